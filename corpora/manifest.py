"""
Recordings of one's own, listed in a manifest.

    python -m corpora.manifest --source=recordings --out=data/recordings --units=units/mhubert \\
        --tokenizer=weights/smollm-360m/tokenizer.json --aligner=aligners/mms

Layout: manifest.jsonl (or any .jsonl, .jsonl.gz, .jsonl.zst) in the folder --source, one record a line:
    {"audio": "a/1.wav", "start": 0.5, "end": 7.25, "text": "As written, with case.", "words": [["As", 0.6, 0.8], ...]}
audio is a path relative to the manifest, and may not lead out of its folder. start and end (seconds) may be left out:
the whole file; text where --kind=speech; words (times on the clock of the file) where there is an --aligner.
"""

from corpora import common, files
from runtime.files import one_line


def find(source, settings):
    return files.find_files(source, (".jsonl", ".jsonl.gz", ".jsonl.zst"))


def read(path, settings):
    for name, record in files.json_lines(path):
        if isinstance(record, common.Bad):
            yield record
            continue
        try:
            audio = files.inside(path.parent, record["audio"]) if "audio" in record else None
            start, end, text, timed = (record.get(key) for key in ("start", "end", "text", "words"))
            words = None if timed is None else [(word, float(a), float(b)) for word, a, b in timed]
            yield common.Item(name, audio, float(start or 0), None if end is None else float(end), text, words)
        except (TypeError, ValueError) as error:
            if not str(error).startswith("path outside"):
                error = ValueError(f"unreadable record: {path}, {name} ({one_line(error)})")
            yield common.Bad(name, error)


if __name__ == "__main__":
    common.main("manifest", find, read)
