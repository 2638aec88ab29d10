"""
What all kinds of speech units share.
"""
import hashlib
import importlib
import os
import reprlib

import numpy as np

from runtime.files import read_array, read_json
from speech.audio import SAMPLE_RATE

UNIT_RATE = 25
HOP = SAMPLE_RATE // UNIT_RATE  # samples per unit frame: 640
# The module of each kind of units. It is imported when a folder of that kind is opened.
KINDS = dict(mel="speech.mel", hubert="speech.hubert", whisper="studies.small.whisper")

def squared_distances(frames, centroids):
    return (frames**2).sum(1)[:, None] - 2 * frames @ centroids.T + (centroids**2).sum(1)


def kmeans(frames, k, rng, iterations):
    """Centroids float32 [k, d] of frames [n, d]: k-means++ start, then Lloyd. ValueError for too few frames."""
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


def run_lengths(frame_ids, k):
    """Mean length in unit frames of the runs of each unit, a tuple [k]; 1 for a unit that does not occur."""
    total, runs = np.zeros(k), np.zeros(k)
    for frames in frame_ids:
        ids, frame_start = collapse(frames)
        total += np.bincount(ids, np.diff(np.append(frame_start, len(frames))), k)
        runs += np.bincount(ids, minlength=k)
    return tuple(np.maximum(total / np.maximum(runs, 1), 1).round(3).tolist())


def vocabulary_hash(centroids):
    return hashlib.sha256(np.ascontiguousarray(centroids, "<f4").tobytes()).hexdigest()


def read_vocabulary(folder, kind=None):
    """
    (what units.json says, centroids float32 [k, d]) of a folder with a unit vocabulary.

    kind: one of KINDS, None for any. Raises ValueError (one line) if a file is missing, damaged or another kind's.
    """
    path = os.path.join(folder, "units.json")
    try:
        about, centroids = read_json(path), np.array(read_array(os.path.join(folder, "centroids.npy")))
    except ValueError as error:
        raise ValueError(f"{folder}: not a whole unit vocabulary ({error}); make it again") from None
    said = about.get("kind")
    if said not in KINDS or kind not in (said, None):
        raise ValueError(f"{path}: kind is {reprlib.repr(said)}, not {kind or ', '.join(KINDS)!r}")
    if centroids.ndim != 2 or centroids.dtype != np.float32 or not 0 < len(centroids) < 1 << 16 or (
            len(centroids) != about.get("n_units")):
        raise ValueError(f"{folder}: centroids.npy is {centroids.dtype} {list(centroids.shape)}, units.json says "
                         f"{reprlib.repr(about.get('n_units'))}")
    if vocabulary_hash(centroids) != about.get("hash"):
        raise ValueError(f"{folder}: centroids.npy does not fit the hash in units.json; make the data set again")
    return about, centroids


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


def collapse(frame_units):
    """Runs of one unit to a single one: (ids uint16 [n], frame_start int64 [n], the frame where each run starts)."""
    frame_units = np.asarray(frame_units)
    first = np.ones(len(frame_units), bool)
    first[1:] = frame_units[1:] != frame_units[:-1]
    return frame_units[first].astype(np.uint16), np.flatnonzero(first)


def overlapping_windows(n_frames, window, margin):
    """
    Overlapping windows over so many frames: [(start, end, a, b), ...]; frames [a, b) are the ones kept of window
    [start, end), at least `margin` from its edges but for those of the recording. All windows are equally long.
    """
    if n_frames <= window:
        return [(0, n_frames, 0, n_frames)]
    starts = [*range(0, n_frames - window, window - 2 * margin), n_frames - window]
    seams = [0, *(start + margin for start in starts[1:]), n_frames]
    return [(start, start + window, a, b) for start, a, b in zip(starts, seams[:-1], seams[1:])]


def model_folder(folder, about):
    """The folder of the model that units.json names; ValueError if it names none."""
    if not isinstance(about.get("model"), str) or not about["model"].isprintable() or len(about["model"]) > 1000:
        raise ValueError(f"{folder}: model in units.json is no folder")
    return os.path.normpath(os.path.join(os.path.realpath(folder), about["model"]))


def load_units(folder, device="cpu"):
    """The unit vocabulary in a folder, of any of KINDS, with .n_units, .rate (Hz) and .hash. ValueError."""
    kind = read_vocabulary(folder)[0]["kind"]
    load = getattr(importlib.import_module(KINDS[kind]), f"load_{kind}_units")
    return load(folder) if kind == "mel" else load(folder, device)


def read_ids(path):
    """Units out of a .json (a list) or an .npy: an array as it stands there. ValueError."""
    if os.fspath(path).lower().endswith(".npy"):
        return np.array(read_array(path))
    ids = read_json(path, list)
    if not all(type(i) is int for i in ids):
        raise ValueError(f"{path}: not a list of integers")
    return np.array(ids)


def n_frames(n_samples, vocabulary):
    """How many undeduplicated frames so many samples have."""
    return n_samples // (SAMPLE_RATE // vocabulary.rate)


def resynthesise(ids, vocabulary, vocoder=None, durations=None):
    """
    Units without repeats [n] to a float32 waveform at 16 kHz: mel and Whisper units by Griffin-Lim, or by a vocoder.

    vocoder: from load_vocoder; durations: frames of each unit, int [n], otherwise what is usual for it.
    Raises ValueError for ids outside the vocabulary, a missing vocoder, or one that was made for other units.
    """
    ids = np.asarray(ids)
    if ids.size and (ids.ndim != 1 or ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= vocabulary.n_units):
        raise ValueError(f"units must be a list of integers from 0 to {vocabulary.n_units - 1}, the vocabulary's last")
    ids = ids.astype(np.int64).reshape(-1)
    if durations is not None:
        durations = np.asarray(durations, np.int64)
        if durations.shape != ids.shape or (durations < 1).any():
            raise ValueError(f"{len(ids)} units need as many durations of at least one frame")
    if vocoder is None and vocabulary.sound is None:
        raise ValueError("HuBERT units need a vocoder: python -m tools.convert vocoder makes one, --vocoder names it")
    if vocoder is not None and (vocoder.n_units, vocoder.hop) != (vocabulary.n_units, SAMPLE_RATE // vocabulary.rate):
        raise ValueError(f"the vocoder speaks {vocoder.n_units} units of {vocoder.hop} samples, the vocabulary has "
                         f"{vocabulary.n_units} of {SAMPLE_RATE // vocabulary.rate}")
    if len(ids) == 0:
        return np.zeros(0, np.float32)
    return (vocoder or vocabulary.sound).speak(ids, durations)


def word_units(ends, frame_start, n_frames, rate=UNIT_RATE):
    """
    Where words begin among collapsed units, int64 [n_words + 1]: word i is units[offsets[i]:offsets[i + 1]].

    ends: end of each word in seconds, ascending; frame_start: from units(); n_frames: frames before collapsing; rate:
    of the units. Word i owns the frames [floor(rate * ends[i - 1]), floor(rate * ends[i])), so a pause belongs to the
    word after it; a unit that straddles two words goes to the later one (a very short word may own none), and what
    follows the last word goes to that. Raises ValueError if ends do not ascend.
    """
    ends = np.asarray(ends, np.float64)
    if np.any(np.diff(ends) < 0):
        raise ValueError("word ends must ascend")
    boundary = np.floor(rate * ends[:-1] + 1e-6).astype(np.int64)  # 1e-6: 25 * 0.28 must not fall below 7
    inner = np.searchsorted(frame_start, boundary, side="right") - 1
    inner = np.where(boundary >= n_frames, len(frame_start), np.maximum(inner, 0))
    return np.concatenate([[0], inner, [len(frame_start)]]).astype(np.int64)
