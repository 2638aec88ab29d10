"""
The People's Speech: 30,000 hours of English, mostly conversations, with transcripts (Galvez et al., 2021).

    python -m corpora.peoples_speech --source=peoples_speech/clean --out=data/peoples-speech --kind=speech \\
        --units=units/mhubert

Source: MLCommons/peoples_speech on the Hugging Face hub. Licence: CC BY and CC BY-SA.

Two layouts can be read. The hub has SUBSET/train-*.parquet with the columns id, audio {bytes, path} and text. The
original release (as lhotse's recipe reads it) has train/clean.json, with a record on each line. training_data in a
record holds the lists name and label. The sound is in train/clean/NAME. Transcripts are in lower case without
punctuation.
"""

from corpora import common, files
from runtime.files import find_files


def find(source, settings):
    return find_files(source, (".parquet", ".json"))


def read(path, settings):
    def row_items(name, row):
        yield common.Item(str(row["id"] or name), (row["audio"] or {}).get("bytes"), text=row["text"])

    def line_items(name, record):
        data = record["training_data"]
        for sound, text in zip(data["name"], data["label"], strict=True):
            yield common.Item(sound, files.inside(path.with_suffix(""), sound), text=text)

    if path.suffix.lower() == ".parquet":
        return files.convert(files.parquet_rows(path, ["id", "audio", "text"]), row_items)
    return files.convert_json(path, line_items)


if __name__ == "__main__":
    common.main("peoples_speech", find, read)
