"""
Units from k-means over mel cepstra, and a waveform from them by Griffin-Lim.
"""
import functools
import json
import math
import os
from typing import NamedTuple

import numpy as np
from scipy.fft import dct, idct, irfft, rfft

from speech.audio import SAMPLE_RATE
from speech.units import (
    HOP,
    UNIT_RATE,
    cheapest_path,
    collapse,
    kmeans,
    read_vocabulary,
    run_lengths,
    squared_distances,
    vocabulary_hash,
)

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


class MelUnits(NamedTuple):
    centroids: np.ndarray  # float32 [k, 2 * N_CEPSTRUM]
    penalty: float  # added to the squared distances wherever the unit changes
    hash: str  # sha256 of the centroids: the name of this vocabulary
    durations: tuple = ()  # [k] mean length of a run of each unit, in unit frames; this and the voice are for speaking
    voice: tuple = ()  # [N_MEL] mean log-mel energies of the speakers, which the features leave out

    n_units = property(lambda self: len(self.centroids))
    rate = UNIT_RATE
    sound = property(lambda self: self)  # what resynthesise() speaks with

    def encode(self, waveforms):
        """Units of 16 kHz waveforms: (ids uint16 without repeats, the first 40 ms frame of each, int64) for each."""
        return [collapse(frame_units(mel_frames(waveform), self)) for waveform in waveforms]

    def speak(self, ids, durations=None):
        """Units int64 [n] to a waveform float32 at 16 kHz; durations int64 [n] in frames, None: the mean ones."""
        return speak_mel_units(ids, self, durations)


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


def loud_mean(x, mel):
    """The mean of the rows of x over the louder 70% of the frames of mel: of the voice, roughly, not of the pauses."""
    loudness = mel.mean(1)
    return x[loudness >= np.quantile(loudness, 0.3)].mean(0)


def mel_frames(waveform):
    """
    Features of a 16 kHz waveform, float32 [4 * (n // HOP), 2 * N_CEPSTRUM], a vector every 10 ms: the mean and the
    slope of the mel cepstrum over CONTEXT frames, less the utterance's own mean where it is loud (the voice, roughly).
    """
    mel = log_mel(waveform)
    if len(mel) == 0:
        return np.zeros((0, 2 * N_CEPSTRUM), np.float32)
    cepstrum = dct(mel, norm="ortho")[:, :N_CEPSTRUM]
    cepstrum -= loud_mean(cepstrum, mel)
    padded = np.pad(cepstrum, ((CONTEXT // 2, CONTEXT // 2 - 1), (0, 0)), mode="edge")
    stacked = np.lib.stride_tricks.sliding_window_view(padded, CONTEXT, axis=0)  # [n, N_CEPSTRUM, CONTEXT]
    ramp = np.arange(CONTEXT) - (CONTEXT - 1) / 2
    ramp /= np.linalg.norm(ramp) * CONTEXT**0.5  # on white noise the slope is then as large as the mean
    kernel = np.stack([np.full(CONTEXT, 1 / CONTEXT), ramp], 1).astype(np.float32)
    return np.ascontiguousarray((stacked @ kernel).transpose(0, 2, 1)).reshape(len(mel), -1)


def fit_mel_units(recordings, k, seed, sample=30000, iterations=25, voices=(), durations_on=64):
    """
    k-means on a random sample of the frames; the same seed gives the same codebook.

    recordings: list of mel_frames() of training recordings; k: number of units. Raises ValueError for too few frames.
    voices: voice() of each recording, without which the units cannot be spoken; durations_on: recordings to take the
    units' durations from.
    """
    frames = np.concatenate(recordings)
    rng = np.random.default_rng(seed)
    frames = frames[rng.permutation(len(frames))[:sample]]
    centroids = kmeans(frames, k, rng, iterations)
    distortion = squared_distances(frames, centroids).min(1).mean()
    codebook = MelUnits(centroids, PENALTY * float(distortion), vocabulary_hash(centroids))
    mean_voice = tuple(np.mean(voices, 0).astype(float).round(4).tolist()) if len(voices) else ()
    durations = run_lengths([frame_units(frames, codebook) for frames in recordings[:durations_on]], k)
    return codebook._replace(durations=durations, voice=mean_voice)


def voice(waveform):
    """Mean log-mel energies of the speech in a waveform, [N_MEL]: what mel_frames() takes away, in full detail."""
    mel = log_mel(waveform)
    return loud_mean(mel, mel)


def save_mel_units(folder, codebook):
    """Writes centroids.npy and units.json into a new or existing folder."""
    os.makedirs(folder, exist_ok=True)
    np.save(os.path.join(folder, "centroids.npy"), codebook.centroids)
    about = dict(kind="mel", n_units=len(codebook.centroids), rate=UNIT_RATE, sample_rate=SAMPLE_RATE,
                 penalty=codebook.penalty, features=PARAMETERS, hash=codebook.hash,
                 durations=codebook.durations, voice=codebook.voice)
    with open(os.path.join(folder, "units.json"), "w") as file:
        json.dump(about, file, indent=1)


def load_mel_units(folder):
    """The codebook saved in a folder; ValueError if it was damaged or made with other features than this file's."""
    about, centroids = read_vocabulary(folder, "mel")
    if about.get("features") != PARAMETERS:
        raise ValueError(f"{folder}: not mel units of this version; make the data set again")
    penalty, durations, mean_voice = (about.get(key, []) for key in ("penalty", "durations", "voice"))  # older folders
    for name, listed, least, most in (("penalty", [penalty], 0, 1e9), ("durations", durations, 1, 1e4),  # lack the two
                                      ("voice", mean_voice, -50, 50)):
        if not isinstance(listed, list) or not all(type(x) in (int, float) and least <= x <= most for x in listed):
            raise ValueError(f"{folder}: {name} in units.json is not from {least} to {most:g}; make the data set again")
    if centroids.shape[1] != 2 * N_CEPSTRUM:
        raise ValueError(f"{folder}: not mel units of this version; make the data set again")
    return MelUnits(centroids, penalty, about["hash"], tuple(durations), tuple(mean_voice))


def frame_units(frames, codebook):
    """The unit of each 40 ms frame, int64 [n // 4]: the path is found at 10 ms and read off in the middle of these."""
    if len(frames) == 0:
        return np.zeros(0, np.int64)
    cost = squared_distances(frames, codebook.centroids)
    return cheapest_path(cost, codebook.penalty)[HOP // STEP // 2::HOP // STEP]


def speak_mel_units(ids, codebook, durations=None):
    """Each 10 ms frame of a unit draws a line through the CONTEXT frames around it; the cepstra are their means."""
    if len(codebook.durations) != codebook.n_units or len(codebook.voice) != N_MEL:
        raise ValueError("these mel units hold no durations and no voice to speak with; make the data set again")
    if durations is None:  # the ends are rounded, not the durations, and so the speech keeps its length
        ends = np.floor(np.cumsum(np.array(codebook.durations)[ids]) + 0.5).astype(np.int64)
        durations = np.diff(ends, prepend=0)
    frames = codebook.centroids[np.repeat(ids, durations * (HOP // STEP))]
    mean, slope = frames[:, :N_CEPSTRUM], frames[:, N_CEPSTRUM:]
    ramp = np.arange(CONTEXT) - (CONTEXT - 1) / 2
    slope = slope * CONTEXT**0.5 / np.linalg.norm(ramp)  # as mel_frames scales it, now per frame
    total, count = np.zeros((len(frames) + CONTEXT - 1, N_CEPSTRUM)), np.zeros((len(frames) + CONTEXT - 1, 1))
    for j in range(CONTEXT):
        total[j:j + len(frames)] += mean + ramp[j] * slope
        count[j:j + len(frames)] += 1
    cepstrum = np.zeros((len(frames), N_MEL))
    cepstrum[:, :N_CEPSTRUM] = (total / count)[CONTEXT // 2:CONTEXT // 2 + len(frames)]
    return griffin_lim(mel_to_magnitude(np.exp(idct(cepstrum, norm="ortho") + np.array(codebook.voice))))


def mel_to_magnitude(mel, iterations=30):
    """Magnitudes [n, FFT // 2 + 1] whose mel energies are nearly mel [n, N_MEL], by Lee and Seung's updates (2000)."""
    filters = mel_matrix()
    power = np.repeat(mel.mean(1, keepdims=True), len(filters), 1)
    for _ in range(iterations):
        power = power * (mel @ filters.T) / np.maximum(power @ filters @ filters.T, 1e-12)
    return np.sqrt(power).astype(np.float32)


def griffin_lim(magnitude, iterations=32, momentum=0.99, seed=0):
    """
    A waveform, float32 [n * STEP], whose frames (as in log_mel) have nearly these magnitudes [n, FFT // 2 + 1].

    The fast Griffin-Lim algorithm (Perraudin, Balazs and Sondergaard 2013) from random phases; pure in its arguments.
    """
    n, part = len(magnitude), STEP // 2  # WINDOW is five parts long
    window = np.hanning(WINDOW).astype(np.float32)

    def overlap(frames):
        out = np.zeros((2 * n + WINDOW // part - 2, part), np.float32)
        for j in range(WINDOW // part):
            out[j:j + 2 * n:2] += frames[:, j * part:(j + 1) * part]
        return out.ravel()

    def to_wave(spectrum):
        return overlap(irfft(spectrum, FFT)[:, :WINDOW] * window) / weight

    weight = np.maximum(overlap(np.broadcast_to(window**2, (n, WINDOW))), 1e-2)
    turns = np.random.default_rng(seed).random(magnitude.shape, np.float32)
    phase, before = np.exp(2j * np.pi * turns).astype(np.complex64), 0
    for _ in range(iterations):
        frames = np.lib.stride_tricks.sliding_window_view(to_wave(magnitude * phase), WINDOW)[::STEP][:n]
        spectrum = rfft(frames * window, FFT)
        phase = spectrum + momentum * (spectrum - before)
        phase /= np.maximum(np.abs(phase), 1e-9)
        before = spectrum
    side = (WINDOW - STEP) // 2
    return to_wave(magnitude * phase)[side:side + n * STEP]
