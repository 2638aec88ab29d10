"""
sTinyStories: the TinyStories of Eldan and Li (2023) read by a synthesiser, with word times (Cuervo and Marxer, 2024;
hub: slprl/sTinyStories, made by Maimon et al., 2025, with FastSpeech 2 in the voice of LJ Speech; MIT).

    python -m corpora.stinystories --source=sTinyStories/data --out=data/stinystories --units=units/mhubert \\
        --tokenizer=weights/smollm-360m/tokenizer.json

Layout (its card): data/data-00000-of-02191.parquet and so on, a story a row: audio {bytes, path}, text, and
aligned_text, a list of {word, start_time, end_time} in seconds. A fourth column, split_sentence, is not explained and
not used. Whether the words of aligned_text bear punctuation could not be looked up; they are compared without. Each
shard reads all files: to split the work among machines, give each a folder of files.
"""

from corpora import common, files


def find(source, settings):
    return files.find_files(source, [".parquet"])


def read(path, settings):
    for name, row in files.parquet_rows(path, ["audio", "text", "aligned_text"]):
        words = row["aligned_text"] and [(w["word"], w["start_time"], w["end_time"]) for w in row["aligned_text"]]
        yield common.Item(name, (row["audio"] or {}).get("bytes"), text=row["text"], words=words or None)


if __name__ == "__main__":
    common.main("stinystories", find, read)
