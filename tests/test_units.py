"""speech.py's units other than the demo's (HuBERT), units to waveform, and convert.py's part in both."""
import json
import os
import pickle
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import weight_norm

from speech.espeak import espeak
from speech.hubert import hubert_features
from speech.mel import (
    N_CEPSTRUM,
    N_MEL,
    fit_mel_units,
    griffin_lim,
    log_mel,
    mel_frames,
    mel_matrix,
    mel_to_magnitude,
    save_mel_units,
    voice,
)
from speech.units import HOP, collapse, load_units, n_frames, overlapping_windows, resynthesise, word_units
from speech.vocoder import load_vocoder
from tools import convert

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

ROOT = Path(__file__).resolve().parent.parent
AT_25, AT_50 = ([10, 3, 3, 3, 3, 2, 2, 2], [5, 2, 2, 2, 2, 2, 2, 2]), ([10, 3, 3, 3, 3, 2, 2], [5, 2, 2, 2, 2, 2, 2])


def noise(samples, seed=0):
    """Something that changes: noise whose level and colour wander."""
    rng = np.random.default_rng(seed)
    level = np.interp(np.arange(samples) / 2000, np.arange(samples // 2000 + 2), rng.random(samples // 2000 + 2))
    white = rng.standard_normal(samples + 1)
    return (0.3 * level * (white[1:] + np.sin(np.arange(samples) / 9000) * white[:-1])).astype(np.float32)


def hubert(folder, layout=AT_25, layers=4, **changes):
    """A HubertModel of the true layout with random weights, narrow, saved in a folder; the batch norm is a real one."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = dict(hidden_size=48, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=64,
                  conv_dim=[24] * len(layout[0]), conv_kernel=layout[0], conv_stride=layout[1], initializer_range=0.05,
                  conv_pos_batch_norm=layout is AT_25) | changes
    model = transformers.HubertModel(transformers.HubertConfig(**config)).eval()
    if config["conv_pos_batch_norm"]:
        norm = model.encoder.pos_conv_embed.batch_norm
        for tensor in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
            tensor.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    return model


def vocabulary_folder(tmp_path, layer=3, k=20, **changes):
    """A model of random weights and a folder with units of it, k-means over its frames of another waveform."""
    model = hubert(tmp_path / "hubert", **changes)
    with torch.no_grad():
        states = model(torch.tensor(noise(160_000, 9))[None], output_hidden_states=True).hidden_states[layer][0]
    centroids = states[torch.linspace(0, len(states) - 1, k).long()]
    for _ in range(5):
        own = torch.cdist(states, centroids).argmin(1)
        centroids = torch.stack([states[own == i].mean(0) if (own == i).any() else centroids[i] for i in range(k)])
    np.save(tmp_path / "km.npy", centroids.numpy())
    return model, convert.units(tmp_path / "units", tmp_path / "km.npy", tmp_path / "hubert", layer)


def by_transformers(model, waveform, layer, centroids, pad=40):
    """The oracle: the unit of each frame, by the whole model and Euclidean distances one by one."""
    with torch.no_grad():
        padded = F.pad(torch.tensor(waveform)[None], (pad, pad))
        states = model(padded, output_hidden_states=True).hidden_states[layer][0]
    return torch.cdist(states.double(), torch.tensor(centroids).double()).argmin(1).numpy()


@pytest.mark.parametrize("layer, changes", [
    (3, {}), (4, {}), (2, dict(do_stable_layer_norm=True, feat_extract_norm="layer")), (3, dict(layout=AT_50))])
def test_hubert_units_are_those_of_transformers(tmp_path, layer, changes):
    model, folder = vocabulary_folder(tmp_path, layer, **changes)
    vocabulary = load_units(folder)
    hop = 320 if changes.get("layout") is AT_50 else 640
    assert (vocabulary.n_units, vocabulary.rate, vocabulary.hop, vocabulary.receptive_field) == (
        20, 16000 // hop, hop, hop + 80)
    assert len(vocabulary.model.encoder.layers) == layer  # those above are not run
    waveform = noise(30_123)
    [(ids, starts)] = vocabulary.encode([waveform])
    frames = by_transformers(model, waveform, layer, np.load(folder / "centroids.npy"))
    wanted, where = collapse(frames)
    assert ids.dtype == np.uint16 and starts.dtype == np.int64
    assert ids.tolist() == wanted.tolist() and starts.tolist() == where.tolist()
    assert len(set(ids.tolist())) >= 5 and len(frames) == n_frames(len(waveform), vocabulary)


def test_hubert_frames_and_short_waveforms(tmp_path):
    model, folder = vocabulary_folder(tmp_path)
    vocabulary = load_units(folder)
    for n in (0, 639, 640, 720, 1279, 1280, 1359, 1360, 20_000):
        assert n_frames(n, vocabulary) == n // 640
        ids, starts = vocabulary.encode([noise(n)])[0]
        assert len(ids) == len(starts) and (len(ids) > 0) == (n >= 640) and (n == 0 or (starts < n // 640).all())
        if n >= 720:  # without the padding
            states = hubert_features(noise(n)[None], vocabulary)
            assert states.shape[1] == (n - 720) // 640 + 1
        if n >= 640:
            states = hubert_features(np.pad(noise(n), 40)[None], vocabulary)
            assert states.shape[1] == n // 640


@pytest.mark.parametrize("changes", [{}, dict(layout=AT_50)])
def test_a_batch_gives_the_units_of_one_at_a_time(tmp_path, changes):
    vocabulary = load_units(vocabulary_folder(tmp_path, **changes)[1])
    waveforms = [noise(n, i) for i, n in enumerate((20_000, 33_000, 20_000, 500, 20_001, 33_000, 20_639, 0, 20_000))]
    together = vocabulary.encode(waveforms)
    for waveform, (ids, starts) in zip(waveforms, together):
        [(alone, alone_starts)] = vocabulary.encode([waveform])
        assert ids.tolist() == alone.tolist() and starts.tolist() == alone_starts.tolist()
    assert vocabulary.encode([]) == []


def test_units_do_not_shift_with_level_unless_the_vocabulary_says_so(tmp_path):
    _, folder = vocabulary_folder(tmp_path, feat_extract_norm="layer")
    about = json.loads((folder / "units.json").read_text())
    waveform = noise(30_000)
    plain = load_units(folder)
    (folder / "units.json").write_text(json.dumps(about | dict(normalize=True)))
    normalizing = load_units(folder)
    scaled = (waveform - waveform.mean()) / np.sqrt(waveform.var() + 1e-7)
    wanted = plain.encode([scaled])[0][0].tolist()
    assert normalizing.encode([waveform])[0][0].tolist() == wanted
    assert plain.encode([waveform])[0][0].tolist() != wanted


@given(st.integers(1, 400), st.integers(1, 60), st.integers(0, 25))
@settings(max_examples=300, deadline=None)
def test_windows_tile_the_recording(n_frames, window, margin):
    window = max(window, 2 * margin + 1)
    pieces = overlapping_windows(n_frames, window, margin)
    kept = [frame for start, end, a, b in pieces for frame in range(a, b)]
    assert kept == list(range(n_frames))
    for start, end, a, b in pieces:
        assert 0 <= start <= a < b <= end <= n_frames and end - start == min(window, n_frames)
        assert (a - start >= margin or start == 0) and (end - b >= margin or end == n_frames)


def test_windows_change_nothing_where_the_model_sees_no_further_than_the_margin(tmp_path):
    """With the attention silenced a frame hears 64 frames on either side, through the positional convolution."""
    model, folder = vocabulary_folder(tmp_path, feat_extract_norm="layer")
    vocabulary = load_units(folder)._replace(window=180, margin=65)
    for layer in vocabulary.model.encoder.layers:
        for parameter in layer.attention.out_proj.parameters():
            parameter.zero_()
    waveform = noise(640 * 437 + 600)
    assert len(overlapping_windows(437, 180, 65)) == 7
    whole = vocabulary._replace(window=10**6).encode([waveform])[0]
    pieces = vocabulary.encode([waveform])[0]
    assert pieces[0].tolist() == whole[0].tolist() and pieces[1].tolist() == whole[1].tolist()
    assert len(whole[0]) > 100
    shifted = vocabulary._replace(margin=0).encode([waveform])[0]
    assert shifted[0].tolist() != whole[0].tolist()  # the margin is needed, and the test would see it


def test_windows_of_a_model_that_sees_everything(tmp_path):
    """Attention and group norm reach over the whole, so features move by a few percent; frames stay where they are."""
    vocabulary = load_units(vocabulary_folder(tmp_path)[1])
    waveform = noise(640 * 800 + 77)

    def frames(window):
        ids, starts = vocabulary._replace(window=window, margin=65).encode([waveform])[0]
        return np.repeat(ids, np.diff(np.append(starts, 800)))
    whole, pieces = frames(10**6), frames(300)
    assert len(pieces) == len(whole) == 800 and len(set(whole.tolist())) > 10
    assert (whole == pieces).mean() > 0.95
    assert (whole[1:] == pieces[:-1]).mean() < 0.5  # one frame aside

    padded = np.pad(waveform, 40)[None]
    features = hubert_features(padded, vocabulary)[0]
    spread = (features - features.mean(0)).norm(dim=1).mean()
    middle = hubert_features(padded[:, 170 * 640:470 * 640 + 80], vocabulary)[0]
    assert len(middle) == 300
    moved = (features[170:470] - middle).norm(dim=1) / spread
    assert moved[65:-65].max() < 0.2 and moved.max() > moved[65:-65].max()


def test_words_own_units_at_another_rate():
    frame_start = np.array([0, 3, 10, 14])
    assert word_units([0.19, 0.3], frame_start, 16, rate=50).tolist() == [0, 1, 4]  # frame 9 is in unit 1
    assert word_units([0.19, 0.3], frame_start, 16).tolist() == [0, 1, 4]  # frame 4 too
    assert word_units([0.21, 0.3], frame_start, 16, rate=50).tolist() == [0, 2, 4]  # frame 10 is not


def test_damaged_hubert_folders(tmp_path):
    _, folder = vocabulary_folder(tmp_path)
    about = json.loads((folder / "units.json").read_text())
    assert about["model"] == os.path.join("..", "hubert")

    def refused(match, **changes):
        (folder / "units.json").write_text(json.dumps(about | changes))
        with pytest.raises(ValueError, match=match) as error:
            load_units(folder)
        assert "\n" not in str(error.value)
    refused("kind is 'codec'", kind="codec")
    refused("layer is 5, the model in .* has 1 to 4", layer=5)
    refused("layer is 0", layer=0)
    refused("layer is None", layer=None)
    refused("rate is 50, the model in .*/hubert means 25", rate=50)
    refused("sample_rate is 8000", sample_rate=8000)
    refused("nowhere: not a HuBERT model", model="../nowhere")
    refused("does not fit the hash", hash="0" * 64)
    refused("units.json says 21", n_units=21)
    (folder / "units.json").write_text(json.dumps(about | dict(model=str(tmp_path / "hubert"))))
    assert load_units(folder).n_units == 20  # an absolute path will do

    from safetensors.torch import load_file, save_file
    path = tmp_path / "hubert" / "model.safetensors"
    state = load_file(path)
    name = "encoder.layers.2.attention.k_proj.weight"
    save_file({n: t for n, t in state.items() if n != name}, path, {"format": "pt"})
    refused(f"lacks {name}")
    path.write_bytes(path.read_bytes()[:1000])
    refused("not a HuBERT model that can be loaded")
    (tmp_path / "hubert" / "config.json").write_text('{"model_type": "wav2vec2"}')
    refused("model_type is 'wav2vec2'")
    (folder / "units.json").write_text("{")
    with pytest.raises(ValueError, match="not a whole unit vocabulary"):
        load_units(folder)
    with pytest.raises(ValueError, match="nothing: not a whole unit vocabulary"):
        load_units(tmp_path / "nothing")


# k-means out of a pickle

@pytest.fixture
def fake_sklearn(monkeypatch):
    """A module by the name of scikit-learn's, to pickle from; gone again when it is read."""
    for name in ("sklearn", "sklearn.cluster", "sklearn.cluster._kmeans"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    module = sys.modules["sklearn.cluster._kmeans"]
    module.KMeans = type("KMeans", (), {"__module__": module.__name__})
    yield module.KMeans


def dump(model, path, monkeypatch):
    joblib = pytest.importorskip("joblib")
    joblib.dump(model, path)
    for name in ("sklearn", "sklearn.cluster", "sklearn.cluster._kmeans"):
        monkeypatch.delitem(sys.modules, name)
    return path


@pytest.mark.parametrize("order, dtype", [("C", np.float32), ("F", np.float64)])
def test_kmeans_is_read_without_running_it(tmp_path, fake_sklearn, monkeypatch, order, dtype):
    model = fake_sklearn()
    centres = np.random.default_rng(0).standard_normal((20, 48)).astype(dtype)
    vars(model).update(n_clusters=20, cluster_centers_=np.asarray(centres, order=order), labels_=np.arange(7),
                       random_state_=np.random.RandomState(0), inertia_=np.float64(3.0), _sklearn_version="1.0.1")
    path = dump(model, tmp_path / "km.bin", monkeypatch)
    assert np.array_equal(convert.read_kmeans(path), centres)
    hubert(tmp_path / "hubert")
    argv = ["units", f"--kmeans={path}", f"--hubert={tmp_path / 'hubert'}", "--layer=3", f"--out={tmp_path / 'units'}"]
    convert.main(argv)
    vocabulary = load_units(tmp_path / "units")
    assert np.array_equal(vocabulary.centroids.numpy(), centres.astype(np.float32))
    with pytest.raises(SystemExit, match="exists already"):
        convert.main(argv)


class Runs:
    def __init__(self, function, *args):
        self.what = function, args

    def __reduce__(self):
        return self.what


@pytest.mark.parametrize("wrap", [lambda evil: evil, lambda evil: {"cluster_centers_": evil},
                                  lambda evil: np.array([evil, None], object)])
def test_a_malicious_pickle_is_refused_and_does_not_run(tmp_path, fake_sklearn, monkeypatch, wrap):
    for function, name in ((os.system, "system"), (os.mkdir, "mkdir"), (eval, "builtins.eval")):
        flag = tmp_path / f"ran-{name}"
        argument = {os.system: f"touch {flag}", os.mkdir: str(flag), eval: f"open({str(flag)!r}, 'w')"}[function]
        model = fake_sklearn()
        model.cluster_centers_ = wrap(Runs(function, argument))
        joblib = pytest.importorskip("joblib")
        joblib.dump(model, tmp_path / "km.bin")
        with pytest.raises(ValueError, match=f"names .*{name}|array of objects"):
            convert.read_kmeans(tmp_path / "km.bin")
        assert not flag.exists()
    with pytest.raises(SystemExit, match="km.bin: no centroids to read") as error:
        convert.units(tmp_path / "units", tmp_path / "km.bin", tmp_path, 3)
    assert "\n" not in str(error.value) and not (tmp_path / "units").exists()
    joblib.load(tmp_path / "km.bin")  # this one does run
    assert flag.exists()


def test_files_that_are_no_kmeans(tmp_path):
    (tmp_path / "text.bin").write_text("some text")
    (tmp_path / "list.bin").write_bytes(pickle.dumps([1, 2]))
    (tmp_path / "short.bin").write_bytes(pickle.dumps([1, 2])[:-2])
    np.save(tmp_path / "whole.npy", np.arange(6).reshape(2, 3))
    np.save(tmp_path / "nan.npy", np.full((2, 3), np.nan))
    np.save(tmp_path / "wide.npy", np.zeros((5, 47), np.float32))
    hubert(tmp_path / "hubert")
    for name, match in {"text.bin": "not an uncompressed joblib file", "list.bin": "no KMeans", "none.bin": "No such",
                        "short.bin": "not an uncompressed joblib file", "whole.npy": "not finite floats",
                        "nan.npy": "not finite floats", "wide.npy": "out: centroids have size 47, .* means 48"}.items():
        with pytest.raises(SystemExit, match=match) as error:
            convert.units(tmp_path / "out", tmp_path / name, tmp_path / "hubert", 3)
        assert "\n" not in str(error.value)
    with pytest.raises(SystemExit, match="no HubertModel"):
        convert.units(tmp_path / "out", tmp_path / "wide.npy", tmp_path / "nothing", 3)
    with pytest.raises(SystemExit, match="which file. give --hubert=PATH|which file. give --kmeans=PATH"):
        convert.main(["units"])
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["hubert"]


# mel units to waveform

TEXTS = ["The little dog ran into the barn and saw a king.", "Once there was a woman who had seven green apples.",
         "It was a cold night, and nobody heard the old bell.", "He took the bread out of the box and went home."]
VOICES = [("en-us", 180, 45), ("en-us+f1", 190, 60), ("en-gb-x-rp", 190, 45), ("en-us+m3", 200, 50)]


@pytest.fixture(scope="module")
def speaking():
    pytest.importorskip("espeakng_loader", reason="espeak-ng is not installed: pip install -e '.[speech]'")
    waveforms = [espeak(text, *who)[0] for text in TEXTS for who in VOICES]
    return waveforms, fit_mel_units([mel_frames(w) for w in waveforms], 60, 0,
                                           voices=[voice(w) for w in waveforms])


def distance(a, b):
    """
    Mel-cepstral distance in dB: per 10 ms frame the RMS over the mel channels of the difference of two log-mel spectra
    as smooth as cepstra 1 to 12 make them, each less its mean over the recording; averaged over the frames.
    """
    from scipy.fft import dct
    a, b = (dct(log_mel(w), norm="ortho")[:, 1:N_CEPSTRUM] for w in (a, b))
    difference = (a - a.mean(0)) - (b - b.mean(0))
    return 10 / np.log(10) * np.sqrt((difference**2).sum(1) / N_MEL).mean()


def test_griffin_lim_gives_the_spectrum_it_was_given(speaking):
    waveform = speaking[0][0]
    mel = np.exp(log_mel(waveform))
    magnitude = mel_to_magnitude(mel)
    assert magnitude.min() >= 0
    back = np.log(magnitude.astype(np.float64)**2 @ mel_matrix() + 1e-12)
    assert np.abs(10 / np.log(10) * (back - np.log(mel))).mean() < 0.5
    again = griffin_lim(magnitude)
    assert again.dtype == np.float32 and len(again) == len(waveform) // HOP * HOP
    assert distance(waveform, again) < 1.5
    assert np.array_equal(again, griffin_lim(magnitude))
    assert not np.array_equal(again, griffin_lim(magnitude, seed=1))
    level = np.sqrt((again**2).mean() / (waveform**2).mean())
    assert 0.8 < level < 1.25


def test_mel_units_can_be_heard_again(speaking):
    waveforms, codebook = speaking
    rng, said = np.random.default_rng(0), []
    for waveform in waveforms[::5]:
        ids, starts = codebook.encode([waveform])[0]
        durations = np.diff(np.append(starts, len(waveform) // HOP))
        again = resynthesise(ids, codebook, durations=durations)
        assert again.dtype == np.float32 and len(again) == len(waveform) // HOP * HOP
        assert np.isfinite(again).all() and np.abs(again).max() > 0.05
        order = rng.permutation(len(ids))
        shuffled = resynthesise(ids[order], codebook, durations=durations[order])
        other = (rng.standard_normal(len(again)) * 0.1).astype(np.float32)
        short = waveform[:len(again)]
        said.append([distance(short, w) for w in (again, shuffled, other, np.zeros_like(again))])
    said = np.array(said)
    assert said[:, 0].mean() < 6.5 and (said[:, 1:].mean(0) > 8).all()
    assert (said[:, 0] < 0.75 * said[:, 1:].min(1)).all()


def test_durations_are_the_mean_ones(speaking):
    waveforms, codebook = speaking
    assert len(codebook.durations) == 60 and min(codebook.durations) >= 1 and len(codebook.voice) == N_MEL
    runs = {}
    for waveform in waveforms:
        frames = [int(unit) for unit, start, end in spans(waveform, codebook) for _ in range(end - start)]
        for unit, start, end in spans(waveform, codebook):
            assert frames[start:end] == [unit] * (end - start)
            runs.setdefault(int(unit), []).append(end - start)
    for unit, lengths in runs.items():
        assert codebook.durations[unit] == pytest.approx(np.mean(lengths), abs=1e-3)
    ids = codebook.encode([waveforms[0]])[0][0]
    usual = len(resynthesise(ids, codebook))
    assert abs(usual / HOP - sum(codebook.durations[i] for i in ids)) <= 0.501
    assert np.array_equal(resynthesise(ids, codebook), resynthesise(ids.tolist(), codebook))


def spans(waveform, codebook):
    ids, starts = codebook.encode([waveform])[0]
    return list(zip(ids, starts, [*starts[1:], len(waveform) // HOP]))


def test_resynthesis_refuses_what_it_cannot_say(speaking, tmp_path):
    _, codebook = speaking
    assert len(resynthesise([], codebook)) == 0
    for ids in ([60], [-1], [1.5], [[1, 2]], ["a"]):
        with pytest.raises(ValueError, match="integers from 0 to 59"):
            resynthesise(ids, codebook)
    for durations in ([1], [1, 0]):
        with pytest.raises(ValueError, match="as many durations"):
            resynthesise([1, 2], codebook, durations=durations)
    with pytest.raises(ValueError, match="no durations and no voice"):
        resynthesise([1, 2], codebook._replace(voice=()))
    save_mel_units(tmp_path, codebook)
    about = json.loads((tmp_path / "units.json").read_text())
    del about["durations"], about["voice"]  # a folder as written before there were any
    (tmp_path / "units.json").write_text(json.dumps(about))
    old = load_units(tmp_path)
    assert old.hash == codebook.hash and (old.n_units, old.rate) == (60, 25)
    with pytest.raises(ValueError, match="no durations and no voice"):
        resynthesise([1, 2], old)


def test_command_line(speaking, tmp_path):
    soundfile = pytest.importorskip("soundfile")
    waveforms, codebook = speaking
    save_mel_units(tmp_path / "units", codebook)
    soundfile.write(tmp_path / "x.wav", waveforms[0], 16000, subtype="FLOAT")

    def run(*argv):
        return subprocess.run([sys.executable, "-m", "speech", *map(str, argv)], capture_output=True,
                              text=True, cwd=ROOT)
    done = run("units", tmp_path / "x.wav", f"--units={tmp_path / 'units'}")
    ids = json.loads(done.stdout)
    assert ids == codebook.encode([waveforms[0]])[0][0].tolist()
    (tmp_path / "x.json").write_text(done.stdout)
    done = run("say", tmp_path / "x.json", f"--units={tmp_path / 'units'}", f"--out={tmp_path / 'y.wav'}")
    waveform, rate = soundfile.read(tmp_path / "y.wav", dtype="float32")
    assert rate == 16000 and done.returncode == 0
    assert np.abs(waveform - resynthesise(ids, codebook)).max() < 1e-3
    done = run("say", tmp_path / "x.json", f"--units={tmp_path / 'none'}")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "not a whole unit vocabulary" in done.stderr


# HuBERT units to waveform: the oracle is HiFi-GAN as published, with modules, weight norm and the original names

CONFIG = dict(num_embeddings=20, embedding_dim=16, model_in_dim=16, upsample_rates=[5, 4, 4, 4, 2],
              upsample_kernel_sizes=[11, 8, 8, 8, 4], upsample_initial_channel=64, resblock_kernel_sizes=[3, 7, 11],
              resblock_dilation_sizes=[[1, 3, 5]] * 3, sampling_rate=16000, code_hop_size=640, num_mels=80,
              multispkr=None, f0=None, dur_predictor_params=dict(
                  encoder_embed_dim=16, var_pred_hidden_dim=16, var_pred_kernel_size=3, var_pred_dropout=0.5))


class OracleBlock(nn.Module):
    def __init__(self, channels, size, dilations):
        super().__init__()
        self.convs1, self.convs2 = (nn.ModuleList(
            weight_norm(nn.Conv1d(channels, channels, size, dilation=d, padding="same")) for d in dilated)
            for dilated in (dilations, [1] * len(dilations)))

    def forward(self, x):
        for first, second in zip(self.convs1, self.convs2):
            x = x + second(F.leaky_relu(first(F.leaky_relu(x, 0.1)), 0.1))
        return x


class OraclePredictor(nn.Module):
    def __init__(self, d, hidden, size):
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv1d(d, hidden, size, padding=size // 2), nn.ReLU())
        self.ln1, self.ln2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.conv2 = nn.Sequential(nn.Conv1d(hidden, hidden, size, padding=1), nn.ReLU())
        self.proj = nn.Linear(hidden, 1)

    def forward(self, x):
        x = self.ln1(self.conv1(x).transpose(1, 2)).transpose(1, 2)
        return self.proj(self.ln2(self.conv2(x).transpose(1, 2))).squeeze(2)


class OracleGenerator(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.dict = nn.Embedding(c["num_embeddings"], c["embedding_dim"])
        self.conv_pre = weight_norm(nn.Conv1d(c["model_in_dim"], c["upsample_initial_channel"], 7, padding=3))
        self.ups, self.resblocks, channels = nn.ModuleList(), nn.ModuleList(), c["upsample_initial_channel"]
        for rate, size in zip(c["upsample_rates"], c["upsample_kernel_sizes"]):
            up = nn.ConvTranspose1d(channels, channels // 2, size, rate, padding=(size - rate) // 2)
            self.ups.append(weight_norm(up))
            channels //= 2
            for block in zip(c["resblock_kernel_sizes"], c["resblock_dilation_sizes"]):
                self.resblocks.append(OracleBlock(channels, *block))
        self.conv_post = weight_norm(nn.Conv1d(channels, 1, 7, padding=3))
        p = c["dur_predictor_params"]
        self.dur_predictor = OraclePredictor(*(p[name] for name in list(p)[:3]))

    @torch.no_grad()
    def forward(self, ids, durations=None):
        x = self.dict(torch.tensor(ids)[None]).transpose(1, 2)
        frames = torch.clamp(torch.round(torch.exp(self.dur_predictor(x)) - 1).long(), min=1)[0]
        frames = frames if durations is None else torch.tensor(durations)
        x = self.conv_pre(torch.repeat_interleave(x, frames, dim=2))
        per_up = len(self.resblocks) // len(self.ups)
        for i, up in enumerate(self.ups):
            x = up(F.leaky_relu(x, 0.1))
            x = torch.stack([block(x) for block in self.resblocks[i * per_up:(i + 1) * per_up]]).mean(0)
        return torch.tanh(self.conv_post(F.leaky_relu(x)))[0, 0].numpy(), frames.tolist()


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """(oracle, checkpoint, config): a generator with random weights, saved as textlesslib's are."""
    folder = tmp_path_factory.mktemp("released")
    torch.manual_seed(0)
    oracle = OracleGenerator(CONFIG).eval()
    for name, parameter in oracle.named_parameters():
        if name.endswith("weight_g"):
            parameter.data *= torch.rand_like(parameter) + 1  # so that folding shows
        if name.startswith("dur_predictor.proj"):
            parameter.data *= 4
    torch.save({"generator": oracle.state_dict()}, folder / "g.pt")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return oracle, folder / "g.pt", folder / "config.json"


class Units(tuple):
    """A vocabulary that is nothing but its size and rate."""
    n_units, rate, sound = property(lambda self: self[0]), property(lambda self: self[1]), None


def test_vocoder_is_textlesslibs(released, tmp_path):
    oracle, checkpoint, config = released
    convert.main(["vocoder", f"--checkpoint={checkpoint}", f"--config={config}", f"--out={tmp_path / 'vocoder'}"])
    assert sorted(path.name for path in (tmp_path / "vocoder").iterdir()) == ["config.json", "model.safetensors"]
    vocoder = load_vocoder(tmp_path / "vocoder")
    assert (vocoder.n_units, vocoder.hop) == (20, 640)
    assert not any(name.endswith(("_g", "_v")) for name in vocoder.weights)
    ids = np.random.default_rng(0).integers(0, 20, 30).astype(np.uint16)
    wanted, durations = oracle(ids.astype(int))
    assert len(set(durations)) > 2 and min(durations) == 1  # the clamp and the rounding both had work
    said = resynthesise(ids, Units((20, 25)), vocoder)
    assert said.dtype == np.float32 and len(said) == 640 * sum(durations)
    np.testing.assert_allclose(said, wanted, atol=1e-5)
    assert wanted.std() > 1e-3
    given_durations = [1 + i % 3 for i in range(30)]
    said = resynthesise(ids, Units((20, 25)), vocoder, durations=given_durations)
    np.testing.assert_allclose(said, oracle(ids.astype(int), given_durations)[0], atol=1e-5)
    assert len(resynthesise([], Units((20, 25)), vocoder)) == 0
    with pytest.raises(ValueError, match="speaks 20 units of 640 samples, the vocabulary has 500 of 640"):
        resynthesise(ids, Units((500, 25)), vocoder)
    with pytest.raises(ValueError, match="the vocabulary has 20 of 320"):
        resynthesise(ids, Units((20, 50)), vocoder)
    with pytest.raises(ValueError, match="need a vocoder"):
        resynthesise(ids, Units((20, 25)))


@pytest.mark.parametrize("changes, match", [
    (dict(multispkr="_"), "multispkr is '_': vocoders with speakers"), (dict(f0=True), "f0 is True"),
    (dict(multistyle="_"), "multistyle"), (dict(embedder_params={"a": 1}), "embedder_params"),
    (dict(sampling_rate=22050), "sampling_rate is 22050, not 16000"), (dict(model_in_dim=32), "model_in_dim is 32"),
    (dict(code_hop_size=320), "code_hop_size is 320, not 640"), (dict(dur_predictor_params=None), "with durations"),
    (dict(upsample_rates=None), "with durations"), (dict(num_embeddings=21), "dict.weight has shape"),
    (dict(resblock_kernel_sizes=[3, 7], resblock_dilation_sizes=[[1, 3, 5]] * 2), "resblocks.10.convs1.0.bias has")])
def test_other_vocoders_are_refused(released, tmp_path, changes, match):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | changes))
    with pytest.raises(SystemExit, match=match) as error:
        convert.vocoder(tmp_path / "out", released[1], tmp_path / "config.json")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_damaged_vocoders(released, tmp_path):
    from safetensors.numpy import load_file, save_file
    convert.vocoder(tmp_path / "v", *released[1:])
    path = tmp_path / "v" / "model.safetensors"
    state = load_file(path)
    save_file(state | {"spkr.weight": np.zeros((3, 16), np.float32)}, path)
    with pytest.raises(ValueError, match=r"spkr.weight has shape \(3, 16\), its config means None"):
        load_vocoder(tmp_path / "v")
    save_file({name: array for name, array in state.items() if name != "ups.1.bias"}, path)
    with pytest.raises(ValueError, match=r"ups.1.bias has shape None, its config means \(16,\)"):
        load_vocoder(tmp_path / "v")
    path.write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match="not a whole vocoder"):
        load_vocoder(tmp_path / "v")
    with pytest.raises(ValueError, match="none: not a whole vocoder"):
        load_vocoder(tmp_path / "none")
    torch.save({"generator": Runs(os.mkdir, str(tmp_path / "ran"))}, tmp_path / "evil.pt")
    for file in ("evil.pt", "nothing.pt"):
        with pytest.raises(SystemExit, match="no generator to read"):
            convert.vocoder(tmp_path / "out", tmp_path / file, released[2])
    assert not (tmp_path / "ran").exists()
