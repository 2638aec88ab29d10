"""model.py against transformers, brute force and the paper's numbers."""
import dataclasses
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import model as smoltolk
from model import Config, SmolTolk, from_pretrained, mean_loss, save_pretrained

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


def interleaved(rows=4, length=40, seed=0):
    """Random rows of runs of text and speech with switch tokens between them, int64 [rows, length]."""
    rng, out = np.random.default_rng(seed), []
    for _ in range(rows):
        row, speech = [], rng.random() < 0.5
        while len(row) < length:
            row += list(rng.integers(50, 61, rng.integers(1, 9)) if speech else rng.integers(0, 50, rng.integers(1, 9)))
            row, speech = row + [TINY.switch], not speech
        out.append(row[:length])
    return torch.tensor(out)


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
    out = m(ids, logits=slice(None))
    for row in range(2):
        text, speech = reference_forward(m, ids[row])
        torch.testing.assert_close(out.text_logits[row], text, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(out.speech_logits[row], speech, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("overrides", ABLATIONS, ids=str)
@torch.no_grad()
def test_half_precision_weights(overrides):
    """As sample.py and bench.py have them, without autocast."""
    m, ids = make(**overrides), interleaved(rows=2, length=18)
    whole = m(ids, logits=slice(None))
    half = m.bfloat16()(ids, logits=slice(None))
    for name in ("text_logits", "speech_logits"):
        exact, rounded = getattr(whole, name), getattr(half, name)
        assert rounded.dtype == torch.bfloat16 and (rounded - exact).square().mean() < 0.01 * exact.square().mean()


@torch.no_grad()
def test_log_likelihoods_and_loss():
    m, ids = make(), interleaved(6, 41)
    inputs, targets = ids[:, :-1], ids[:, 1:].clone()
    targets[0, :5] = -1
    out = m(inputs, targets, want=("logp", "omega"), logits=slice(None))
    expected, n_text, n_speech, entropy = torch.zeros(6, 40), 0, 0, 0.0
    for b in range(6):
        for t in range(40):
            target = int(targets[b, t])
            if 0 <= target < 50:
                expected[b, t], n_text = out.text_logits[b, t].log_softmax(-1)[target], n_text + 1
            elif 50 <= target < TINY.switch:
                expected[b, t], n_speech = out.speech_logits[b, t].log_softmax(-1)[target - 50], n_speech + 1
                entropy += float((out.omega[b, t] * out.omega[b, t].log()).sum())
    torch.testing.assert_close(out.logp, expected)
    assert (out.n_text, out.n_speech) == (n_text, n_speech)
    assert float(out.negative_entropy) == pytest.approx(entropy, rel=1e-5)
    by_hand = -float(expected.sum()) / (n_text + n_speech) + 0.3 * entropy / n_speech
    assert float(mean_loss(out, 0.3)) == pytest.approx(by_hand, rel=1e-5)


def test_switch_is_never_predicted_and_the_target_before_it_counts():
    ids = torch.tensor([[3, 4, TINY.switch, 51, 52, TINY.switch, 5]])
    out = make()(ids[:, :-1], ids[:, 1:], want=("logp",), logits=slice(None))
    assert (out.n_text, out.n_speech) == (2, 2)  # 4, 5 and 51, 52
    assert (out.logp[0] != 0).tolist() == [True, False, True, True, False, True]
    assert out.text_logits.shape[-1] == 50 and out.speech_logits.shape[-1] == 11


@torch.no_grad()
def test_no_position_sees_its_future():
    m, ids = make(), interleaved(3, 40)
    whole = m(ids, logits=slice(None))
    for cut in (1, 7, 20, 33):
        other = ids.clone()
        other[:, cut:] = interleaved(3, 40, seed=cut)[:, cut:]
        changed = m(other, logits=slice(None))
        for a, b in ((changed.text_logits, whole.text_logits), (changed.speech_logits, whole.speech_logits)):
            torch.testing.assert_close(a[:, :cut], b[:, :cut], atol=1e-5, rtol=1e-5)
            assert not torch.allclose(a[:, cut:], b[:, cut:])


def adapt_input(m, ids):
    rope, views, *_ = m.look(ids, 0, None, None)
    return m.adapt_input(m.embed(ids), ids, rope, 0, views)


@torch.no_grad()
def test_input_adapter_sees_one_run_only():
    m = make()
    first, second = torch.arange(50, 58), torch.arange(53, 60)
    ids = torch.cat([first, torch.tensor([TINY.switch, 3, 4, 5, TINY.switch]), second])[None]
    z = m.embed(ids)
    x = adapt_input(m, ids)
    assert torch.equal(x[:, 8:13], z[:, 8:13]) and not torch.allclose(x[:, :8], z[:, :8])  # text and switch untouched
    other = ids.clone()
    other[:, :8] = torch.randint(50, 61, (8,))
    x_other = adapt_input(m, other)
    assert torch.equal(x_other[:, 13:], x[:, 13:])  # a run does not see another run
    alone = adapt_input(m, second[None])
    torch.testing.assert_close(x[:, 13:], alone, atol=1e-5, rtol=1e-5)  # nor where in the sequence it stands


@torch.no_grad()
def test_adapters_start_as_the_identity():
    torch.manual_seed(0)
    m, ids = SmolTolk(TINY), interleaved(3, 30)
    assert torch.equal(adapt_input(m, ids), m.embed(ids))
    none = SmolTolk(dataclasses.replace(TINY, input_adapter_layers=0, output_adapter_layers=0))
    none.load_state_dict({k: v for k, v in m.state_dict().items() if "adapter" not in k})
    assert torch.equal(none(ids, logits=slice(None)).speech_logits, m(ids, logits=slice(None)).speech_logits)


def test_the_layer_selector_starts_even_and_learns():
    torch.manual_seed(0)
    m, ids = SmolTolk(TINY), interleaved(3, 30)
    out = m(ids[:, :-1], ids[:, 1:], want=("omega",))
    torch.testing.assert_close(out.omega, torch.full_like(out.omega, 1 / 3))
    mean_loss(out).backward()
    assert m.layer_selector.weight.grad.norm() > 0


@torch.no_grad()
def test_skipping_text_rows_changes_nothing():
    m, ids = make(), interleaved(6, 41)
    ids[:2] %= 50
    one = m(ids[:, :-1], ids[:, 1:], text_rows=0, want=("logp",))
    two = m(ids[:, :-1], ids[:, 1:], text_rows=2, want=("logp",))
    torch.testing.assert_close(one.logp, two.logp)
    assert one[3:5] == two[3:5]
    assert float(one.negative_entropy) == pytest.approx(float(two.negative_entropy), rel=1e-5)


def test_every_parameter_gets_a_gradient_even_without_speech():  # or DistributedDataParallel would wait for ever
    for ids, text_rows in ((interleaved(3, 20) % 50, 3), (interleaved(3, 20), 0)):
        m = make()
        mean_loss(m(ids[:, :-1], ids[:, 1:], text_rows)).backward()
        assert [n for n, p in m.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("size", [1 << 27, 7 * 50])
def test_loss_with_its_gradient_is_the_plain_one(monkeypatch, half, size):
    monkeypatch.setattr(smoltolk, "LOGITS_AT_ONCE", size)
    torch.manual_seed(0)
    x, w, targets = torch.randn(60, 32), 0.3 * torch.randn(50, 32), torch.randint(0, 50, (60,))

    def plain(x, w):
        return F.cross_entropy(F.linear(x, w).float(), targets, reduction="none")
    for need_x, need_w in ((True, True), (True, False), (False, True)):  # a frozen backbone needs no gradient of W
        results = []
        for loss in (lambda x, w: smoltolk.HeadLoss.apply(x, w, targets, smoltolk.head_piece),
                     lambda x, w: (plain(x, w).sum(), -plain(x, w))):
            a, b = x.clone().requires_grad_(need_x), w.clone().requires_grad_(need_w)
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                total, logp = loss(a, b)
            (0.25 * total).backward()
            results.append([total.detach(), logp.detach(), *(t.grad for t in (a, b) if t.requires_grad)])
        for ours, theirs in zip(*results):
            torch.testing.assert_close(ours, theirs, **(dict(atol=0.02, rtol=0.02) if half else {}))


@pytest.mark.parametrize("text_rows", [0, 2, 6])
def test_given_counts_change_nothing(text_rows):
    import data
    ids = interleaved(6, 41)
    ids[:text_rows] %= 50
    if not text_rows:
        ids = ids % 10 + 50  # not one text target
    batch, m = data.make_batch(ids.numpy(), text_rows, TINY), make()
    found = m(ids[:, :-1], ids[:, 1:], text_rows, want=("logp",))
    told = m(ids[:, :-1], ids[:, 1:], text_rows, want=("logp",), counts=batch[2:])
    assert told[3:5] == found[3:5] == batch[2:4] and torch.equal(told.logp, found.logp)
    if text_rows < 6:
        is_speech = m.is_speech(ids[text_rows:, :-1])
        bounds = smoltolk.find_runs(is_speech, True).bounds
        padded = smoltolk.find_runs(is_speech, True, batch.n_runs).bounds
        assert batch.n_runs % 256 == 0 and len(padded) == batch.n_runs + 1 and padded.dtype == torch.int32
        assert torch.equal(padded[:len(bounds)], bounds) and (padded[len(bounds) - 1:] == is_speech.numel()).all()


def test_long_losses_in_pieces_are_the_same(monkeypatch):
    ids, results = interleaved(6, 41), []
    for budget in (1 << 27, 7 * 50):
        monkeypatch.setattr(smoltolk, "LOGITS_AT_ONCE", budget)
        m = make()
        out = m(ids[:, :-1], ids[:, 1:])
        mean_loss(out, 0.1).backward()
        results.append([out.text_nll, out.speech_nll, *(p.grad for p in m.parameters())])
    torch.testing.assert_close(results[0], results[1])


def fake_flash(q, k, v, bounds_q, bounds_k, longest_q, longest_k, causal):
    """flash_attn_varlen_func's contract, slowly."""
    assert causal and torch.equal(bounds_q, bounds_k) and bounds_q.dtype == torch.int32 and len(bounds_q) > 1
    y = torch.empty_like(q)
    for a, b in zip(bounds_q[:-1].tolist(), bounds_q[1:].tolist()):
        qs, ks, vs = (t[a:b].transpose(0, 1)[None] for t in (q, k, v))
        y[a:b] = F.scaled_dot_product_attention(qs, ks, vs, is_causal=True, enable_gqa=True)[0].transpose(0, 1)
    return y


@torch.no_grad()
def test_flash_and_torch_kernels_agree(monkeypatch):
    m, ids = make(), interleaved(4, 40)
    plain = m(ids, logits=slice(None))
    monkeypatch.setattr(smoltolk, "flash_attn_varlen_func", fake_flash)
    find = smoltolk.find_runs
    monkeypatch.setattr(smoltolk, "find_runs", lambda is_speech, flash, n: find(is_speech, True, n))
    torch.testing.assert_close(m(ids, logits=slice(None)).speech_logits, plain.speech_logits, atol=1e-5, rtol=1e-5)
    m(ids % 50, text_rows=4)  # no row for the adapters at all


def test_compiled_in_bf16(monkeypatch):
    """torch.compile's own tracing, without its slow C++: no error, the same losses and gradients, few graphs."""
    monkeypatch.setattr(smoltolk, "LOGITS_AT_ONCE", 7 * 50)  # the loss in pieces too
    graphs, results = [], []
    torch._dynamo.reset()

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)
    from torch._dynamo.backends.debugging import aot_eager
    for compiled in (False, True):
        m = make()
        runner = torch.compile(m, backend=backend) if compiled else m
        for text_rows in (2, 0, 2):
            ids = interleaved(6, 41)
            ids[:text_rows] %= 50
            with torch.autocast("cpu", torch.bfloat16):
                out = runner(ids[:, :-1], ids[:, 1:], text_rows)
            mean_loss(out, 0.1).backward()
            results.append(float(mean_loss(out, 0.1).detach()))
        results.append(sum(float(p.grad.abs().sum()) for p in m.parameters()))
    assert results[4:] == pytest.approx(results[:4], rel=1e-3)
    assert 0 < len(graphs) < 12


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
                loss = mean_loss(m(ids[:, :-1], ids[:, 1:]), 0.1)
            loss.backward()
        results.append([loss.detach(), *(p.grad for p in m.parameters())])
        wide = (m.config.intermediate_size,)
        saved.append(sum(t.shape[-1:] == wide and t.numel() == 4 * 39 * wide[0] for t in kept.values()))
        results[-1].append(torch.tensor(flops.get_total_flops()))
    assert all(torch.equal(a, b) for a, b in zip(*results))
    mlps = sum(isinstance(module, smoltolk.MLP) for module in m.modules())
    assert saved == [4 * mlps, 2 * mlps]


def test_nothing_is_compiled_anew_for_other_counts():
    """Compiled steps of one shape: whatever stands in the rows, there are no more graphs after the second step."""
    from torch._dynamo.backends.debugging import aot_eager

    import data
    torch._dynamo.reset()
    m, graphs, after = make(num_hidden_layers=1, input_adapter_layers=1, output_adapter_layers=1), [], 0
    runner = torch.compile(m, backend=lambda graph, inputs: graphs.append(graph) or aot_eager(graph, inputs))
    for step in range(6):
        ids = interleaved(6, 41, seed=step)
        ids[:2] %= 50
        batch = data.make_batch(ids.numpy(), 2, TINY)
        mean_loss(runner(ids[:, :-1], ids[:, 1:], 2, counts=batch[2:])).backward()
        after = after if step > 1 else len(graphs)
    assert 0 < len(graphs) == after <= 4


@pytest.mark.parametrize("signature", ["is_causal", "window_size"])
@torch.no_grad()
def test_torchs_own_flash_attention_is_called_as_it_wants(monkeypatch, signature):
    def fake(q, k, v, bounds_q, bounds_k, longest_q, longest_k, **causal):
        assert causal == smoltolk.CAUSAL and q.shape == k.shape == v.shape  # 2.11 knows no grouped heads
        return fake_flash(q, k, v, bounds_q, bounds_k, longest_q, longest_k, causal=True)
    m, ids = make(), interleaved(4, 40)
    plain = m(ids, logits=slice(None))
    monkeypatch.setattr(smoltolk, "CAUSAL", {signature: (-1, 0) if signature == "window_size" else True})
    monkeypatch.setattr(smoltolk, "varlen_attn", fake)
    find = smoltolk.find_runs
    monkeypatch.setattr(smoltolk, "find_runs", lambda is_speech, flash, n: find(is_speech, True, 256))
    torch.testing.assert_close(m(ids, logits=slice(None)).speech_logits, plain.speech_logits, atol=1e-5, rtol=1e-5)


def test_too_long_a_sequence():
    with pytest.raises(ValueError, match="max_position_embeddings=64"):
        make()(torch.zeros(1, 65, dtype=torch.long))


# folders

def test_folder_round_trip(tmp_path):
    m, ids = make(rope_theta=5000.0, layer_pooling="fixed"), interleaved()
    save_pretrained(m, tmp_path)
    again = from_pretrained(tmp_path)
    assert again.config == m.config
    assert all(torch.equal(a, b) for a, b in zip(m.state_dict().values(), again.state_dict().values(), strict=True))
    torch.testing.assert_close(m(ids, logits=slice(None)).speech_logits, again(ids, logits=slice(None)).speech_logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backbone_opens_in_transformers(tmp_path, dtype):
    from transformers import LlamaForCausalLM
    save_pretrained(make(), tmp_path, dtype)
    m = from_pretrained(tmp_path).eval()
    llama, info = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"] and not info["mismatched_keys"]
    ids = torch.randint(0, 50, (2, 30))
    torch.testing.assert_close(m(ids, logits=slice(None)).text_logits, llama(ids).logits, atol=2e-5, rtol=1e-4)


def test_sharded_weights_load(tmp_path):
    m = make()
    save_pretrained(m, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[:7], "model-00002-of-00002.safetensors": names[7:]}
    for file, part in shards.items():
        save_file({n: tensors[n] for n in part}, tmp_path / file)
    index = dict(weight_map={n: file for file, part in shards.items() for n in part})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    again = from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(m.state_dict().values(), again.state_dict().values(), strict=True))


@pytest.mark.parametrize("fault, message", [
    (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "model.layers.1.mlp.up_proj.weight is missing"),
    (lambda t: t.update({"lm_head.weight": torch.zeros(50, 32)}), "lm_head.weight is unexpected"),
    (lambda t: t.update({"model.norm.weight": torch.zeros(31)}), r"model.norm.weight has shape \(31,\)")])
def test_weights_are_read_strictly(tmp_path, fault, message):
    save_pretrained(make(), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    fault(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("key, value, message", [
    ("attention_bias", True, "attention_bias is True"), ("rope_scaling", {"type": "linear"}, "rope_scaling"),
    ("tie_word_embeddings", False, "tie_word_embeddings"), ("hidden_size", None, "hidden_size"),
    ("model_type", "qwen2", "model_type is 'qwen2'"), ("head_dim", 5, "head_dim is 5"), ("rms_norm_eps", "1", "rms_"),
    ("vocab_size", 1 << 40, "vocab_size=1099511627776: give"), ("hidden_size", 1 << 19, "config.json asks for"),
    ("num_hidden_layers", 1000, "tensors, config.json asks for"), ("eos_token_id", [0, 2], "eos_token_id="),
    ("eos_token_id", 50, "is no id below vocab_size")])
def test_other_architectures_are_refused(tmp_path, key, value, message):
    save_pretrained(make(), tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    said[key] = value
    if value is None:
        del said[key]
    (tmp_path / "config.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match=message):
        from_pretrained(tmp_path)


def test_damaged_files_are_named(tmp_path):
    save_pretrained(make(), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"] * math.nan}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="model.safetensors: tensor 'model.norm.weight' has .* not finite"):
        from_pretrained(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "speech.safetensors").write_bytes((tmp_path / "speech.safetensors").read_bytes()[:-100])
    with pytest.raises(ValueError, match="speech.safetensors: cannot be read"):
        from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="nowhere/config.json: no such file"):
        from_pretrained(tmp_path / "nowhere")


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
        ours = m(ids, torch.cat([ids[:, 1:], torch.tensor([[-1]])], 1), logits=slice(None))
        torch.testing.assert_close(ours.text_logits, theirs.logits, atol=1e-4, rtol=1e-5)
        assert float(mean_loss(ours).exp()) == pytest.approx(float(theirs.loss.exp()), rel=1e-5)
        other = from_pretrained(smollm2_folder, rope_theta=10_000.0).eval()(ids, logits=slice(None)).text_logits
    assert float((other - theirs.logits).abs().max()) > 1  # the RoPE base is really applied
