"""
Libriheavy: 50,000 hours of Libri-Light with transcripts that have case and punctuation (Kang et al., 2023).

    python -m corpora.libriheavy --source=libriheavy/libriheavy_cuts_small.jsonl.gz --audio=librilight \\
        --out=data/libriheavy --units=units/mhubert --tokenizer=weights/smollm-360m/tokenizer.json \\
        --aligner=aligners/mms

Source: github.com/k2-fsa/libriheavy for the transcripts, Libri-Light for the sound. Licence: Apache 2.0 for the
transcripts; the recordings are in the public domain.

Layout (its README): --source is a libriheavy_cuts_*.jsonl.gz or a folder of such files. Each line is a lhotse cut: id,
start and duration in a recording, and one supervision. In the supervision, custom.texts[0] is the text of the book, and
custom.texts[1] is the output of a recogniser, which is not used. recording.id is the path of the .flac below --audio,
without the ending. Word times come from the aligner.
"""

import os

from corpora import common, files
from runtime.files import find_files


def find(source, settings):
    if settings["kind"] != "text" and not os.path.isdir(settings["audio"]):
        raise SystemExit(f"--audio={settings['audio']}: give the folder of Libri-Light")
    return find_files(source, files.JSONL)


def read(path, settings):
    def items(name, cut):
        (supervision,), start = cut["supervisions"], float(cut["start"])
        audio = files.inside(settings["audio"], cut["recording"]["id"] + ".flac")
        text = supervision["custom"]["texts"][0]
        yield common.Item(str(cut["id"]), audio, start, start + float(cut["duration"]), text)

    return files.convert_json(path, items)


if __name__ == "__main__":
    common.main(
        "libriheavy", find, read,
        audio="",  # the folder of Libri-Light; not needed for text
    )
