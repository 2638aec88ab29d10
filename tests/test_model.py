"""model.py against transformers, brute force and the paper's numbers."""
import dataclasses
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import model as smoltolk
from model import Config, Layout, SmolTolk, from_pretrained, make_layout, nll, save_pretrained, selector_entropy

TINY = Config(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
              num_key_value_heads=2, n_units=10, max_position_embeddings=64, initializer_range=0.2)
BASELINE = dict(input_adapter_layers=0, output_adapter_layers=0, layer_pooling="last", residual=False)
ABLATIONS = [{}, BASELINE, dict(layer_pooling="fixed"), dict(layer_pooling="last"), dict(input_adapter_layers=0),
             dict(output_adapter_layers=0), dict(input_adapter_layers=0, output_adapter_layers=0), dict(residual=False)]


def make(seed=0, **overrides):
    torch.manual_seed(seed)
    model = SmolTolk(dataclasses.replace(TINY, **overrides)).eval()
    for layer in [*model.input_adapter, *model.output_adapter]:  # they start as the identity, which would hide them
        torch.nn.init.normal_(layer.self_attn.o_proj.weight, std=0.2)
        torch.nn.init.normal_(layer.mlp.down_proj.weight, std=0.2)
    if hasattr(model, "phi"):  # at their start phi and omega are (nearly) even, and an error in them would not show
        torch.nn.init.normal_(model.phi)
    if hasattr(model, "layer_selector"):
        torch.nn.init.normal_(model.layer_selector.weight, std=0.2)
    return model


def interleaved(rows=4, length=40, seed=0, longest=8):
    """Random rows of runs of text and speech, up to longest symbols each, with switch tokens between them.

    Returns int64 [rows, length].
    """
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


def loss_of(m, ids, beta=0.1, text_only=False):
    """The training loss of rows of ids, Eqs. 2 and 6. text_only: leave out the speech modules."""
    inputs, targets = ids[:, :-1], ids[:, 1:]
    layout = make_layout(inputs, targets, m.config)
    out = m(inputs, targets, layout._replace(speech=None) if text_only else layout)
    loss = torch.cat([out.text_nll, out.speech_nll]).mean()
    if text_only:
        return loss
    return loss - beta * selector_entropy(out.log_omega, layout.speech) / max(1, len(layout.speech))


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
    """Both heads of each ablation against the equations; and roughly the same with weights in bf16."""
    m, ids = make(**overrides), interleaved(rows=2, length=18)
    whole = both_logits(m, ids)
    for row, *ours in zip(ids, *whole):
        torch.testing.assert_close(tuple(ours), reference_forward(m, row), atol=2e-5, rtol=1e-4)
    for exact, rounded in zip(whole, both_logits(m.bfloat16(), ids)):
        assert rounded.dtype == torch.bfloat16 and (rounded - exact).square().mean() < 0.01 * exact.square().mean()


@torch.no_grad()
def test_no_position_sees_its_future():
    m, ids, cut = make(), interleaved(3, 40), 20
    other = ids.clone()
    other[:, cut:] = interleaved(3, 40, seed=1)[:, cut:]
    for a, b in zip(both_logits(m, other), both_logits(m, ids)):
        torch.testing.assert_close(a[:, :cut], b[:, :cut], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(a[:, cut:], b[:, cut:])


def adapt_input(m, ids):
    """z': the embeddings after the input adapter."""
    return m(ids).hidden[0]


@torch.no_grad()
def test_input_adapter_sees_one_run_only():
    m = make()
    first, second = torch.arange(50, 58), torch.arange(53, 60)
    ids = torch.cat([first, torch.tensor([TINY.switch, 3, 4, 5, TINY.switch]), second])[None]
    z, x = m.embed(ids), adapt_input(m, ids)
    assert torch.equal(x[:, 8:13], z[:, 8:13]) and not torch.allclose(x[:, :8], z[:, :8])  # text and switch untouched
    other = ids.clone()
    other[:, :8] = torch.randint(50, 61, (8,))
    assert torch.equal(adapt_input(m, other)[:, 13:], x[:, 13:])  # a run does not see another run
    alone = adapt_input(m, second[None])
    torch.testing.assert_close(x[:, 13:], alone, atol=1e-5, rtol=1e-5)  # nor where in the sequence it stands


@torch.no_grad()
def test_adapters_start_as_the_identity():
    torch.manual_seed(0)
    m, ids = SmolTolk(TINY), interleaved(3, 30)
    assert torch.equal(adapt_input(m, ids), m.embed(ids))
    none = SmolTolk(dataclasses.replace(TINY, input_adapter_layers=0, output_adapter_layers=0))
    none.load_state_dict({k: v for k, v in m.state_dict().items() if "adapter" not in k})
    assert torch.equal(none(ids).speech, m(ids).speech)


def test_the_layer_selector_starts_even_and_learns():
    torch.manual_seed(0)
    m, ids = SmolTolk(TINY), interleaved(3, 30)
    torch.testing.assert_close(m(ids).log_omega.exp(), torch.full((3, 30, 3), 1 / 3))
    loss_of(m, ids, beta=0).backward()
    assert m.layer_selector.weight.grad.norm() > 0


# ---------------------------------------------------------------------------------------------------------------------
# losses

@torch.no_grad()
def test_losses_and_entropy():
    m, ids = make(), interleaved(6, 41)
    inputs, targets = ids[:, :-1], ids[:, 1:].clone()
    targets[0, :5] = -1
    out, layout = m(inputs, targets), make_layout(inputs, targets, TINY)
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
    assert float(selector_entropy(out.log_omega, layout.speech)) == pytest.approx(entropy, rel=1e-5)
    assert torch.equal(m(inputs, targets, layout).speech_nll, out.speech_nll)  # with a layout made before


@torch.no_grad()
def test_text_alone_may_skip_the_speech_modules():
    m, ids = make(), interleaved(4, 41) % 50
    inputs, targets = ids[:, :-1], ids[:, 1:]
    layout = make_layout(inputs, targets, TINY)
    full, text = m(inputs, targets, layout), m(inputs, targets, layout._replace(speech=None))
    torch.testing.assert_close(text.text_nll, full.text_nll)
    torch.testing.assert_close(text.hidden, full.hidden)
    assert text.speech is text.log_omega is None and len(text.speech_nll) == len(full.speech_nll) == 0


@pytest.mark.parametrize("first, n", [(0, 50), (50, 11), (0, 62)], ids=["text", "speech", "both"])
def test_every_parameter_gets_a_gradient(first, n):  # or DistributedDataParallel would wait for ever
    m = make()
    loss_of(m, interleaved(3, 20) % n + first).backward()
    assert [name for name, p in m.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("frozen", ["nothing", "x", "weight"])  # a frozen backbone needs no gradient of the weight
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("at_once", [1 << 27, 7 * 50])
def test_nll_is_cross_entropy_with_its_gradients(monkeypatch, at_once, half, frozen):
    """At once and in pieces, in fp32 and bf16."""
    monkeypatch.setattr(smoltolk, "LOGITS_AT_ONCE", at_once)
    torch.manual_seed(0)
    x, weight, targets = torch.randn(60, 32), 0.3 * torch.randn(50, 32), torch.randint(0, 50, (60,))
    tensors = [x.requires_grad_(frozen != "x"), weight.requires_grad_(frozen != "weight")]
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        ours = nll(*tensors, targets)
    scores = exact[0] @ exact[1].T
    theirs = scores.logsumexp(-1) - scores.gather(1, targets[:, None])[:, 0]
    assert ours.dtype == torch.float32
    for values in (ours, theirs):
        (0.25 * values * torch.linspace(-1, 2, 60)).sum().backward()  # each target has a gradient of its own
    tolerance = dict(atol=0.03, rtol=0.03) if half else dict(atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.double(), theirs, **tolerance)
    for our, their in zip(tensors, exact):
        if our.requires_grad:
            torch.testing.assert_close(our.grad.double(), their.grad, **tolerance)


# ---------------------------------------------------------------------------------------------------------------------
# layouts, runs and branches

@settings(max_examples=100, deadline=None)
@given(st.integers(1, 5), st.integers(1, 60), st.sampled_from([1, 8, 40]), st.integers(0, 99))
def test_layout_against_brute_force(rows, length, longest, seed):
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
    assert (layout.text.tolist(), layout.speech.tolist(), layout.branch) == (text, speech, None)
    size = n // 32 if len(starts) <= n // 32 else n // 8 if len(starts) <= n // 8 else n
    assert layout.runs.tolist() == starts + [n] * (size + 1 - len(starts)) and layout.runs.dtype == torch.int32


def fake_flash(q, k, v, bounds_q, bounds_k, longest_q, longest_k, causal):
    """flash_attn_varlen_func's contract, slowly."""
    assert causal and bounds_q is bounds_k and bounds_q.dtype == torch.int32
    if not torch.compiler.is_compiling():  # a graph does not know the numbers
        lengths = bounds_q.diff()
        assert bounds_q[0] == 0 and bounds_q[-1] == len(q) and lengths.min() >= 0
        assert lengths.max() <= longest_q == longest_k
    position = torch.arange(len(q))
    run = torch.bucketize(position, bounds_q, right=True)
    mask = (run == run[:, None]) & (position <= position[:, None])
    q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    return F.scaled_dot_product_attention(q[None], k[None], v[None], mask, enable_gqa=True)[0].transpose(0, 1)


@pytest.mark.parametrize("longest", [8, 60])
@pytest.mark.parametrize("kernel", ["flash_attn", "is_causal", "window_size"])
@torch.no_grad()
def test_kernels_for_runs_agree_with_the_masks(monkeypatch, kernel, longest):
    """The flash-attn package, or torch's own copy: before 2.12 it knows no grouped heads, and causality by a window."""
    calls = []

    def flash(*args, causal):
        calls.append(kernel)
        return fake_flash(*args, causal=causal)

    def varlen(q, k, v, *bounds, **causal):
        assert causal == smoltolk.CAUSAL and q.shape == k.shape == v.shape
        return flash(q, k, v, *bounds, causal=True)
    m, ids = make(), interleaved(4, 40, longest=longest)
    plain = m(ids).speech
    monkeypatch.setattr(SmolTolk, "can_use_flash", lambda self, ids: True)
    monkeypatch.setattr(smoltolk, "flash_attn_varlen_func", flash if kernel == "flash_attn" else None)
    monkeypatch.setattr(smoltolk, "varlen_attn", varlen)
    monkeypatch.setattr(smoltolk, "CAUSAL", {kernel: (-1, 0) if kernel == "window_size" else True})
    torch.testing.assert_close(m(ids, layout=make_layout(ids, ids, TINY)).speech, plain, atol=1e-5, rtol=1e-5)
    assert len(calls) == TINY.input_adapter_layers


@pytest.mark.parametrize("overrides", ABLATIONS, ids=str)
@torch.no_grad()
def test_branches_of_a_row_are_sequences_of_their_own(overrides):
    """Rows of sequences with a common beginning, or with none: each gets what it gets alone, wherever it stands."""
    m, rows = make(**overrides), [(25, [20, 1, 12]), (0, [30, 25, 20]), (7, [9]), (10, [30, 6, 17, 7]), (64, [0])]
    T = 75  # more than the model has positions; a row is longer than each of its sequences
    ids = torch.randint(0, 62, (len(rows), T))
    branch = (-1 - torch.arange(T)).repeat(len(rows), 1)  # each position of the padding is a branch of its own
    placed = []  # of each sequence: its row, its positions there, its ids
    for row, (common, rests) in enumerate(rows):
        beginning, end = interleaved(1, common, seed=row)[0], common
        beginning[-2:] = 55
        ids[row, :common], branch[row, :common] = beginning, 0
        for number, n in enumerate(rests, 1):
            start, end = end, end + n
            rest = interleaved(1, n, seed=10 * row + number)[0]
            rest[:number] = 56  # the beginning's run of speech goes on
            ids[row, start:end], branch[row, start:end] = rest, number
            placed.append((row, [*range(common), *range(start, end)], torch.cat([beginning, rest])))
    together = m(ids, layout=Layout(text=None, speech=torch.zeros(0), branch=branch))
    for row, positions, sequence in placed:
        alone = m(sequence[None])
        torch.testing.assert_close(together.text[row, positions], alone.text[0], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(together.speech[row, positions], alone.speech[0], atol=2e-5, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# what changes only speed and memory

@pytest.mark.parametrize("flash", [False, True])
def test_compiled_in_bf16(monkeypatch, flash):
    """torch.compile's own tracing, without its slow C++: the same losses and gradients, one graph for rows with speech
    and one for text alone, and no other whatever stands in them."""
    from torch._dynamo.backends.debugging import aot_eager
    graphs, results = [], []
    torch._dynamo.reset()
    monkeypatch.setattr(SmolTolk, "can_use_flash", lambda self, ids: flash)
    monkeypatch.setattr(smoltolk, "flash_attn_varlen_func", fake_flash)

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)
    for compiled in (False, True):
        m = make(num_hidden_layers=2, input_adapter_layers=1, output_adapter_layers=1).train()
        if compiled:
            m.compiled_read = torch.compile(m.read, backend=backend, fullgraph=True)
        for step in range(6):
            ids, text_only = interleaved(6, 41, seed=step, longest=30), step % 3 == 1
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(m, ids % 50 if text_only else ids, text_only=text_only)
            loss.backward()
            results.append(float(loss.detach()))
            assert len(graphs) == compiled * min(step + 1, 2)
        results.append(sum(float(p.grad.abs().sum()) for p in m.parameters()))
    assert results[7:] == pytest.approx(results[:7], rel=1e-3)


@pytest.mark.parametrize("half", [False, True])
def test_recomputing_changes_memory_alone(half):
    """The same loss and gradients to the last bit, no matrix product more, and two activations a MLP less."""
    results, saved = [], []
    for recompute in (False, True):
        m, ids, kept = make(), interleaved(4, 40), {}
        m.apply(lambda module, recompute=recompute: setattr(module, "recompute", recompute))

        def keep(t, kept=kept):
            kept[t.untyped_storage().data_ptr()] = t
            return t
        with torch.utils.flop_counter.FlopCounterMode(display=False) as flops:
            with torch.autocast("cpu", torch.bfloat16, enabled=half), \
                    torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
                loss = loss_of(m, ids)
            loss.backward()
        results.append([loss.detach(), *(p.grad for p in m.parameters()), torch.tensor(flops.get_total_flops())])
        wide = (m.config.intermediate_size,)
        saved.append(sum(t.shape[-1:] == wide and t.numel() == 4 * 39 * wide[0] for t in kept.values()))
    assert all(torch.equal(a, b) for a, b in zip(*results))
    mlps = sum(isinstance(module, smoltolk.MLP) for module in m.modules())
    assert saved == [4 * mlps, 2 * mlps]


def test_too_long_a_sequence():
    with pytest.raises(ValueError, match="65 positions, the model has max_position_embeddings=64"):
        make()(torch.zeros(1, 65, dtype=torch.long))


# ---------------------------------------------------------------------------------------------------------------------
# folders

@pytest.fixture
def folder(tmp_path):
    save_pretrained(make(), tmp_path)
    return tmp_path


def assert_reads(folder, m):
    again = from_pretrained(folder)
    assert m.config == again.config
    torch.testing.assert_close(m.state_dict(), again.state_dict(), atol=0, rtol=0)


def refused(folder, message):
    with pytest.raises(ValueError, match=message) as error:
        from_pretrained(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def split(folder):
    """Split the backbone's weights into two shards -> {tensor: file}."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {name: f"model-0000{1 + (i >= 7)}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(index.values()):
        save_file({name: tensors[name] for name in tensors if index[name] == file}, folder / file)
    return index


def write_index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map=weight_map)))


def test_folders_come_back(tmp_path):
    m = make(rope_theta=5000.0, layer_pooling="fixed")
    save_pretrained(m, tmp_path)
    assert_reads(tmp_path, m)
    write_index(tmp_path, split(tmp_path))
    assert_reads(tmp_path, m)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backbone_opens_in_transformers(tmp_path, dtype):
    from transformers import LlamaForCausalLM
    save_pretrained(make(), tmp_path, dtype)
    m = from_pretrained(tmp_path).eval()
    llama, info = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"] and not info["mismatched_keys"]
    ids = torch.randint(0, 50, (2, 30))
    torch.testing.assert_close(both_logits(m, ids)[0], llama(ids).logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("change, message", [
    (lambda index: [], "weight_map is not a dict"),
    (lambda index: index | {"model.norm.weight": 3}, "weight_map is not a dict"),
    (lambda index: index | {"model.norm.weight": "../model.safetensors"}, "is not the name of a file in the folder"),
    (lambda index: index | {"model.norm.weight": "none.safetensors"}, "none.safetensors: cannot be read"),
    (lambda index: index | {"lm_head.weight": index["model.norm.weight"]}, "'lm_head.weight' is only in"),
    (lambda index: dict(list(index.items())[1:]), "'model.embed_tokens.weight' is only in")])
def test_a_wrong_index_is_refused(folder, change, message):
    write_index(folder, change(split(folder)))
    refused(folder, message)


@pytest.mark.parametrize("change, message", [
    ({"model.layers.1.mlp.up_proj.weight": None}, r"'model.layers.1.mlp.*' has shape \(missing\), config.json"),
    ({"lm_head.weight": torch.zeros(50, 32)}, "'lm_head.weight' has shape .50, 32., config.json asks for no such"),
    ({"model.norm.weight": torch.zeros(31)}, "'model.norm.weight' has shape .31., config.json asks for .32."),
    ({"model.norm.weight": torch.full([32], math.nan)}, "model.safetensors: tensor 'model.norm.weight' has .* finite")])
def test_wrong_weights_are_refused(folder, change, message):
    tensors = load_file(folder / "model.safetensors") | change
    save_file({name: t for name, t in tensors.items() if t is not None}, folder / "model.safetensors")
    refused(folder, message)


@pytest.mark.parametrize("key, value, message", [
    ("attention_bias", True, "attention_bias is True"), ("rope_scaling", {"type": "linear"}, "rope_scaling"),
    ("tie_word_embeddings", False, "tie_word_embeddings"), ("hidden_size", None, "hidden_size"),
    ("model_type", "qwen2", "model_type is 'qwen2'"), ("head_dim", 5, "head_dim is 5"), ("rms_norm_eps", "1", "rms_"),
    ("vocab_size", 1 << 40, "vocab_size=1099511627776: give"), ("hidden_size", 1 << 19, "config.json asks for"),
    ("num_hidden_layers", 1000, "config.json asks for"), ("eos_token_id", [0, 2], "eos_token_id="),
    ("eos_token_id", 50, "is not below vocab_size"), ("smoltolk", {"wings": 2}, "unexpected keyword argument 'wings'"),
    ("num_key_value_heads", 3, "num_attention_heads=4 must divide"), ("smoltolk", {"residual": 1}, "residual=1: give"),
    ("smoltolk", {"layer_pooling": "max"}, "layer_pooling='max': choose")])
def test_other_architectures_are_refused(folder, key, value, message):
    config = json.loads((folder / "config.json").read_text()) | {key: value}
    if value is None:
        del config[key]
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, message)


def test_damaged_and_missing_files_are_named(folder):
    path = folder / "speech.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(folder, "speech.safetensors: cannot be read")
    refused(folder / "nowhere", "nowhere/config.json: cannot be read")


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
        other = both_logits(from_pretrained(smollm2_folder, rope_theta=10_000.0).eval(), ids)[0]
    assert float((other - theirs.logits).abs().max()) > 1  # the RoPE base is really applied
