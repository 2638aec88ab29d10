"""
Text to a waveform and word times, with espeak-ng through ctypes: the voices of the demo.
"""
import _ctypes
import atexit
import ctypes
import functools
import os
import shutil
import tempfile

import numpy as np

from speech.audio import resample


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
