"""
Synthesise speech with espeak-ng, called through ctypes: from a text to a waveform and word times. The demo uses it.
"""
import atexit
import ctypes
import functools
import os
import shutil
import tempfile
from _ctypes import dlclose

import numpy as np

from speech.audio import resample

END_OF_LIST, WORD, END_OF_CLAUSE, PHONE = 0, 1, 5, 7  # event types in espeak-ng's speak_lib.h
SYNCHRONOUS, UTF8, RATE, PITCH = 2, 1, 1, 3  # options and parameters in speak_lib.h


class Event(ctypes.Structure):
    """espeak-ng's struct espeak_EVENT. Positions count the characters of the text from 1."""
    _fields_ = [(name, ctypes.c_int) for name in ("type", "identifier", "position", "length", "milliseconds", "sample")]
    _fields_ += [("user_data", ctypes.c_void_p), ("phone", ctypes.c_char * 8)]


Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(Event))


def espeak(text, voice="en-us", rate=175, pitch=50):
    """
    Speak a text with espeak-ng.

    text: words separated by white space; voice: an espeak-ng voice with an optional variant ("en-us+f2");
    rate: words a minute (80 to 450); pitch: 0 to 99.
    Returns (waveform, words): float32 [n] at 16 kHz within [-1, 1], and one (start, end) in seconds for each word.
    words is None if espeak-ng gives no time for some word; do not use such a text. The same arguments give the same
    samples, except with the breathy variants +f2, +f3 and +f5, whose noise depends on the clock.
    Raises RuntimeError if espeak-ng is missing, ValueError for an unknown voice.
    """
    words = text.split()
    # espeak-ng joins some function words ("of the") and reports one event for the group. A bar "|" before a word
    # separates it from the word before. A new bar can change other groups, so this is repeated.
    barred = set()
    for _ in range(3):
        spoken = " ".join("| " + word if i in barred else word for i, word in enumerate(words))
        samples, native_rate, events = synthesise(spoken, voice, rate, pitch)
        spans = word_spans(words, barred, samples, events)
        untimed = {i for i, span in enumerate(spans) if span is None}
        if untimed <= barred:
            break
        barred |= untimed
    waveform = np.clip(resample(samples.astype(np.float32) / 32768, native_rate), -1, 1)
    if untimed:
        return waveform, None
    return waveform, [(start / native_rate, end / native_rate) for start, end in spans]


def espeak_phones(text, voice="en-us", rate=175, pitch=50):
    """
    Speak a text and return (waveform, [(phone, start in seconds), ...]), without stress marks; "_" is a pause.

    Joined function words are not separated here, so the waveform can differ from that of espeak().
    """
    samples, native_rate, events = synthesise(text, voice, rate, pitch, phones=True)
    phones = []
    for kind, _, sample, phone in events:
        if kind == PHONE and phone != b";":  # ";" continues the phone before it
            name = phone.decode().strip("',%=").rstrip("2")
            phones.append(("_" if name[:1] in ("", "_", "|") else name, sample / native_rate))
    return np.clip(resample(samples.astype(np.float32) / 32768, native_rate), -1, 1), phones


def word_spans(words, barred, samples, events):
    """(start, end) in samples for each word, None for a word without an event. barred: words after a bar, by index."""
    owner, position = {}, 0  # owner: the word at each character of the spoken text
    for i, word in enumerate(words):
        position += len("| ") if i in barred else 0
        owner |= dict.fromkeys(range(position, position + len(word)), i)
        position += len(word) + 1
    starts = {}
    for kind, character, sample, _ in events:
        if kind == WORD and character in owner:
            starts.setdefault(owner[character], sample)
    clause_ends = [sample for kind, _, sample, _ in events if kind == END_OF_CLAUSE] + [len(samples)]
    spans, end = [None] * len(words), len(samples)
    for i in sorted(starts, reverse=True):  # a word ends where the next one starts, or where its clause ends
        start = starts[i]
        end = min([end, *(clause_end for clause_end in clause_ends if clause_end > start)])
        if end in clause_ends:  # the pause after a clause does not belong to its last word
            loud = np.flatnonzero(np.abs(samples[start:end].astype(np.int32)) > 50)
            end = start + int(loud[-1]) + 1 if len(loud) else end
        spans[i] = (start, end)
        end = start
    return spans


def synthesise(text, voice, rate, pitch, phones=False):
    """Returns int16 samples, their rate in Hz, and (type, character, sample, phone) of each event.

    There are events of phones only with phones=True.
    """
    library, data = espeak_paths()
    # espeak-ng keeps the phase of its pitch flutter in static variables, so an utterance depends on earlier ones.
    # Loading the library anew for each text takes 2 ms and makes this a pure function of its arguments.
    lib = ctypes.CDLL(library)
    samples, events = [], []

    def collect(wave, count, event):
        if wave and count > 0:
            samples.append(np.ctypeslib.as_array(wave, (count,)).copy())
        i = 0
        while event[i].type != END_OF_LIST:
            events.append((event[i].type, event[i].position - 1, event[i].sample, event[i].phone))
            i += 1
        return 0

    callback = Callback(collect)
    try:
        native_rate = lib.espeak_Initialize(SYNCHRONOUS, 0, data, int(phones))
        if native_rate <= 0:
            raise RuntimeError(f"espeak-ng could not start with its data in {data.decode()}")
        lib.espeak_SetSynthCallback(callback)
        if lib.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(f"espeak-ng has no voice {voice!r}")
        lib.espeak_SetParameter(RATE, rate, 0)
        lib.espeak_SetParameter(PITCH, pitch, 0)
        encoded = text.encode()
        lib.espeak_Synth(encoded, ctypes.c_size_t(len(encoded) + 1), 0, 1, 0, UTF8, None, None)
        lib.espeak_Terminate()
    finally:
        dlclose(lib._handle)
    return np.concatenate(samples or [np.zeros(0, np.int16)]), native_rate, events


@functools.cache
def espeak_paths():
    """(path of the library, path of its data as bytes). Raises RuntimeError if espeak-ng is not installed."""
    try:
        import espeakng_loader
    except ImportError:
        raise RuntimeError("espeak-ng is missing: pip install -e '.[demo]'") from None
    data = espeakng_loader.get_data_path()
    if len(data) > 120:  # espeak-ng has a buffer of about 150 characters for the path
        folder = tempfile.mkdtemp(prefix="espeak-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        data = shutil.copytree(data, os.path.join(folder, "espeak-ng-data"))
    return espeakng_loader.get_library_path(), data.encode()
