"""
Print the units of a sound file, speak units, or draw a recording with its units and words.

    python -m speech units CLIP.wav --units=data/demo/units                    prints the units as json
    python -m speech say UNITS.json --units=data/demo/units --out=say.wav      from a .json or an .npy of units
    python -m speech draw CLIP.wav --units=data/demo/units --times=CLIP.TextGrid
    python -m speech draw CLIP.wav --units=data/demo/units --text="The cat sat." --aligner=pocketsphinx
"""
import json
import sys
from pathlib import Path

from configurator import configure, print_help
from speech.align import align, load_aligner
from speech.audio import SAMPLE_RATE, read_audio, write_audio
from speech.transcripts import fill_spans
from speech.units import load_units, read_ids, resynthesise
from speech.vocoder import load_vocoder
from speech.word_times import read_textgrid, read_timed_json, read_wrd

DEFAULTS = dict(
    units="data/demo/units",  # folder of the unit vocabulary
    device="cpu",             # where HuBERT, the vocoder and the aligner run: cpu or cuda
    out="",                   # say: sound file to write (default say.wav); draw: picture to write (default clip.png)
    vocoder="",               # say: folder of a vocoder; needed for HuBERT units
    times="",                 # draw: word times of the clip, a .TextGrid, .WRD or .json
    text="",                  # draw: transcript of the clip, if there is no file of word times
    aligner="",               # draw: finds the word times of --text: pocketsphinx, or the folder of MMS's aligner
)
READERS = {".textgrid": read_textgrid, ".wrd": read_wrd, ".json": read_timed_json}


def print_units(clip, settings):
    [(ids, _)] = load_units(settings["units"], settings["device"]).encode([read_audio(clip)])
    print(json.dumps(ids.tolist()))


def say(file, settings):
    ids, out, device = read_ids(file), settings["out"] or "say.wav", settings["device"]
    vocoder = load_vocoder(settings["vocoder"], device) if settings["vocoder"] else None
    waveform = resynthesise(ids, load_units(settings["units"], device), vocoder)
    write_audio(out, waveform)
    print(f"{out}: {len(waveform) / SAMPLE_RATE:.2f} s")


def draw(clip, settings):
    from tools import figures  # imported here, because matplotlib is slow to load

    vocabulary, waveform = load_units(settings["units"], settings["device"]), read_audio(clip)
    words, ends = timed_transcript(clip, waveform, settings)
    out = settings["out"] or "clip.png"
    figures.utterance(out, waveform, vocabulary, words, ends)
    print(f"{out}: {len(words)} words")


def timed_transcript(clip, waveform, settings):
    """The words of a clip and the end of each in seconds, from --times or from --text and --aligner."""
    times, text = settings["times"], settings["text"]
    if times and Path(times).suffix.lower() in READERS:
        timed = READERS[Path(times).suffix.lower()](times)
        words, spans = [word for word, _, _ in timed], [span for _, *span in timed]
        spans = fill_spans(words, spans, len(waveform) / SAMPLE_RATE) if words else []
        return words, [end for _, end in spans]
    if times:
        raise ValueError(f"{times}: its name ends in none of {', '.join(READERS)}")
    if not (text and settings["aligner"]):
        raise ValueError(f"{clip}: its words are not known; give --times=FILE, or --text=WORDS and --aligner=NAME")
    [spans] = align([waveform], [text], load_aligner(settings["aligner"], settings["device"]))
    if isinstance(spans, ValueError):
        raise spans
    return text.split(), [end for _, end in spans]


def main(argv):
    commands = dict(units=print_units, say=say, draw=draw)
    if not argv or "-h" in argv or "--help" in argv:
        print_help(DEFAULTS)
    elif len(argv) < 2 or argv[0] not in commands or argv[1].startswith("-"):
        raise SystemExit(f"python -m speech {' '.join(argv)}: give units, say or draw, then a file; --help shows how")
    else:
        settings, _ = configure(DEFAULTS, argv[2:])
        try:
            commands[argv[0]](argv[1], settings)
        except (ValueError, OSError, RuntimeError) as error:
            raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main(sys.argv[1:])
