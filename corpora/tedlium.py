"""
TED-LIUM 3: 452 hours of TED talks with aligned transcripts (Hernandez et al., 2018).

    python -m corpora.tedlium --source=TEDLIUM_release-3/legacy/train --out=data/tedlium --units=units/mhubert \\
        --tokenizer=weights/smollm-360m/tokenizer.json --aligner=aligners/mms

Source: openslr.org/51. Licence: CC BY-NC-ND 3.0.

Layout (its README, and Kaldi's recipe tedlium/s5_r3): sph/TALK.sph (NIST SPHERE, PCM), and stm/TALK.stm with lines
`TALK CHANNEL SPEAKER START END <LABELS> text in lower case`. In NIST's STM format the labels may be missing.

Segments marked ignore_time_segment_in_scoring are left out. The transcripts split off suffixes, as in "it 's"; here
they are joined to the word again. <unk> stands for a word that was not transcribed, so a segment with <unk> is used
only for --kind=speech.
"""

import re

from corpora import common, files
from runtime.files import find_files


def find(source, settings):
    return find_files(source, [".stm"])


def clean(text):
    """Return the words of a transcript, without labels, noises and pauses, and with "it's" for "it 's"."""
    text = re.sub(r"<(?!unk>)[^<>]*>|\{\w+\}|\[\w+\]|\(\d+\)", " ", text, flags=re.IGNORECASE)
    return " ".join(re.sub(r"(?<=\w) '(?=(?:s|re|ve|ll|d|m|t)\b)", "'", text).split())


def read(path, settings):
    def items(name, line):
        if line.strip().startswith(";;"):  # a comment
            return
        talk, _, _, start, end, *rest = line.split(maxsplit=5)
        start, end, text = float(start), float(end), clean(" ".join(rest))
        audio = files.inside(path.parent.parent / "sph", f"{talk}.sph")
        if text.lower() == "ignore_time_segment_in_scoring":
            yield common.Bad(name, ValueError(f"not transcribed: {start:g} to {end:g} s of {talk}"))
        elif "<unk>" in text.lower() and settings["kind"] != "speech":
            yield common.Bad(name, ValueError(f"unknown word in transcript: {text[:60]!r}"))
        else:
            yield common.Item(name, audio, start, end, text)

    return files.convert(files.numbered_lines(path), items)


if __name__ == "__main__":
    common.main("tedlium", find, read)
