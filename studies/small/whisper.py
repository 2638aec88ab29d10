"""
Units from k-means over a middle layer of Whisper's encoder (Radford et al. 2022).

They stand in for HuBERT units, and are more phonetic than mel cepstra (studies/small/README.md). Pairs of the encoder's
50 Hz frames are averaged to 25 Hz. Layer i is the output of block i, each frame normalised to mean 0 and variance 1.
Whisper was trained on windows of 30 s. Shorter recordings are not padded to that length here, which saves half of the
work and changes the lower layers little.

The settings were chosen with 500 units on four minutes of passages under the demo's hiss, in eight voices, and fitted
on 45 minutes. Phone purity and units per second after runs are collapsed (25 before):

    layer 3, as it is                                          0.569   23.8
    each channel standardised                                  0.579   23.7
    each frame normalised (chosen)                             0.591   23.9
    and a penalty of 0.3 mean distances for each change        0.592   19.9   (chosen)
"""
import functools
import json
import os
import reprlib
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from runtime.files import read_json, read_tensors, reading
from speech import units
from speech.audio import SAMPLE_RATE
from speech.mel import PER_UNIT, MelUnits, load_mel_units, mel_frames, save_mel_units, voice
from speech.units import HOP, UNIT_RATE

PENALTY = 0.3  # for a change of unit, in mean squared distances to the nearest centroid
WINDOW, MARGIN = 750, 125  # 40 ms frames: 30 s, all positions that the encoder has, and 5 s on either side
SAMPLE = 100_000  # frames for k-means


class WhisperUnits(NamedTuple):
    """A unit vocabulary; see speech/units.py."""
    weights: dict  # name -> float32 tensor, of the encoder up to the layer that is read
    heads: int
    layer: int
    centroids: torch.Tensor  # float32 [k, d], on the device of the weights
    penalty: float  # added to the squared distances wherever the unit changes
    hash: str  # SHA-256 of the centroids
    sound: MelUnits | None = None  # the mean mel features of each unit, to speak with

    n_units = property(lambda self: len(self.centroids))
    rate = UNIT_RATE

    def encode(self, waveforms):
        return [units.collapse(whisper_frame_units(whisper_frames(w, self), self)) for w in waveforms]


def load_whisper(folder, layer, device="cpu"):
    """
    WhisperUnits without centroids, to be fitted. ValueError if the folder is damaged or has no such layer.

    folder: a Whisper in the format of transformers, with config.json and model.safetensors. Only the encoder is read.
    """
    path = os.path.join(folder, "model.safetensors")
    config, tensors = read_json(os.path.join(folder, "config.json")), read_tensors(path)
    layers = config.get("encoder_layers")
    if type(layers) is not int or type(layer) is not int or not 1 <= layer <= layers:
        raise ValueError(f"{folder}: layer is {reprlib.repr(layer)}, this Whisper has 1 to {reprlib.repr(layers)}")
    needed = ("conv1.", "conv2.", "embed_positions.", *(f"layers.{i}." for i in range(layer)))
    names = {name: name.removeprefix("model.").removeprefix("encoder.") for name in tensors}
    weights = {ours: tensors[name].float().to(device) for name, ours in names.items() if ours.startswith(needed)}
    with reading(path, "not the encoder of a Whisper; get the model again"):
        d, n_mels, _ = weights["conv1.weight"].shape
        if len(weights["embed_positions.weight"]) != 2 * WINDOW:
            raise ValueError(f"it has no positions for {2 * WINDOW} frames")
        none = torch.zeros(0, d, device=device)
        whisper = WhisperUnits(weights, config["encoder_attention_heads"], layer, none, penalty=0.0, hash="")
        encode_mel(torch.zeros(1, n_mels, 8, device=device), whisper)  # fails if a weight is missing or does not fit
    return whisper


def load_whisper_units(folder, device="cpu"):
    """The vocabulary that save_whisper_units() wrote into a folder. ValueError if it is damaged."""
    about, centroids = units.read_vocabulary(folder, "whisper")
    whisper = load_whisper(units.model_folder(folder, about), about.get("layer"), device)
    penalty, sound = about.get("penalty"), os.path.join(folder, "sound")
    if centroids.shape[1] != whisper.centroids.shape[1] or type(penalty) not in (int, float) or not 0 <= penalty <= 1e9:
        raise ValueError(f"{folder}: units.json does not fit its Whisper; fit the units again")
    return whisper._replace(centroids=torch.from_numpy(centroids).to(device), penalty=penalty, hash=about["hash"],
                            sound=load_mel_units(sound) if os.path.isdir(sound) else None)


def save_whisper_units(folder, model, vocabulary):
    """
    Write units.json, centroids.npy [n_units, d] and sound/ into a new or existing folder.

    model: the folder of the Whisper. units.json names it relative to its own folder.
    """
    os.makedirs(folder, exist_ok=True)
    if vocabulary.sound:
        save_mel_units(os.path.join(folder, "sound"), vocabulary.sound)
    np.save(os.path.join(folder, "centroids.npy"), vocabulary.centroids.cpu().numpy())
    about = dict(kind="whisper", n_units=vocabulary.n_units, rate=UNIT_RATE, sample_rate=SAMPLE_RATE,
                 model=os.path.relpath(os.path.realpath(model), os.path.realpath(folder)), layer=vocabulary.layer,
                 penalty=vocabulary.penalty, hash=vocabulary.hash)
    with open(os.path.join(folder, "units.json"), "w") as file:
        json.dump(about, file, indent=1)


@functools.cache
def feature_extractor(n_mels):
    from transformers import WhisperFeatureExtractor
    return WhisperFeatureExtractor(feature_size=n_mels)


def whisper_frames(waveform, whisper):
    """
    Features of a 16 kHz waveform of any length, tensor float32 [n // HOP, d].

    Two frames of the encoder, which are centred at 0 and 20 ms, make one of 40 ms. The first 10 ms of the waveform are
    dropped, so that both lie around the middle of the 40 ms.
    """
    waveform, d = np.asarray(waveform, np.float32), whisper.centroids.shape[1]
    waveform = np.append(waveform[HOP // 4:], np.zeros(min(HOP // 4, len(waveform)), np.float32))
    extract = functools.partial(feature_extractor(whisper.weights["conv1.weight"].shape[1]), padding=False,
                                sampling_rate=SAMPLE_RATE, return_tensors="np")
    pieces = []
    for start, end, a, b in units.overlapping_windows(len(waveform) // HOP, WINDOW, MARGIN):
        if end > start:
            mel = torch.from_numpy(extract(waveform[start * HOP:end * HOP])["input_features"])
            pieces.append(encode_mel(mel.to(whisper.centroids.device), whisper)[a - start:b - start])
    return torch.cat(pieces) if pieces else torch.zeros(0, d)


@torch.inference_mode()
def encode_mel(mel, whisper):
    """The encoder up to the layer that is read. mel: [1, n_mels, 4 n], at most 30 s -> [n, d], normalised."""
    w, d = whisper.weights, whisper.centroids.shape[1]

    def linear(x, name):
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))  # keys have no bias

    def norm(x, name):
        return F.layer_norm(x, (d,), w[f"{name}.weight"], w[f"{name}.bias"])

    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        x = F.gelu(F.conv1d(mel, w["conv1.weight"], w["conv1.bias"], padding=1))
        x = F.gelu(F.conv1d(x, w["conv2.weight"], w["conv2.bias"], stride=2, padding=1))  # [1, d, 2 n]
        x = x[0].T + w["embed_positions.weight"][:x.size(2)]                              # [2 n, d]
        for block in (f"layers.{i}" for i in range(whisper.layer)):
            h = norm(x, f"{block}.self_attn_layer_norm")
            q, k, v = (linear(h, f"{block}.self_attn.{part}_proj").view(len(h), whisper.heads, -1).transpose(0, 1)
                       for part in "qkv")                                                 # [heads, 2 n, d / heads]
            h = F.scaled_dot_product_attention(q[None], k[None], v[None])[0].transpose(0, 1).reshape(len(h), d)
            x = x + linear(h, f"{block}.self_attn.out_proj")
            h = F.gelu(linear(norm(x, f"{block}.final_layer_norm"), f"{block}.fc1"))
            x = x + linear(h, f"{block}.fc2")
        return F.layer_norm(x.view(-1, 2, d).mean(1), (d,))


def whisper_frame_units(frames, vocabulary):
    """The unit of each 40 ms frame, int64 [n], of whisper_frames()."""
    if len(frames) == 0:
        return np.zeros(0, np.int64)
    cost = units.squared_distances(frames.cpu().numpy(), vocabulary.centroids.cpu().numpy())
    return units.cheapest_path(cost, vocabulary.penalty)


def fit_whisper_units(recordings, waveforms, k, seed, whisper):
    """
    A vocabulary of k units by k-means on a random sample of frames. The same seed gives the same units.

    recordings: whisper_frames() of each waveform; whisper: from load_whisper().
    """
    frames = torch.cat(recordings).cpu().numpy()
    rng = np.random.default_rng(seed)
    frames = frames[rng.permutation(len(frames))[:SAMPLE]]
    centroids = units.kmeans(frames, k, rng, iterations=25)
    penalty = PENALTY * float(units.squared_distances(frames, centroids).min(1).mean())
    fitted = whisper._replace(centroids=torch.from_numpy(centroids).to(whisper.centroids.device), penalty=penalty,
                              hash=units.vocabulary_hash(centroids))
    frame_ids = [whisper_frame_units(frames, fitted) for frames in recordings]
    return fitted._replace(sound=sound_of_units(frame_ids, waveforms, k))


def sound_of_units(frame_ids, waveforms, k):
    """MelUnits with the mean mel features of each unit. frame_ids: the unit of each frame, for each waveform."""
    sums, counts = np.zeros((k, mel_frames(waveforms[0]).shape[1])), np.zeros((k, 1))
    for ids, waveform in zip(frame_ids, waveforms):
        np.add.at(sums, ids, mel_frames(waveform)[PER_UNIT // 2::PER_UNIT][:len(ids)])
        np.add.at(counts, ids, 1)
    centroids = (sums / np.maximum(counts, 1)).astype(np.float32)
    mean_voice = np.mean([voice(waveform) for waveform in waveforms], 0).astype(float).round(4)
    durations = units.run_lengths(frame_ids, k)
    return MelUnits(centroids, 0.0, units.vocabulary_hash(centroids), durations, tuple(mean_voice.tolist()))
