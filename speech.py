"""
Waveform to units and word times.

Speech enters the language model as *units*: small integers, 25 of them a second before runs of the same unit are
collapsed to one. The paper's units come from HuBERT; beside them are much cheaper ones, k-means clusters of mel
cepstra, good enough for a few synthetic speakers, ones from Whisper's encoder, and the synthesiser (espeak-ng) that the
embedded demo speaks with.

    waveform, words = espeak("The cat sat.")                 # float32 at 16 kHz, [(start, end), ...] in seconds
    vocabulary = load_units("data/demo/units")               # mel, Whisper or HuBERT units, whichever the folder holds
    [(ids, frame_start)] = units([waveform], vocabulary)     # uint16 [n], int64 [n]
    offsets = word_units([end for _, end in words], frame_start, n_frames(len(waveform), vocabulary))
    ids[offsets[i]:offsets[i + 1]]                           # the units of word i
    resynthesise(ids, vocabulary)                            # float32 at 16 kHz again

    python speech.py units x.wav --units=data/demo/units > x.json
    python speech.py say x.json --units=data/demo/units --out=y.wav
"""

import _ctypes
import atexit
import ctypes
import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
import reprlib
import shutil
import sys
import tempfile
from typing import NamedTuple

import numpy as np
from scipy.fft import dct, idct, irfft, rfft
from scipy.signal import resample_poly

from runtime.files import one_line, read_array, read_json, read_tensors

SAMPLE_RATE = 16000
UNIT_RATE = 25
HOP = SAMPLE_RATE // UNIT_RATE  # samples per unit frame: 640
KINDS = ("mel", "whisper", "hubert")  # of units

# ---------------------------------------------------------------------------------------------------------------------
# Sound files

SLACK = 0.1  # seconds: manifests and transcripts round, so a span may end that much after the audio does
RATES, MAX_SAMPLES, BLOCK = (4000, 384000), 1 << 28, 1 << 20  # Hz; of one span; read at once, of all channels
AV_SUFFIXES = (".g722", ".m4a", ".mp4", ".webm")  # what libsndfile cannot read


def read_audio(path, start=0.0, end=None, longest=math.inf):
    """
    A sound file, or the span [start, end) of it in seconds, as mono float32 [n] at 16 kHz.

    path: of a wav, flac, ogg, mp3 or NIST SPHERE (PCM) file, or the bytes of one; g722, m4a, mp4 and webm go through
    PyAV. Only the span is read, of up to `longest` seconds; any rate is resampled, channels are averaged.
    Raises ValueError "unreadable audio: ...", "empty audio: ...", "audio is not finite: ...", "audio too long: ..." or
    "span outside the audio: ...".
    """
    import soundfile

    name = "sound in a record" if isinstance(path, bytes) else path
    try:
        with io.BytesIO(path) if isinstance(path, bytes) else open(path, "rb") as file:
            check_length(file, name)
        if isinstance(path, (str, os.PathLike)) and os.fspath(path).endswith(AV_SUFFIXES):
            path = decode_with_av(path)
        with soundfile.SoundFile(io.BytesIO(path) if isinstance(path, bytes) else path) as file:
            rate, seconds = file.samplerate, file.frames / file.samplerate
            if not RATES[0] <= rate <= RATES[1]:
                raise ValueError(f"unreadable audio: {name} says {rate} samples a second")
            if file.frames == 0:
                raise ValueError(f"empty audio: {name} has no samples")
            if not 0 <= start < min(seconds, math.inf if end is None else end) or (end or 0) > seconds + SLACK:
                raise ValueError(f"span outside the audio: [{start}, {end}) of {seconds:.2f} s in {name}")
            first, last = round(start * rate), file.frames if end is None else min(round(end * rate), file.frames)
            if last - first > min(longest * rate, MAX_SAMPLES):
                raise ValueError(f"audio too long: {(last - first) / rate:.0f} s of {name}; give shorter spans")
            file.seek(first)
            blocks = [np.zeros(0, np.float32)]  # by and by: what is there may be far less than the header says
            while len(block := file.read(min(BLOCK // file.channels, last - file.tell()), "float32", always_2d=True)):
                blocks.append(block.mean(1))
            samples = np.concatenate(blocks)
    except (soundfile.LibsndfileError, OSError) as error:
        raise ValueError(f"unreadable audio: {name} ({' '.join(str(error).split())})") from None
    if len(samples) == 0:
        raise ValueError(f"empty audio: [{start}, {end}) holds no sample of {name}")
    if len(samples) < last - first - SLACK * rate:
        broken = (first + len(samples)) / rate
        raise ValueError(f"unreadable audio: {name} breaks off after {broken:.2f} of {seconds:.2f} s")
    if not np.isfinite(samples).all():
        raise ValueError(f"audio is not finite: {name} has NaN or infinite samples")
    return resample(samples, rate)


def check_length(file, name):
    """ValueError if a sound file has no bytes, fewer than its SPHERE or wav header says, or those of shorten.

    libsndfile makes do with the bytes that are there. A wav written to a pipe says 0 or about 1 << 31 or 1 << 32.
    """
    head, there, needed = file.read(1024), file.seek(0, os.SEEK_END), 0
    if not head:
        raise ValueError(f"empty audio: {name} has no bytes")
    if head.startswith(b"NIST_1A"):
        if b"shorten" in head:
            raise ValueError(f"unreadable audio: {name} is compressed with shorten; convert it: sph2pipe -f wav")
        said = re.findall(rb"\n(?:sample_count|channel_count|sample_n_bytes) -i (\d{1,12})[ \t\r]*(?=\n)", head)
        start = re.match(rb"NIST_1A\r?\n *(\d{1,12})[ \t\r]*\n", head)
        if not start or len(said) != 3:
            raise ValueError(f"unreadable audio: {name} has no whole SPHERE header")
        needed = int(start[1]) + math.prod(map(int, said))
    elif head.startswith(b"RIFF") and head[8:12] == b"WAVE":
        at = 12
        for _ in range(1000):  # chunks: a name, its size, as many bytes, and one more if they are odd
            file.seek(at)
            chunk, size = file.read(4), int.from_bytes(file.read(4), "little")
            if chunk == b"data":
                needed = at + 8 + size if size < 0x7FFF0000 else 0
                break
            at += 8 + size + size % 2
    if needed > there:
        raise ValueError(f"unreadable audio: {name} breaks off: {there} bytes, by its header {needed}")


def resample(samples, rate):
    """float32 [n] at any rate in Hz -> float32 at 16 kHz."""
    if rate == SAMPLE_RATE:
        return samples
    divisor = math.gcd(SAMPLE_RATE, rate)
    return resample_poly(samples, SAMPLE_RATE // divisor, rate // divisor).astype(np.float32)


def decode_with_av(path):
    """A whole file that FFmpeg can decode as the bytes of a wav; ValueError "unreadable audio: ..."."""
    import soundfile

    try:
        import av
    except ImportError:
        raise RuntimeError(f"PyAV, which {path} needs, is missing: pip install av") from None
    try:
        with av.open(os.fspath(path)) as container:
            rate = container.streams.audio[0].rate
            resampler = av.AudioResampler("flt", "mono", rate)
            frames = [part for frame in container.decode(audio=0) for part in resampler.resample(frame)]
            samples = [frame.to_ndarray()[0] for frame in frames + resampler.resample(None)]
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"unreadable audio: {path} ({one_line(error)})") from None
    out = io.BytesIO()
    soundfile.write(out, np.concatenate(samples or [np.zeros(0, np.float32)]), rate, format="WAV", subtype="FLOAT")
    return out.getvalue()


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
EVENT_END_OF_LIST, EVENT_WORD, EVENT_END_OF_CLAUSE, EVENT_PHONE = 0, 1, 5, 7
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


def espeak_once(text, voice, rate, pitch, phones=False):
    """One pass of the synthesiser: int16 samples, their rate in Hz, and (kind, character, sample, phone) for each
    event; those of phones are left out unless asked for."""
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
            events.append((event[i].type, event[i].position - 1, event[i].sample, event[i].id))
            i += 1
        return 0

    callback = EspeakCallback(collect)
    try:
        native_rate = lib.espeak_Initialize(SYNCHRONOUS, 0, data, int(phones))
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
    for kind, character, sample, _ in events:
        if kind == EVENT_WORD and character in owner and starts[owner[character]] is None:
            starts[owner[character]] = sample
    clause_ends = [sample for kind, _, sample, _ in events if kind == EVENT_END_OF_CLAUSE] + [len(samples)]
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
    waveform = np.clip(resample(samples.astype(np.float32) / 32768, native_rate), -1, 1)
    if silent:
        return waveform, None
    return waveform, [(start / native_rate, end / native_rate) for start, end in spans]


def espeak_phones(text, voice="en-us", rate=175, pitch=50):
    """
    (waveform as espeak-ng says it, without espeak()'s marks for words, [(phone, start in seconds), ...]); "_" is a
    pause. Stress marks are left out.
    """
    samples, native_rate, events = espeak_once(text, voice, rate, pitch, phones=True)
    named = [(phone.decode().strip("',%=").rstrip("2") or "_", sample / native_rate)
             for kind, _, sample, phone in events if kind == EVENT_PHONE and phone != b";"]  # still the one before
    waveform = np.clip(resample(samples.astype(np.float32) / 32768, native_rate), -1, 1)
    return waveform, [("_" if phone[0] in "_|" else phone, start) for phone, start in named]


# ---------------------------------------------------------------------------------------------------------------------
# Waveform to mel units
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
    durations: tuple = ()  # [k] mean length of a run of each unit, in unit frames; this and the voice are for speaking
    voice: tuple = ()  # [N_MEL] mean log-mel energies of the speakers, which the features leave out

    n_units = property(lambda self: len(self.centroids))
    rate = UNIT_RATE


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
    codebook = Codebook(centroids, PENALTY * float(distortion), vocabulary_hash(centroids))
    mean_voice = tuple(np.mean(voices, 0).astype(float).round(4).tolist()) if len(voices) else ()
    durations = run_lengths([frame_units(frames, codebook) for frames in recordings[:durations_on]], k)
    return codebook._replace(durations=durations, voice=mean_voice)


def voice(waveform):
    """Mean log-mel energies of the speech in a waveform, [N_MEL]: what mel_frames() takes away, in full detail."""
    mel = log_mel(waveform)
    return loud_mean(mel, mel)


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


def save_mel_units(folder, codebook):
    """Writes centroids.npy and units.json into a new or existing folder."""
    os.makedirs(folder, exist_ok=True)
    np.save(os.path.join(folder, "centroids.npy"), codebook.centroids)
    about = dict(kind="mel", n_units=len(codebook.centroids), rate=UNIT_RATE, sample_rate=SAMPLE_RATE,
                 penalty=codebook.penalty, features=PARAMETERS, hash=codebook.hash,
                 durations=codebook.durations, voice=codebook.voice)
    with open(os.path.join(folder, "units.json"), "w") as file:
        json.dump(about, file, indent=1)


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
    return Codebook(centroids, penalty, about["hash"], tuple(durations), tuple(mean_voice))


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


def frame_units(frames, codebook):
    """The unit of each 40 ms frame, int64 [n // 4]: the path is found at 10 ms and read off in the middle of these."""
    if len(frames) == 0:
        return np.zeros(0, np.int64)
    cost = squared_distances(frames, codebook.centroids)
    return cheapest_path(cost, codebook.penalty)[HOP // STEP // 2::HOP // STEP]


def mel_units(waveform, codebook):
    """
    Units of a 16 kHz waveform [n]: (ids uint16 without repeats, frame_start int64: the first of the n // HOP
    undeduplicated 40 ms frames of each).
    """
    return collapse(frame_units(mel_frames(waveform), codebook))


# ---------------------------------------------------------------------------------------------------------------------
# Waveform to HuBERT units
#
# The paper's units: the nearest of 500 k-means centroids to the output of layer 11 of mHuBERT at 25 Hz (TWIST, Hassid
# et al. 2023). All in float32, on a GPU too, and without TF32: many frames lie nearly between two centroids, where less
# precision means other units, and a language model should hear the units that its corpus was cut into elsewhere.
#
# Recordings are batched only with others of exactly their length. Group norm in the first convolution sees the whole
# recording, and the batch norm before the positional convolution turns zeros into something else, so padding one would
# change its units. A recording up to WHOLE seconds is encoded whole, as in textlesslib.

WHOLE, MARGIN = 100.0, 5.0  # seconds: longer recordings are encoded in windows so long, less a margin on either side
BATCH = 100.0  # seconds of audio encoded together


class HubertUnits(NamedTuple):
    model: object  # transformers.HubertModel without the layers above the one that is read
    centroids: object  # tensor float32 [k, d] on the model's device
    hash: str  # sha256 of the centroids
    hop: int  # samples from one frame to the next
    receptive_field: int  # samples that the convolutions see for one frame
    normalize: bool  # waveforms to mean 0 and variance 1 first?
    window: int  # frames; and the margin
    margin: int

    n_units = property(lambda self: len(self.centroids))
    rate = property(lambda self: SAMPLE_RATE // self.hop)


def frame_geometry(config):
    """(samples from one frame to the next, samples that a frame sees) of a HuBERT's or wav2vec 2.0's convolutions."""
    if not all(type(n) is int and n > 0 for n in [*config.conv_stride, *config.conv_kernel]):
        raise ValueError(f"conv_stride {config.conv_stride} and conv_kernel {config.conv_kernel} are no whole numbers")
    receptive_field = 1 + sum((k - 1) * math.prod(config.conv_stride[:i]) for i, k in enumerate(config.conv_kernel))
    return math.prod(config.conv_stride), receptive_field


def check_size(kind, folder):
    """ValueError if config.json cannot be, or asks for a far larger model than model.safetensors holds."""
    import torch

    tensors = read_tensors(os.path.join(folder, "model.safetensors"))
    config = kind.config_class.from_pretrained(folder, local_files_only=True)
    frame_geometry(config)
    with torch.device("meta"):
        model = kind(config) if config.num_hidden_layers <= len(tensors) else None
    if model is None or model.num_parameters() > 2 * sum(tensor.numel() for tensor in tensors.values()) + 1e6:
        raise ValueError("config.json asks for a larger model than model.safetensors holds")


def load_hubert_units(folder, device="cpu", whole=WHOLE, margin=MARGIN):
    """
    The HuBERT vocabulary in a folder, as `python convert.py units` writes it.

    units.json: {kind: "hubert", model: folder of a transformers HubertModel (relative to this one, or absolute), layer:
    1 to all, n_units, rate in Hz, sample_rate, normalize, hash}; centroids.npy: float32 [n_units, hidden size].
    whole, margin: in seconds, see above. Raises ValueError (one line) for a damaged folder, RuntimeError without
    transformers.
    """
    about, centroids = read_vocabulary(folder, "hubert")
    try:
        import torch
        from transformers import HubertModel
    except ImportError:
        raise RuntimeError("transformers is missing: pip install 'smoltolk[speech]'") from None
    path = model_folder(folder, about)
    try:
        kind = read_json(os.path.join(path, "config.json")).get("model_type")
        if kind != "hubert":
            raise ValueError(f"model_type is {kind!r}, not 'hubert'")
        check_size(HubertModel, path)
        model, report = HubertModel.from_pretrained(path, output_loading_info=True, local_files_only=True,
                                                    use_safetensors=True)
    except Exception as error:  # of many kinds, by what is damaged and by the version of transformers
        raise ValueError(f"{path}: not a HuBERT model that can be loaded ({one_line(error)})") from None
    missing = sorted(set(map(str, report["missing_keys"])) - {"masked_spec_embed"})  # this one serves training only
    if missing or report["mismatched_keys"]:
        raise ValueError(f"{path}: lacks {(missing or sorted(map(str, report['mismatched_keys'])))[0]}; "
                         "copy the model again, or get a newer transformers (mHuBERT at 25 Hz needs 4.47)")
    config, layer = model.config, about.get("layer")
    hop, receptive_field = frame_geometry(config)
    if type(layer) is not int or layer not in range(1, config.num_hidden_layers + 1):
        said = reprlib.repr(layer)
        raise ValueError(f"{folder}: layer is {said}, the model in {path} has 1 to {config.num_hidden_layers}")
    for name, said, wanted in (("rate is", about.get("rate"), SAMPLE_RATE / hop),
                               ("sample_rate is", about.get("sample_rate"), SAMPLE_RATE),
                               ("centroids have size", centroids.shape[1], config.hidden_size)):
        if said != wanted:
            raise ValueError(f"{folder}: {name} {reprlib.repr(said)}, the model in {path} means {wanted:g}")
    model.encoder.layers = model.encoder.layers[:layer]
    if config.do_stable_layer_norm:  # then the encoder ends with a norm, which is after all layers, not after this one
        model.encoder.layer_norm = torch.nn.Identity()
    model = model.eval().float().requires_grad_(False).to(device)
    frames = [int(seconds * SAMPLE_RATE / hop) for seconds in (whole, margin)]
    return HubertUnits(model, torch.from_numpy(centroids).float().to(device), about["hash"], hop, receptive_field,
                       bool(about.get("normalize", False)), *frames)


def cut(n_frames, window, margin):
    """
    Overlapping windows over so many frames: [(start, end, a, b), ...]; frames [a, b) are the ones kept of window
    [start, end), at least `margin` from its edges but for those of the recording. All windows are equally long.
    """
    if n_frames <= window:
        return [(0, n_frames, 0, n_frames)]
    starts = [*range(0, n_frames - window, window - 2 * margin), n_frames - window]
    seams = [0, *(start + margin for start in starts[1:]), n_frames]
    return [(start, start + window, a, b) for start, a, b in zip(starts, seams[:-1], seams[1:])]


def hubert_features(batch, vocabulary):
    """float32 samples [b, receptive field + (t - 1) * hop + less than hop] -> tensor [b, t, d], on the device."""
    import torch

    batch = torch.as_tensor(batch).to(vocabulary.centroids.device)
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return vocabulary.model(batch).last_hidden_state


def hubert_units(waveforms, vocabulary):
    """Units of 16 kHz waveforms, as units() returns them: n // hop frames of n samples, ends padded as slamkit does."""
    hop, extra = vocabulary.hop, vocabulary.receptive_field - vocabulary.hop
    frames, pieces = [], []
    for i, waveform in enumerate(waveforms):
        waveform = np.asarray(waveform, np.float32)
        if vocabulary.normalize and len(waveform):
            waveform = (waveform - waveform.mean()) / np.sqrt(waveform.var() + 1e-7)
        frames.append(np.zeros(len(waveform) // hop, np.int64))
        padded = np.pad(waveform, (extra // 2, extra - extra // 2))
        for start, end, a, b in cut(len(frames[i]), vocabulary.window, vocabulary.margin) if len(frames[i]) else ():
            stop = len(padded) if end == len(frames[i]) else end * hop + extra
            pieces.append((padded[start * hop:stop], i, start, a, b))
    by_length = itertools.groupby(sorted(pieces, key=lambda piece: len(piece[0])), lambda piece: len(piece[0]))
    centroids = vocabulary.centroids
    for length, equal in by_length:
        equal, size = list(equal), max(1, int(BATCH * SAMPLE_RATE) // length)
        for batch in (equal[j:j + size] for j in range(0, len(equal), size)):
            features = hubert_features(np.stack([samples for samples, *_ in batch]), vocabulary)
            nearest = ((centroids**2).sum(1) - 2 * features @ centroids.T).argmin(-1).cpu().numpy()
            for (_, i, start, a, b), ids in zip(batch, nearest):
                frames[i][a:b] = ids[a - start:b - start]
    return [collapse(ids) for ids in frames]


# ---------------------------------------------------------------------------------------------------------------------
# Waveform to Whisper units
#
# k-means over a middle layer of Whisper's encoder (Radford et al. 2022), pairs of its 50 Hz frames averaged: where
# there is no HuBERT, more phonetic than mel cepstra (corpora/small.py). Layer i is the output of block i, each frame
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
    penalty: float  # as a Codebook's
    hash: str
    sound: Codebook | None = None  # the mean mel features of each unit: to speak with, where there is no vocoder

    n_units = property(lambda self: len(self.centroids))
    rate = UNIT_RATE


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


def model_folder(folder, about):
    """The folder of the model that units.json names; ValueError if it names none."""
    if not isinstance(about.get("model"), str) or not about["model"].isprintable() or len(about["model"]) > 1000:
        raise ValueError(f"{folder}: model in units.json is no folder")
    return os.path.normpath(os.path.join(os.path.realpath(folder), about["model"]))


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
              for start, end, a, b in cut(len(waveform) // HOP, WHISPER_WINDOW, WHISPER_MARGIN) if end > start]
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
    """A Codebook with the mean mel features of any units. frame_ids: the unit of each frame of each waveform."""
    sums, counts = np.zeros((k, 2 * N_CEPSTRUM)), np.zeros((k, 1))
    for ids, waveform in zip(frame_ids, waveforms):
        np.add.at(sums, ids, mel_frames(waveform)[HOP // STEP // 2::HOP // STEP][:len(ids)])
        np.add.at(counts, ids, 1)
    centroids = (sums / np.maximum(counts, 1)).astype(np.float32)
    mean_voice = np.mean([voice(waveform) for waveform in waveforms], 0).astype(float).round(4)
    return Codebook(centroids, 0.0, vocabulary_hash(centroids), run_lengths(frame_ids, k), tuple(mean_voice.tolist()))


def whisper_frame_units(frames, vocabulary):
    """The unit of each 40 ms frame, int64 [n], of whisper_frames()."""
    if len(frames) == 0:
        return np.zeros(0, np.int64)
    cost = squared_distances(frames.cpu().numpy(), vocabulary.centroids.cpu().numpy())
    return cheapest_path(cost, vocabulary.penalty)


# ---------------------------------------------------------------------------------------------------------------------
# Any kind

def load_units(folder, device="cpu"):
    """The unit vocabulary in a folder, of any of KINDS, with .n_units, .rate (Hz) and .hash. ValueError."""
    kind = read_vocabulary(folder)[0]["kind"]
    if kind == "mel":
        return load_mel_units(folder)
    return (load_whisper_units if kind == "whisper" else load_hubert_units)(folder, device)


def read_ids(path):
    """Units out of a .json (a list) or an .npy: an array as it stands there. ValueError."""
    if os.fspath(path).lower().endswith(".npy"):
        return np.array(read_array(path))
    ids = read_json(path, list)
    if not all(type(i) is int for i in ids):
        raise ValueError(f"{path}: not a list of integers")
    return np.array(ids)


def units(waveforms, vocabulary):
    """
    Units of a list of 16 kHz waveforms: for each (ids uint16 without repeats, frame_start int64, the first
    undeduplicated frame of each). Batched inside; what a waveform gives does not depend on the others.
    """
    if isinstance(vocabulary, HubertUnits):
        return hubert_units(waveforms, vocabulary)
    if isinstance(vocabulary, WhisperUnits):
        return [collapse(whisper_frame_units(whisper_frames(w, vocabulary), vocabulary)) for w in waveforms]
    return [mel_units(waveform, vocabulary) for waveform in waveforms]


def n_frames(n_samples, vocabulary):
    """How many undeduplicated frames so many samples have."""
    return n_samples // (SAMPLE_RATE // vocabulary.rate)


# ---------------------------------------------------------------------------------------------------------------------
# Units to waveform

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
    book = vocabulary if isinstance(vocabulary, Codebook) else getattr(vocabulary, "sound", None)
    if vocoder is None and book is None:
        raise ValueError("HuBERT units need a vocoder: convert one with convert.py, and load it with load_vocoder")
    if vocoder is not None and (vocoder.n_units, vocoder.hop) != (vocabulary.n_units, SAMPLE_RATE // vocabulary.rate):
        raise ValueError(f"the vocoder speaks {vocoder.n_units} units of {vocoder.hop} samples, the vocabulary has "
                         f"{vocabulary.n_units} of {SAMPLE_RATE // vocabulary.rate}")
    if len(ids) == 0:
        return np.zeros(0, np.float32)
    return speak_mel_units(ids, book, durations) if vocoder is None else vocode(ids, vocoder, durations)


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


class Vocoder(NamedTuple):
    """HiFi-GAN V1 over embedded units, with a predictor of their durations (textlesslib's CodeHiFiGANVocoder)."""
    config: dict
    weights: dict  # tensors by the names in textlesslib's checkpoint, weight norm folded in
    n_units: int
    hop: int  # samples for one frame


VOCODER_NUMBERS = ("num_embeddings", "embedding_dim", "upsample_rates", "upsample_kernel_sizes", "var_pred_hidden_dim",
                   "resblock_kernel_sizes", "resblock_dilation_sizes", "upsample_initial_channel", "encoder_embed_dim")


def vocoder_shapes(config):
    """{tensor name: shape} of a vocoder's weights; ValueError (one line) if the config is of another kind."""
    c, shapes = config, {}

    def expect(name, *shape, bias=None):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, (bias or shape[0],)

    if not isinstance(c, dict):
        raise ValueError("not the config of a unit HiFi-GAN: no object")
    for name in ("multispkr", "multistyle", "f0", "f0_quant_num_bin", "embedder_params"):
        if c.get(name):
            said = reprlib.repr(c[name])
            raise ValueError(f"{name} is {said}: vocoders with speakers, styles or pitch cannot be used here")

    def flat(value):
        return [x for inner in value for x in (inner if isinstance(inner, list) else [inner])]

    try:
        for name, value in [*c.items(), *c["dur_predictor_params"].items()]:
            counts = flat(flat([value])) or [0]
            if name in VOCODER_NUMBERS and not all(type(x) is int and 0 < x < 1 << 16 for x in counts):
                raise TypeError(f"{name} is {reprlib.repr(value)}")
        d, channels, hop = c["embedding_dim"], c["upsample_initial_channel"], math.prod(c["upsample_rates"])
        size, hidden, inner = (c["dur_predictor_params"][name] for name in
                               ("var_pred_kernel_size", "var_pred_hidden_dim", "encoder_embed_dim"))
        for name, said, wanted in (("sampling_rate", c["sampling_rate"], SAMPLE_RATE), ("encoder_embed_dim", inner, d),
                                   ("model_in_dim", c.get("model_in_dim", d), d), ("var_pred_kernel_size", size, 3),
                                   ("code_hop_size", c.get("code_hop_size", hop), hop)):
            if said != wanted:
                raise ValueError(f"{name} is {said}, not {wanted}")
        blocks = list(zip(c["resblock_kernel_sizes"], c["resblock_dilation_sizes"], strict=True))
        for i, (_, size) in enumerate(zip(c["upsample_rates"], c["upsample_kernel_sizes"], strict=True)):
            here = channels >> i + 1
            expect(f"ups.{i}", 2 * here, here, size, bias=here)
            for j, (size, dilations) in enumerate(blocks):
                for name in (f"convs{k}.{m}" for k in (1, 2) for m in range(len(dilations))):
                    expect(f"resblocks.{i * len(blocks) + j}.{name}", here, here, size)
        shapes["dict.weight"] = (c["num_embeddings"], d)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"not the config of a unit HiFi-GAN with durations ({one_line(error)})") from None
    for name, *shape in (("conv_pre", channels, d, 7), ("conv_post", 1, here, 7), ("dur_predictor.proj", 1, hidden),
                         ("dur_predictor.conv1.0", hidden, d, 3), ("dur_predictor.conv2.0", hidden, hidden, 3),
                         ("dur_predictor.ln1", hidden), ("dur_predictor.ln2", hidden)):
        expect(name, *shape)
    return shapes


def check_weights(there, shapes, path):
    """there: {name: shape}. ValueError that names the first tensor that is missing, too much or misshaped."""
    for name in sorted(there.keys() | shapes.keys()):
        if there.get(name) != shapes.get(name):
            raise ValueError(f"{path}: {name} has shape {there.get(name)}, its config means {shapes.get(name)}")


def load_vocoder(folder, device="cpu"):
    """The vocoder that `python convert.py vocoder` wrote into a folder; ValueError (one line) if anything is wrong."""
    path = os.path.join(folder, "model.safetensors")
    try:
        config, weights = read_json(os.path.join(folder, "config.json")), read_tensors(path)
    except ValueError as error:
        raise ValueError(f"{folder}: not a whole vocoder ({error}); convert it again") from None
    try:
        shapes = vocoder_shapes(config)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    check_weights({name: tuple(tensor.shape) for name, tensor in weights.items()}, shapes, path)
    weights = {name: tensor.float().to(device) for name, tensor in weights.items()}
    return Vocoder(config, weights, config["num_embeddings"], math.prod(config["upsample_rates"]))


def vocode(ids, vocoder, durations=None):
    """Units int64 [n] to a waveform float32 [frames * hop]; durations int64 [n] in frames, None: predicted."""
    import torch
    from torch.nn import functional as F

    w, config = vocoder.weights, vocoder.config

    def conv(x, name, **how):
        return F.conv1d(x, w[f"{name}.weight"], w[f"{name}.bias"], **how)

    def predict(x):  # [n, d] -> frames [n]; the predictor gives log(1 + frames)
        for layer in ("1", "2"):
            x = F.relu(conv(x.T, f"dur_predictor.conv{layer}.0", padding=1)).T
            x = F.layer_norm(x, x.shape[1:], w[f"dur_predictor.ln{layer}.weight"], w[f"dur_predictor.ln{layer}.bias"])
        log_frames = F.linear(x, w["dur_predictor.proj.weight"], w["dur_predictor.proj.bias"])[:, 0]
        return torch.round(torch.exp(log_frames) - 1).long().clamp(min=1)

    def block(x, name, size, dilations):
        for m, dilation in enumerate(dilations):
            y = conv(F.leaky_relu(x, 0.1), f"{name}.convs1.{m}", dilation=dilation, padding=(size - 1) * dilation // 2)
            x = x + conv(F.leaky_relu(y, 0.1), f"{name}.convs2.{m}", padding=(size - 1) // 2)
        return x

    blocks = list(zip(config["resblock_kernel_sizes"], config["resblock_dilation_sizes"]))
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        x = w["dict.weight"][torch.as_tensor(ids, device=w["dict.weight"].device)]
        frames = predict(x) if durations is None else torch.as_tensor(durations, device=x.device)
        x = conv(x.repeat_interleave(frames, 0).T, "conv_pre", padding=3)
        for i, (rate, size) in enumerate(zip(config["upsample_rates"], config["upsample_kernel_sizes"])):
            x = F.conv_transpose1d(F.leaky_relu(x, 0.1), w[f"ups.{i}.weight"], w[f"ups.{i}.bias"], stride=rate,
                                   padding=(size - rate) // 2)
            x = sum(block(x, f"resblocks.{i * len(blocks) + j}", *how) for j, how in enumerate(blocks)) / len(blocks)
        return torch.tanh(conv(F.leaky_relu(x), "conv_post", padding=3))[0].cpu().numpy()


# ---------------------------------------------------------------------------------------------------------------------
# Words and units

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


def draw_utterance(waveform, vocabulary, words, offsets, path, seconds=4.0):
    """
    A picture of the first seconds of a recording: waveform, spectrogram, units and words on one time axis.

    words: strings; offsets: where they begin among the units [len(words) + 1], as from word_units.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    seconds = min(seconds, len(waveform) / SAMPLE_RATE)
    [(ids, frame_start)] = units([waveform], vocabulary)
    starts = np.append(frame_start, n_frames(len(waveform), vocabulary)) / vocabulary.rate
    figure, (wave, mel, row, names) = plt.subplots(
        4, 1, figsize=(16, 6), sharex=True, gridspec_kw=dict(height_ratios=[2, 5, 1, 1]), layout="constrained")
    wave.plot(np.arange(len(waveform)) / SAMPLE_RATE, waveform, linewidth=0.4)
    wave.set_ylabel("waveform")
    wave.set_title(" ".join(words), fontsize=9)
    energies = log_mel(waveform)
    extent = (0, len(energies) * STEP / SAMPLE_RATE, 0, N_MEL)
    mel.imshow(energies.T, origin="lower", aspect="auto", extent=extent, cmap="magma")
    mel.set_ylabel("mel channel")
    colours = plt.get_cmap("tab20")
    for unit, a, b in zip(ids.tolist(), starts, starts[1:]):
        row.axvspan(a, b, color=colours(unit % 20))
        if a < seconds:
            row.text((a + min(b, seconds)) / 2, 0.5, str(unit), ha="center", va="center", fontsize=7)
    row.set_ylabel("units")
    for word, a, b in zip(words, starts[offsets], starts[offsets[1:]]):
        if a < seconds and a < b:
            names.text((a + min(b, seconds)) / 2, 0.5, word, ha="center", va="center", fontsize=9)
        for axis in (wave, mel, row, names):
            axis.axvline(b, color="white" if axis is mel else "black", linewidth=1)
    names.set_ylabel("words")
    names.set_xlabel("seconds")
    for axis in (row, names):
        axis.set_yticks([])
    names.set_xlim(0, seconds)
    figure.savefig(path, dpi=100)
    plt.close(figure)


USAGE = """\
python speech.py units CLIP --units=FOLDER                                   its units, as json
python speech.py say UNITS.json|.npy --units=FOLDER --out=say.wav [--vocoder=FOLDER]
python speech.py draw CLIP --units=FOLDER --out=clip.png --times=CLIP.TextGrid|.WRD|.json
python speech.py draw CLIP --units=FOLDER --out=clip.png --text="what is said" --aligner=pocketsphinx|FOLDER"""


def timed_transcript(clip, waveform, settings):
    """(words, their ends in seconds) of a clip, from --times or from --text and --aligner; ValueError if neither."""
    from words import align, load_aligner, read_textgrid, read_timed_json, read_wrd

    if settings["times"]:
        readers = {".textgrid": read_textgrid, ".wrd": read_wrd, ".json": read_timed_json}
        reader = readers.get(os.path.splitext(settings["times"])[1].lower())
        if reader is None:
            raise ValueError(f"{settings['times']}: its name ends in none of {', '.join(readers)}")
        timed = reader(settings["times"])
        return [text for text, _, _ in timed], np.maximum.accumulate([end for _, _, end in timed])
    if not (settings["text"] and settings["aligner"]):
        raise ValueError(f"{clip}: which words, and when? give --times=FILE, or --text=WORDS and --aligner=NAME")
    [spans] = align([waveform], [settings["text"]], load_aligner(settings["aligner"], settings["device"]))
    if isinstance(spans, ValueError):
        raise spans
    return settings["text"].split(), [end for _, end in spans]


def main(argv):
    from configurator import configure

    if len(argv) < 2 or argv[0] not in ("units", "say", "draw"):
        raise SystemExit(USAGE)
    command, file = argv[:2]
    settings, _ = configure(dict(units="data/demo/units", out="", vocoder="", device="cpu", text="", times="",
                                 aligner=""), argv[2:])
    out = settings["out"] or dict(units="", say="say.wav", draw="clip.png")[command]
    try:
        vocabulary = load_units(settings["units"], settings["device"])
        if command == "say":
            import soundfile

            ids = read_ids(file)
            vocoder = load_vocoder(settings["vocoder"], settings["device"]) if settings["vocoder"] else None
            waveform = resynthesise(ids, vocabulary, vocoder)
            soundfile.write(out, waveform / max(1.0, np.abs(waveform).max(initial=0)), SAMPLE_RATE)
            print(f"{out}: {len(waveform) / SAMPLE_RATE:.2f} s")
            return
        waveform = read_audio(file)
        [(ids, frame_start)] = units([waveform], vocabulary)
        if command == "units":
            print(json.dumps(ids.tolist()))
            return
        words, ends = timed_transcript(file, waveform, settings)
        offsets = word_units(ends, frame_start, n_frames(len(waveform), vocabulary), vocabulary.rate)
        draw_utterance(waveform, vocabulary, words, offsets, out)
        print(f"{out}: {len(words)} words, {len(ids)} units")
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main(sys.argv[1:])
