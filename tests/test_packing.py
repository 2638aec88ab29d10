"""runtime/packing.py: the same model with packed weights, and with weights in 8 bits."""
import copy
import shutil

import pytest
import torch
from test_sample import collect

import sample
from model import Config, Layer, SmolTolk
from runtime import packing
from runtime.packing import Int8Linear, PackedLinear, StreamedLinear, can_pack, pack_weights

CONFIG = Config(vocab_size=300, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=1, n_units=20)
needs_packing = pytest.mark.skipif(not can_pack(torch.float32), reason="this processor or torch packs no weights")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return SmolTolk(CONFIG).start_new_modules("release").eval()


def logits(model):
    """Those of both heads on a sequence of text and speech."""
    ids = torch.tensor([[1, 2, 3, 321, 301, 302, 303, 321, 7, 8]])
    with torch.inference_mode():
        out = model(ids)
        return torch.cat([model.text_logits(out.text)[0], model.speech_logits(out.speech)[0]], dim=1).float()


def products(model):
    """The modules that multiply in all layers."""
    return [product for layer in model.modules() if isinstance(layer, Layer)
            for product in (layer.self_attn.project.__self__.layer, layer.self_attn.o_proj,
                            layer.mlp.project.__self__.layer, layer.mlp.down_proj)]


def most_likely(logits):
    return logits.argmax(-1)


@needs_packing
@pytest.mark.parametrize("rows", [1, 512])
def test_packed_weights_give_the_same(model, rows):
    packed = copy.deepcopy(model)
    pack_weights(packed, rows)
    assert [type(product) for product in products(packed)] == [PackedLinear] * 6 * 4
    assert not any(name.endswith("q_proj.weight") for name, _ in packed.named_parameters())  # kept only once
    torch.testing.assert_close(logits(packed), logits(model), rtol=1e-4, atol=1e-4)
    plan, openings = [("text", 9), ("speech", 8), ("text", 7)], [[1, 2, 3], [301, 302, 303, 321]]
    assert collect(packed, openings, plan, most_likely) == collect(model, openings, plan, most_likely)


def test_compiled_steps_sum_the_products(model, monkeypatch):
    """The same symbols. The graph of a step has a sum in place of each product; torch.compile only traces here."""
    graphs, compile_of_torch = [], torch.compile

    def backend(graph, inputs):
        graphs.append(graph.code)
        return graph
    monkeypatch.setattr(torch, "compile", lambda f, mode, **options: compile_of_torch(f, backend=backend, **options))
    streamed = copy.deepcopy(model)
    pack_weights(streamed, 1, compiled=True)
    assert [type(product) for product in products(streamed)] == [StreamedLinear] * 6 * 4
    torch.testing.assert_close(logits(streamed), logits(model), rtol=1e-4, atol=1e-4)
    plan, openings = [("text", 9), ("speech", 8), ("text", 7)], [[1, 2, 3]]
    expected = collect(model, openings, plan, most_likely)
    assert collect(streamed, openings, plan, most_likely, compiled=True) == expected
    assert [graph.count(".sum(-1)") for graph in graphs] == [2 * 4 + 1, 6 * 4]  # a text step, with its head; speech


def test_weights_in_8_bits(model):
    half = copy.deepcopy(model).bfloat16()
    int8 = copy.deepcopy(half)
    pack_weights(int8, 1, bits=8)
    layer, weight = int8.model.layers[0].mlp.down_proj, half.model.layers[0].mlp.down_proj.weight.float()
    assert isinstance(layer, Int8Linear) and layer.weight.dtype == torch.int8
    assert isinstance(int8.model.layers[0].self_attn.project.__self__.layer, Int8Linear)
    error = (layer.weight * layer.scale.float()[:, None] - weight).abs()
    assert (error <= weight.abs().amax(1, keepdim=True) / 127 * (0.5 + 0.5)).all()  # rounding, and the scale's in bf16
    ours, theirs = logits(int8), logits(half)
    assert not torch.equal(ours, theirs) and (ours - theirs).norm() / theirs.norm() < 0.03


def is_unchanged(model):
    return not any(isinstance(module, PackedLinear) or vars(module).keys() & {"project", "text_logits"}
                   for module in model.modules())


def test_where_nothing_is_packed(model, monkeypatch):
    """Small layers keep their weights, and so does a model for whose dtype there are no packed weights."""
    small = SmolTolk(Config(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                            num_attention_heads=2, num_key_value_heads=1, n_units=20))
    half = copy.deepcopy(model).half()
    for unchanged in (small, half):
        pack_weights(unchanged, 1)
        assert is_unchanged(unchanged)
    monkeypatch.setattr(packing, "can_pack", lambda dtype: False)
    pack_weights(model, 1)
    assert is_unchanged(model)
    with pytest.raises(ValueError, match="int8: only on a CPU"):
        pack_weights(copy.deepcopy(model), 1, bits=8)


def test_talking_in_8_bits(monkeypatch, capsys):
    """Eager and compiled, which only traces here, also where threads are shared with other programs."""
    box = sample.__file__.replace("sample.py", "assets/tiny")
    command = [f"--checkpoint={box}/smoltolk", f"--prompt={box}/stories/29-opening.flac", f"--units={box}/units",
               "--temperature=0", "--dtype=int8", "--device=cpu"]
    compile_of_torch = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, mode, **options: compile_of_torch(f, backend="eager", **options))
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for option in ("--compile=false", "--compile=true"):
        sample.main([*command, option])
        assert "the crowd booed" in capsys.readouterr().out
    sample.main([*command, "--prompt=Anna", "--compile=true"])
    printed = capsys.readouterr()
    assert "the crowd booed" in printed.out and "only speeds up a single prompt" in printed.err
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match="needs a C.. compiler; install g"):
        sample.main([*command, "--compile=true"])
    monkeypatch.setattr(sample, "pick_device", lambda device: "mps")
    with pytest.raises(SystemExit, match="dtype=int8: only on a CPU"):
        sample.main(command)
