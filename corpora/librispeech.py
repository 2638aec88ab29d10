"""
LibriSpeech: 960 hours of read English audiobooks with transcripts (Panayotov et al., 2015).

    python -m corpora.librispeech --source=LibriSpeech/dev-clean --out=data/librispeech-dev --kind=speech \\
        --units=units/mhubert
    python -m corpora.librispeech --source=LibriSpeech --alignments=LibriSpeech-Alignments --out=data/librispeech \\
        --units=units/mhubert --tokenizer=weights/smollm-360m/tokenizer.json

Source: openslr.org/12. Licence: CC BY 4.0.

Layout (its README): SPLIT/SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt with lines `ID TRANSCRIPT IN CAPITALS`, and ID.flac
in the same folder.

Word times were made with the Montreal Forced Aligner (github.com/CorentinJ/librispeech-alignments). They come in two
forms, which can both be read: ID.TextGrid, and SPEAKER-CHAPTER.alignment.txt with lines
`ID ",GO,,DO," "0.49,0.89,1.27,1.38"` (words and their ends; pauses are empty words). These files are in the folders of
the sound, or in folders of the same names below --alignments. --aligner finds the times that are missing.
"""

import os
import re
from pathlib import Path

from corpora import common, files
from runtime.files import find_files
from speech.word_times import read_textgrid, timed_word


def find(source, settings):
    if settings["alignments"] and not os.path.isdir(settings["alignments"]):
        raise SystemExit(f"--alignments={settings['alignments']}: there is no such folder")
    return find_files(source, [".trans.txt"])


def read_alignments(path):
    """Return {utterance: timed words} of an .alignment.txt. Raises ValueError for a line of another form."""
    times = {}
    for line in files.lines(path):
        match = re.fullmatch(r'(\S+) "([^"]*)" "([^"]*)"\s*', line)
        words, ends = (match[2].split(","), match[3].split(",")) if match else ([], [""])
        if len(words) != len(ends):
            raise ValueError(f"bad alignment: {path}: {line[:60]!r}")
        timed = [timed_word(word, start, end, path) for word, start, end in zip(words, ["0", *ends], ends)]
        times[match[1]] = [word for word in timed if word[0]]
    return times


def read(path, settings):
    folder, paired, times = path.parent, settings["kind"] == "paired", {}
    if settings["alignments"]:
        folder = Path(settings["alignments"]) / path.parent.relative_to(settings["source"])
    condensed = folder / path.name.replace(".trans.", ".alignment.")
    if paired and condensed.exists():
        times = read_alignments(condensed)
    for line in files.lines(path):
        name, _, text = line.partition(" ")
        try:
            audio, grid = files.inside(path.parent, f"{name}.flac"), folder / f"{name}.TextGrid"
            words = read_textgrid(grid) if paired and grid.exists() else times.get(name)
            yield common.Item(name, audio, text=text.lower() if settings["lower"] else text, words=words)
        except ValueError as error:
            yield common.Bad(name, error)


if __name__ == "__main__":
    common.main(
        "librispeech", find, read, companions=(".textgrid", ".alignment.txt"),
        alignments="",  # folder of word times; empty: they are in the folders of the sound
        lower=False,    # write transcripts in lower case, which a text model knows better than capitals
    )
