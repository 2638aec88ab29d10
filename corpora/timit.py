"""
TIMIT: 630 speakers read ten sentences each, with word times checked by hand (Garofolo et al., 1993).

    python -m corpora.timit --source=TIMIT/TEST --out=data/timit-test --units=units/mhubert \\
        --tokenizer=weights/smollm-360m/tokenizer.json

Source: catalog.ldc.upenn.edu/LDC93S1. Licence: the LDC's.

Layout (its README.DOC): TRAIN|TEST/DR1/FCJF0/SA1.WAV (NIST SPHERE, 16 kHz), SA1.TXT (`0 46797 She had your ...`) and
SA1.WRD (`BEGIN END word`, in samples). Names are in upper or lower case. Some copies have a converted SA1.WAV.wav
instead of SA1.WAV.
"""

import re

from corpora import common
from runtime.files import find_files, read_text
from speech.word_times import read_wrd


def find(source, settings):
    found = find_files(source, [".wrd"])
    return [path for path in found if settings["sa"] or not path.stem.lower().startswith("sa")]


def sibling(path, *endings):
    """Return the file with the stem of a path and the first possible of these endings, in upper or lower case.

    Raises ValueError if there is none.
    """
    names = {file.name.lower(): file for file in path.parent.iterdir()}
    for ending in endings:
        if found := names.get((path.stem + ending).lower()):
            return found
    raise ValueError(f"missing file: {path.with_suffix(endings[0])}")


def read(path, settings):
    name = f"{path.parent.name}-{path.stem}"  # FCJF0-SA1
    try:
        match = re.fullmatch(r"\s*\d+\s+\d+\s+(\S.*?)\s*", read_text(sibling(path, ".TXT")), re.DOTALL)
        if not match:
            raise ValueError(f"no transcript: {path.with_suffix('.TXT')} is not `BEGIN END text`")
        audio = sibling(path, ".WAV", ".WAV.wav")
        yield common.Item(name, str(audio), text=match[1], words=read_wrd(path))
    except ValueError as error:
        yield common.Bad(name, error)


if __name__ == "__main__":
    common.main(
        "timit", find, read, companions=[".txt"],
        sa=False,  # include the two SA sentences, which every speaker reads
    )
