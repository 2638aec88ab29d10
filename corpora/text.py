"""
Text as text: FineWeb-Edu, Cosmopedia-v2, Python-Edu, FineMath, or files of one's own.

    python -m corpora.text --source=fineweb-edu-dedup --out=data/fineweb --tokenizer=weights/smollm-360m/tokenizer.json

The paper's text mixture is 0.7 FineWeb-Edu, 0.15 Cosmopedia-v2, 0.08 Python-Edu, 0.06 FineMath: make a set of each and
weight them in the config. From the hub: HuggingFaceTB/smollm-corpus (fineweb-edu-dedup/, cosmopedia-v2/, python-edu/:
parquet; ODC-By, the code under its own licences) and HuggingFaceTB/finemath (ODC-By). All have their documents in the
column `text`, but Python-Edu: that lists the blobs of Software Heritage to download, see its card.

Layout: any folders of .parquet, .jsonl, .jsonl.gz, .jsonl.zst (a document a row, in the column or field --field) and
.txt files (a document each). --shard=i/n splits the documents, but each shard reads all files: to split very large
corpora among machines, give each machine a folder of files instead.
"""

from corpora import common, files


def find(source, settings):
    return files.find_files(source, (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"))


def read(path, settings):
    field = settings["field"]
    if path.suffix == ".txt":
        yield common.Item(path.name, text=path.read_text("utf-8", errors="surrogateescape"))
        return
    rows = files.parquet_rows(path, [field]) if path.suffix == ".parquet" else files.json_lines(path)
    for name, record in rows:
        if isinstance(record, dict) and not isinstance(record.get(field), str | None):
            record = common.Bad(name, ValueError(f"unreadable record: {field!r} of {name} is no text"))
        yield common.Item(name, text=record.get(field)) if isinstance(record, dict) else record


if __name__ == "__main__":
    common.main("text", find, read, kinds=("text",), field="text")
