"""
LibriSpeech: 960 hours of read English audiobooks with transcripts (Panayotov et al., 2015; openslr.org/12; CC BY 4.0).

    python -m corpora.librispeech --source=LibriSpeech/dev-clean --out=data/librispeech-dev --kind=speech \\
        --units=units/mhubert
    python -m corpora.librispeech --source=LibriSpeech --alignments=LibriSpeech-Alignments --out=data/librispeech \\
        --units=units/mhubert --tokenizer=weights/smollm-360m/tokenizer.json

Layout (its README): SPLIT/SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt, lines `ID TRANSCRIPT IN CAPITALS`, and beside it
ID.flac. Word times come from the Montreal Forced Aligner by way of github.com/CorentinJ/librispeech-alignments, in
either of its forms and in the same folders as the audio, below --alignments or merged into the corpus: ID.TextGrid, or
SPEAKER-CHAPTER.alignment.txt with lines `ID ",GO,,DO," "0.49,0.89,1.27,1.38"` (words and their ends, pauses empty).
Utterances without times go to --aligner.
"""

import os
import re
from pathlib import Path

from corpora import common, files
from speech.word_times import read_textgrid, timed_word


def find(source, settings):
    if settings["alignments"] and not os.path.isdir(settings["alignments"]):
        raise SystemExit(f"--alignments={settings['alignments']}: there is no such folder")
    return files.find_files(source, [".trans.txt"])


def read_alignments(path):
    """{utterance: timed words} of an .alignment.txt; ValueError for a line of another form."""
    times = {}
    for line in files.lines(path):
        parts = re.fullmatch(r'(\S+) "([^"]*)" "([^"]*)"\s*', line)
        words, ends = (part.split(",") for part in parts.groups()[1:]) if parts else ((), [])
        if not parts or len(words) != len(ends):
            raise ValueError(f"bad alignment: {path}: {line[:60]!r}")
        timed = [timed_word(word, start, end, path) for word, start, end in zip(words, ["0", *ends], ends)]
        times[parts[1]] = [word for word in timed if word[0]]
    return times


def read(path, settings):
    folder = path.parent
    if settings["alignments"]:
        folder = Path(settings["alignments"]) / path.parent.relative_to(settings["source"])
    condensed = folder / path.name.replace(".trans.", ".alignment.")
    paired = settings["kind"] == "paired"
    times = read_alignments(condensed) if paired and condensed.exists() else {}
    for line in files.lines(path):
        name, _, text = line.partition(" ")
        try:
            audio, grid = files.inside(path.parent, f"{name}.flac"), files.inside(folder, f"{name}.TextGrid")
            words = read_textgrid(grid) if paired and os.path.exists(grid) else times.get(name)
            yield common.Item(name, audio, text=text, words=words)
        except ValueError as error:
            yield common.Bad(name, error)


if __name__ == "__main__":
    common.main("librispeech", find, read, alignments="")
