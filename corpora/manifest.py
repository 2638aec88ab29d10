"""
Your own recordings, listed in a manifest.

    python -m corpora.manifest --source=recordings --out=data/recordings --units=units/mhubert \\
        --tokenizer=weights/smollm-360m/tokenizer.json --aligner=aligners/mms

Layout: a manifest.jsonl (or any .jsonl, .jsonl.gz or .jsonl.zst) in the folder --source, with a record on each line:

    {"audio": "a/1.wav", "start": 0.5, "end": 7.25, "text": "As written, with case.", "words": [["As", 0.6, 0.8], ...]}

audio is a path relative to the folder of the manifest, and must not lead out of it. start and end are in seconds.
Without them the item is the whole file. text is not needed for --kind=speech. words has the word, start and end of each
word, in seconds from the beginning of the file. It is not needed with --aligner.
"""

from corpora import common, files
from runtime.files import find_files
from speech.word_times import timed_word


def find(source, settings):
    return find_files(source, files.JSONL)


def read(path, settings):
    def items(name, record):
        audio = files.inside(path.parent, record["audio"]) if "audio" in record else None
        start, end, text, words = (record.get(key) for key in ("start", "end", "text", "words"))
        if words is not None:
            words = [timed_word(word, first, last, name) for word, first, last in words]
        yield common.Item(name, audio, float(start or 0), None if end is None else float(end), text, words)

    return files.convert_json(path, items)


if __name__ == "__main__":
    common.main("manifest", find, read)
