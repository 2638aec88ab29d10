"""
The Spoken Wikipedia Corpora, English: volunteers read articles, sentences and words partly aligned (Baumann, Koehn and
Hennig, 2019; nats.gitlab.io/swc; CC BY-SA).

    python -m corpora.swc --source=SWC/english --out=data/swc --units=units/mhubert \\
        --tokenizer=weights/smollm-360m/tokenizer.json

Layout (as DeepSpeech's import_swc.py reads it): ARTICLE/aligned.swc and ARTICLE/audio.ogg, or audio1.ogg, audio2.ogg,
... if it was read in several parts. An item is a run of neighbouring sentences of one paragraph and one part, all
words of which have times, of up to --segment seconds. A sentence with a word that was not aligned is dropped ("no word
times"). With --kind=speech recordings are cut evenly.
"""

import re

from corpora import common, files
from words import read_swc


def find(source, settings):
    return files.find_files(source, ["aligned.swc"])


def read(path, settings):
    recordings = sorted(path.parent.glob("audio*.ogg"), key=lambda p: int("0" + re.sub(r"\D", "", p.stem)))
    run, article = [], path.parent.name
    if settings["kind"] == "speech":  # all of it, aligned or not
        for recording in recordings:
            for number, span in enumerate(files.cut(0.0, files.duration(recording), settings["segment"])):
                yield common.Item(f"{article}/{recording.stem}_{number}", str(recording), *span)
        return
    for number, segment in enumerate([*read_swc(path), None]):
        fits = run and segment and segment.words and segment[2:] == run[-1][1][2:] and (
            segment.words[-1][2] - run[0][1].words[0][1] <= settings["segment"])
        if run and not fits:
            yield item(article, run, recordings)
            run = []
        if segment and segment.words:
            run.append((number, segment))
        elif segment:
            name = f"{article}:{number}"
            yield common.Bad(name, ValueError(f"no word times: {segment.text[:60]!r} in {path} is not wholly aligned"))


def item(article, run, recordings):
    """A run of [(number, Segment)] as an Item."""
    name, part = f"{article}:{run[0][0]}-{run[-1][0]}", run[0][1].part
    words = [word for _, segment in run for word in segment.words]
    if part >= len(recordings):
        return common.Bad(name, ValueError(f"no audio: part {part + 1} of {article}"))
    text = " ".join(segment.text for _, segment in run)
    return common.Item(name, str(recordings[part]), words[0][1], words[-1][2], text, words)


if __name__ == "__main__":
    common.main("swc", find, read, segment=30.0)
