"""
sTinyStories: the TinyStories of Eldan and Li (2023), spoken by a synthesiser, with word times.

    python -m corpora.stinystories --source=sTinyStories/data --out=data/stinystories --units=units/mhubert \\
        --tokenizer=weights/smollm-360m/tokenizer.json

Source: slprl/sTinyStories on the Hugging Face hub, made by Maimon et al. (2025) after Cuervo and Marxer (2024), with
FastSpeech 2 in the voice of LJ Speech. Licence: MIT.

Layout (its card): data/data-00000-of-02191.parquet and so on, with a story in each row. Columns are audio {bytes,
path}, text, and aligned_text, a list of {word, start_time, end_time} in seconds. A fourth column, split_sentence, is
not explained and not used. Words are compared without punctuation, because we do not know whether aligned_text has any.
Each shard reads all files. To split the work among machines, give each machine a folder with some of the files.
"""

from corpora import common, files
from runtime.files import find_files
from speech.word_times import timed_word


def find(source, settings):
    return find_files(source, [".parquet"])


def read(path, settings):
    def items(name, row):
        words = [timed_word(w["word"], w["start_time"], w["end_time"], name) for w in row["aligned_text"] or []]
        yield common.Item(name, (row["audio"] or {}).get("bytes"), text=row["text"], words=words or None)

    return files.convert(files.parquet_rows(path, ["audio", "text", "aligned_text"]), items)


if __name__ == "__main__":
    common.main("stinystories", find, read)
