"""
Units from k-means over a layer of Whisper's encoder.
"""

import functools
import json
import os
import reprlib
from typing import NamedTuple

import numpy as np

from runtime.files import read_json, read_tensors
from speech.audio import SAMPLE_RATE
from speech.mel import N_CEPSTRUM, STEP, MelUnits, load_mel_units, mel_frames, save_mel_units, voice
from speech.units import (
    HOP,
    UNIT_RATE,
    cheapest_path,
    collapse,
    kmeans,
    model_folder,
    overlapping_windows,
    read_vocabulary,
    run_lengths,
    squared_distances,
    vocabulary_hash,
)

#
# k-means over a middle layer of Whisper's encoder (Radford et al. 2022), pairs of its 50 Hz frames averaged: where
# there is no HuBERT, more phonetic than mel cepstra (studies/small/corpus.py). Layer i is the output of block i, each frame
# normalised to mean 0 and variance 1. Whisper was trained on 30 s windows; shorter ones are not padded here, for what
# follows a frame changes its lower layers little, and half the work is saved.
#
# What was tried: 500 units, four minutes of passages under the demo's hiss from eight voices, fitted on 45; phone
# purity, and units that are left when runs are collapsed, of 25 a second. Layer 3 as it is 0.569, 23.8; each channel
# standardised 0.579, 23.7; frames normalised (chosen) 0.591, 23.9; with a penalty on changes of 0.3 mean distances,
# as for mel units: 0.592, 19.9.

WHISPER_PENALTY = 0.3  # of a change of unit, in mean squared distances to the nearest centroid
WHISPER_WINDOW, WHISPER_MARGIN = 750, 125  # frames: 30 s, the positions that it has, less 5 s on either side


class WhisperUnits(NamedTuple):
    weights: dict  # name -> tensor of the encoder, blocks above the one that is read left out
    heads: int
    layer: int
    centroids: object  # tensor float32 [k, d] on the weights' device
    penalty: float  # as of MelUnits
    hash: str
    sound: MelUnits | None = None  # the mean mel features of each unit: to speak with, where there is no vocoder

    n_units = property(lambda self: len(self.centroids))
    rate = UNIT_RATE

    def encode(self, waveforms):
        """Units of 16 kHz waveforms: (ids uint16 without repeats, the first 40 ms frame of each, int64) for each."""
        return [collapse(whisper_frame_units(whisper_frames(w, self), self)) for w in waveforms]


def load_whisper(folder, layer, device="cpu"):
    """
    WhisperUnits without centroids, to fit them, from a folder of transformers' Whisper: config.json, model.safetensors,
    of which only the encoder is read. ValueError (one line).
    """
    import torch

    path = os.path.join(folder, "model.safetensors")
    config, tensors = read_json(os.path.join(folder, "config.json")), read_tensors(path)
    d, heads, layers, mels = (config.get(key) for key in ("d_model", "encoder_attention_heads", "encoder_layers",
                                                          "num_mel_bins"))
    if not all(type(n) is int and n > 0 for n in (d, heads, layers, mels)) or d % heads or mels not in (80, 128):
        raise ValueError(f"{folder}: config.json is not a Whisper's")
    if type(layer) is not int or not 1 <= layer <= layers:
        raise ValueError(f"{folder}: layer is {reprlib.repr(layer)}, this Whisper has 1 to {layers}")
    shapes = {"conv1.weight": (d, mels, 3), "conv1.bias": (d,), "conv2.weight": (d, d, 3), "conv2.bias": (d,),
              "embed_positions.weight": (2 * WHISPER_WINDOW, d)}
    for i in range(layer):
        for part, out, into in (("self_attn.q_proj", d, d), ("self_attn.k_proj", d, d), ("self_attn.v_proj", d, d),
                                ("self_attn.out_proj", d, d), ("fc1", 4 * d, d), ("fc2", d, 4 * d),
                                ("self_attn_layer_norm", d, 0), ("final_layer_norm", d, 0)):
            shapes[f"layers.{i}.{part}.weight"] = (out, into) if into else (out,)
            if part != "self_attn.k_proj":  # keys have no bias
                shapes[f"layers.{i}.{part}.bias"] = (out,)
    named = {name.removeprefix("model.").removeprefix("encoder."): tensor for name, tensor in tensors.items()
             if "decoder." not in name}
    for name, shape in shapes.items():
        if name not in named or tuple(named[name].shape) != shape:
            there = list(named[name].shape) if name in named else "missing"
            raise ValueError(f"{path}: encoder.{name} is {there}, not {list(shape)}; get the model again")
    weights = {name: named[name].float().to(device) for name in shapes}
    return WhisperUnits(weights, heads, layer, torch.zeros(0, d, device=device), 0.0, "")


def load_whisper_units(folder, device="cpu"):
    """
    The Whisper vocabulary in a folder, as save_whisper_units() writes it: units.json {kind: "whisper", model: folder of
    a Whisper, relative to this one or absolute, layer, penalty, n_units, rate, hash}, centroids.npy [n_units, d], and
    sound/, a folder of mel units, one for each. ValueError (one line) for a damaged folder.
    """
    import torch

    about, centroids = read_vocabulary(folder, "whisper")
    vocabulary = load_whisper(model_folder(folder, about), about.get("layer"), device)
    if about.get("rate") != UNIT_RATE or centroids.shape[1] != vocabulary.centroids.shape[1]:
        raise ValueError(f"{folder}: rate {reprlib.repr(about.get('rate'))} and centroids of size {centroids.shape[1]} "
                         f"are not {UNIT_RATE} and {vocabulary.centroids.shape[1]}, as its Whisper means")
    penalty = about.get("penalty")
    if type(penalty) not in (int, float) or not 0 <= penalty <= 1e9:
        raise ValueError(f"{folder}: penalty in units.json is {reprlib.repr(penalty)}; fit the units again")
    path = os.path.join(folder, "sound")
    sound = load_mel_units(path) if os.path.isdir(path) else None
    if sound and sound.n_units != len(centroids):
        raise ValueError(f"{path}: {sound.n_units} units, not {len(centroids)}; fit the units again")
    return vocabulary._replace(centroids=torch.from_numpy(centroids).to(device), penalty=penalty, hash=about["hash"],
                               sound=sound)


def save_whisper_units(folder, model, vocabulary):
    """Writes centroids.npy, units.json and sound/ into a new or existing folder. model: the folder of the Whisper."""
    os.makedirs(folder, exist_ok=True)
    if vocabulary.sound:
        save_mel_units(os.path.join(folder, "sound"), vocabulary.sound)
    np.save(os.path.join(folder, "centroids.npy"), vocabulary.centroids.cpu().numpy())
    about = dict(kind="whisper", n_units=vocabulary.n_units, rate=UNIT_RATE, sample_rate=SAMPLE_RATE,
                 model=os.path.relpath(os.path.realpath(model), os.path.realpath(folder)), layer=vocabulary.layer,
                 penalty=vocabulary.penalty, hash=vocabulary.hash)
    with open(os.path.join(folder, "units.json"), "w") as file:
        json.dump(about, file, indent=1)


def whisper_features(waveform, vocabulary):
    """16 kHz waveform [n] of up to 30 s -> tensor float32 [n // HOP, d] on the device."""
    import torch
    from torch.nn import functional as F

    w, d = vocabulary.weights, vocabulary.centroids.shape[1]
    mel = whisper_mel(w["conv1.weight"].shape[1])(
        waveform[:len(waveform) // HOP * HOP], sampling_rate=SAMPLE_RATE, padding=False, return_tensors="np")

    def linear(x, name):
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def norm(x, name):
        return F.layer_norm(x, (d,), w[f"{name}.weight"], w[f"{name}.bias"])

    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        x = torch.from_numpy(mel["input_features"]).to(vocabulary.centroids.device)        # [1, mels, 4 frames]
        x = F.gelu(F.conv1d(x, w["conv1.weight"], w["conv1.bias"], padding=1))
        x = F.gelu(F.conv1d(x, w["conv2.weight"], w["conv2.bias"], stride=2, padding=1))   # [1, d, 2 frames]
        x = x[0].T + w["embed_positions.weight"][:x.size(2)]
        for name in (f"layers.{i}" for i in range(vocabulary.layer)):
            h = norm(x, f"{name}.self_attn_layer_norm")
            q, k, v = (linear(h, f"{name}.self_attn.{p}_proj").view(len(h), vocabulary.heads, -1).transpose(0, 1)
                       for p in "qkv")                                               # [heads, 2 frames, d / heads]
            h = F.scaled_dot_product_attention(q[None], k[None], v[None])[0].transpose(0, 1).reshape(len(h), d)
            x = x + linear(h, f"{name}.self_attn.out_proj")
            x = x + linear(F.gelu(linear(norm(x, f"{name}.final_layer_norm"), f"{name}.fc1")), f"{name}.fc2")
        return F.layer_norm(x.view(-1, 2, d).mean(1), (d,))


@functools.cache
def whisper_mel(n_mels):
    try:
        from transformers import WhisperFeatureExtractor
    except ImportError:
        raise RuntimeError("transformers is missing: pip install 'smoltolk[speech]'") from None
    return WhisperFeatureExtractor(feature_size=n_mels)


def whisper_frames(waveform, vocabulary):
    """
    Features of a 16 kHz waveform of any length, tensor float32 [n // HOP, d]. Two of the encoder's frames, which look
    at 0 and 20 ms, make one of 40 ms: 10 ms are taken off at the start, so that they lie about its middle.
    """
    import torch

    waveform, d = np.asarray(waveform, np.float32), vocabulary.centroids.shape[1]
    waveform = np.append(waveform[HOP // 4:], np.zeros(min(HOP // 4, len(waveform)), np.float32))
    pieces = [whisper_features(waveform[start * HOP:end * HOP], vocabulary)[a - start:b - start]
              for start, end, a, b in overlapping_windows(len(waveform) // HOP, WHISPER_WINDOW, WHISPER_MARGIN)
              if end > start]
    return torch.cat(pieces) if pieces else torch.zeros(0, d)


def fit_whisper_units(recordings, waveforms, k, seed, vocabulary, sample=100_000, iterations=25):
    """A vocabulary of k units. recordings: whisper_frames() of each waveform; vocabulary: from load_whisper()."""
    import torch

    frames = torch.cat(recordings).cpu().numpy()
    rng = np.random.default_rng(seed)
    frames = frames[rng.permutation(len(frames))[:sample]]
    centroids = kmeans(frames, k, rng, iterations)
    penalty = WHISPER_PENALTY * float(squared_distances(frames, centroids).min(1).mean())
    tensor = torch.from_numpy(centroids).to(vocabulary.centroids.device)
    fitted = vocabulary._replace(centroids=tensor, penalty=penalty, hash=vocabulary_hash(centroids))
    ids = [whisper_frame_units(frames, fitted) for frames in recordings]
    return fitted._replace(sound=sound_of_units(ids, waveforms, k))


def sound_of_units(frame_ids, waveforms, k):
    """MelUnits with the mean mel features of any units. frame_ids: the unit of each frame of each waveform."""
    sums, counts = np.zeros((k, 2 * N_CEPSTRUM)), np.zeros((k, 1))
    for ids, waveform in zip(frame_ids, waveforms):
        np.add.at(sums, ids, mel_frames(waveform)[HOP // STEP // 2::HOP // STEP][:len(ids)])
        np.add.at(counts, ids, 1)
    centroids = (sums / np.maximum(counts, 1)).astype(np.float32)
    mean_voice = np.mean([voice(waveform) for waveform in waveforms], 0).astype(float).round(4)
    return MelUnits(centroids, 0.0, vocabulary_hash(centroids), run_lengths(frame_ids, k), tuple(mean_voice.tolist()))


def whisper_frame_units(frames, vocabulary):
    """The unit of each 40 ms frame, int64 [n], of whisper_frames()."""
    if len(frames) == 0:
        return np.zeros(0, np.int64)
    cost = squared_distances(frames.cpu().numpy(), vocabulary.centroids.cpu().numpy())
    return cheapest_path(cost, vocabulary.penalty)
