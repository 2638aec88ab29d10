"""
TED-LIUM 3: 452 hours of TED talks with aligned transcripts (Hernandez et al., 2018; openslr.org/51; CC BY-NC-ND 3.0).

    python -m corpora.tedlium --source=TEDLIUM_release-3/legacy/train --out=data/tedlium --units=units/mhubert \\
        --tokenizer=weights/smollm-360m/tokenizer.json --aligner=aligners/mms

Layout (its README, and Kaldi's recipe tedlium/s5_r3): stm/TALK.stm and sph/TALK.sph (NIST SPHERE, PCM), lines
`TALK CHANNEL SPEAKER START END <LABELS> text in lower case`. Segments marked ignore_time_segment_in_scoring are left
out. The text is cut as "it 's": the suffix goes back to its word. <unk> stands for a word that the transcript lacks, so
such a segment serves as speech only.
"""

import re

from corpora import common, files
from runtime.files import one_line


def find(source, settings):
    return files.find_files(source, [".stm"])


def clean(text):
    """The words of a transcript: no noises or pauses, and "it 's" as "it's"."""
    text = re.sub(r"<sil>|\{\w+\}|\[\w+\]|\(\d+\)", " ", text)
    return " ".join(re.sub(r"(?<=\w) '(?=(?:s|re|ve|ll|d|m|t)\b)", "'", text).split())


def read(path, settings):
    for number, line in enumerate(files.lines(path), 1):
        fields, name = line.split(maxsplit=6), f"{path.stem}:{number}"
        if not fields or line.startswith(";;") or fields[-1].strip() == "ignore_time_segment_in_scoring":
            continue
        try:
            (start, end), text = map(float, fields[3:5]), clean(fields[6] if len(fields) > 6 else "")
            audio = files.inside(path.parent.parent / "sph", f"{fields[0]}.sph")
        except ValueError as error:
            yield common.Bad(name, ValueError(f"unreadable record: {path}, line {number} ({one_line(error)})"))
            continue
        if "<unk>" in text and settings["kind"] != "speech":
            yield common.Bad(name, ValueError(f"unknown word in transcript: {text[:60]!r}"))
            continue
        yield common.Item(name, audio, start, end, text)


if __name__ == "__main__":
    common.main("tedlium", find, read)
