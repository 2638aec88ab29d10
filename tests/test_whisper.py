"""studies/small/whisper.py: against transformers' Whisper, through the converter, and on long recordings."""
import json
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from speech.mel import mel_frames
from speech.units import HOP, load_units, resynthesise
from studies.small import whisper
from studies.small.whisper import load_whisper, whisper_frames
from tools import convert

transformers = pytest.importorskip("transformers")


def small_encoder(d=128, layers=3):
    """The encoder of transformers' Whisper, with heads of 64 and random weights."""
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        d_model=d, encoder_layers=layers, encoder_attention_heads=d // 64, encoder_ffn_dim=4 * d)
    model = transformers.models.whisper.modeling_whisper.WhisperEncoder(config).eval()
    for parameter in model.parameters():  # biases of 0 and norms of 1 would hide mistakes
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path, theirs = tmp_path_factory.mktemp("whisper"), small_encoder()
    (path / "config.json").write_text(json.dumps(theirs.config.to_dict(), default=str))
    save_file({f"model.encoder.{name}": tensor for name, tensor in theirs.state_dict().items()},
              path / "model.safetensors")
    return path


def sound(seconds, seed=0):
    rng, t = np.random.default_rng(seed), np.arange(int(seconds * 16000)) / 16000
    return (np.sin(2 * np.pi * 220 * t * (1 + 0.1 * np.sin(t))) * 0.3 + 0.05 * rng.standard_normal(len(t))).astype("f4")


@pytest.mark.parametrize("layer", [1, 2])
def test_layers_equal_those_of_transformers(folder, layer):
    waveform = sound(30)
    shifted = np.append(waveform[160:], np.zeros(160, np.float32))  # by 10 ms, to the middle of the 40 ms
    mel = transformers.WhisperFeatureExtractor()(shifted, sampling_rate=16000, return_tensors="pt")["input_features"]
    with torch.no_grad():
        wanted = small_encoder()(mel, output_hidden_states=True).hidden_states[layer][0].view(-1, 2, 128).mean(1)
    wanted = (wanted - wanted.mean(1, keepdim=True)) / (wanted.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    got = whisper_frames(waveform, load_whisper(folder, layer))
    torch.testing.assert_close(got, wanted, atol=2e-4, rtol=2e-4)


def test_recordings_of_any_length(folder):
    """Of a long recording, each window of 30 s gives its middle. A short one has as many frames as 40 ms fit in."""
    vocabulary, long = load_whisper(folder, 2), sound(47.3)
    whole = whisper_frames(long, vocabulary)
    first, last = (whisper_frames(long[start * 640:(start + 750) * 640 + 160], vocabulary) for start in (0, 432))
    torch.testing.assert_close(whole, torch.cat([first[:432 + 125], last[125:]]))  # 5 s of the last are left out
    assert [len(whisper_frames(long[:n], vocabulary)) for n in (0, 639, 640, 1300)] == [0, 0, 1, 2]


def test_units_are_fitted_saved_and_read(folder, tmp_path):
    """Without penalty each frame gets the nearest centroid, found by brute force. A large penalty leaves one run."""
    vocabulary, waveforms = load_whisper(folder, 2), [sound(4, seed) for seed in range(3)]
    frames = [whisper_frames(waveform, vocabulary) for waveform in waveforms]
    fitted = whisper.fit_whisper_units(frames, waveforms, 8, 0, vocabulary)
    whisper.save_whisper_units(tmp_path, folder, fitted)
    again = load_units(tmp_path)
    assert again.hash == fitted.hash and again.n_units == 8
    (ids, _), = again._replace(penalty=1e9).encode([waveforms[1]])
    (free, starts), = again._replace(penalty=0.0).encode([waveforms[1]])
    brute = [min(range(8), key=lambda c: float(((f - again.centroids[c]) ** 2).sum())) for f in frames[1]]
    assert np.repeat(free, np.diff([*starts, len(brute)])).tolist() == brute
    assert again.penalty == fitted.penalty > 0 and len(ids) == 1
    # the units are spoken with the mean mel features of their frames
    mel = np.concatenate([mel_frames(waveform)[2::4][:len(x)] for waveform, x in zip(waveforms, frames)])
    ids = np.concatenate([whisper.whisper_frame_units(x, again) for x in frames])
    np.testing.assert_allclose(again.sound.centroids, [mel[ids == unit].mean(0) for unit in range(8)], atol=1e-5)
    assert len(resynthesise([0, 1], again, durations=[3, 4])) == 7 * HOP


CT2_NAMES = {"layers.": "layer_", "self_attn_layer_norm": "self_attention/layer_norm", "final_layer": "ffn/layer",
             "layer_norm.weight": "layer_norm/gamma", "layer_norm.bias": "layer_norm/beta", "_proj": "",
             "self_attn.out": "self_attention/linear_1", "self_attn.": "self_attention/", "fc1": "ffn/linear_0",
             "fc2": "ffn/linear_1", "embed_positions.weight": "position_encodings/encodings"}


def ct2(variables, kind=b"WhisperSpec"):
    """A model.bin of CTranslate2."""
    def string(text):
        return struct.pack("<H", len(text) + 1) + text + b"\0"
    parts = [struct.pack("<I", 6), string(kind), struct.pack("<II", 3, len(variables))]
    for name, array in variables.items():
        code = {"float32": 0, "int8": 1, "int16": 2, "float16": 4}[str(array.dtype)]
        parts += [string(name.encode()), struct.pack("<B", array.ndim), struct.pack(f"<{array.ndim}I", *array.shape),
                  struct.pack("<BI", code, array.nbytes), array.tobytes()]
    return b"".join([*parts, struct.pack("<I", 0)])


def ct2_of(model):
    """An encoder's variables as CTranslate2's converter names them, with q, k and v in one matrix."""
    variables = {"encoder/num_heads": np.array(2, np.int16)}
    for name, tensor in model.state_dict().items():
        for theirs, ours in CT2_NAMES.items():
            name = name.replace(theirs, ours)
        variables[f"encoder/{name.replace('.', '/')}"] = tensor.numpy()
    for i in range(len(model.layers)):
        block = f"encoder/layer_{i}/self_attention"
        variables[f"{block}/linear_0/weight"] = np.concatenate([variables.pop(f"{block}/{x}/weight") for x in "qkv"])
        q, v = (variables.pop(f"{block}/{x}/bias") for x in "qv")
        variables[f"{block}/linear_0/bias"] = np.concatenate([q, np.zeros_like(q), v])  # keys have no bias
    return variables


def test_the_converter_gives_the_same_encoder(folder, tmp_path):
    (tmp_path / "model.bin").write_bytes(ct2(ct2_of(small_encoder())))
    convert.whisper(tmp_path / "out", tmp_path / "model.bin")
    got, wanted = load_whisper(tmp_path / "out", 3), load_whisper(folder, 3)
    assert got.heads == wanted.heads and got.weights.keys() == wanted.weights.keys()
    assert all(torch.equal(got.weights[name], wanted.weights[name]) for name in wanted.weights)
    (tmp_path / "model.bin").write_bytes(ct2({"encoder/conv1/weight": np.zeros((128, 80, 3), np.int8)}))
    with pytest.raises(SystemExit, match="quantised"):
        convert.whisper(tmp_path / "other", tmp_path / "model.bin")
