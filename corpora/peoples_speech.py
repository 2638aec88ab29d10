"""
The People's Speech: 30,000 hours of English, mostly talk, with transcripts (Galvez et al., 2021;
hub: MLCommons/peoples_speech; CC BY and CC BY-SA).

    python -m corpora.peoples_speech --source=peoples_speech/clean --out=data/peoples-speech --kind=speech \\
        --units=units/mhubert

Layouts: the hub's parquet files (SUBSET/train-*.parquet with the columns id, audio {bytes, path}, text), or the
original one (as in lhotse's recipe): train/clean.json, a record a line, whose training_data has the lists name, label
and duration_ms, and train/clean/NAME, the flac files. Transcripts are in lower case without punctuation.
"""

from corpora import common, files
from runtime.files import one_line


def find(source, settings):
    return files.find_files(source, (".parquet", ".json"))


def read(path, settings):
    if path.suffix == ".parquet":
        for name, row in files.parquet_rows(path, ["id", "audio", "text"]):
            yield common.Item(row["id"] or name, (row["audio"] or {}).get("bytes"), text=row["text"])
        return
    for name, record in files.json_lines(path):
        if isinstance(record, common.Bad):
            yield record
            continue
        try:
            data = record["training_data"]
            for sound, text in zip(data["name"], data["label"], strict=True):
                yield common.Item(sound, files.inside(path.with_suffix(""), sound), text=text)
        except (KeyError, TypeError, ValueError) as error:
            yield common.Bad(name, ValueError(f"unreadable record: {path}, {name} ({one_line(error)})"))


if __name__ == "__main__":
    common.main("peoples_speech", find, read)
