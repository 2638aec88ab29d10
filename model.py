"""
SmolTolk: a Llama text decoder that also reads and predicts discrete speech units (Cuervo et al., arXiv 2503.06211).

                    text ids                     units, speech EOS                  all symbols share one id space:
                       |                                |                           0 .. vocab_size-1       text
                  embed_tokens                     speech_embed ----------+         + 0 .. n_units-1        units
                       |                                |                 |         + n_units               speech EOS
                       |                     input_adapter (each run of   |         + n_units + 1           switch
                       |                     speech attends to itself)    |
                       +--------> z' [B,T,d] <----------+                 |         The switch token stands at each
                                     |                                    |         change of modality. It is embedded
                       layers 1 .. L, then norm:                          |         by speech_embed, belongs to neither
                       hidden states c(1) .. c(L)                         |         modality, and is never predicted.
                         |                  |                             |
                  text head (c(L))   layer pooling, Eqs. 3-4              |
                  tied to            c' = sum softmax(phi) c              |
                  embed_tokens       omega = softmax(S c')                |
                                     sum omega c  + z (Eq. 5) <-----------+
                                            |
                                     output_adapter (causal over all positions)
                                            |
                                     speech head, tied to speech_embed

Without input adapter, output adapter, layer pooling and residual, the model is the vocabulary-expansion baseline. Each
ablation of the paper's Table 2 is an option in Config. Training, scoring, sampling and analysis share one forward pass.

Letters in shapes: B rows, T positions, d hidden_size, H query heads, H_kv key and value heads, L backbone layers.
S is the layer selector in Eq. 3, and the number of key slots in attention masks.
"""
import dataclasses
import json
import os
import reprlib
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from runtime.files import read_json, read_tensors, reading
from runtime.hub import local_folder
from runtime.tokenizer import end_of_text

try:  # FlashAttention for the input adapter on CUDA: from this package or, if it is not installed, from torch
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None
varlen_attn, VARLEN = None, {}
if torch.cuda.is_available():  # without a GPU nobody uses it, and this import takes a second
    from torch.nn.attention.varlen import varlen_attn
    VARLEN = signature(varlen_attn).parameters  # they differ between releases of torch
CAUSAL = dict(is_causal=True) if "is_causal" in VARLEN else dict(window_size=(-1, 0))

NEW_MODULES = ("identity", "default", "release")  # see SmolTolk.start_new_modules
# The largest number of logits in memory when the loss is computed: 0.5 GB in fp32. Compiled, they are kept only once,
# in the dtype of autocast: 4 GB in bf16 for 43,000 targets. Then no micro-batch has to compute its logits twice.
LOGITS_AT_ONCE, COMPILED_LOGITS_AT_ONCE = 1 << 27, 1 << 31


@dataclass
class Config:
    # the text backbone: names as in a Llama config.json, defaults as in SmolLM-135M
    vocab_size: int = 49152
    hidden_size: int = 576
    intermediate_size: int = 1536
    num_hidden_layers: int = 30
    num_attention_heads: int = 9
    num_key_value_heads: int = 3
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 100_000.0  # SmolLM has 10,000; SmolTolk raises it (Section 4.1)
    initializer_range: float = 1 / 24  # standard deviation of new weights: 1/sqrt(hidden_size), as in SmolLM
    eos_token_id: int = 0              # begins and ends texts: the tokenizer's <|endoftext|>
    exported_eos: object = None        # config.json's eos_token_id if it is another; only written back to config.json
    # what SmolTolk adds; the names in quotes are rows of the paper's Table 2
    n_units: int = 500
    input_adapter_layers: int = 2   # 0: "-In Adapter"
    output_adapter_layers: int = 2  # 0: "-Out Adapter"
    layer_pooling: str = "dynamic"  # "fixed": softmax(phi) only, "-Dyn. pooling"; "last": no pooling, "-Layer pooling"
    residual: bool = True           # False: "-Residual"

    @property
    def speech_eos(self):
        return self.vocab_size + self.n_units

    @property
    def switch(self):
        return self.vocab_size + self.n_units + 1

    def __post_init__(self):
        if self.layer_pooling not in ("dynamic", "fixed", "last"):
            raise ValueError(f"layer_pooling={reprlib.repr(self.layer_pooling)}: choose 'dynamic', 'fixed' or 'last'")
        for field in dataclasses.fields(self):
            value, problem = getattr(self, field.name), ""
            least = 0 if "adapter" in field.name or "eos" in field.name else 1
            most = 1 << 10 if field.name.endswith("_layers") else 1 << 20
            if field.type is int and (type(value) is not int or not least <= value <= most):
                problem = f"give a whole number from {least} to {most}"
            elif field.type is float and (type(value) not in (int, float) or not 0 < value < 1e9):
                problem = "give a number between 0 and 1e9"
            elif field.type is bool and type(value) is not bool:
                problem = "give true or false"
            if problem:
                raise ValueError(f"{field.name}={reprlib.repr(value)}: {problem}")
        if self.eos_token_id >= self.vocab_size:
            raise ValueError(f"eos_token_id={self.eos_token_id} is not below vocab_size={self.vocab_size}")
        heads = self.num_attention_heads
        if self.hidden_size % (2 * heads) or heads % self.num_key_value_heads:
            raise ValueError(f"num_attention_heads={heads} must divide half of hidden_size={self.hidden_size}"
                             f" and be a multiple of num_key_value_heads={self.num_key_value_heads}")


# ---------------------------------------------------------------------------------------------------------------------
# attention: which position attends to which

def rotary_table(config):
    """cos and sin of the angles of all positions, [2, max_position_embeddings, head_dim] in fp32.

    Dimensions i and i + head_dim/2 form a pair (a, b), which is rotated to (a cos - b sin, b cos + a sin).
    """
    head_dim = config.hidden_size // config.num_attention_heads
    frequency = config.rope_theta ** -(torch.arange(0, head_dim, 2).float() / head_dim)
    angle = torch.outer(torch.arange(config.max_position_embeddings).float(), frequency)
    return torch.stack([torch.cat([angle.cos(), angle.cos()], -1), torch.cat([-angle.sin(), angle.sin()], -1)])


def rotate(x, rope):
    """Rotate queries or keys x [B, T, H, head_dim]. rope [2, 1 or B, T, 1, head_dim]: cos and sin of each position."""
    cos, sin = rope.to(x.dtype)
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, -1), sin)


class Cache(NamedTuple):
    """Keys and values of all positions so far, so that the next forward pass reads only new positions.

    A slot holds one position of each row. All rows fill the same slot at the same time, so shorter prompts are padded
    on the left. The tensors are updated in place. In sample.py, each part of an answer starts with a new cache.
    """
    input_adapter: list   # (keys, values) of each layer, each [B, length, H_kv, head_dim]
    backbone: list
    output_adapter: list
    is_speech: Tensor     # [B, length] bool, which slots hold speech
    start: Tensor         # [B] int64, the first slot of each row that is not padding
    slot: Tensor          # [] int64, the next slot that will be written


def new_cache(model, start, length):
    """An empty Cache with `length` slots. start: int64 [B], the number of padding slots at the start of each row."""
    c, weight = model.config, model.model.embed_tokens.weight
    if length > c.max_position_embeddings:
        raise ValueError(f"{length} positions, the model has max_position_embeddings={c.max_position_embeddings}")
    device, dtype = weight.device, weight.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    shape = 2, len(start), length, c.num_key_value_heads, c.hidden_size // c.num_attention_heads
    # Slots that are still empty have attention weight 0, but 0 x NaN is NaN, so torch.empty cannot be used.
    stacks = ([tuple(torch.zeros(shape, dtype=dtype, device=device)) for _ in range(n)]
              for n in (c.input_adapter_layers, c.num_hidden_layers, c.output_adapter_layers))
    is_speech = torch.zeros(len(start), length, dtype=torch.bool, device=device)
    return Cache(*stacks, is_speech, start.to(device), torch.zeros((), dtype=torch.long, device=device))


def make_masks(is_speech, slots, subtree_end=None, cache=None):
    """Two attention masks, bool [1 or B, T, S]: one for backbone and output adapter, one for the input adapter.

    is_speech [B, T] and slots [T] describe the T positions that are read now. These positions can attend to S slots.
    Without a cache, S = T. subtree_end: see SmolTolk.read. Every position attends to itself, because some kernels
    return NaN for a fully masked row.
    """
    if cache is not None:
        is_speech = cache.is_speech.index_copy_(1, slots, is_speech)      # [B, S]
    slot = torch.arange(is_speech.size(1), device=slots.device, dtype=torch.int32)  # [S]
    itself = slot == slots[:, None]                                       # [T, S]
    seen = (slot <= slots[:, None])[None]                                 # [1, T, S], causal
    if cache is not None:
        seen = seen & (slot >= cache.start[:, None, None])
    if subtree_end is not None:
        seen = seen & (slots[:, None] <= subtree_end[:, None])            # [B, T, T]
    seen = seen | itself
    # The run of speech at a position begins after the last slot without speech that the position can attend to.
    first = torch.where(seen & ~is_speech[:, None], slot + 1, 0).amax(-1, keepdim=True)
    return seen, seen & (slot >= first) | itself


def attend(q, k, v, mask=None, runs=None):
    """Attention: q [B, T, H, head_dim]; k, v [B, S, H_kv, head_dim] -> [B, T, H, head_dim].

    If runs (see Layout) are given, it is causal within each run. If a mask [1 or B, T, S] is given, positions attend
    where it is true; no position may attend to a later one. Otherwise attention is causal.
    """
    if runs is not None:
        return attend_runs(*(t.flatten(0, 1) for t in (q, k, v)), runs, q.size(1)).view(q.shape)
    if can_use_blocks(q, k):
        return attend_in_blocks(q, k, v, mask)
    if mask is not None and q.size(1) == 1 and q.device.type == "cpu":
        return attend_once(q, k, v, mask)
    # In these two cases torch uses a memory-efficient kernel, which needs as many key heads as query heads.
    if q.is_cuda and (mask is not None or q.dtype == torch.float32):
        k, v = (t.repeat_interleave(q.size(2) // t.size(2), 2) for t in (k, v))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B, H, T, head_dim]
    mask = None if mask is None else mask[:, None]    # [1 or B, 1, T, S]
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                       enable_gqa=q.size(1) != k.size(1))
    return y.transpose(1, 2)


def attend_runs(q, k, v, runs, longest):
    """Causal attention within each run, by FlashAttention. q [B*T, H, head_dim]; k, v [B*T, H_kv, head_dim] -> like q.
    """
    if flash_attn_varlen_func is not None:
        return flash_attn_varlen_func(q, k, v, runs, runs, longest, longest, causal=True)
    if "enable_gqa" in VARLEN:
        return varlen_attn(q, k, v, runs, runs, longest, longest, **CAUSAL, enable_gqa=True)
    k, v = (t.repeat_interleave(q.size(1) // t.size(1), 1) for t in (k, v))  # torch 2.11 needs H_kv = H here
    return varlen_attn(q, k, v, runs, runs, longest, longest, **CAUSAL)


def attend_once(q, k, v, mask):
    """Attention of one position, as attend() does it: q [B, 1, H, head_dim] -> like q. mask [1 or B, 1, S].

    The query heads that share a key head take the place of positions. torch's kernel for bfloat16 on a CPU then reads
    each key once, not once a head, and takes a quarter of the time (docs/speed.md).
    """
    B, _, _, head_dim = q.shape
    q = q.view(B, k.size(2), -1, head_dim)               # [B, H_kv, H/H_kv, head_dim]
    k, v = k.transpose(1, 2), v.transpose(1, 2)          # [B, H_kv, S, head_dim]
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])
    return y.reshape(B, 1, -1, head_dim)


def can_use_blocks(q, k):
    """Whether attend_in_blocks is faster than torch and its weights, which backward needs, fit into memory."""
    B, T, H, _ = q.shape
    in_bfloat16_on_cpu = q.device.type == "cpu" and q.dtype == torch.bfloat16
    return in_bfloat16_on_cpu and T >= 256 and T == k.size(1) and B * H * T * T <= 1 << 25


def attend_in_blocks(q, k, v, mask=None, size=256):
    """attend() in bfloat16 on a CPU, for blocks of queries: q [B, T, H, head_dim]; k, v [B, T, H_kv, head_dim].

    Forward and backward take 0.6 of the time of torch's own kernel, and a training step 0.85 (docs/speed.md). A block
    meets only the keys before its end, and the query heads that share a key head form one matrix.
    """
    B, T, H, head_dim = q.shape
    H_kv, group = k.size(2), H // k.size(2)
    if mask is None:
        mask = torch.ones(1, T, T, dtype=torch.bool, device=q.device).tril()             # causal
    elif len(mask) > 1:
        mask = mask.repeat_interleave(H_kv, 0)                                           # [B*H_kv, T, T]
    q = (q * head_dim ** -0.5).view(B, T, H_kv, group, head_dim).permute(0, 2, 3, 1, 4)  # [B, H_kv, group, T, head_dim]
    k, v = (t.transpose(1, 2).flatten(0, 1) for t in (k, v))                             # [B*H_kv, T, head_dim]
    blocks = []
    for start in range(0, T, size):
        end = min(start + size, T)
        block = q[:, :, :, start:end].reshape(B * H_kv, -1, head_dim)                    # [B*H_kv, group*n, head_dim]
        unseen = ~mask[:, start:end, :end]                                               # [1 or B*H_kv, n, end]
        bias = torch.zeros_like(unseen, dtype=q.dtype).masked_fill(unseen, -torch.inf).repeat(1, group, 1)
        weights = torch.baddbmm(bias, block, k[:, :end].transpose(1, 2)).softmax(-1)     # [B*H_kv, group*n, end]
        blocks.append(torch.bmm(weights, v[:, :end]).view(B, H_kv, group, -1, head_dim))
    return torch.cat(blocks, 3).permute(0, 3, 1, 2, 4).reshape(B, T, H, head_dim)


# ---------------------------------------------------------------------------------------------------------------------
# the Llama decoder layer, used by the backbone and by both adapters

class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        d, self.heads = config.hidden_size, config.num_attention_heads
        d_kv = d // self.heads * config.num_key_value_heads
        self.q_proj = nn.Linear(d, d, bias=False)
        self.k_proj = nn.Linear(d, d_kv, bias=False)
        self.v_proj = nn.Linear(d, d_kv, bias=False)
        self.o_proj = nn.Linear(d, d, bias=False)

    def forward(self, x, rope, mask=None, runs=None, past=None):
        B, T, d = x.shape
        q, k, v = (t.view(B, T, -1, d // self.heads) for t in self.project(x))  # [B, T, heads, head_dim]
        q, k = rotate(q, rope), rotate(k, rope)
        if past is not None:  # put the new keys and values into their slots, and attend to all slots
            keys, values, slots = past
            k, v = keys.index_copy_(1, slots, k), values.index_copy_(1, slots, v)
        y = attend(q, k, v, mask, runs)
        return self.o_proj(y.reshape(B, T, d))

    def project(self, x):
        """x [B, T, d] -> q [B, T, d], k and v [B, T, d_kv]. runtime/packing.py makes it one product."""
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


class MLP(nn.Module):
    recompute = False  # compute the activation again in backward, to save memory (a setting of train.py)

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        gate, up = self.project(x)
        if self.recompute:  # no matrix product is computed twice: recomputation stops at the input of down_proj
            return checkpoint(self.down, gate, up, use_reentrant=False, preserve_rng_state=False)
        return self.down(gate, up)

    def project(self, x):
        """x [B, T, d] -> gate and up, each [B, T, intermediate_size]. runtime/packing.py makes it one product."""
        return self.gate_proj(x), self.up_proj(x)

    def down(self, gate, up):
        return self.down_proj(F.silu(gate) * up)


class Layer(nn.Module):
    compiled = None  # torch.compile(self.forward) for training, see SmolTolk.compile_training

    def __init__(self, config):
        super().__init__()
        self.self_attn, self.mlp = Attention(config), MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, rope, mask=None, runs=None, past=None):
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, runs, past)
        return x + self.mlp(self.post_attention_layernorm(x))


def apply_layers(layers, x, rope, mask=None, runs=None, slots=None, cache=None):
    """[x, output of layer 1, ..., output of the last layer]. cache: (keys, values) of each layer."""
    states = [x]
    for i, layer in enumerate(layers):
        past = None if cache is None else (*cache[i], slots)
        forward = layer.compiled if layer.training and layer.compiled else layer
        states.append(forward(states[-1], rope, mask, runs, past))
    return states


# ---------------------------------------------------------------------------------------------------------------------
# the text-speech model

class Layout(NamedTuple):
    """Where each head predicts a target, and where the runs are. A run is a maximal stretch of speech or of non-speech.
    """
    text: Tensor | None      # int64, the flat positions (row * T + column) that predict a text token
    speech: Tensor | None    # the same for units and speech EOS; may be empty. None: the speech modules are skipped
    runs: Tensor | None = None    # int32, 0 and the cumulative lengths of all runs in the flattened batch;
                                  # FlashAttention uses them in place of a mask


class Output(NamedTuple):
    text: Tensor              # [B, T, d] what the text head reads: c(L)
    speech: Tensor | None     # [B, T, d] what the speech head reads
    hidden: list              # z', c(1) .. c(L), the last one after the norm; each [B, T, d]
    log_omega: Tensor | None  # [B, T, L] logarithms of the layer weights (Eq. 3)
    text_nll: Tensor | None = None    # -ln p of each text target in nats, in the order of layout.text
    speech_nll: Tensor | None = None  # -ln p of each speech target, in the order of layout.speech


TEXT_ONLY = Layout(text=None, speech=None)  # for ids without speech, and without losses


def find_speech(ids, config):
    """True where ids are units or speech EOS. The switch token is not speech."""
    return (ids >= config.vocab_size) & (ids != config.switch)


def make_layout(ids, targets, config):
    """ids, targets int64 [B, T] -> Layout. Negative targets and switch tokens are not scored."""
    flat, is_speech = targets.flatten(), find_speech(ids, config)
    text = ((flat >= 0) & (flat < config.vocab_size)).nonzero()[:, 0]
    speech = find_speech(flat, config).nonzero()[:, 0]
    starts = torch.ones_like(is_speech)  # a run never crosses a row
    starts[:, 1:] = is_speech[:, 1:] != is_speech[:, :-1]
    runs = starts.flatten().nonzero()[:, 0]
    # Empty runs are appended to reach one of three sizes, because torch.compile makes a new graph for each size. There
    # is about one run per 40 positions. Only very short spans give more.
    size = next(size for size in (ids.numel() // 32, ids.numel() // 8, ids.numel()) if len(runs) <= size)
    return Layout(text, speech, F.pad(runs, (0, size + 1 - len(runs)), value=ids.numel()).int())


class SmolTolk(nn.Module):
    compiled_pool = compiled_nll = None  # see compile_training

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict(dict(  # named as in checkpoints of transformers
            embed_tokens=nn.Embedding(config.vocab_size, config.hidden_size),
            layers=nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers)),
            norm=nn.RMSNorm(config.hidden_size, config.rms_norm_eps)))
        self.speech_embed = nn.Embedding(config.n_units + 2, config.hidden_size)
        self.input_adapter = nn.ModuleList(Layer(config) for _ in range(config.input_adapter_layers))
        self.output_adapter = nn.ModuleList(Layer(config) for _ in range(config.output_adapter_layers))
        if config.layer_pooling != "last":
            self.phi = nn.Parameter(0.01 * torch.randn(config.num_hidden_layers))
        if config.layer_pooling == "dynamic":
            self.layer_selector = nn.Linear(config.hidden_size, config.num_hidden_layers)
        self.register_buffer("rope", rotary_table(config), persistent=False)
        self.init_weights()

    def init_weights(self):
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        self.start_new_modules("identity")

    def start_new_modules(self, start):
        """Set the first weights of the modules that SmolTolk adds, and return the model. start: one of NEW_MODULES.

        identity   The adapters change nothing at first, so the backbone reads plain embeddings.
        default    The adapters start as nn.Linear does.
        release    As in the authors' code: as "default", the layer selector too, and smaller speech embeddings.

        In the first two the layer selector starts at zero, so that omega is the same for all layers. In "release" it
        begins with a few layers, because a trained backbone has large hidden states. Still, speech is learned fastest
        from "release". docs/history.md compares the three.
        """
        for layer in [*self.input_adapter, *self.output_adapter]:
            if start == "identity":
                nn.init.zeros_(layer.self_attn.o_proj.weight)
                nn.init.zeros_(layer.mlp.down_proj.weight)
                continue
            for module in layer.modules():
                if isinstance(module, nn.Linear):
                    module.reset_parameters()
        if self.config.layer_pooling == "dynamic":
            nn.init.zeros_(self.layer_selector.weight)
            if start == "release":
                self.layer_selector.reset_parameters()
        if start == "release":
            nn.init.normal_(self.speech_embed.weight, std=0.02)
        return self

    def compile_training(self):
        """Compile what training spends its time in: the layers, layer pooling and the loss.

        All layers share their graphs, so this takes seconds, not minutes. Each layer ends its own backward pass, so
        that DistributedDataParallel can send its gradients while the next layer is computed. When the number of rows
        changes, torch compiles a second time, and that graph serves any number of rows.
        """
        # Frozen or trained, with a mask or without, one number of rows or any: more than the 8 graphs that are allowed.
        torch._dynamo.config.recompile_limit = 32
        for module in self.modules():
            if isinstance(module, Layer):
                module.compiled = torch.compile(module.forward)
        self.compiled_pool = torch.compile(self.pool)
        self.compiled_nll = torch.compile(nll_of_piece, dynamic=True)  # the number of targets always differs

    def forward(self, ids, targets=None, layout=None, cache=None):
        """The forward pass -> Output, with losses if targets are given.

        ids      int64 [B, T]
        targets  int64 [B, T], the next ids; negative ones and switch tokens are not scored. None: no losses
        layout   Layout, made here if it is not given
        cache    Cache of the positions before ids; the positions of ids are added to it
        """
        if ids.size(1) > self.rope.size(1):
            raise ValueError(f"{ids.size(1)} positions, the model has max_position_embeddings={self.rope.size(1)}")
        if targets is not None and layout is None:
            layout = make_layout(ids, targets, self.config)
        if layout is None:
            return self.read(ids, cache=cache)
        out = self.read(ids, layout.runs, layout.speech is not None, cache)
        return out if targets is None else self.add_losses(out, targets, layout)

    def read(self, ids, runs=None, speaks=True, cache=None, subtree_end=None):
        """The forward pass without losses -> Output.

        runs         see Layout
        speaks       False: skip the speech modules, for ids without speech
        cache        see forward()
        subtree_end  int64 [B, T], for rows that hold several sequences as a tree, in which they share their beginnings:
                     the last position that attends to each position. The row may be longer than the model has positions
        """
        T, slots = ids.size(1), torch.arange(ids.size(1), device=ids.device)
        if cache is not None:
            slots = slots + cache.slot
            cache.slot.add_(T)
        is_plain = cache is None and subtree_end is None  # then the backbone has causal attention without a mask
        if not is_plain or not self.can_use_flash(ids):
            runs = None                         # a mask takes their place
        is_speech, positions, seen, within_run = find_speech(ids, self.config), slots[None], None, None
        if not is_plain or (speaks and self.input_adapter and runs is None):
            seen, within_run = make_masks(is_speech, slots, subtree_end, cache)
        if is_plain:
            seen = None
        if subtree_end is not None:
            positions = seen.sum(-1) - 1        # [B, T], as if each sequence had a row to itself
        rope = self.rope[:, positions, None]    # [2, 1 or B, T, 1, head_dim]
        pasts = [None] * 3 if cache is None else cache[:3]

        z = self.embed(ids) if speaks else self.model.embed_tokens(ids)  # [B, T, d]
        x = z
        if speaks and self.input_adapter:  # the embeddings of text and switch tokens are not changed
            x = apply_layers(self.input_adapter, z, rope, within_run, runs, slots, pasts[0])[-1]
            x = torch.where(is_speech[..., None], x, z)
        hidden = apply_layers(self.model.layers, x, rope, seen, None, slots, pasts[1])
        hidden[-1] = self.model.norm(hidden[-1])
        pool = self.compiled_pool if self.training and self.compiled_pool else self.pool
        log_omega, pooled = pool(hidden[1:], speaks)
        if not speaks:
            return Output(hidden[-1], None, hidden, log_omega)
        speech = pooled + z if self.config.residual else pooled  # Eq. 5
        speech = apply_layers(self.output_adapter, speech, rope, seen, None, slots, pasts[2])[-1]
        return Output(hidden[-1], speech, hidden, log_omega)

    def can_use_flash(self, ids):
        """Whether FlashAttention works: half precision on CUDA, and a head_dim that is a multiple of 8 up to 256."""
        dtype, head_dim = self.model.embed_tokens.weight.dtype, self.rope.size(-1)
        half = dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled(ids.device.type)
        return ids.is_cuda and half and head_dim % 8 == 0 and head_dim <= 256

    def embed(self, ids):
        """The embeddings z [B, T, d]. Text ids use embed_tokens; units, speech EOS and switch use speech_embed."""
        V = self.config.vocab_size
        text = self.model.embed_tokens(ids.clamp(max=V - 1))
        new = self.speech_embed((ids - V).clamp(min=0))
        return torch.where((ids < V)[..., None], text, new)

    def mix(self, layers):
        """[c(1) .. c(L)], each [B, T, d] -> c' [B, T, d], the same mixture of layers at all positions (Eq. 4)."""
        return sum(w * c for w, c in zip(self.phi.softmax(0), layers))

    def pool(self, layers, speaks=True):
        """Layer pooling: [c(1) .. c(L)], each [B, T, d] -> (ln omega [B, T, L], pooled layers [B, T, d]).

        ln omega, the layer weights of each position, is None without a layer selector. If not speaks, nobody reads the
        pooled layers. ln omega is still computed in training, because Eq. 6 averages its entropy over text too.
        """
        if self.config.layer_pooling == "last":
            return None, layers[-1]
        if not (speaks or self.training):
            return None, None
        mixture = self.mix(layers)
        if self.config.layer_pooling == "fixed":
            return None, mixture
        log_omega = self.layer_selector(mixture).float().log_softmax(-1)
        if not speaks:
            return log_omega, None
        omega = log_omega.exp().to(layers[0].dtype)
        return log_omega, sum(w * c for w, c in zip(omega.split(1, dim=-1), layers))  # Eq. 3

    def add_losses(self, out, targets, layout):
        """The Output with -ln p of each target. Each head is computed only at the positions where it has a target."""
        V, targets = self.config.vocab_size, targets.flatten()
        compiled = self.compiled_nll if self.training else None
        text = out.text.flatten(0, 1)[layout.text]
        text_nll = nll(text, self.text_logits, V, targets[layout.text], compiled)
        if layout.speech is None:
            return out._replace(text_nll=text_nll, speech_nll=text_nll.new_zeros(0))
        speech = out.speech.flatten(0, 1)[layout.speech]
        speech_nll = nll(speech, self.speech_logits, self.config.n_units + 1, targets[layout.speech] - V, compiled)
        return out._replace(text_nll=text_nll, speech_nll=speech_nll)

    def text_logits(self, x):
        """x [..., d], from Output.text -> [..., vocab_size]."""
        weight = self.model.embed_tokens.weight
        # For a parameter, but not for a view, autocast would keep a bf16 copy and sum its gradients in bf16.
        return F.linear(x, weight.view_as(weight))

    def speech_logits(self, x):
        """x [..., d], from Output.speech -> [..., n_units + 1]: units and speech EOS, without the switch token."""
        return F.linear(x, self.speech_embed.weight[:-1])


def nll(x, head, n_symbols, targets, compiled=None):
    """-ln p(target) in nats, p = softmax(head(x)): x [n, d], head(x) [n, n_symbols], targets [n] -> fp32 [n].

    The logits are the largest tensors (n x 49152). If n is large, they are computed in pieces, and again in backward.
    compiled: torch.compile(nll_of_piece), or None.
    """
    of_piece, at_once = (compiled, COMPILED_LOGITS_AT_ONCE) if compiled else (nll_of_piece, LOGITS_AT_ONCE)
    size = max(1, at_once // n_symbols)
    if len(x) <= size:
        return of_piece(x, head, targets)
    return torch.cat([checkpoint(of_piece, rows, head, ids, use_reentrant=False, preserve_rng_state=False)
                      for rows, ids in zip(x.split(size), targets.split(size))])


def nll_of_piece(x, head, targets):
    return F.cross_entropy(head(x).float(), targets, reduction="none")


def selector_entropy(log_omega):
    """Entropy in nats of the layer weights, summed over all positions (Eq. 6): log_omega [B, T, L] -> []."""
    return -(log_omega.exp() * log_omega).sum()


# ---------------------------------------------------------------------------------------------------------------------
# counting

def is_new(name):
    """Whether SmolTolk adds the tensor of this name. All other tensors belong to the text backbone."""
    return not name.startswith("model.")


def count_parameters(model):
    """(text, speech): the numbers of parameters in the backbone and in the modules that SmolTolk adds (Table 5)."""
    sizes = [(is_new(name), p.numel()) for name, p in model.named_parameters()]
    return sum(n for new, n in sizes if not new), sum(n for new, n in sizes if new)


def forward_flops(config, rows, length, speaks=True, n_text=0, n_speech=0):
    """(backbone, added modules): floating point operations of one forward pass. A multiply-add counts as two.

    The count covers matrix products, causal attention, and the heads at n_text and n_speech targets. It leaves out
    norms, softmax, pooling, and the layer weights that Eq. 6 needs in text batches (under 1%). Training takes three
    times as many, or twice as many for frozen weights.
    """
    d, L, positions = config.hidden_size, config.num_hidden_layers, rows * length
    d_kv = d // config.num_attention_heads * config.num_key_value_heads
    layer = 2 * (2 * d * d + 2 * d * d_kv + 3 * d * config.intermediate_size) + 2 * d * (length + 1)  # per position
    backbone = L * layer * positions + 2 * d * config.vocab_size * n_text
    if not speaks:
        return backbone, 0
    added = (config.input_adapter_layers + config.output_adapter_layers) * layer * positions
    added += 2 * d * L * positions if config.layer_pooling == "dynamic" else 0
    return backbone, added + 2 * d * (config.n_units + 1) * n_speech


# ---------------------------------------------------------------------------------------------------------------------
# reading and writing model folders: config.json and safetensors

LLAMA = tuple(("vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
               "max_position_embeddings rms_norm_eps rope_theta initializer_range eos_token_id").split())
REQUIRED = dict(model_type="llama", hidden_act="silu", attention_bias=False, mlp_bias=False, tie_word_embeddings=True)


def read_config(folder, **overrides):
    """config.json of a SmolLM or SmolTolk folder, changed by overrides -> Config. ValueError names file and key."""
    folder = Path(local_folder(folder))
    path = folder / "config.json"
    file = read_json(path)
    with reading(path, "not a Llama config.json that this model supports"):
        for key, wanted in REQUIRED.items():
            if file.get(key, wanted) != wanted:
                raise ValueError(f"{key} is {reprlib.repr(file[key])}, only {wanted!r} is supported")
        defaults = dict(num_key_value_heads=file.get("num_attention_heads"), initializer_range=0.02, rms_norm_eps=1e-6,
                        max_position_embeddings=2048, eos_token_id=None)  # as in transformers
        file = defaults | {key: value for key, value in file.items() if value is not None}
        values = {key: file[key] for key in LLAMA if key != "rope_theta"}
        values |= dict(rope_theta=read_rope_theta(file)) | read_eos(folder, file)
        ours = file.get("smoltolk", {})
        for key in overrides.keys() & ours.keys() - {"eos_token_id", "exported_eos"}:
            if overrides[key] != ours[key]:
                raise ValueError(f"{key} is {ours[key]!r}, and a model that speaks keeps it; set --{key}={ours[key]}")
        config = Config(**{**ours, **values, **overrides})
        head_dim = config.hidden_size // config.num_attention_heads
        if file.get("head_dim") not in (None, head_dim):
            raise ValueError(f"head_dim is {reprlib.repr(file['head_dim'])}, only hidden_size / num_attention_heads ="
                             f" {head_dim} is supported")
    return config


def read_rope_theta(file):
    """rope_theta of a config.json, given as a dict. ValueError if it asks for another kind of RoPE."""
    # The names before and since transformers 5, which takes the old one if a file has both.
    key = "rope_scaling" if file.get("rope_scaling") else "rope_parameters"
    rope = file.get(key) or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{key} is {reprlib.repr(rope)}, not a dict")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"rope_type in {key} is {reprlib.repr(kind)}, only 'default' is supported")
    return rope.get("rope_theta", file.get("rope_theta", 10_000.0))


def read_eos(folder, file):
    """{eos_token_id, exported_eos} of a folder with this config.json.

    In a chat model, config.json's eos_token_id ends a turn. Texts end with <|endoftext|>, which the tokenizer knows.
    """
    exported = file.get("eos_token_id")
    exported = None if exported == [] else exported
    tokenizer = Path(folder) / "tokenizer.json"
    eos = end_of_text(tokenizer) if tokenizer.exists() else file.get("smoltolk", {}).get("eos_token_id")
    if eos is None:
        eos = exported[0] if isinstance(exported, list) else exported
    return dict(eos_token_id=eos, exported_eos=None if exported == eos else exported)


def read_shards(folder, stem):
    """{name: tensor} of stem.safetensors, or of the shards that stem.safetensors.index.json lists. ValueError."""
    index = folder / f"{stem}.safetensors.index.json"
    if not index.exists():
        return read_tensors(folder / f"{stem}.safetensors")
    listed, tensors = read_json(index).get("weight_map"), {}
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        raise ValueError(f"{index}: weight_map is not a dict {{tensor: file}}")
    for name in sorted(set(listed.values())):
        if os.path.basename(name) != name or not name.isprintable() or len(name) > 200:
            raise ValueError(f"{index}: shard {reprlib.repr(name)} is not the name of a file in the folder")
        tensors |= read_tensors(folder / name)
    if differing := sorted(tensors.keys() ^ listed.keys()):
        raise ValueError(f"{index}: tensor {reprlib.repr(differing[0])} is only in the shards or only in this index")
    return tensors


def from_pretrained(folder, **overrides):
    """A model in fp32 from a folder of SmolTolk, or from a folder of SmolLM with new weights for the speech modules.

    folder: a path, or hf:OWNER/NAME (runtime/hub.py)
    overrides: Config fields, e.g. rope_theta=100_000, layer_pooling="fixed" (only for a SmolLM folder).
    ValueError names the file, and the tensor that is missing, unknown or has another shape.
    """
    folder = Path(local_folder(folder))
    config, tensors = read_config(folder, **overrides), read_shards(folder, "model")
    has_speech = (folder / "speech.safetensors").exists()
    if has_speech:
        tensors |= read_shards(folder, "speech")
    with torch.device("meta"):  # only shapes, because config.json may ask for more memory than this machine has
        state = SmolTolk(config).state_dict()
    wanted = {name: list(t.shape) for name, t in state.items() if has_speech or not is_new(name)}
    # The tied weights may be written twice, or only as the head. Old files also hold the frequencies of RoPE.
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    head = tensors.pop("lm_head.weight", None)
    embed = head if head is None else tensors.setdefault("model.embed_tokens.weight", head)
    if head is not embed and (head.shape != embed.shape or (head != embed).any()):
        raise ValueError(f"{folder}: lm_head.weight differs from model.embed_tokens.weight; only tied weights are"
                         " supported")
    found = {name: list(t.shape) for name, t in tensors.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise ValueError(f"{folder}: tensor {name[:100]!r} has shape {found.get(name, '(missing)')},"
                             f" config.json asks for {wanted.get(name, 'no such tensor')}")
    model = SmolTolk(config)
    model.load_state_dict({name: t.float() for name, t in tensors.items()}, strict=False)
    return model


def save_pretrained(model, folder, dtype=torch.float32):
    """Write config.json, model.safetensors (the backbone, as in transformers) and speech.safetensors (all the rest)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    fields = dataclasses.asdict(model.config)
    llama = dict(architectures=["LlamaForCausalLM"], bos_token_id=fields["eos_token_id"],
                 torch_dtype=str(dtype).removeprefix("torch."), **REQUIRED, **{key: fields[key] for key in LLAMA})
    exported = fields.pop("exported_eos")
    llama["eos_token_id"] = fields["eos_token_id"] if exported is None else exported
    ours = {key: value for key, value in fields.items() if key not in LLAMA or key == "eos_token_id"}
    (folder / "config.json").write_text(json.dumps({**llama, "smoltolk": ours}, indent=1))
    state = {name: t.detach().to("cpu", dtype).contiguous() for name, t in model.state_dict().items()}
    for stem, new in (("model", False), ("speech", True)):
        part = {name: t for name, t in state.items() if is_new(name) == new}
        save_file(part, folder / f"{stem}.safetensors", metadata={"format": "pt"})
