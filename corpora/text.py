"""
Text without speech: FineWeb-Edu, Cosmopedia-v2, Python-Edu, FineMath, or your own files.

    python -m corpora.text --source=fineweb-edu-dedup --out=data/fineweb --tokenizer=weights/smollm-360m/tokenizer.json

The text mixture of the paper is 0.7 FineWeb-Edu, 0.15 Cosmopedia-v2, 0.08 Python-Edu and 0.06 FineMath. Make a set of
each, and give these weights in the config, as config/train_150m.py does.

Source: HuggingFaceTB/smollm-corpus on the Hugging Face hub (fineweb-edu-dedup/, cosmopedia-v2/, python-edu/) and
HuggingFaceTB/finemath. Licence: ODC-By; the code in Python-Edu has various licences. All but Python-Edu have the
documents in the column `text`. Python-Edu only lists files, which must be downloaded from Software Heritage: see its
dataset card.

Layout: files at any depth below --source. A .parquet, .jsonl, .jsonl.gz, .jsonl.zst or .jsonl.xz file has a document in
each row. A .txt file is one document. --shard=i/n splits the documents, but each shard reads all files. To split a very
large corpus among machines, give each machine a folder with some of the files.
"""

from corpora import common, files
from runtime.files import find_files, open_text


def find(source, settings):
    return find_files(source, (".txt", ".parquet", *files.JSONL))


def read(path, settings):
    def items(name, row):
        text = row.get(settings["field"])
        if not isinstance(text, str | None):
            raise TypeError(f"{settings['field']} is {type(text).__name__}, not text")
        yield common.Item(name, text=text)

    if path.suffix.lower() == ".txt":
        with open_text(path, "surrogateescape") as file:
            return [common.Item(path.name, text=file.read())]
    if path.suffix.lower() == ".parquet":
        return files.convert(files.parquet_rows(path, [settings["field"]]), items)
    return files.convert_json(path, items)


if __name__ == "__main__":
    common.main(
        "text", find, read, kinds=("text",),
        field="text",  # the column or field that holds the documents
    )
