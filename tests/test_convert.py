"""Files of other projects become ours, and nothing that is stored in them is executed."""
import os
import pickle
import sys
import types
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_units import Runs, hubert

from runtime.tokenizer import Tokenizer
from speech.units import load_units
from tools import convert

TALE = ("Once upon a time there was a little girl who lived in a small house near the forest. Every morning she walked"
        " to the river to fetch water for her grandmother. One day she met an old fox who could speak.")


# SmolLM2

def test_smollm2_opens_in_transformers_and_can_read(smollm2_folder):
    transformers = pytest.importorskip("transformers")
    model, report = transformers.LlamaForCausalLM.from_pretrained(
        smollm2_folder, output_loading_info=True, dtype=torch.float32)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.rms_norm_eps == 1e-5
    tokenizer = Tokenizer(smollm2_folder / "tokenizer.json")
    ids = torch.tensor([[tokenizer.eos] + tokenizer.encode(TALE)])
    with torch.no_grad():
        nll = model(ids, labels=ids).loss.item()
    assert nll < np.log(25)  # with the rows of q and k in the order of llama.cpp the perplexity is above 50


def test_rows_of_q_come_in_the_order_of_transformers():
    """llama.cpp keeps the rows of a head in the order 0, h/2, 1, h/2 + 1, and so on."""
    gguf = pytest.importorskip("gguf")
    rows = np.array([[0, 0], [2, 2], [1, 1], [3, 3]], np.float32)
    tensor = SimpleNamespace(name="blk.0.attn_q.weight", tensor_type=gguf.GGMLQuantizationType.F32, data=rows)
    config = dict(num_attention_heads=1, num_key_value_heads=1)
    assert convert.dequantise(tensor, config)[:, 0].tolist() == [0, 1, 2, 3]


# k-means

def dump(path, monkeypatch, **attributes):
    """A file as joblib writes it of scikit-learn's KMeans, which is not installed when the file is read."""
    joblib, module = pytest.importorskip("joblib"), types.ModuleType("sklearn.cluster._kmeans")
    module.KMeans = type("KMeans", (), {"__module__": module.__name__})
    model = module.KMeans()
    vars(model).update(attributes)
    with monkeypatch.context() as patch:
        for name in ("sklearn", "sklearn.cluster", module.__name__):
            patch.setitem(sys.modules, name, module)
        joblib.dump(model, path)
    return path


@pytest.mark.parametrize("order, dtype", [("C", "<f4"), ("F", "<f8"), ("C", ">f4")])
def test_kmeans_is_read_without_scikit_learn(tmp_path, monkeypatch, order, dtype):
    centroids = np.random.default_rng(0).standard_normal((20, 48)).astype(dtype)
    path = dump(tmp_path / "km.bin", monkeypatch, n_clusters=20, cluster_centers_=np.asarray(centroids, order=order),
                labels_=np.arange(7), random_state_=np.random.RandomState(0), inertia_=np.float64(3.0))
    assert np.array_equal(convert.read_kmeans(path), centroids)
    hubert(tmp_path / "hubert")
    convert.main(["units", f"--kmeans={path}", f"--hubert={tmp_path / 'hubert'}", "--layer=3",
                  f"--out={tmp_path / 'units'}"])
    assert np.array_equal(load_units(tmp_path / "units").centroids.numpy(), centroids.astype(np.float32))


@pytest.mark.parametrize("hostile", [
    lambda flag: Runs(os.system, f"touch {flag}"), lambda flag: Runs(os.mkdir, flag),
    lambda flag: Runs(eval, f"open({flag!r}, 'w')"),
    lambda flag: Runs(np.testing.runstring, f"open({flag!r}, 'w')", {})])
@pytest.mark.parametrize("wrap, message", [
    (lambda evil: evil, "not a KMeans"), (lambda evil: {"nested": [evil]}, "not a KMeans"),
    (lambda evil: np.array([evil, None], "O"), "holds an array of object"),
    (lambda evil: np.array([(evil,)], [("field", "O")]), "holds an array of")])
def test_a_hostile_pickle_does_not_run(tmp_path, monkeypatch, hostile, wrap, message):
    flag = tmp_path / "ran"
    path = dump(tmp_path / "km.bin", monkeypatch, cluster_centers_=wrap(hostile(str(flag))))
    with pytest.raises(ValueError, match=message):
        convert.read_kmeans(path)
    assert not flag.exists()
    pickle.loads(pickle.dumps(hostile(str(flag))))
    assert flag.exists()  # pickle itself would have run it


@pytest.mark.parametrize("command, source, message", [
    (convert.smollm2, "text.bin", "GGUF magic"), (convert.smollm2, "none.bin", "No such file"),
    (convert.smollm2, "qwen.gguf", "tokenizer.ggml.pre is 'qwen2', not 'smollm'"),
    (convert.units, "list.bin", "not a KMeans"), (convert.units, "none.bin", "No such file"),
    (convert.units, "nan.npy", "not finite floats"), (convert.units, "wide.npy", "is 47, .* needs 48")])
def test_files_that_cannot_be_converted_are_refused(tmp_path, command, source, message):
    writer = pytest.importorskip("gguf").GGUFWriter(tmp_path / "qwen.gguf", "llama")
    writer.add_string("tokenizer.ggml.pre", "qwen2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    (tmp_path / "text.bin").write_text("some text")
    (tmp_path / "list.bin").write_bytes(pickle.dumps([1, 2]))
    np.save(tmp_path / "nan.npy", np.full((2, 3), np.nan))
    np.save(tmp_path / "wide.npy", np.zeros((5, 47), np.float32))
    hubert(tmp_path / "hubert")
    others = (tmp_path / "hubert", 3) if command is convert.units else ()
    with pytest.raises(SystemExit, match=f"{source}: cannot be converted .*{message}") as error:
        command(tmp_path / "out", tmp_path / source, *others)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("argv, message", [
    (["smollm3"], "no such command; did you mean smollm2"), (["units"], "--kmeans is missing; give --kmeans=PATH"),
    (["whisper", "--model=a.bin", "--out=tests"], "tests: exists already; remove it or give another --out")])
def test_mistakes_in_the_command_are_one_line(argv, message, monkeypatch):
    monkeypatch.chdir(convert.Path(convert.__file__).parent.parent)
    with pytest.raises(SystemExit, match=message) as error:
        convert.main(argv)
    assert "\n" not in str(error.value)
