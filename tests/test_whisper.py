"""Whisper's encoder as units: against transformers' model, through the converter, on long recordings."""
import json
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from speech.mel import mel_frames
from speech.units import HOP, load_units, resynthesise, vocabulary_hash
from studies.small.whisper import fit_whisper_units, load_whisper, save_whisper_units, sound_of_units, whisper_frames
from tools import convert

transformers = pytest.importorskip("transformers")


def small_encoder(d=128, layers=3):
    """transformers' encoder of a Whisper with heads of 64, its weights at random."""
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        d_model=d, encoder_layers=layers, encoder_attention_heads=d // 64, encoder_ffn_dim=4 * d, decoder_layers=1,
        decoder_attention_heads=2, vocab_size=9, pad_token_id=0, bos_token_id=0, eos_token_id=0,
        decoder_start_token_id=0)
    model = transformers.WhisperModel(config).eval().encoder
    for parameter in model.parameters():  # biases and norms start as zeros and ones, which would hide mistakes
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def theirs():
    return small_encoder()


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    path = tmp_path_factory.mktemp("whisper")
    (path / "config.json").write_text(json.dumps(theirs.config.to_dict(), default=str))
    save_file({f"model.encoder.{name}": tensor.contiguous() for name, tensor in theirs.state_dict().items()},
              path / "model.safetensors")
    return path


def sound(seconds, seed=0):
    rng = np.random.default_rng(seed)
    t = np.arange(int(seconds * 16000)) / 16000
    return (np.sin(2 * np.pi * 220 * t * (1 + 0.1 * np.sin(t))) * 0.3 + 0.05 * rng.standard_normal(len(t))).astype("f4")


@pytest.mark.parametrize("layer", [1, 2])
def test_layers_are_transformers(theirs, folder, layer):
    waveform = sound(30)
    shifted = np.append(waveform[160:], np.zeros(160, np.float32))  # 10 ms: frame pairs in the middle of their 40 ms
    mel = transformers.WhisperFeatureExtractor()(shifted, sampling_rate=16000, return_tensors="pt")["input_features"]
    with torch.inference_mode():
        wanted = theirs(mel, output_hidden_states=True).hidden_states[layer][0].view(-1, 2, 128).mean(1)
    wanted = (wanted - wanted.mean(1, keepdim=True)) / (wanted.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    got = whisper_frames(waveform, load_whisper(folder, layer))
    torch.testing.assert_close(got, wanted, atol=2e-4, rtol=2e-4)


def test_long_recordings_meet_in_the_margins_and_short_ones_have_n_frames(folder):
    vocabulary = load_whisper(folder, 2)
    long = sound(47.3)
    whole = whisper_frames(long, vocabulary)
    assert len(whole) == len(long) // HOP
    first, last = (whisper_frames(long[start * 640:(start + 750) * 640 + 160], vocabulary) for start in (0, 432))
    seam = 432 + 125  # both windows are 30 s; the last one's first 5 s are left to the one before
    torch.testing.assert_close(whole, torch.cat([first[:seam], last[125:]]))
    assert [len(whisper_frames(long[:n], vocabulary)) for n in (0, 639, 640, 1300)] == [0, 0, 1, 2]


def test_units_are_fitted_saved_and_read(folder, tmp_path):
    vocabulary = load_whisper(folder, 2)
    waveforms = [sound(4, seed) for seed in range(3)]
    frames = [whisper_frames(waveform, vocabulary) for waveform in waveforms]
    fitted = fit_whisper_units(frames, waveforms, 8, 0, vocabulary)
    save_whisper_units(tmp_path / "units", folder, fitted)
    again = load_units(tmp_path / "units")
    assert again.hash == fitted.hash and again.n_units == 8 and again.rate == 25
    (ids, starts), = again.encode([sound(4, 1)])
    (free, free_starts), = again._replace(penalty=0.0).encode([sound(4, 1)])
    brute = [min(range(8), key=lambda c: float(((f - again.centroids[c]) ** 2).sum())) for f in frames[1]]
    assert np.repeat(free, np.diff([*free_starts, len(brute)])).tolist() == brute
    assert again.penalty == fitted.penalty > 0 and len(ids) <= len(free)
    assert len(again._replace(penalty=1e9).encode([sound(4, 1)])[0][0]) == 1


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
    """Variables as CTranslate2's converter names them: q, k and v in one matrix."""
    state, out = {name: tensor.numpy() for name, tensor in model.state_dict().items()}, {}
    for name in ("conv1", "conv2"):
        out |= {f"encoder/{name}/{end}": state[f"{name}.{end}"] for end in ("weight", "bias")}
    out["encoder/position_encodings/encodings"] = state["embed_positions.weight"]
    out["encoder/num_heads"] = np.array(2, np.int16)
    d, layers = len(state["conv1.bias"]), len(model.layers)
    for i in range(layers):
        a, b = f"encoder/layer_{i}", f"layers.{i}"
        out[f"{a}/self_attention/linear_0/weight"] = np.concatenate(
            [state[f"{b}.self_attn.{p}_proj.weight"] for p in "qkv"])
        out[f"{a}/self_attention/linear_0/bias"] = np.concatenate(
            [state.get(f"{b}.self_attn.{p}_proj.bias", np.zeros(d, "f4")) for p in "qkv"])
        for end, norm in (("weight", "gamma"), ("bias", "beta")):
            out[f"{a}/self_attention/linear_1/{end}"] = state[f"{b}.self_attn.out_proj.{end}"]
            out[f"{a}/ffn/linear_0/{end}"] = state[f"{b}.fc1.{end}"]
            out[f"{a}/ffn/linear_1/{end}"] = state[f"{b}.fc2.{end}"]
            out[f"{a}/self_attention/layer_norm/{norm}"] = state[f"{b}.self_attn_layer_norm.{end}"]
            out[f"{a}/ffn/layer_norm/{norm}"] = state[f"{b}.final_layer_norm.{end}"]
    return out


def test_converter_gives_the_same_encoder(theirs, folder, tmp_path):
    (tmp_path / "model.bin").write_bytes(ct2(ct2_of(theirs)))
    got = load_whisper(convert.whisper(tmp_path / "out", tmp_path / "model.bin"), 3)
    wanted = load_whisper(folder, 3)
    assert got.heads == wanted.heads and got.weights.keys() == wanted.weights.keys()
    assert all(torch.equal(got.weights[name], wanted.weights[name]) for name in wanted.weights)


def test_damaged_files_are_named(theirs, folder, tmp_path):
    variables = ct2_of(theirs)
    (tmp_path / "other.bin").write_bytes(ct2(variables, b"TransformerSpec"))
    quantised = variables | {"encoder/conv1/weight": np.zeros((128, 80, 3), np.int8)}
    (tmp_path / "int8.bin").write_bytes(ct2(quantised))
    (tmp_path / "torn.bin").write_bytes(ct2(variables)[:200_000])
    for name, what in (("other", "not a Whisper"), ("int8", "quantised"), ("torn", "torn.bin"), ("none", "none.bin")):
        with pytest.raises(SystemExit, match=what):
            convert.whisper(tmp_path / "out", tmp_path / f"{name}.bin")
        assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="layer is 4, this Whisper has 1 to 3"):
        load_whisper(folder, 4)


def test_units_are_spoken_by_their_mean_sound(folder, tmp_path):
    """Noise and a tone, told apart: what is spoken again sounds like the one or the other."""
    vocabulary = load_whisper(folder, 2)
    rng, t = np.random.default_rng(0), np.arange(32000) / 16000
    tone, noise = 0.3 * np.sin(2 * np.pi * 440 * t).astype("f4"), 0.1 * rng.standard_normal(32000).astype("f4")
    ids = [np.zeros(50, np.int64), np.ones(50, np.int64)]
    book = sound_of_units(ids, [tone, noise], 3)
    assert book.durations == (50.0, 50.0, 1.0) and not book.centroids[2].any()
    for unit, waveform in enumerate((tone, noise)):
        assert np.allclose(book.centroids[unit], mel_frames(waveform)[2::4].mean(0), atol=1e-5)
    whisper = vocabulary._replace(centroids=torch.zeros(3, 128), sound=book, hash=vocabulary_hash(
        np.zeros((3, 128), np.float32)))
    assert len(resynthesise([0, 1], whisper)) == 2 * 50 * 640
    save_whisper_units(tmp_path / "units", folder, whisper)
    assert np.array_equal(load_units(tmp_path / "units").sound.centroids, book.centroids)
    with pytest.raises(ValueError, match="need a vocoder"):
        resynthesise([0, 1], whisper._replace(sound=None))
