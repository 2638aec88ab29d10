"""
Units of a sound file, the sound of units, and a picture of both.

    python -m speech units CLIP.wav --units=data/demo/units                    prints the units as json
    python -m speech say UNITS.json --units=data/demo/units --out=say.wav      from a .json or an .npy of units
    python -m speech draw CLIP.wav --units=data/demo/units --times=CLIP.TextGrid
    python -m speech draw CLIP.wav --units=data/demo/units --text="what is said" --aligner=pocketsphinx
"""
import importlib
import json
import os
import sys

import numpy as np

from configurator import configure, nearest, print_help
from speech.align import align, load_aligner
from speech.audio import SAMPLE_RATE, read_audio, write_audio
from speech.units import load_units, read_ids, resynthesise
from speech.vocoder import load_vocoder
from speech.word_times import read_textgrid, read_timed_json, read_wrd

DEFAULTS = dict(
    units="data/demo/units",  # folder of the unit vocabulary
    device="cpu",             # where HuBERT, vocoder and aligner run: cpu or cuda
    out="",                   # say: sound file to write (say.wav); draw: picture to write (clip.png)
    vocoder="",               # say: folder of a vocoder; needed for HuBERT units
    times="",                 # draw: word times of the clip, a .TextGrid, .WRD or .json
    text="",                  # draw: the words of the clip, where there is no file of word times
    aligner="",               # draw: what finds their times: pocketsphinx, or the folder of a wav2vec 2.0
)
READERS = {".textgrid": read_textgrid, ".wrd": read_wrd, ".json": read_timed_json}


def print_units(clip, c):
    """Write the units of a sound file to standard output, as a json list."""
    [(ids, _)] = load_units(c["units"], c["device"]).encode([read_audio(clip)])
    print(json.dumps(ids.tolist()))


def say(file, c):
    """Write a sound file in which units are spoken."""
    ids, out = read_ids(file), c["out"] or "say.wav"
    vocoder = load_vocoder(c["vocoder"], c["device"]) if c["vocoder"] else None
    waveform = resynthesise(ids, load_units(c["units"], c["device"]), vocoder)
    write_audio(out, waveform)
    print(f"{out}: {len(waveform) / SAMPLE_RATE:.2f} s")


def draw(clip, c):
    """Draw waveform, spectrogram, units and words of a sound file."""
    vocabulary, waveform, out = load_units(c["units"], c["device"]), read_audio(clip), c["out"] or "clip.png"
    words, ends = timed_transcript(clip, waveform, c)
    figures = importlib.import_module("tools.figures")  # here, because matplotlib takes long to import
    figures.utterance(out, waveform, vocabulary, words, ends)
    print(f"{out}: {len(words)} words")


def timed_transcript(clip, waveform, c):
    """The words of a clip and their ends in seconds, from --times, or from --text and --aligner. ValueError."""
    if c["times"]:
        reader = READERS.get(os.path.splitext(c["times"])[1].lower())
        if reader is None:
            raise ValueError(f"{c['times']}: its name ends in none of {', '.join(READERS)}")
        timed = reader(c["times"])
        return [text for text, _, _ in timed], np.maximum.accumulate([end for _, _, end in timed])
    if not (c["text"] and c["aligner"]):
        raise ValueError(f"{clip}: its words are not known; give --times=FILE, or --text=WORDS and --aligner=NAME")
    [spans] = align([waveform], [c["text"]], load_aligner(c["aligner"], c["device"]))
    if isinstance(spans, ValueError):
        raise spans
    return c["text"].split(), [end for _, end in spans]


COMMANDS = dict(units=print_units, say=say, draw=draw)


def main(argv):
    if not argv or {"-h", "--help"} & set(argv):
        return print_help(DEFAULTS)
    if argv[0] not in COMMANDS:
        raise SystemExit(f"python -m speech {argv[0]}: no such command; did you mean {nearest(argv[0], COMMANDS)}?")
    if len(argv) < 2 or argv[1].startswith("-"):
        raise SystemExit(f"python -m speech {argv[0]}: give a file first; --help shows how")
    settings, _ = configure(DEFAULTS, argv[2:])
    try:
        COMMANDS[argv[0]](argv[1], settings)
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main(sys.argv[1:])
