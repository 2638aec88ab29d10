"""model.py against transformers, brute force and the paper's numbers."""
import dataclasses
import functools
import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch._dynamo.backends.debugging import aot_eager

import model as smoltolk
from model import Config, SmolTolk, from_pretrained, make_layout, nll, save_pretrained, selector_entropy

TINY = Config(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
              num_key_value_heads=2, n_units=10, max_position_embeddings=64, initializer_range=0.2)
BASELINE = dict(input_adapter_layers=0, output_adapter_layers=0, layer_pooling="last", residual=False)
ABLATIONS = [{}, BASELINE, dict(layer_pooling="fixed"), dict(layer_pooling="last"), dict(input_adapter_layers=0),
             dict(output_adapter_layers=0), dict(input_adapter_layers=0, output_adapter_layers=0), dict(residual=False)]


def make(seed=0, **overrides):
    """A model with random adapters, phi and layer selector. As they start, an error in them would not show."""
    torch.manual_seed(seed)
    model = SmolTolk(dataclasses.replace(TINY, **overrides)).eval()
    for name, p in model.named_parameters():
        if name == "phi":
            torch.nn.init.normal_(p)
        if name == "layer_selector.weight" or "adapter" in name and "norm" not in name:
            torch.nn.init.normal_(p, std=0.2)
    return model


def interleaved(rows=4, length=40, seed=0, longest=8):
    """Random rows of runs of text and speech, up to longest symbols each, with switch tokens between them."""
    rng, out = np.random.default_rng(seed), []
    for _ in range(rows):
        row, speech = [], rng.random() < 0.5
        while len(row) < length:
            first, end = (50, 61) if speech else (0, 50)
            row += [*rng.integers(first, end, rng.integers(1, longest + 1)), TINY.switch]
            speech = not speech
        out.append(row[:length])
    return torch.tensor(out, dtype=torch.long)


def both_logits(m, ids, **options):
    """(text logits, speech logits) of all positions."""
    out = m(ids, **options)
    return m.text_logits(out.text), m.speech_logits(out.speech)


def loss_of(m, ids, beta=0.1):
    """The training loss of rows of ids, Eqs. 2 and 6."""
    inputs, targets = ids[:, :-1], ids[:, 1:]
    layout = make_layout(inputs, targets, m.config)
    out = m(inputs, targets, layout)
    entropy = 0.0 if out.log_omega is None else selector_entropy(out.log_omega) / inputs.numel()
    return torch.cat([out.text_nll, out.speech_nll]).mean() - beta * entropy


@pytest.mark.parametrize("shape, text, new, baseline", [  # Tables 4 and 5
    (dict(), 134_515_008, 14.47, 0.289),
    (dict(hidden_size=960, intermediate_size=2560, num_hidden_layers=32, num_attention_heads=15, num_key_value_heads=5),
     361_821_120, 39.84, 0.482),
    (dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, num_attention_heads=32,
          num_key_value_heads=32), 1_711_376_384, 269.53, 1.028)])
def test_parameter_counts_of_the_paper(shape, text, new, baseline):
    with torch.device("meta"):
        assert smoltolk.count_parameters(SmolTolk(Config(**shape))) == (text, pytest.approx(new * 1e6, abs=5e3))
        expanded = smoltolk.count_parameters(SmolTolk(Config(**shape, **BASELINE)))
    assert expanded == (text, pytest.approx(baseline * 1e6, abs=1e3))


def reference_forward(m, ids):
    """The model once more, one position and one equation at a time, from the paper's text. ids [T] -> two logits."""
    c, T = m.config, len(ids)
    d, H, KV = c.hidden_size, c.num_attention_heads, c.num_key_value_heads
    hd = d // H

    def norm(x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + c.rms_norm_eps).sqrt() * weight

    def turn(x, pos):  # complex rotation of the pairs (i, i + hd/2)
        angle = pos * c.rope_theta ** (-torch.arange(hd // 2) * 2.0 / hd)
        z = torch.complex(x[: hd // 2], x[hd // 2:]) * torch.polar(torch.ones(hd // 2), angle)
        return torch.cat([z.real, z.imag])

    def layer(block, x, sees):
        h = norm(x, block.input_layernorm.weight)
        a, y = block.self_attn, torch.zeros_like(x)
        q, k, v = (F.linear(h, p.weight) for p in (a.q_proj, a.k_proj, a.v_proj))
        for i in range(T):
            for head in range(H):
                kv = head // (H // KV)
                qi = turn(q[i, head * hd:(head + 1) * hd], i)
                others = [j for j in range(T) if sees(i, j)]
                s = torch.stack([qi @ turn(k[j, kv * hd:(kv + 1) * hd], j) for j in others]) / hd ** 0.5
                values = torch.stack([v[j, kv * hd:(kv + 1) * hd] for j in others])
                y[i, head * hd:(head + 1) * hd] = s.softmax(0) @ values
        x = x + F.linear(y, a.o_proj.weight)
        h = norm(x, block.post_attention_layernorm.weight)
        return x + F.linear(F.silu(F.linear(h, block.mlp.gate_proj.weight)) * F.linear(h, block.mlp.up_proj.weight),
                            block.mlp.down_proj.weight)

    speech = [c.vocab_size <= i < c.switch for i in ids.tolist()]
    z = torch.stack([m.speech_embed.weight[i - c.vocab_size] if i >= c.vocab_size else m.model.embed_tokens.weight[i]
                     for i in ids.tolist()])
    x = z
    for block in m.input_adapter:
        x = layer(block, x, lambda i, j: j == i or (j < i and all(speech[j:i + 1])))
    x = torch.stack([x[i] if speech[i] else z[i] for i in range(T)])
    hidden = []
    for block in m.model.layers:
        x = layer(block, x, lambda i, j: j <= i)
        hidden.append(x)
    hidden[-1] = norm(hidden[-1], m.model.norm.weight)
    pooled = hidden[-1]
    if c.layer_pooling != "last":
        phi = m.phi.exp() / m.phi.exp().sum()
        pooled = sum(phi[i] * h for i, h in enumerate(hidden))  # Eq. 4
    if c.layer_pooling == "dynamic":
        omega = (pooled @ m.layer_selector.weight.T + m.layer_selector.bias).softmax(-1)
        pooled = sum(omega[:, i:i + 1] * h for i, h in enumerate(hidden))  # Eq. 3
    y = pooled + z if c.residual else pooled  # Eq. 5
    for block in m.output_adapter:
        y = layer(block, y, lambda i, j: j <= i)
    return hidden[-1] @ m.model.embed_tokens.weight.T, y @ m.speech_embed.weight[:c.n_units + 1].T


@pytest.mark.parametrize("overrides", ABLATIONS, ids=str)
@torch.no_grad()
def test_equations(overrides):
    m, ids = make(**overrides), interleaved(rows=2, length=18)
    for row, *ours in zip(ids, *both_logits(m, ids)):
        torch.testing.assert_close(tuple(ours), reference_forward(m, row), atol=2e-5, rtol=1e-4)


def test_a_new_model_starts_from_the_identity():
    """The adapters change nothing, and the layer selector has equal weights but learns."""
    torch.manual_seed(0)
    m, ids = SmolTolk(TINY), interleaved(3, 30)
    out = m(ids)
    torch.testing.assert_close(out.log_omega.exp(), torch.full((3, 30, 3), 1 / 3))
    none = SmolTolk(dataclasses.replace(TINY, input_adapter_layers=0, output_adapter_layers=0))
    none.load_state_dict({k: v for k, v in m.state_dict().items() if "adapter" not in k})
    assert torch.equal(none(ids).speech, out.speech)
    loss_of(m, ids, beta=0).backward()
    assert m.layer_selector.weight.grad.norm() > 0


def test_other_starts_of_new_modules():
    """As torch.nn.Linear starts: uniform in +-1/sqrt(inputs), whose standard deviation is 1/sqrt(3 inputs)."""
    config = dataclasses.replace(TINY, hidden_size=64, intermediate_size=96)
    torch.manual_seed(0)
    default, release = SmolTolk(config).start_new_modules("default"), SmolTolk(config).start_new_modules("release")
    for m in (default.requires_grad_(False), release.requires_grad_(False)):
        for layer in [*m.input_adapter, *m.output_adapter]:
            for matrix in (layer.self_attn.o_proj.weight, layer.self_attn.q_proj.weight, layer.mlp.down_proj.weight):
                assert float(matrix.std()) == pytest.approx((3 * matrix.size(1)) ** -0.5, rel=0.1)
        assert float(m.model.layers[0].mlp.down_proj.weight.std()) == pytest.approx(config.initializer_range, rel=0.1)
    assert not default.layer_selector.weight.any() and release.layer_selector.weight.abs().max() > 0.1
    assert float(default.speech_embed.weight.std()) == pytest.approx(config.initializer_range, rel=0.1)
    assert float(release.speech_embed.weight.std()) == pytest.approx(0.02, rel=0.1)


@torch.no_grad()
def test_losses_and_entropy():
    m, ids = make(), interleaved(6, 41)
    inputs, targets = ids[:, :-1], ids[:, 1:].clone()
    targets[0, :5] = -1
    out = m(inputs, targets)
    text_nll, speech_nll, entropy = [], [], 0.0
    for text, speech, log_omega, row in zip(*both_logits(m, inputs), out.log_omega, targets.tolist()):
        for t, target in enumerate(row):
            if 0 <= target < 50:
                text_nll.append(-text[t].log_softmax(-1)[target])
            elif 50 <= target < TINY.switch:
                speech_nll.append(-speech[t].log_softmax(-1)[target - 50])
            entropy -= float((log_omega[t].exp() * log_omega[t]).sum())
    torch.testing.assert_close(out.text_nll, torch.stack(text_nll))
    torch.testing.assert_close(out.speech_nll, torch.stack(speech_nll))
    assert float(selector_entropy(out.log_omega)) == pytest.approx(entropy, rel=1e-5)


@torch.no_grad()
def test_text_alone_may_skip_the_speech_modules():
    m, ids = make(), interleaved(4, 41) % 50
    inputs, targets = ids[:, :-1], ids[:, 1:]
    layout = make_layout(inputs, targets, TINY)
    m.train()
    full, text = m(inputs, targets, layout), m(inputs, targets, layout._replace(speech=None))
    torch.testing.assert_close((text.text_nll, text.hidden), (full.text_nll, full.hidden))
    torch.testing.assert_close(text.log_omega, full.log_omega)  # for Eq. 6
    assert text.speech is None and len(text.speech_nll) == 0
    assert m.eval()(inputs, targets, layout._replace(speech=None)).log_omega is None


@pytest.mark.parametrize("first, n", [(0, 50), (50, 11), (0, 62)], ids=["text", "speech", "both"])
def test_every_parameter_gets_a_gradient(first, n):  # or DistributedDataParallel would wait for ever
    m = make()
    loss_of(m, interleaved(3, 20) % n + first).backward()
    assert [name for name, p in m.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("half, tolerance", [(False, 1e-5), (True, 0.03)])
@pytest.mark.parametrize("at_once", [1 << 27, 7 * 50])
def test_nll_is_cross_entropy_with_its_gradients(monkeypatch, at_once, half, tolerance):
    """At once and in pieces, in fp32 and bf16, with a gradient of its own for each target."""
    monkeypatch.setattr(smoltolk, "LOGITS_AT_ONCE", at_once)
    torch.manual_seed(0)
    targets, factors = torch.randint(0, 50, (60,)), torch.linspace(-1, 2, 60) / 4
    tensors = [torch.randn(60, 32, requires_grad=True), torch.randn(50, 32, requires_grad=True)]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        ours = nll(tensors[0], lambda x: F.linear(x, 0.3 * tensors[1]), 50, targets)
    scores = exact[0] @ (0.3 * exact[1]).T
    theirs = scores.logsumexp(-1) - scores.gather(1, targets[:, None])[:, 0]
    for values in (ours, theirs):
        (values * factors).sum().backward()
    ours, theirs = [ours, *(t.grad for t in tensors)], [theirs, *(t.grad for t in exact)]
    torch.testing.assert_close([t.double() for t in ours], theirs, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("longest", [1, 8, 40])
def test_layout_against_brute_force(longest, rows=4, length=60, seed=1):
    """Positions and runs, with few runs, with more than one in 32 positions, and with more than one in 8."""
    ids = interleaved(rows, length + 1, seed, longest)
    inputs, targets = ids[:, :-1], ids[:, 1:].clone()
    targets[torch.rand(targets.shape, generator=torch.Generator().manual_seed(seed)) < 0.2] = -100
    text, speech, starts = [], [], []
    for b in range(rows):
        for t in range(length):
            target, kinds = int(targets[b, t]), [50 <= int(i) < TINY.switch for i in inputs[b]]
            text += [b * length + t] * (0 <= target < 50)
            speech += [b * length + t] * (50 <= target < TINY.switch)
            starts += [b * length + t] * (t == 0 or kinds[t] != kinds[t - 1])
    layout, n = make_layout(inputs, targets, TINY), rows * length
    assert (layout.text.tolist(), layout.speech.tolist()) == (text, speech)
    size = n // 32 if len(starts) <= n // 32 else n // 8 if len(starts) <= n // 8 else n
    assert layout.runs.tolist() == starts + [n] * (size + 1 - len(starts)) and layout.runs.dtype == torch.int32


def fake_flash(q, k, v, bounds_q, bounds_k, longest_q, longest_k, causal):
    """flash_attn_varlen_func's contract, slowly."""
    assert causal and bounds_q is bounds_k and bounds_q.dtype == torch.int32
    position = torch.arange(len(q))
    run = torch.bucketize(position, bounds_q, right=True)
    mask = (run == run[:, None]) & (position <= position[:, None])
    q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    return F.scaled_dot_product_attention(q[None], k[None], v[None], mask, enable_gqa=True)[0].transpose(0, 1)


@pytest.mark.parametrize("kernel", ["flash_attn", "torch"])
@torch.no_grad()
def test_kernels_for_runs_agree_with_the_masks(monkeypatch, kernel):
    """The flash-attn package, or torch's own copy, which has no grouped heads in torch 2.11."""
    calls = []

    def varlen(q, k, v, *bounds, **causal):
        calls.append(kernel)
        if kernel == "torch" and not causal.pop("enable_gqa", False):
            assert q.shape == k.shape == v.shape
        assert kernel == "flash_attn" or causal == smoltolk.CAUSAL
        return fake_flash(q, k, v, *bounds, causal=True)
    m, ids = make(), interleaved(4, 40)
    plain = m(ids).speech
    monkeypatch.setattr(SmolTolk, "can_use_flash", lambda self, ids: True)
    monkeypatch.setattr(smoltolk, "flash_attn_varlen_func", varlen if kernel == "flash_attn" else None)
    monkeypatch.setattr(smoltolk, "varlen_attn", varlen)
    torch.testing.assert_close(m(ids, layout=make_layout(ids, ids, TINY)).speech, plain, atol=1e-5, rtol=1e-5)
    assert len(calls) == TINY.input_adapter_layers


@pytest.mark.parametrize("overrides", ABLATIONS, ids=str)
@torch.no_grad()
def test_sequences_in_a_tree_are_read_as_alone(overrides):
    """Rows of sequences with a common beginning, or with none: each gets what it gets alone, wherever it stands."""
    m, rows = make(**overrides), [(25, [20, 1, 12]), (0, [30, 25, 20]), (10, [30, 6, 17, 7]), (64, [0])]
    T = 75  # more than the model has positions; a row is longer than each of its sequences
    ids, placed = torch.randint(0, 62, (len(rows), T)), []
    subtree_end = torch.arange(T).repeat(len(rows), 1)  # no position attends to one of the padding
    for row, (common, lengths) in enumerate(rows):
        ids[row, :common], subtree_end[row, :common] = interleaved(1, common, seed=row)[0], common + sum(lengths) - 1
        ids[row, max(0, common - 2):common], end = 55, common
        for number, n in enumerate(lengths, 1):
            start, end = end, end + n
            ids[row, start:end], subtree_end[row, start:end] = interleaved(1, n, seed=10 * row + number)[0], end - 1
            ids[row, start:min(end, start + number)] = 56  # the beginning's run of speech goes on
            placed.append((row, [*range(common), *range(start, end)]))
    together = m.read(ids, subtree_end=subtree_end)
    for row, positions in placed:
        alone = m(ids[row, positions][None])
        for ours, theirs in ((together.text, alone.text), (together.speech, alone.speech)):
            torch.testing.assert_close(ours[row, positions], theirs[0], atol=2e-5, rtol=1e-4)


def test_compiled_in_bf16(monkeypatch):
    """The same losses and gradients, and no new graph whatever the rows hold. torch.compile only traces here."""
    graphs, made, results, compile_of_torch = [], [], [], torch.compile
    monkeypatch.setattr(SmolTolk, "can_use_flash", lambda self, ids: True)
    monkeypatch.setattr(smoltolk, "flash_attn_varlen_func", fake_flash)

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)
    monkeypatch.setattr(torch, "compile", functools.partial(compile_of_torch, backend=backend, fullgraph=True))
    for compiled in (False, True):
        m = make(num_hidden_layers=1, input_adapter_layers=1, output_adapter_layers=1).train()
        if compiled:
            m.compile_training()
        for step in range(4):
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(m, interleaved(6, 41, seed=step, longest=30))
            loss.backward()
            results.append(float(loss.detach()))
            made.append(len(graphs))
        results.append(sum(float(p.grad.abs().sum()) for p in m.parameters()))
    assert results[5:] == pytest.approx(results[:5], rel=1e-3)
    assert 0 < made[4] == made[-1] <= 6  # layers with and without runs, pooling, the losses of both heads


def test_recomputing_changes_memory_alone():
    """The same loss and gradients to the last bit, no matrix product more, and less is kept for backward."""
    results, kept = [], []
    for recompute in (False, True):
        m, ids, sizes = make(), interleaved(4, 40), {}
        m.apply(lambda module, recompute=recompute: setattr(module, "recompute", recompute))

        def keep(t, sizes=sizes):
            sizes[t.data_ptr()] = t.numel()
            return t
        with torch.utils.flop_counter.FlopCounterMode(display=False) as flops:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
                loss = loss_of(m, ids)
            loss.backward()
        results.append([loss.detach(), *(p.grad for p in m.parameters()), torch.tensor(flops.get_total_flops())])
        kept.append(sum(sizes.values()))
    assert all(torch.equal(a, b) for a, b in zip(*results)) and kept[1] < 0.9 * kept[0]


CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


def change_file(path, change):
    """Change some values of a json file, or some tensors of a safetensors file."""
    is_json = path.suffix == ".json"
    before = {} if not path.exists() else json.loads(path.read_text()) if is_json else load_file(path)
    path.write_text(json.dumps(before | change)) if is_json else save_file(before | change, path)


def test_folders_come_back(tmp_path):
    """Also with the backbone in a file that an index names."""
    m = make(rope_theta=5000.0, layer_pooling="fixed")
    save_pretrained(m, tmp_path)
    for _ in range(2):
        again = from_pretrained(tmp_path)
        assert m.config == again.config
        torch.testing.assert_close(m.state_dict(), again.state_dict(), atol=0, rtol=0)
        if (tmp_path / WEIGHTS).exists():
            shard = (tmp_path / WEIGHTS).rename(tmp_path / "shard.safetensors")
            change_file(tmp_path / INDEX, dict(weight_map=dict.fromkeys(load_file(shard), shard.name)))


def test_backbone_opens_in_transformers(tmp_path):
    from transformers import LlamaForCausalLM
    save_pretrained(make(), tmp_path, torch.bfloat16)
    m = from_pretrained(tmp_path).eval()
    llama, info = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"] and not info["mismatched_keys"]
    ids = torch.randint(0, 50, (2, 30))
    torch.testing.assert_close(both_logits(m, ids)[0], llama(ids).logits, atol=2e-5, rtol=1e-4)


ROPES = dict(default={}, linear=dict(factor=2.0), dynamic=dict(factor=2.0),
             yarn=dict(factor=2.0, original_max_position_embeddings=32),
             llama3=dict(factor=2.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32),
             longrope=dict(factor=2.0, short_factor=[1.0] * 4, long_factor=[2.0] * 4,
                           original_max_position_embeddings=32))


@pytest.mark.parametrize("spelling", ["transformers 5", "both thetas", "both dicts", "transformers 4",
                                      "old transformers 4"])
@pytest.mark.parametrize("kind", ROPES)
def test_rope_is_what_transformers_takes_it_for(tmp_path, kind, spelling):
    """The logits are equal, or config.json is refused with the key. The older spellings are those of 4.57 and 4.30."""
    from transformers import LlamaConfig, LlamaForCausalLM
    rope, path = dict(rope_type=kind, rope_theta=500.0, **ROPES[kind]), tmp_path / CONFIG
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8,
                         num_attention_heads=4, max_position_embeddings=64, tie_word_embeddings=True,
                         initializer_range=0.3, rope_parameters=rope)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    values = json.loads(path.read_text())
    if spelling == "both thetas":
        values["rope_theta"] = 7.0  # transformers takes the one in rope_parameters
    elif spelling == "both dicts":
        values["rope_scaling"] = dict(rope_type=kind, **ROPES[kind])  # takes the place of rope_parameters
    elif "4" in spelling:
        rope = values.pop("rope_parameters")
        values["rope_theta"] = rope.pop("rope_theta")
        if spelling.startswith("old"):
            rope["type"] = rope.pop("rope_type")
        values["rope_scaling"] = rope if kind != "default" or spelling.startswith("old") else None
    path.write_text(json.dumps(values))
    key = "rope_parameters" if "rope_parameters" in values and "rope_scaling" not in values else "rope_scaling"
    if kind != "default":
        with pytest.raises(ValueError, match=f"config.json: .*rope_type in {key} is '{kind}'"):
            from_pretrained(tmp_path)
        return
    ids = torch.arange(50)[None]
    llama = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(both_logits(from_pretrained(tmp_path).eval(), ids)[0], llama(ids).logits, atol=2e-5,
                               rtol=1e-4)


def test_tied_weights_may_be_written_twice(tmp_path):
    m = make()
    save_pretrained(m, tmp_path)
    change_file(tmp_path / WEIGHTS, {"lm_head.weight": m.model.embed_tokens.weight.data.clone()})
    torch.testing.assert_close(m.state_dict(), from_pretrained(tmp_path).state_dict(), atol=0, rtol=0)
    tensors = load_file(tmp_path / WEIGHTS)
    del tensors["model.embed_tokens.weight"]  # or only as the head; and old files hold the frequencies of RoPE
    save_file(tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, tmp_path / WEIGHTS)
    torch.testing.assert_close(m.state_dict(), from_pretrained(tmp_path).state_dict(), atol=0, rtol=0)


def test_missing_values_are_those_of_transformers(tmp_path):
    from transformers import LlamaConfig
    save_pretrained(make(num_key_value_heads=4), tmp_path)
    values = json.loads((tmp_path / CONFIG).read_text())
    for key in ("rms_norm_eps", "max_position_embeddings", "num_key_value_heads", "rope_theta", "initializer_range"):
        del values[key]
    (tmp_path / CONFIG).write_text(json.dumps(values))
    ours, theirs = from_pretrained(tmp_path).config, LlamaConfig.from_pretrained(tmp_path)
    for key in ("rms_norm_eps", "max_position_embeddings", "num_key_value_heads", "initializer_range"):
        assert getattr(ours, key) == getattr(theirs, key)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]


@pytest.mark.parametrize("exported", [2, [2, 3], None])
def test_texts_end_as_the_tokenizer_says(tmp_path, demo_folder, exported):
    """Chat models name another token in config.json, which is only kept."""
    save_pretrained(make(), tmp_path)
    change_file(tmp_path / CONFIG, dict(eos_token_id=exported))
    shutil.copy(demo_folder / "tokenizer.json", tmp_path)
    m = from_pretrained(tmp_path)
    assert m.config.eos_token_id == 0
    save_pretrained(m, tmp_path / "again")
    assert from_pretrained(tmp_path / "again").config == m.config
    assert json.loads((tmp_path / "again" / CONFIG).read_text())["eos_token_id"] == (exported or 0)


def test_a_model_that_speaks_keeps_its_switches(tmp_path):
    save_pretrained(make(residual=False), tmp_path)
    assert from_pretrained(tmp_path, residual=False, rope_theta=5.0).config.rope_theta == 5.0
    with pytest.raises(ValueError, match="residual is False, and a model that speaks keeps it; set --residual=False"):
        from_pretrained(tmp_path, residual=True)


@pytest.mark.parametrize("file, change, message", [
    (CONFIG, {"model_type": "qwen2"}, "model_type is 'qwen2'"),
    (CONFIG, {"head_dim": 5}, "head_dim is 5"),
    (CONFIG, {"hidden_size": 1 << 19}, "config.json asks for"),
    (CONFIG, {"num_key_value_heads": 3}, "num_attention_heads=4 must divide"),
    (WEIGHTS, {"lm_head.weight": torch.zeros(50, 32)}, "lm_head.weight differs from model.embed_tokens"),
    (WEIGHTS, {"model.norm.weight": torch.full([32], math.nan)}, "model.safetensors: tensor .* not finite"),
    (INDEX, {"weight_map": {"a": "../model.safetensors"}}, "is not the name of a file in the folder"),
    (INDEX, {"weight_map": {"lm_head.weight": WEIGHTS}}, "'lm_head.weight' is only in")])
def test_folders_that_do_not_fit_are_refused(tmp_path, file, change, message):
    save_pretrained(make(), tmp_path)
    change_file(tmp_path / file, change)
    with pytest.raises(ValueError, match=message) as error:
        from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


PAGE = """It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want
of a wife. However little known the feelings or views of such a man may be on his first entering a neighbourhood, this
truth is so well fixed in the minds of the surrounding families, that he is considered as the rightful property of some
one or other of their daughters. "My dear Mr. Bennet," said his lady to him one day, "have you heard that Netherfield
Park is let at last?" Mr. Bennet replied that he had not. "But it is," returned she; "for Mrs. Long has just been here,
and she told me all about it." Mr. Bennet made no answer. """


def test_real_weights_against_transformers(smollm2_folder):
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM
    ids = torch.tensor([Tokenizer.from_file(str(smollm2_folder / "tokenizer.json")).encode(PAGE).ids])
    llama = LlamaForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32)
    m = from_pretrained(smollm2_folder).eval()
    with torch.no_grad():
        theirs = llama(ids, labels=ids)
        ours = m(ids, torch.cat([ids[:, 1:], torch.tensor([[-1]])], 1))
        torch.testing.assert_close(m.text_logits(ours.text), theirs.logits, atol=1e-4, rtol=1e-5)
        assert float(ours.text_nll.mean().exp()) == pytest.approx(float(theirs.loss.exp()), rel=1e-5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("B, T, H, H_kv", [(1, 1024, 9, 3), (2, 300, 4, 4), (2, 513, 6, 2)])
def test_attention_in_blocks(B, T, H, H_kv, masked, monkeypatch):
    """Values and gradients in bfloat16 against float64, also where the last block is short."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, T, heads, 64).bfloat16().requires_grad_() for heads in (H, H_kv, H_kv))
    direction, causal = torch.randn(B, T, H, 64), torch.ones(T, T, dtype=torch.bool).tril()
    mask = causal & (torch.rand(B, T, T) < 0.3) | torch.eye(T, dtype=torch.bool) if masked else None
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in exact), mask[:, None] if masked else causal,
                                       enable_gqa=True)
    y.transpose(1, 2).backward(direction.double())
    called, blocks = [], smoltolk.attend_in_blocks
    monkeypatch.setattr(smoltolk, "attend_in_blocks", lambda *args: called.append(1) or blocks(*args))
    ours = smoltolk.attend(q, k, v, mask)
    ours.backward(direction.bfloat16())
    assert called and ours.shape == q.shape
    for a, b in zip((ours.transpose(1, 2), q.grad, k.grad, v.grad), (y, *(t.grad for t in exact))):
        assert (a.double() - b).norm() / b.norm() < 0.01
    for queries, keys in ((q.float(), k), (q[:, :255], k[:, :255]), (q[:, 1:], k)):  # float32, too short, with a cache
        assert not smoltolk.can_use_blocks(queries, keys)
