"""HuBERT units against transformers, and the vocoder that speaks them against HiFi-GAN as published."""
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import weight_norm

from speech.units import collapse, load_units, n_frames, overlapping_windows, resynthesise
from speech.vocoder import Vocoder, load_vocoder
from tools import convert

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

AT_25 = dict(conv_kernel=[10, 3, 3, 3, 3, 2, 2, 2], conv_stride=[5, 2, 2, 2, 2, 2, 2, 2], conv_pos_batch_norm=True)
AT_50 = dict(conv_kernel=[10, 3, 3, 3, 3, 2, 2], conv_stride=[5, 2, 2, 2, 2, 2, 2], conv_pos_batch_norm=False)

# HuBERT units

def noise(samples, seed=0):
    """Noise whose level and colour change over time."""
    rng = np.random.default_rng(seed)
    level = np.interp(np.arange(samples) / 2000, np.arange(samples // 2000 + 2), rng.random(samples // 2000 + 2))
    white = rng.standard_normal(samples + 1)
    return (0.3 * level * (white[1:] + np.sin(np.arange(samples) / 9000) * white[:-1])).astype(np.float32)


def hubert(folder, **changes):
    """A narrow HubertModel with random weights and the layout of mHuBERT, saved in a folder."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = dict(hidden_size=48, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64,
                  initializer_range=0.05) | AT_25 | changes
    config["conv_dim"] = [24] * len(config["conv_kernel"])
    model = transformers.HubertModel(transformers.HubertConfig(**config)).eval()
    if config["conv_pos_batch_norm"]:
        norm = model.encoder.pos_conv_embed.batch_norm
        for tensor in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
            tensor.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    return model


def all_states(model, waveform):
    with torch.no_grad():
        return model(torch.as_tensor(waveform)[None], output_hidden_states=True).hidden_states


def vocabulary_folder(tmp_path, layer=3, k=20, **changes):
    """A random HuBERT and the folder of a vocabulary for it. The centroids are frames of another waveform."""
    model = hubert(tmp_path / "hubert", **changes)
    states = all_states(model, noise(160_000, 9))[layer][0]
    np.save(tmp_path / "km.npy", states[torch.linspace(0, len(states) - 1, k).long()].numpy())
    return model, convert.units(tmp_path / "units", tmp_path / "km.npy", tmp_path / "hubert", layer)


def assert_equal_units(ours, wanted):
    for our, want in zip(ours, wanted, strict=True):
        assert our.dtype == want.dtype and our.tolist() == want.tolist()


@pytest.mark.parametrize("layer, hop, changes", [
    (3, 640, {}), (4, 640, {}), (3, 320, AT_50),
    (2, 640, dict(do_stable_layer_norm=True, feat_extract_norm="layer"))])
def test_hubert_units_are_those_of_transformers(tmp_path, layer, hop, changes):
    """The oracle runs the whole model and computes the Euclidean distances one by one, in float64."""
    model, folder = vocabulary_folder(tmp_path, layer, **changes)
    vocabulary, waveform = load_units(folder), noise(30_123)
    states = all_states(model, np.pad(waveform, 40))[layer][0]
    frames = torch.cdist(states.double(), torch.tensor(np.load(folder / "centroids.npy")).double()).argmin(1).numpy()
    assert len(frames) == n_frames(len(waveform), vocabulary)
    assert len(set(frames.tolist())) >= 5
    assert_equal_units(vocabulary.encode([waveform])[0], collapse(frames))
    assert len(vocabulary.model.encoder.layers) == layer  # the layers above are not run


def test_a_batch_gives_the_units_of_one_at_a_time(tmp_path):
    vocabulary = load_units(vocabulary_folder(tmp_path)[1])
    waveforms = [noise(n, i) for i, n in enumerate((20_000, 33_000, 500, 639, 640, 20_001, 33_000, 20_639, 0, 20_000))]
    for waveform, together in zip(waveforms, vocabulary.encode(waveforms), strict=True):
        assert_equal_units(together, vocabulary.encode([waveform])[0])
        assert (len(together[0]) > 0) == (len(waveform) >= vocabulary.hop)  # one frame for each whole hop


def test_waveforms_are_normalised_only_if_the_vocabulary_says_so(tmp_path):
    plain, waveform = load_units(vocabulary_folder(tmp_path, feat_extract_norm="layer")[1]), noise(30_000)
    normalised = (waveform - waveform.mean()) / np.sqrt(waveform.var() + 1e-7)
    wanted = plain.encode([normalised])[0]
    assert_equal_units(plain._replace(normalize=True).encode([waveform])[0], wanted)
    assert plain.encode([waveform])[0][0].tolist() != wanted[0].tolist()


def test_windows_do_not_change_units_of_a_model_that_sees_no_further_than_the_margin(tmp_path):
    """Without attention, a frame depends on 64 frames on each side, through the positional convolution."""
    vocabulary = load_units(vocabulary_folder(tmp_path, feat_extract_norm="layer")[1])
    for layer in vocabulary.model.encoder.layers:
        for parameter in layer.attention.out_proj.parameters():
            parameter.zero_()
    waveform = noise(640 * 437 + 600)
    assert [kept for *_, kept, _ in overlapping_windows(437, 180, 65)] == [0, 115, 165, 215, 265, 315, 322]
    [whole] = vocabulary.encode([waveform])
    assert_equal_units(vocabulary._replace(window=180, margin=65).encode([waveform])[0], whole)
    [without_margin] = vocabulary._replace(window=180, margin=0).encode([waveform])
    assert without_margin[0].tolist() != whole[0].tolist()


@pytest.mark.parametrize("changes, message", [
    (dict(layer=5), "layer is 5, but the model in .* has layers 1 to 4"), (dict(rate=50), "rate is 50, .* needs 25"),
    (dict(sample_rate=8000), "sample_rate is 8000"), (dict(model="../nowhere"), "nowhere: not a HubertModel")])
def test_vocabularies_that_do_not_fit_their_model_are_refused(tmp_path, changes, message):
    folder = vocabulary_folder(tmp_path)[1]
    about = json.loads((folder / "units.json").read_text())
    (folder / "units.json").write_text(json.dumps(about | changes))
    with pytest.raises(ValueError, match=message):
        load_units(folder)


# the vocoder

CONFIG = dict(num_embeddings=20, embedding_dim=16, model_in_dim=16, upsample_rates=[5, 4, 4, 4, 2],
              upsample_kernel_sizes=[11, 8, 8, 8, 4], upsample_initial_channel=64, resblock_kernel_sizes=[3, 7, 11],
              resblock_dilation_sizes=[[1, 3, 5]] * 3, sampling_rate=16000, code_hop_size=640, num_mels=80,
              multispkr=None, f0=None, dur_predictor_params=dict(
                  encoder_embed_dim=16, var_pred_hidden_dim=16, var_pred_kernel_size=3, var_pred_dropout=0.5))


@torch.no_grad()
def as_published(state, ids, durations=None):
    """The oracle: HiFi-GAN V1 on the tensors of textlesslib's checkpoint. Returns (samples, durations)."""
    def conv(x, name, function=F.conv1d, **options):
        weight = torch._weight_norm(state[f"{name}.weight_v"], state[f"{name}.weight_g"], 0)
        return function(x, weight, state[f"{name}.bias"], **options)

    x = state["dict.weight"][torch.tensor(ids)].T[None]                                   # [1, d, n]
    y, predictor = x, {name.removeprefix("dur_predictor."): tensor for name, tensor in state.items()}
    for i in "12":
        y = F.relu(F.conv1d(y, predictor[f"conv{i}.0.weight"], predictor[f"conv{i}.0.bias"], padding=1)).mT
        y = F.layer_norm(y, y.shape[-1:], predictor[f"ln{i}.weight"], predictor[f"ln{i}.bias"]).mT
    log_frames = F.linear(y.mT, predictor["proj.weight"], predictor["proj.bias"])[0, :, 0]  # of 1 + the duration
    predicted = (log_frames.exp() - 1).round().long().clamp(min=1)
    durations = predicted if durations is None else torch.tensor(durations)
    x = conv(x.repeat_interleave(durations, dim=2), "conv_pre", padding=3)
    for i, (rate, size) in enumerate([(5, 11), (4, 8), (4, 8), (4, 8), (2, 4)]):
        x = conv(F.leaky_relu(x, 0.1), f"ups.{i}", F.conv_transpose1d, stride=rate, padding=(size - rate) // 2)
        outputs = []
        for j in range(3):
            y, block = x, f"resblocks.{3 * i + j}"
            for k, dilation in enumerate([1, 3, 5]):
                z = conv(F.leaky_relu(y, 0.1), f"{block}.convs1.{k}", dilation=dilation, padding="same")
                y = y + conv(F.leaky_relu(z, 0.1), f"{block}.convs2.{k}", padding="same")
            outputs.append(y)
        x = torch.stack(outputs).mean(0)
    return torch.tanh(conv(F.leaky_relu(x), "conv_post", padding=3))[0, 0].numpy(), durations.tolist()


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """(checkpoint, config) of a generator with random weights, saved as textlesslib's are, with weight norm."""
    folder = tmp_path_factory.mktemp("released")
    torch.manual_seed(0)
    generator = Vocoder(CONFIG)
    generator.dur_predictor.proj.weight.data *= 4
    for name, module in generator.named_modules():
        if isinstance(module, nn.Conv1d | nn.ConvTranspose1d) and "dur_predictor" not in name:
            weight_norm(module).weight_g.data *= 1 + torch.rand_like(module.weight_g)  # |v| is not g any more
    torch.save({"generator": generator.state_dict()}, folder / "g.pt")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder / "g.pt", folder / "config.json"


def test_the_vocoder_speaks_as_textlesslib(released, tmp_path):
    checkpoint, config = released
    convert.main(["vocoder", f"--checkpoint={checkpoint}", f"--config={config}", f"--out={tmp_path / 'vocoder'}"])
    vocoder = load_vocoder(tmp_path / "vocoder")
    ids = np.random.default_rng(0).integers(0, 20, 30).astype(np.uint16)
    units = SimpleNamespace(n_units=20, rate=25, sound=None)
    state = torch.load(checkpoint)["generator"]
    wanted, predicted = as_published(state, ids.astype(int))
    assert len(set(predicted)) > 2 and min(predicted) == 1 and wanted.std() > 1e-3  # rounding and clamping matter
    waveform = resynthesise(ids, units, vocoder)
    assert waveform.dtype == np.float32 and len(waveform) == 640 * sum(predicted)
    np.testing.assert_allclose(waveform, wanted, atol=1e-5)
    durations = [1, 2, 3] * 10
    waveform = resynthesise(ids, units, vocoder, durations=durations)
    np.testing.assert_allclose(waveform, as_published(state, ids.astype(int), durations)[0], atol=1e-5)
    with pytest.raises(ValueError, match="the vocoder speaks 20 units of 640 samples"):
        resynthesise(ids, SimpleNamespace(n_units=20, rate=50, sound=None), vocoder)


class Runs:
    """When it is unpickled, it calls a function."""
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("changes, weights, message", [
    (dict(multispkr="_"), {}, "multispkr is '_'"), (dict(sampling_rate=22050), {}, "sampling_rate is 22050"),
    (dict(num_embeddings=21), {}, "dict.weight"), ({}, {"dict.weight": torch.ones(20, 16) * np.inf}, "not finite"),
    ({}, {"spkr.weight": torch.zeros(3, 16)}, "spkr.weight"), ({}, Runs(os.mkdir, "ran"), "g.pt: cannot")])
def test_other_vocoders_are_refused_and_not_run(released, tmp_path, monkeypatch, changes, weights, message):
    monkeypatch.chdir(tmp_path)
    if isinstance(weights, dict):
        weights = torch.load(released[0])["generator"] | weights
    torch.save({"generator": weights}, "g.pt")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | changes))
    with pytest.raises(SystemExit, match=message) as error:
        convert.vocoder("out", "g.pt", "config.json")
    assert "\n" not in str(error.value) and sorted(os.listdir()) == ["config.json", "g.pt"]
