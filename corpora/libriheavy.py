"""
Libriheavy: 50,000 hours of Libri-Light with transcripts that have case and punctuation (Kang et al., 2023;
github.com/k2-fsa/libriheavy; manifests Apache 2.0, recordings in the public domain).

    python -m corpora.libriheavy --source=libriheavy/libriheavy_cuts_small.jsonl.gz --audio=librilight \\
        --out=data/libriheavy --units=units/mhubert --tokenizer=weights/smollm-360m/tokenizer.json \\
        --aligner=aligners/mms

Layout (its README): --source is a libriheavy_cuts_*.jsonl.gz, or a folder of them, of lhotse's cuts: one a line, with
id, start and duration in a recording, and one supervision whose custom.texts[0] is the text of the book; the second
text is a recogniser's. --audio is the folder of Libri-Light: recording.id is the path of the .flac in it, without the
ending (recording.sources has a path of the authors' machine). Word times are the --aligner's.
"""

import os

from corpora import common, files
from runtime.files import one_line


def find(source, settings):
    if settings["kind"] != "text" and not os.path.isdir(settings["audio"]):
        raise SystemExit(f"--audio={settings['audio']}: give the folder of Libri-Light")
    return files.find_files(source, (".jsonl.gz", ".jsonl"))


def read(path, settings):
    for name, cut in files.json_lines(path):
        if isinstance(cut, common.Bad):
            yield cut
            continue
        try:
            (supervision,), start = cut["supervisions"], float(cut["start"])
            text = supervision["custom"]["texts"][0]
            audio = files.inside(settings["audio"], cut["recording"]["id"] + ".flac")
            yield common.Item(cut["id"], audio, start, start + float(cut["duration"]), text)
        except (KeyError, TypeError, IndexError, ValueError) as error:
            yield common.Bad(name, ValueError(f"unreadable record: {path}, {name} ({one_line(error)})"))


if __name__ == "__main__":
    common.main("libriheavy", find, read, audio="")
