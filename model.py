"""
SmolTolk: a Llama text decoder that also hears and speaks in discrete speech units (Cuervo et al., arXiv 2503.06211).

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

Without input adapter, output adapter, pooling and residual this is the vocabulary-expansion baseline: every ablation
of the paper's Table 2 is a switch in Config. There is one forward pass, for training, scoring, sampling and analysis.
Given a Cache of what stands before, it reads only what is new.
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
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint

from foreign import read_json, read_tensors

try:  # on CUDA the input adapter never computes across two runs of speech: by this package, or else by torch's own copy
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None
CAUSAL = dict(is_causal=True) if "is_causal" in signature(varlen_attn).parameters else dict(window_size=(-1, 0))

LARGEST = 1 << 20  # whole number in a Config
ZERO_ALLOWED = ("eos_token_id", "input_adapter_layers", "output_adapter_layers")
LOGITS_AT_ONCE = 1 << 27  # logits held at one time when computing the loss: 0.5 GB in fp32


@dataclass
class Config:
    # the text backbone, under the names of a Llama config.json; the defaults are SmolLM-135M's
    vocab_size: int = 49152
    hidden_size: int = 576
    intermediate_size: int = 1536
    num_hidden_layers: int = 30
    num_attention_heads: int = 9
    num_key_value_heads: int = 3
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 100_000.0  # SmolLM has 10,000; SmolTolk raises it (Section 4.1)
    initializer_range: float = 1 / 24  # standard deviation of new weights, SmolLM's own 1/sqrt(576)
    eos_token_id: int = 0
    # what SmolTolk adds
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
            value, zero = getattr(self, field.name), field.name in ZERO_ALLOWED
            most = 1 << 10 if field.name.endswith("_layers") else LARGEST
            if field.type is int and (type(value) is not int or not 1 - zero <= value <= most):
                raise ValueError(f"{field.name}={reprlib.repr(value)}: give a whole number from {1 - zero} to {most}")
            if field.type is float and (type(value) not in (int, float) or not 0 < value < 1e9):
                raise ValueError(f"{field.name}={reprlib.repr(value)}: give a number between 0 and 1e9")
            if field.type is bool and type(value) is not bool:
                raise ValueError(f"{field.name}={reprlib.repr(value)}: give true or false")
        if self.rope_theta < 1:
            raise ValueError(f"rope_theta={self.rope_theta}: give 1 or more")
        if self.eos_token_id >= self.vocab_size:
            raise ValueError(f"eos_token_id={self.eos_token_id} is no id below vocab_size={self.vocab_size}")
        heads = self.num_attention_heads
        if self.hidden_size % (2 * heads) or heads % self.num_key_value_heads:
            raise ValueError(f"num_attention_heads={heads} must divide half of hidden_size={self.hidden_size}"
                             f" and be a multiple of num_key_value_heads={self.num_key_value_heads}")


# ---------------------------------------------------------------------------------------------------------------------
# the Llama decoder layer, used by the backbone and by both adapters

class RMSNorm(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.eps = config.rms_norm_eps
        self.weight = nn.Parameter(torch.ones(config.hidden_size))

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotary_table(config):
    """cos and sin of every position's angles, [2, max_position_embeddings, head_dim] in fp32.

    The half-split kind: dimensions i and i + head_dim/2 turn together, (a, b) -> (a cos - b sin, b cos + a sin).
    """
    head_dim = config.hidden_size // config.num_attention_heads
    frequency = config.rope_theta ** -(torch.arange(0, head_dim, 2).float() / head_dim)
    angle = torch.outer(torch.arange(config.max_position_embeddings).float(), frequency)
    return torch.stack([torch.cat([angle.cos(), angle.cos()], -1), torch.cat([-angle.sin(), angle.sin()], -1)])


def rotate(x, rope):
    """x [B, T, H, head_dim]; rope [2, T, 1, head_dim] or, where rows stand at different positions, [2, B, T, ...]."""
    cos, sin = rope
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, -1), sin)


class Runs(NamedTuple):
    """Where the sequence falls into runs of one modality, in the form that the attention kernel at hand wants."""
    mask: Tensor | None        # [B, 1, T, T] bool, for torch's kernels
    bounds: Tensor | None      # [runs + 1] int32, cumulated lengths over the flattened [B*T], for FlashAttention
    longest: int = 0           # bounds may end with empty runs


class Tree(NamedTuple):
    """Rows that hold many sequences, beginnings that they share only once: prefix trees, their nodes depth first.

    A node sees its ancestors and itself, and stands at the position that their number gives, as in a sequence alone.
    """
    parent: Tensor  # [B, T] where the token before it stands; itself at a root
    end: Tensor     # [B, T] the nodes below node i, and i itself, are i .. end-1
    source: Tensor  # [B, M] the node that predicts each target: one node may predict several

    def sees(self):
        """[B, T, T] bool: does node i see node j?"""
        i = torch.arange(self.end.size(1), device=self.end.device)[:, None]
        return (i >= i.T) & (i < self.end[:, None])


def where(mask, n=None, fill=0):
    """The flat positions where mask is true, int64 [n]. Told n, nothing waits for CUDA; fill stands for missing ones.
    """
    flat = mask.flatten()
    return (flat.nonzero() if not n else flat.nonzero_static(size=n, fill_value=fill))[:, 0]


def find_runs(is_speech, flash, n=None):
    """is_speech [B, T] bool -> Runs. Every position lies in one run, a run never crosses a row. n: at most so many."""
    B, T = is_speech.shape
    starts = torch.ones_like(is_speech)
    starts[:, 1:] = is_speech[:, 1:] != is_speech[:, :-1]
    if flash:
        return Runs(None, F.pad(where(starts, n, B * T), (0, 1), value=B * T).int(), T)
    run = starts.cumsum(1)
    causal = torch.ones(T, T, dtype=torch.bool, device=is_speech.device).tril()
    return Runs((run[:, None, :, None] == run[:, None, None, :]) & causal, None)


def find_tree_runs(is_speech, tree, sees):
    """The same in a Tree: count changes on the way from the root; an ancestor with the same count is in the run."""
    changes = is_speech != is_speech.gather(1, tree.parent)
    run = (sees & changes[:, None]).sum(-1)
    return Runs((sees & (run[:, :, None] == run[:, None]))[:, None], None)


class Cache(NamedTuple):
    """What was read so far, for a forward pass that goes on from there: preallocated tensors, filled in place.

    Row b reads its next symbols from position[b] on, which the caller moves. Slots from there on are of no account and
    get written over. So rows of unlike length share a batch: pad them on the right, then set position to their lengths.
    """
    input_adapter: list   # of each layer its (keys, values), [B, length, H_kv, head_dim] each
    backbone: list
    output_adapter: list
    speech: Tensor        # [B, length] bool, which slots hold speech: the input adapter starts anew after any other
    position: Tensor      # [B] int64, how many symbols have been read


class Past(NamedTuple):
    """A cache as one layer sees it in one forward pass."""
    keys: Tensor      # [B, length, H_kv, head_dim]
    values: Tensor
    slots: Tensor     # [B, T] int64, where the new keys and values go
    mask: Tensor      # [B, 1, T, length], 0 for the slots that each new position attends to and -inf for the others


def new_cache(model, rows, length):
    """An empty Cache for rows of up to length symbols, on the model's device and in its precision (not autocast's)."""
    c, like = model.config, model.model.embed_tokens.weight
    if length > c.max_position_embeddings:
        raise ValueError(f"{length} positions, the model has max_position_embeddings={c.max_position_embeddings}")
    shape = rows, length, c.num_key_value_heads, c.hidden_size // c.num_attention_heads
    stacks = ([(like.new_zeros(shape), like.new_zeros(shape)) for _ in range(n)]  # zeros: 0 weight times NaN is NaN
              for n in (c.input_adapter_layers, c.num_hidden_layers, c.output_adapter_layers))
    speech = torch.zeros(rows, length, dtype=torch.bool, device=like.device)
    return Cache(*stacks, speech, torch.zeros(rows, dtype=torch.long, device=like.device))


def look_back(cache, is_speech, dtype):
    """Give new symbols, is_speech [B, T] bool, their slots [B, T] in a cache: (slots, Pasts of its three stacks)."""
    slots = cache.position[:, None] + torch.arange(is_speech.size(1), device=is_speech.device)
    cache.speech.scatter_(1, slots, is_speech)
    slot, own = torch.arange(cache.speech.size(1), device=is_speech.device), slots[..., None]
    seen = slot <= own  # [B, T, length]
    start = ((slot + 1) * (seen & ~cache.speech[:, None])).amax(-1, keepdim=True)  # after the last slot without speech
    run = seen & (slot >= start) | (slot == own)  # text sees itself: of nothing some kernels make NaN
    run, seen = (torch.zeros(mask.shape, dtype=dtype, device=slots.device).masked_fill_(~mask, -torch.inf)[:, None]
                 for mask in (run, seen))  # once for all layers
    masks = zip(cache[:3], (run, seen, seen))
    return slots, *([Past(keys, values, slots, mask) for keys, values in stack] for stack, mask in masks)


def attend_past(q, k, v, past):
    """Attention to the slots of a cache, after the new k and v are put into theirs. Shapes as in attend."""
    B, T, H, head_dim = q.shape
    index = past.slots[..., None, None].expand_as(k)
    keys, values = (t.scatter_(1, index, new).transpose(1, 2) for t, new in ((past.keys, k), (past.values, v)))
    # query heads that share a key head stand side by side as if they were positions, so that no key is repeated
    shared = H // k.size(2)
    q = q.unflatten(2, (-1, shared)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # [B, H_kv, shared * T, head_dim]
    mask = past.mask[:, :, None].expand(-1, -1, shared, -1, -1).flatten(2, 3)
    y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
    return y.unflatten(2, (shared, T)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def attend(q, k, v, runs=None):
    """Causal attention, over the whole row, inside each of its Runs, or with the Past before it.

    q [B, T, H, head_dim]; k, v [B, T, H_kv, head_dim] -> [B, T, H, head_dim].
    """
    if q.size(0) == 0:  # flash-attn refuses an empty batch; so written, every parameter still gets its zero gradient
        return q + k.sum() + v.sum()
    if isinstance(runs, Past):
        return attend_past(q, k, v, runs)
    if runs is not None and runs.bounds is not None:
        return attend_runs(*(t.flatten(0, 1) for t in (q, k, v)), runs.bounds, runs.longest).view(q.shape)
    if runs is not None or q.is_cuda and q.dtype == torch.float32:  # CUDA's memory-saving kernels then want equal heads
        k, v = (t.repeat_interleave(q.size(2) // t.size(2), 2) for t in (k, v))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B, H, T, head_dim]
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=None if runs is None else runs.mask, is_causal=runs is None,
                                       enable_gqa=q.size(1) != k.size(1))
    return y.transpose(1, 2)


def attend_runs(q, k, v, bounds, longest):
    """Causal attention inside each run by FlashAttention: q [B*T, H, head_dim]; k, v [B*T, H_kv, head_dim] -> like q.
    """
    if flash_attn_varlen_func is not None:
        return flash_attn_varlen_func(q, k, v, bounds, bounds, longest, longest, causal=True)
    k, v = (t.repeat_interleave(q.size(1) // t.size(1), 1) for t in (k, v))  # torch 2.11 knows no grouped heads
    return varlen_attn(q, k, v, bounds, bounds, longest, longest, **CAUSAL)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        d, self.heads, self.kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        d_kv = d // self.heads * self.kv_heads
        self.q_proj = nn.Linear(d, d, bias=False)
        self.k_proj = nn.Linear(d, d_kv, bias=False)
        self.v_proj = nn.Linear(d, d_kv, bias=False)
        self.o_proj = nn.Linear(d, d, bias=False)

    def forward(self, x, rope, runs=None):
        B, T, d = x.shape
        q = self.q_proj(x).view(B, T, self.heads, d // self.heads)
        k = self.k_proj(x).view(B, T, self.kv_heads, d // self.heads)
        v = self.v_proj(x).view(B, T, self.kv_heads, d // self.heads)
        y = attend(rotate(q, rope), rotate(k, rope), v, runs)
        return self.o_proj(y.reshape(B, T, d))


class MLP(nn.Module):
    recompute = False  # train.py's setting: make what is between the products again in backward, instead of keeping it

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.recompute:  # no product is made twice: checkpoint stops as soon as down_proj's input is there again
            return checkpoint(self.down, gate, up, use_reentrant=False, preserve_rng_state=False)
        return self.down(gate, up)

    def down(self, gate, up):
        return self.down_proj(F.silu(gate) * up)


def narrow(x):
    """x as autocast's matrix products want it: cast once, where each of them would cast for itself and keep it."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn, self.mlp = Attention(config), MLP(config)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(config), RMSNorm(config)

    def forward(self, x, rope, runs=None):
        if x.size(0) == 0 and not torch.is_grad_enabled():  # to train, every parameter gets a gradient, be it zero
            return x
        x = x + self.self_attn(narrow(self.input_layernorm(x)), rope, runs)
        return x + self.mlp(narrow(self.post_attention_layernorm(x)))


# ---------------------------------------------------------------------------------------------------------------------
# the text-speech model

class Output(NamedTuple):
    """What a forward pass gives. Sums rather than means, so that any split of a batch adds up to the same loss."""
    text_nll: Tensor        # scalars: summed negative log-likelihood of the scored targets, in nats
    speech_nll: Tensor
    negative_entropy: Tensor  # sum over scored speech targets of sum_l omega ln omega (Eq. 6)
    n_text: int             # scored targets
    n_speech: int
    logp: Tensor | None     # [B, T] log-likelihood of each target, 0 where none is scored
    omega: Tensor | None    # [B - text_rows, T, L] layer weights (Eq. 3)
    hidden: list | None     # input to the backbone, then the outputs of layers 1..L, the last one normed; [B, T, d]
    text_logits: Tensor | None    # [B, positions, vocab_size]
    speech_logits: Tensor | None  # [B - text_rows, positions, n_units + 1]


def mean_loss(out, beta=0.0, n=None, n_speech=None):
    """Eq. 2 as a mean over all scored targets, plus Eq. 6; n, n_speech: the counts of a larger batch it is part of."""
    n = max(1, out.n_text + out.n_speech if n is None else n)
    n_speech = max(1, out.n_speech if n_speech is None else n_speech)
    return (out.text_nll + out.speech_nll) / n + beta * out.negative_entropy / n_speech


class SmolTolk(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict(dict(  # named like the checkpoints of transformers
            embed_tokens=nn.Embedding(config.vocab_size, config.hidden_size),
            layers=nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers)),
            norm=RMSNorm(config)))
        self.speech_embed = nn.Embedding(config.n_units + 2, config.hidden_size)
        self.input_adapter = nn.ModuleList(Layer(config) for _ in range(config.input_adapter_layers))
        self.output_adapter = nn.ModuleList(Layer(config) for _ in range(config.output_adapter_layers))
        if config.layer_pooling != "last":
            self.phi = nn.Parameter(0.01 * torch.randn(config.num_hidden_layers))
        if config.layer_pooling == "dynamic":
            self.layer_selector = nn.Linear(config.hidden_size, config.num_hidden_layers)
        self.register_buffer("rope", rotary_table(config), persistent=False)
        self.head_piece = head_piece  # train.py may put a compiled one here
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for layer in [*self.input_adapter, *self.output_adapter]:  # start as the identity: the backbone first meets
            nn.init.zeros_(layer.self_attn.o_proj.weight)          # plain embeddings, and learning starts much faster
            nn.init.zeros_(layer.mlp.down_proj.weight)
        if config.layer_pooling == "dynamic":  # start with all layers alike: random weights, on the large hidden
            nn.init.zeros_(self.layer_selector.weight)  # states of a trained backbone, pick one from the first step on

    def forward(self, ids, targets=None, text_rows=0, want=(), logits=None, heads=("text", "speech"), tree=None,
                cache=None, counts=(None, None, None)):
        """
        ids, targets  int64 [B, T]. Targets are the next ids; negative ones and switch tokens are not scored.
        text_rows     the first text_rows rows hold no speech, in ids and targets: the speech modules skip them
        want          names of extras to return: "logp", "omega", "hidden"
        logits        slice of positions to return the logits of the heads for, e.g. slice(-1, None)
        tree          Tree, if the rows are no plain sequences; targets are then [B, M], and text_rows is 0 or B
        cache         what stands before ids: read, and filled further, but its position is the caller's to move. It
                      must have room for ids; text_rows is 0, or B where no speech is to come: its caches get nothing
        counts        of scored text targets, scored speech targets, and (at most) runs of modality in the rows from
                      text_rows on, if known (data.Batch): then nothing has to wait for CUDA to count them
        """
        if tree is None and ids.size(1) > self.rope.size(1):
            raise ValueError(f"{ids.size(1)} positions, the model has max_position_embeddings={self.rope.size(1)}")
        if cache is not None and text_rows not in (0, len(ids)):
            raise ValueError(f"text_rows={text_rows}: with a cache all rows go through the speech modules, or none")
        rope, *views = self.look(ids, text_rows, tree, cache, counts[2])
        speech_rope = rope if rope.dim() == 4 else rope[:, text_rows:]
        z = self.embed(ids)                                   # [B, T, d]
        x = self.adapt_input(z, ids, speech_rope, text_rows, views[0])  # [B, T, d]
        hidden = [x]
        for layer, view in zip(self.model.layers, views[1]):
            hidden.append(layer(hidden[-1], rope, view))
        hidden[-1] = self.model.norm(hidden[-1])

        layers = hidden[1:]
        pooled, log_omega = self.pool([h[text_rows:] for h in layers] if text_rows else layers)
        speech = pooled + z[text_rows:] if self.config.residual else pooled  # Eq. 5
        for layer, view in zip(self.output_adapter, views[2]):
            speech = layer(speech, speech_rope, view)         # [B - text_rows, T, d]

        zero = torch.zeros((), device=ids.device)
        scores = zero, zero, zero, 0, 0, None
        if targets is not None:
            at = hidden[-1], speech, log_omega
            if tree is not None:  # from nodes to the targets that they predict
                at = (x if x is None else x.gather(1, tree.source[:len(x), :, None].expand(len(x), -1, x.size(-1)))
                      for x in at)
            scores = self.score(*at, targets, text_rows, counts[:2])
        return Output(
            *scores[:5],
            logp=scores[5] if "logp" in want else None,
            omega=log_omega.exp() if "omega" in want and log_omega is not None else None,
            hidden=hidden if "hidden" in want else None,
            text_logits=self.text_logits(hidden[-1][:, logits]) if logits is not None and "text" in heads else None,
            speech_logits=self.speech_logits(speech[:, logits]) if logits is not None and "speech" in heads else None)

    def look(self, ids, text_rows, tree, cache, n_runs=None):
        """(rope, what each layer of the three stacks attends to: None, which is all before it, Runs or a Past)."""
        c, is_speech, rope = self.config, self.is_speech(ids), narrow(self.rope)[:, :, None]
        if cache is not None:
            slots, *pasts = look_back(cache, is_speech, rope.dtype)
            return rope[:, slots], *pasts
        if tree is not None:
            sees = tree.sees()
            rope, seen = rope[:, sees.sum(-1) - 1], Runs(sees[:, None], None)
            runs = find_tree_runs(is_speech, tree, sees) if self.input_adapter and not text_rows else seen
        else:
            rope, seen, runs = rope[:, :ids.size(1)], None, None
            if self.input_adapter:
                dtype = self.model.embed_tokens.weight.dtype
                half = dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled(ids.device.type)
                flash = ids.is_cuda and half and rope.size(-1) % 8 == 0 and rope.size(-1) <= 256
                runs = find_runs(is_speech[text_rows:], flash, n_runs)
        return rope, [runs] * c.input_adapter_layers, [seen] * c.num_hidden_layers, [seen] * c.output_adapter_layers

    def is_speech(self, ids):
        """Units and speech EOS, not the switch token."""
        return (ids >= self.config.vocab_size) & (ids != self.config.switch)

    def embed(self, ids):
        """Raw embeddings z: text ids from the backbone's table, units, speech EOS and switch from the new one."""
        V = self.config.vocab_size
        text = self.model.embed_tokens(ids.clamp(max=V - 1))
        new = self.speech_embed((ids - V).clamp(min=0))
        return torch.where((ids < V)[..., None], text, new)

    def adapt_input(self, z, ids, rope, text_rows, views):
        """The input adapter over each contiguous run of speech by itself; text and switch embeddings pass untouched."""
        if not self.input_adapter:
            return z
        z_text, z = z[:text_rows], z[text_rows:]
        x = z
        for layer, view in zip(self.input_adapter, views):
            x = layer(x, rope, view)
        return torch.cat([z_text, torch.where(self.is_speech(ids[text_rows:])[..., None], x, z)])

    def pool(self, layers):
        """Layer pooling: [c(1) .. c(L)], each [B, T, d] -> the pooled representation, ln omega [B, T, L] or None."""
        if self.config.layer_pooling == "last":
            return layers[-1], None
        mixed = sum(w * c for w, c in zip(self.phi.softmax(0), layers))  # c', Eq. 4
        if self.config.layer_pooling == "fixed":
            return mixed, None
        log_omega = self.layer_selector(mixed).float().log_softmax(-1)
        omega = log_omega.exp().to(layers[0].dtype)
        return sum(w * c for w, c in zip(omega.split(1, dim=-1), layers)), log_omega  # Eq. 3

    def text_logits(self, x):
        return F.linear(x, self.model.embed_tokens.weight)

    def speech_logits(self, x):
        return F.linear(x, self.speech_embed.weight[:-1])  # units and speech EOS; the switch token is no target

    @torch.compiler.disable  # its shapes depend on the data: compiled, it would be cut up and compiled again and again
    def score(self, text, speech, log_omega, targets, text_rows, counts):
        """The first six fields of Output. Each head is computed only at the positions whose target it predicts."""
        V, n = self.config.vocab_size, self.config.n_units + 1
        spoken = targets[text_rows:]
        at_text = where((targets >= 0) & (targets < V), counts[0])
        at_speech = where((spoken >= V) & (spoken < V + n), counts[1])
        x_text, x_speech = (x.flatten(0, 1).index_select(0, at) for x, at in ((text, at_text), (speech, at_speech)))
        heads = self.model.embed_tokens.weight, self.speech_embed.weight[:n]
        if not torch.is_grad_enabled():  # HeadLoss would make gradients all the same
            heads = [w.detach() for w in heads]
        text_nll, text_logp = HeadLoss.apply(x_text, heads[0], targets.flatten()[at_text], self.head_piece)
        speech_nll, speech_logp = HeadLoss.apply(x_speech, heads[1], spoken.flatten()[at_speech] - V, self.head_piece)
        negative_entropy = torch.zeros((), device=text.device)
        if log_omega is not None:
            scored = log_omega.flatten(0, 1).index_select(0, at_speech)
            negative_entropy = (scored.exp() * scored).sum()
        logp = text_logp.new_zeros(targets.shape)
        logp.view(-1)[at_text] = text_logp
        logp[text_rows:].view(-1)[at_speech] = speech_logp
        return text_nll, speech_nll, negative_entropy, len(at_text), len(at_speech), logp


def head_piece(x, weight, targets, learn):
    """ln p(t) [n], p = softmax(x W') in fp32; to learn also d -sum ln p(t) / d logits = p - onehot(t) [n, V]."""
    logp = F.linear(x, weight).float().log_softmax(-1)
    of_targets = logp.gather(1, targets[:, None])
    if not learn:
        return of_targets[:, 0], None
    gradient = logp.exp_().scatter_add_(1, targets[:, None], of_targets.new_full((len(x), 1), -1.0))
    return of_targets[:, 0], gradient.to(x.dtype)


class HeadLoss(torch.autograd.Function):
    """-sum_i ln p(t_i) and, without gradient, ln p(t_i) [N], p = softmax(x W'): x [N, d], W [V, d], targets t [N].

    Logits are the largest tensors of all (N x 49152). They come in pieces, and with each comes its share of the
    gradients, (p - onehot(t)) W and (p - onehot(t))' x: no logits are kept for backward or made twice.
    """
    @staticmethod
    def forward(ctx, x, weight, targets, piece):
        device, half, (need_x, need_w, *_) = x.device.type, weight.dtype, ctx.needs_input_grad
        if torch.is_autocast_enabled(device):
            half = torch.get_autocast_dtype(device)
        dx, dw = torch.empty_like(x) if need_x else None, torch.zeros_like(weight) if need_w else None
        logp, w = x.new_empty(len(x), dtype=torch.float), weight.to(half)
        size = max(1, LOGITS_AT_ONCE // len(weight))
        with torch.autocast(device, enabled=False):
            for part in (slice(at, at + size) for at in range(0, len(x), size)):
                logp[part], gradient = piece(x[part].to(half), w, targets[part], need_x or need_w)
                if need_x:
                    dx[part] = gradient @ w
                if need_w:
                    dw += gradient.T @ x[part].to(half)
        ctx.save_for_backward(dx, dw)
        ctx.mark_non_differentiable(logp)
        return -logp.sum(), logp

    @staticmethod
    def backward(ctx, d_loss, _):
        return *(None if d is None else d_loss * d for d in ctx.saved_tensors), None, None


# ---------------------------------------------------------------------------------------------------------------------
# counting

def is_new(name):
    """Is the tensor of this name one that SmolTolk adds, rather than the text backbone's?"""
    return not name.startswith("model.")


def count_parameters(model):
    """(text, speech): parameters of the backbone and of all that is added (Table 5)."""
    sizes = [(is_new(name), p.numel()) for name, p in model.named_parameters()]
    return sum(n for new, n in sizes if not new), sum(n for new, n in sizes if new)


def forward_flops(config, rows, length, text_rows=0, n_text=0, n_speech=0):
    """(backbone, added modules): floating point operations of one forward pass, a multiply-add counted as two.

    Matrix products and causal attention at the positions where they are computed, and the heads at scored targets;
    norms, softmax and pooling (under 1%) left out. Training takes three times as much, two where weights are frozen.
    """
    d, L = config.hidden_size, config.num_hidden_layers
    d_kv = d // config.num_attention_heads * config.num_key_value_heads
    layer = 2 * (2 * d * d + 2 * d * d_kv + 3 * d * config.intermediate_size) + 2 * d * (length + 1)  # each position
    positions, speech_positions = rows * length, (rows - text_rows) * length
    backbone = L * layer * positions + 2 * d * config.vocab_size * n_text
    added = (config.input_adapter_layers + config.output_adapter_layers) * layer * speech_positions
    added += 2 * d * L * speech_positions if config.layer_pooling == "dynamic" else 0
    return backbone, added + 2 * d * (config.n_units + 1) * n_speech


# ---------------------------------------------------------------------------------------------------------------------
# folders: config.json and safetensors, in and out

LLAMA = ("vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
         "max_position_embeddings rms_norm_eps rope_theta initializer_range eos_token_id").split()
REQUIRED = dict(model_type="llama", hidden_act="silu", attention_bias=False, mlp_bias=False, tie_word_embeddings=True,
                rope_scaling=None)


def read_config(folder, **overrides):
    """config.json of a SmolLM or SmolTolk folder -> Config; overrides win. Raises ValueError naming the key."""
    path = Path(folder) / "config.json"
    if not path.exists():
        raise ValueError(f"{path}: no such file; a SmolLM or SmolTolk folder is needed")
    said = read_json(path)
    try:
        said = {**said, "rope_theta": said.get("rope_theta") or said["rope_parameters"]["rope_theta"]}
        values = {key: said[key] for key in LLAMA if key != "initializer_range"} | said.get("smoltolk", {})
    except KeyError as e:
        raise ValueError(f"{path}: key {e} is missing, not a Llama config.json") from None
    except TypeError as e:
        raise ValueError(f"{path}: not a Llama config.json ({e})") from None
    for key, wanted in REQUIRED.items():
        if said.get(key, wanted) != wanted:
            raise ValueError(f"{path}: {key} is {reprlib.repr(said[key])}, only {wanted!r} is supported")
    values["initializer_range"] = said.get("initializer_range", 0.02)
    unknown = set(values) | set(overrides)
    unknown -= {field.name for field in dataclasses.fields(Config)}
    if unknown:
        raise ValueError(f"{path}: unknown model key {reprlib.repr(sorted(unknown)[0])}")
    try:
        config = Config(**{**values, **overrides})
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None
    head_dim = config.hidden_size // config.num_attention_heads
    if said.get("head_dim") not in (None, head_dim):
        raise ValueError(f"{path}: head_dim is {reprlib.repr(said['head_dim'])}, only hidden_size / num_attention_heads"
                         f" = {head_dim} is supported")
    return config


def read_shards(folder, stem):
    """{name: tensor} of stem.safetensors, or of the shards that stem.safetensors.index.json lists. ValueError."""
    index = folder / f"{stem}.safetensors.index.json"
    if not index.exists():
        return read_tensors(folder / f"{stem}.safetensors")
    listed, tensors = read_json(index).get("weight_map"), {}
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        raise ValueError(f"{index}: weight_map is no {{tensor: file}}")
    for name in sorted(set(listed.values())):
        if os.path.basename(name) != name or not name.isprintable() or len(name) > 200:
            raise ValueError(f"{index}: shard {reprlib.repr(name)} is no name of a file in the folder")
        found = read_tensors(folder / name)
        if odd := sorted(found.keys() ^ {tensor for tensor, file in listed.items() if file == name}):
            where = "the shard" if odd[0] in found else index.name
            raise ValueError(f"{folder / name}: tensor {reprlib.repr(odd[0])} is in {where} alone")
        tensors |= found
    return tensors


def from_pretrained(folder, **overrides):
    """A model in fp32 from a folder of SmolLM (new modules start at random) or of SmolTolk (all read, strictly).

    overrides: Config fields, e.g. rope_theta=100_000, layer_pooling="fixed" (only for a SmolLM folder).
    Raises ValueError naming the file and the missing, extra or misshaped tensor.
    """
    folder = Path(folder)
    config, tensors = read_config(folder, **overrides), read_shards(folder, "model")
    has_speech = (folder / "speech.safetensors").exists()
    if has_speech:
        tensors |= read_shards(folder, "speech")
    layers = config.num_hidden_layers + config.input_adapter_layers + config.output_adapter_layers
    if layers > len(tensors):
        raise ValueError(f"{folder}: {len(tensors)} tensors, config.json asks for {layers} layers")
    with torch.device("meta"):  # shapes only: config.json may ask for more memory than there is
        wanted = {name: t for name, t in SmolTolk(config).state_dict().items() if has_speech or not is_new(name)}
    for name in sorted(wanted.keys() ^ tensors.keys()):
        raise ValueError(f"{folder}: tensor {name} is {'missing' if name in wanted else 'unexpected'}")
    for name, tensor in wanted.items():
        if tensors[name].shape != tensor.shape:
            raise ValueError(f"{folder}: tensor {name} has shape {tuple(tensors[name].shape)},"
                             f" config.json asks for {tuple(tensor.shape)}")
    model = SmolTolk(config)
    model.load_state_dict({name: t.float() for name, t in tensors.items()}, strict=False)
    return model


def save_pretrained(model, folder, dtype=torch.float32, state=None):
    """Write config.json, model.safetensors (the backbone; transformers opens it) and speech.safetensors (all added).

    state: {name: tensor} to write instead of the weights that the model has at this moment
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    fields = dataclasses.asdict(model.config)
    llama = dict(architectures=["LlamaForCausalLM"], bos_token_id=fields["eos_token_id"],
                 torch_dtype=str(dtype).removeprefix("torch."), **REQUIRED, **{key: fields.pop(key) for key in LLAMA})
    (folder / "config.json").write_text(json.dumps({**llama, "smoltolk": fields}, indent=1))
    state = {name: t.detach().to("cpu", dtype).contiguous() for name, t in (state or model.state_dict()).items()}
    for stem, new in (("model", False), ("speech", True)):
        part = {name: t for name, t in state.items() if is_new(name) == new}
        save_file(part, folder / f"{stem}.safetensors", metadata={"format": "pt"})
