"""
Unit vocabularies: what all kinds have in common.

A unit vocabulary turns waveforms into units. It is stored in a folder, which `load_units` opens. A vocabulary of any of
the KINDS is an object with

    n_units              the number of units, which are numbered from 0
    rate                 frames per second, before runs of the same unit are collapsed to one
    hash                 SHA-256 of the centroids, which identifies the vocabulary in data sets and checkpoints
    encode(waveforms)    (ids, frame_start) for each float32 waveform at 16 kHz: ids uint16 [n] without repeats,
                         and the frame in which each unit begins, int64 [n]
    sound                an object that speaks the units, or None if they need a vocoder (speech/vocoder.py)

`sound` and every vocoder have a method speak(ids, durations), which returns a float32 waveform at 16 kHz. ids are int64
[n]. durations are int64 [n] in frames, or None: then `sound` uses mean durations, and a vocoder predicts them.
"""
import hashlib
import importlib
import os
import reprlib

import numpy as np

from runtime.files import read_array, read_json
from runtime.hub import local_folder
from speech.audio import SAMPLE_RATE

UNIT_RATE = 25
HOP = SAMPLE_RATE // UNIT_RATE  # 640 samples per unit frame
KINDS = dict(mel="speech.mel", hubert="speech.hubert", whisper="studies.small.whisper")  # imported when needed


def load_units(folder, device="cpu"):
    """Open the unit vocabulary in a folder. Raises ValueError if the folder is damaged."""
    folder = local_folder(folder)
    kind = read_vocabulary(folder)[0]["kind"]
    return getattr(importlib.import_module(KINDS[kind]), f"load_{kind}_units")(folder, device)


def read_vocabulary(folder, kind=None):
    """
    Read the files that all kinds have: (the dict in units.json, centroids float32 [n_units, d]).

    kind: one of KINDS, or None for any. Raises ValueError if a file is missing or damaged, or if the kind differs.
    """
    folder = local_folder(folder)
    path = os.path.join(folder, "units.json")
    try:
        about = read_json(path)
        centroids = np.array(read_array(os.path.join(folder, "centroids.npy")))
    except ValueError as error:
        raise ValueError(f"{folder}: not a whole unit vocabulary ({error}); make it again") from None
    found, size = about.get("kind"), about.get("n_units")
    if found not in ([kind] if kind else list(KINDS)):
        raise ValueError(f"{path}: kind is {reprlib.repr(found)}, not {kind or ', '.join(KINDS)!r}")
    if centroids.ndim != 2 or centroids.dtype != np.float32 or not 0 < len(centroids) == size < 1 << 16:
        raise ValueError(f"{folder}: centroids.npy is {centroids.dtype} {list(centroids.shape)}, units.json says "
                         f"{reprlib.repr(size)}")
    if vocabulary_hash(centroids) != about.get("hash"):
        raise ValueError(f"{folder}: centroids.npy does not fit the hash in units.json; make the data set again")
    return about, centroids


def vocabulary_hash(centroids):
    """SHA-256 of the centroids, in hex."""
    return hashlib.sha256(np.ascontiguousarray(centroids, "<f4").tobytes()).hexdigest()


def model_folder(folder, about):
    """The path of the model that units.json (read as `about`) names. Raises ValueError if it names none."""
    model = about.get("model")
    if not isinstance(model, str) or not model.isprintable() or len(model) > 1000:
        raise ValueError(f"{folder}: model in units.json is no folder")
    return local_folder(model) if model.startswith("hf:") else os.path.normpath(
        os.path.join(os.path.realpath(folder), model))


def n_frames(n_samples, vocabulary):
    """The number of frames in n_samples, before runs are collapsed."""
    return n_samples // (SAMPLE_RATE // vocabulary.rate)


def collapse(frame_units):
    """Collapse each run of the same unit to one unit: (ids uint16 [n], the frame where each run starts, int64 [n])."""
    frame_units = np.asarray(frame_units)
    first = np.ones(len(frame_units), bool)
    first[1:] = frame_units[1:] != frame_units[:-1]
    return frame_units[first].astype(np.uint16), np.flatnonzero(first)


def run_lengths(frame_ids, k):
    """The mean number of frames in a run of each of k units, as a tuple. It is 1 for a unit that does not occur."""
    total, runs = np.zeros(k), np.zeros(k)
    for frames in frame_ids:
        ids, frame_start = collapse(frames)
        total += np.bincount(ids, np.diff(np.append(frame_start, len(frames))), k)
        runs += np.bincount(ids, minlength=k)
    return tuple(np.maximum(total / np.maximum(runs, 1), 1).round(3).tolist())


def word_units(ends, frame_start, n_frames, rate=UNIT_RATE):
    """
    Assign units to words. Returns offsets, int64 [n_words + 1]: word i has the units offsets[i] to offsets[i + 1].

    ends: the end of each word in seconds; frame_start: from encode(); n_frames: before runs are collapsed.
    A word gets the frames between the end of the word before it and its end, so a pause belongs to the word after it.
    The last word also gets all later frames. A unit that spans two words goes to the second, so a very short word may
    have no units. Raises ValueError if an end is before an earlier one.
    """
    ends = np.asarray(ends, np.float64)
    if np.any(np.diff(ends) < 0):
        raise ValueError("word ends must ascend")
    boundary = np.floor(rate * ends[:-1] + 1e-6).astype(np.int64)  # 1e-6, because 25 * 1.16 is 28.999999999999996
    inner = np.searchsorted(frame_start, boundary, side="right") - 1
    inner = np.where(boundary >= n_frames, len(frame_start), np.maximum(inner, 0))
    return np.concatenate([[0], inner, [len(frame_start)]]).astype(np.int64)


def read_ids(path):
    """Read units from a list in a .json file or an array in an .npy file. Raises ValueError for a damaged file."""
    if os.fspath(path).lower().endswith(".npy"):
        return np.array(read_array(path))
    ids = read_json(path, list)
    if not all(type(i) is int for i in ids):
        raise ValueError(f"{path}: not a list of integers")
    return np.array(ids)


def resynthesise(ids, vocabulary, vocoder=None, durations=None):
    """
    Turn units without repeats [n] into a float32 waveform at 16 kHz, by the vocoder or else by vocabulary.sound.

    vocoder: from load_vocoder; durations: frames of each unit, int [n], or None as in speak().
    Raises ValueError for ids outside the vocabulary, a missing vocoder, or a vocoder for other units.
    """
    ids, n_units, hop = np.asarray(ids), vocabulary.n_units, SAMPLE_RATE // vocabulary.rate
    if ids.size and (ids.ndim != 1 or ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= n_units):
        raise ValueError(f"units must be a list of integers from 0 to {n_units - 1}, the vocabulary's last")
    ids = ids.astype(np.int64).reshape(-1)
    if vocoder is None and vocabulary.sound is None:
        raise ValueError("HuBERT units need a vocoder: python -m tools.convert vocoder makes one, --vocoder names it")
    if vocoder is not None and (vocoder.n_units, vocoder.hop) != (n_units, hop):
        raise ValueError(f"the vocoder speaks {vocoder.n_units} units of {vocoder.hop} samples, the vocabulary has "
                         f"{n_units} of {hop}")
    if len(ids) == 0:
        return np.zeros(0, np.float32)
    durations = None if durations is None else np.asarray(durations, np.int64)
    return (vocoder or vocabulary.sound).speak(ids, durations)


def squared_distances(frames, centroids):
    """The squared distance of each frame [n, d] to each centroid [k, d]: float [n, k]."""
    return (frames**2).sum(1)[:, None] - 2 * frames @ centroids.T + (centroids**2).sum(1)


def kmeans(frames, k, rng, iterations):
    """Centroids float32 [k, d] of frames [n, d]: k-means++, then Lloyd's algorithm. Raises ValueError if n < k."""
    if len(frames) < k:
        raise ValueError(f"{len(frames)} frames are too few for {k} units")
    centroids = frames[:1]
    nearest = squared_distances(frames, centroids)[:, 0]
    while len(centroids) < k:
        weights = np.maximum(nearest, 0).astype(np.float64)
        new = frames[rng.choice(len(frames), p=weights / weights.sum())][None]
        centroids = np.concatenate([centroids, new])
        nearest = np.minimum(nearest, squared_distances(frames, new)[:, 0])
    for _ in range(iterations):
        own = squared_distances(frames, centroids).argmin(1)
        sums = np.stack([np.bincount(own, column, k) for column in frames.T], 1)
        counts = np.bincount(own, minlength=k)[:, None]
        centroids = np.where(counts > 0, sums / np.maximum(counts, 1), centroids).astype(np.float32)
    return centroids


def cheapest_path(cost, penalty):
    """The states [n] that minimise the sum of cost [n, k] plus `penalty` for each change of state (Viterbi)."""
    n, k = cost.shape
    states = np.arange(k)
    came_from = np.empty((n, k), np.int32)
    total = cost[0]
    for t in range(1, n):
        best = total.argmin()
        change = total[best] + penalty
        came_from[t] = np.where(total <= change, states, best)
        total = np.minimum(total, change) + cost[t]
    path = np.empty(n, np.int64)
    path[-1] = total.argmin()
    for t in range(n - 1, 0, -1):
        path[t - 1] = came_from[t, path[t]]
    return path


def overlapping_windows(n_frames, window, margin):
    """
    Cut n_frames frames into overlapping windows of `window` frames: [(start, end, a, b), ...].

    A model reads the frames [start, end) of each window. Its results for the frames [a, b) are kept. These frames are
    at least `margin` frames from the edges of the window, except at the edges of the recording.
    """
    if n_frames <= window:
        return [(0, n_frames, 0, n_frames)]
    starts = [*range(0, n_frames - window, window - 2 * margin), n_frames - window]
    seams = [0, *(start + margin for start in starts[1:]), n_frames]
    return [(start, start + window, a, b) for start, a, b in zip(starts, seams[:-1], seams[1:])]
