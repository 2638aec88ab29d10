"""
TIMIT: 630 speakers read ten sentences each, with word times checked by hand (Garofolo et al., 1993).

    python -m corpora.timit --source=TIMIT/TEST --out=data/timit-test --units=units/mhubert \\
        --tokenizer=weights/smollm-360m/tokenizer.json

Source: catalog.ldc.upenn.edu/LDC93S1. Licence: the LDC's.

Layout (its README.DOC): TRAIN|TEST/DR1/FCJF0/SA1.WAV (NIST SPHERE, 16 kHz), SA1.TXT (`0 46797 She had your ...`) and
SA1.WRD (`BEGIN END word`, in samples). Names are in upper or lower case. Some copies have a converted SA1.WAV.wav
instead of SA1.WAV.
"""

from corpora import common, files
from speech.word_times import read_wrd


def find(source, settings):
    found = files.find_files(source, (".WRD", ".wrd"))
    return [path for path in found if settings["sa"] or not path.stem.lower().startswith("sa")]


def sibling(path, *endings):
    """Return the first existing file with the stem of a path and one of the endings. Raises ValueError if none exists.
    """
    for ending in endings:
        if path.with_suffix(ending).exists():
            return path.with_suffix(ending)
    raise ValueError(f"missing file: {path.with_suffix(endings[0])}")


def read(path, settings):
    name = f"{path.parent.name}-{path.stem}"  # FCJF0-SA1
    try:
        text = sibling(path, ".TXT", ".txt").read_text("utf-8", errors="surrogateescape").split(maxsplit=2)[2]
        audio = sibling(path, ".WAV", ".wav", ".WAV.wav")
        yield common.Item(name, str(audio), text=text.strip(), words=read_wrd(path))
    except IndexError:
        yield common.Bad(name, ValueError(f"no transcript: {path.with_suffix('.TXT')} is not `BEGIN END text`"))
    except ValueError as error:
        yield common.Bad(name, error)


if __name__ == "__main__":
    common.main(
        "timit", find, read,
        sa=False,  # include the two SA sentences, which every speaker reads
    )
