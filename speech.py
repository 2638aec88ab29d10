"""
Waveform to units and word times.

Speech enters the language model as *units*: small integers, 25 of them a second before runs of the same unit are
collapsed to one. The paper's units come from HuBERT; here are much cheaper ones, k-means clusters of mel cepstra,
good enough for one synthetic speaker or two, and the synthesiser (espeak-ng) that the embedded demo speaks with.

    waveform, words = espeak("The cat sat.")                 # float32 at 16 kHz, [(start, end), ...] in seconds
    codebook = fit_mel_units([mel_frames(waveform)], k=80, seed=0)
    ids, frame_start = mel_units(waveform, codebook)         # uint16 [n], int64 [n]
    offsets = word_units([end for _, end in words], frame_start, len(waveform) // HOP)
    ids[offsets[i]:offsets[i + 1]]                           # the units of word i
"""

import _ctypes
import atexit
import ctypes
import functools
import hashlib
import json
import math
import os
import shutil
import tempfile
from typing import NamedTuple

import numpy as np
from scipy.fft import dct, rfft
from scipy.signal import resample_poly

SAMPLE_RATE = 16000
UNIT_RATE = 25
HOP = SAMPLE_RATE // UNIT_RATE  # samples per unit frame: 640

# ---------------------------------------------------------------------------------------------------------------------
# Text to waveform and word times, with espeak-ng through ctypes


class EspeakEvent(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("identifier", ctypes.c_uint),
        ("position", ctypes.c_int),  # 1-based, in characters of the text
        ("length", ctypes.c_int),
        ("milliseconds", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", ctypes.c_char * 8),
    ]


unload = getattr(_ctypes, "dlclose", None) or _ctypes.FreeLibrary  # the latter on Windows
EVENT_END_OF_LIST, EVENT_WORD, EVENT_END_OF_CLAUSE = 0, 1, 5
SYNCHRONOUS, CHARACTERS_UTF8, PARAMETER_RATE, PARAMETER_PITCH = 2, 1, 1, 3
EspeakCallback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(EspeakEvent)
)


@functools.cache
def espeak_paths():
    """Path of the library and path of its data, as bytes; RuntimeError if espeak-ng is not installed."""
    try:
        import espeakng_loader
    except ImportError:
        raise RuntimeError("espeak-ng is missing: pip install 'smoltolk[speech]'") from None
    data = espeakng_loader.get_data_path()
    if len(data) > 120:  # espeak-ng copies the path into a buffer of about 150 characters and gives up if it is longer
        folder = tempfile.mkdtemp(prefix="espeak-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        link = os.path.join(folder, "espeak-ng-data")
        try:
            os.symlink(data, link)
        except OSError:  # no symbolic links on this system
            shutil.copytree(data, link)
        data = link
    return espeakng_loader.get_library_path(), data.encode()


def espeak_once(text, voice, rate, pitch):
    """One pass of the synthesiser: int16 samples, their rate in Hz, and (kind, character, sample) for each event."""
    library, data = espeak_paths()
    # espeak-ng keeps the phase of its pitch flutter in static variables, so what it says depends on what it said
    # before. Loading the library afresh each time costs 2 ms and makes this a pure function of its arguments.
    lib = ctypes.CDLL(library)
    samples, events = [], []

    def collect(wave, count, event):
        if wave and count > 0:
            samples.append(np.ctypeslib.as_array(wave, (count,)).copy())
        i = 0
        while event[i].type != EVENT_END_OF_LIST:
            events.append((event[i].type, event[i].position - 1, event[i].sample))
            i += 1
        return 0

    callback = EspeakCallback(collect)
    try:
        native_rate = lib.espeak_Initialize(SYNCHRONOUS, 0, data, 0)
        if native_rate <= 0:
            raise RuntimeError(f"espeak-ng could not start with its data in {data.decode()}")
        lib.espeak_SetSynthCallback(callback)
        if lib.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(f"espeak-ng has no voice {voice!r}")
        lib.espeak_SetParameter(PARAMETER_RATE, rate, 0)
        lib.espeak_SetParameter(PARAMETER_PITCH, pitch, 0)
        encoded = text.encode()
        lib.espeak_Synth(encoded, ctypes.c_size_t(len(encoded) + 1), 0, 1, 0, CHARACTERS_UTF8, None, None)
        lib.espeak_Terminate()
    finally:
        unload(lib._handle)
    return np.concatenate(samples or [np.zeros(0, np.int16)]), native_rate, events


def espeak_words(words, samples, events, separators):
    """(start, end) in samples for each word, None for a word without an event; separators: words preceded by ' | '."""
    owner, position = {}, 0  # first character of a word -> its index
    for i, word in enumerate(words):
        position += 2 if i in separators else 0
        owner.update({position + j: i for j in range(len(word))})
        position += len(word) + 1
    starts = [None] * len(words)
    for kind, character, sample in events:
        if kind == EVENT_WORD and character in owner and starts[owner[character]] is None:
            starts[owner[character]] = sample
    clause_ends = [sample for kind, _, sample in events if kind == EVENT_END_OF_CLAUSE] + [len(samples)]
    spans, end = [None] * len(words), len(samples)
    for i in reversed(range(len(words))):  # a word ends where the next one starts, or where its clause ends
        if starts[i] is None:
            continue
        start = starts[i]
        end = min([end] + [clause_end for clause_end in clause_ends if clause_end > start])
        if end in clause_ends:  # less the pause there, which belongs to the next word or to none
            loud = np.flatnonzero(np.abs(samples[start:end].astype(np.int32)) > 50)
            end = start + int(loud[-1]) + 1 if len(loud) else end
        spans[i] = (start, end)
        end = start
    return spans


def espeak(text, voice="en-us", rate=175, pitch=50):
    """
    Speak a text with espeak-ng. The same arguments always give the same samples, but for breathy voices (variants +f2,
    +f3, +f5), whose noise espeak-ng draws from the clock.

    text: words separated by white space; voice: an espeak-ng voice with an optional variant ("en-us+f2");
    rate: words a minute (80 to 450); pitch: 0 to 99.
    Returns (waveform, words): float32 [n] at 16 kHz within [-1, 1], and one (start, end) in seconds for each word.
    words is None if some word could not be timed: leave such a text out.
    Raises RuntimeError without espeak-ng, ValueError for an unknown voice.
    """
    words = text.split()
    # espeak-ng says some groups of function words ("of the") as one and reports a single event for them.
    # A bar before the words that got none forces them apart; a new bar may shift the grouping, so it is tried again.
    separators = set()
    for _ in range(3):
        spoken = " ".join("| " + word if i in separators else word for i, word in enumerate(words))
        samples, native_rate, events = espeak_once(spoken, voice, rate, pitch)
        spans = espeak_words(words, samples, events, separators)
        silent = {i for i, span in enumerate(spans) if span is None}
        if not silent - separators:
            break
        separators |= silent
    divisor = math.gcd(SAMPLE_RATE, native_rate)
    waveform = resample_poly(samples.astype(np.float32) / 32768, SAMPLE_RATE // divisor, native_rate // divisor)
    waveform = np.clip(waveform, -1, 1).astype(np.float32)
    if silent:
        return waveform, None
    return waveform, [(start / native_rate, end / native_rate) for start, end in spans]


# ---------------------------------------------------------------------------------------------------------------------
# Waveform to units
#
# What was tried. Measure: does the word nearest in normalised edit distance bear the same name (128 to 200 demo
# stories, 360 words)? Four speakers, context 80 ms: k = 80, penalty 6 (chosen) 98.2% at 4.9 units a word; penalty 0,
# 3, 9: 95.5% at 6.2, 98.3% at 5.6, 97.8% at 4.4; k = 50, 64, 100: 95.2%, 97.3%, 97.6%. One voice, context 40 ms,
# penalty 3: 94.0% at 5.6; 100 ms, penalty 6: 98.0% at 4.4. A man's words among a woman's (+f2; context 40 ms, penalty
# 0: 73%): variance normalised too 40%, c0 halved 53%. Slopes left out (penalty 3: 70%) 39%. The path found at 25 Hz,
# not 100 (penalty 1: 73%): 68%.

WINDOW, STEP, FFT = 400, 160, 512  # samples: 25 ms windows every 10 ms, four to a unit frame
N_MEL, N_CEPSTRUM, CONTEXT = 40, 13, 8  # CONTEXT: 10 ms frames that one feature vector sees
FLOOR = 1e-4  # of the mean energy, -40 dB
PENALTY = 6.0  # of a change of unit, in mean squared distances to the nearest centroid
PARAMETERS = dict(window=WINDOW, step=STEP, n_mel=N_MEL, n_cepstrum=N_CEPSTRUM, context=CONTEXT, floor=FLOOR)


class Codebook(NamedTuple):
    centroids: np.ndarray  # float32 [k, 2 * N_CEPSTRUM]
    penalty: float  # added to the squared distances wherever the unit changes
    hash: str  # sha256 of the centroids: the name of this vocabulary


@functools.cache
def mel_matrix():
    """Triangular mel filters between 60 and 7600 Hz, float32 [FFT // 2 + 1, N_MEL]."""
    low, high = (2595 * math.log10(1 + hz / 700) for hz in (60, 7600))
    edges = 700 * (10 ** (np.linspace(low, high, N_MEL + 2) / 2595) - 1)
    hz = np.arange(FFT // 2 + 1)[:, None] * SAMPLE_RATE / FFT
    rising = (hz - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - hz) / (edges[2:] - edges[1:-1])
    return np.maximum(0, np.minimum(rising, falling)).astype(np.float32)


def log_mel(waveform):
    """Log-mel energies, float32 [4 * (n // HOP), N_MEL]: exactly four 10 ms frames to each 40 ms unit frame."""
    n_frames = len(waveform) // HOP * (HOP // STEP)
    if n_frames == 0:
        return np.zeros((0, N_MEL), np.float32)
    side = (WINDOW - STEP) // 2  # centres each window on its 10 ms
    padded = np.pad(np.asarray(waveform, np.float32), (side, WINDOW))
    windows = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::STEP][:n_frames]
    spectrum = rfft(windows * np.hanning(WINDOW).astype(np.float32), FFT)
    mel = (spectrum.real**2 + spectrum.imag**2) @ mel_matrix()
    # The floor keeps digital silence, and all that is as faint, from spreading over many clusters.
    return np.log(mel + FLOOR * mel.mean() + 1e-10)


def mel_frames(waveform):
    """
    Features of a 16 kHz waveform, float32 [4 * (n // HOP), 2 * N_CEPSTRUM], a vector every 10 ms: the mean and the
    slope of the mel cepstrum over CONTEXT frames, less the utterance's own mean where it is loud (the voice, roughly).
    """
    mel = log_mel(waveform)
    if len(mel) == 0:
        return np.zeros((0, 2 * N_CEPSTRUM), np.float32)
    cepstrum = dct(mel, norm="ortho")[:, :N_CEPSTRUM]
    loudness = mel.mean(1)
    cepstrum -= cepstrum[loudness >= np.quantile(loudness, 0.3)].mean(0)
    padded = np.pad(cepstrum, ((CONTEXT // 2, CONTEXT // 2 - 1), (0, 0)), mode="edge")
    stacked = np.lib.stride_tricks.sliding_window_view(padded, CONTEXT, axis=0)  # [n, N_CEPSTRUM, CONTEXT]
    ramp = np.arange(CONTEXT) - (CONTEXT - 1) / 2
    ramp /= np.linalg.norm(ramp) * CONTEXT**0.5  # on white noise the slope is then as large as the mean
    kernel = np.stack([np.full(CONTEXT, 1 / CONTEXT), ramp], 1).astype(np.float32)
    return np.ascontiguousarray((stacked @ kernel).transpose(0, 2, 1)).reshape(len(mel), -1)


def squared_distances(frames, centroids):
    return (frames**2).sum(1)[:, None] - 2 * frames @ centroids.T + (centroids**2).sum(1)


def fit_mel_units(frames, k, seed, sample=30000, iterations=25):
    """
    k-means (k-means++ start, then Lloyd) on a random sample of the frames; the same seed gives the same codebook.

    frames: list of mel_frames() of training recordings; k: number of units. Raises ValueError for too few frames.
    """
    frames = np.concatenate(frames)
    if len(frames) < k:
        raise ValueError(f"{len(frames)} frames are too few for {k} units")
    rng = np.random.default_rng(seed)
    frames = frames[rng.permutation(len(frames))[:sample]]
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
    distortion = squared_distances(frames, centroids).min(1).mean()
    return Codebook(centroids, PENALTY * float(distortion), vocabulary_hash(centroids))


def vocabulary_hash(centroids):
    return hashlib.sha256(np.ascontiguousarray(centroids, "<f4").tobytes()).hexdigest()


def save_mel_units(folder, codebook):
    """Writes centroids.npy and units.json into a new or existing folder."""
    os.makedirs(folder, exist_ok=True)
    np.save(os.path.join(folder, "centroids.npy"), codebook.centroids)
    about = dict(kind="mel", n_units=len(codebook.centroids), rate=UNIT_RATE, sample_rate=SAMPLE_RATE,
                 penalty=codebook.penalty, features=PARAMETERS, hash=codebook.hash)
    with open(os.path.join(folder, "units.json"), "w") as file:
        json.dump(about, file, indent=1)


def load_mel_units(folder):
    """The codebook saved in a folder; ValueError if it was damaged or made with other features than this file's."""
    with open(os.path.join(folder, "units.json")) as file:
        about = json.load(file)
    if about.get("kind") != "mel" or about["features"] != PARAMETERS:
        raise ValueError(f"{folder}: not mel units of this version; make the data set again")
    centroids = np.load(os.path.join(folder, "centroids.npy"))
    if vocabulary_hash(centroids) != about["hash"]:
        raise ValueError(f"{folder}: centroids.npy does not fit the hash in units.json; make the data set again")
    return Codebook(centroids, about["penalty"], about["hash"])


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


def mel_units(waveform, codebook):
    """
    Units of a 16 kHz waveform [n]: (ids uint16 without repeats, frame_start int64: the first of the n // HOP
    undeduplicated 40 ms frames of each).
    """
    cost = squared_distances(mel_frames(waveform), codebook.centroids)
    if len(cost) == 0:
        return np.zeros(0, np.uint16), np.zeros(0, np.int64)
    # The path is found at 10 ms and read off in the middle of each 40 ms frame.
    return collapse(cheapest_path(cost, codebook.penalty)[HOP // STEP // 2::HOP // STEP])


def word_units(ends, frame_start, n_frames):
    """
    Where words begin among collapsed units, int64 [n_words + 1]: word i is units[offsets[i]:offsets[i + 1]].

    ends: end of each word in seconds, ascending; frame_start: from mel_units; n_frames: frames before collapsing.
    Word i owns the frames [floor(25 * ends[i - 1]), floor(25 * ends[i])), so a pause belongs to the word after it;
    a unit that straddles two words goes to the later one (a very short word may own none), and what follows the last
    word goes to that. Raises ValueError if ends do not ascend.
    """
    ends = np.asarray(ends, np.float64)
    if np.any(np.diff(ends) < 0):
        raise ValueError("word ends must ascend")
    boundary = np.floor(UNIT_RATE * ends[:-1] + 1e-6).astype(np.int64)  # 1e-6: 25 * 0.28 must not fall below 7
    inner = np.searchsorted(frame_start, boundary, side="right") - 1
    inner = np.where(boundary >= n_frames, len(frame_start), np.maximum(inner, 0))
    return np.concatenate([[0], inner, [len(frame_start)]]).astype(np.int64)
