"""
Text alone: FineWeb-Edu, Cosmopedia-v2, Python-Edu, FineMath, or your own files.

    python -m corpora.text --source=fineweb-edu-dedup --out=data/fineweb --tokenizer=weights/smollm-360m/tokenizer.json

The text mixture of the paper is 0.7 FineWeb-Edu, 0.15 Cosmopedia-v2, 0.08 Python-Edu and 0.06 FineMath. Make a set of
each, and give the weights in the config.

Source: HuggingFaceTB/smollm-corpus on the Hugging Face hub (fineweb-edu-dedup/, cosmopedia-v2/, python-edu/) and
HuggingFaceTB/finemath. Licence: ODC-By; the code in Python-Edu has licences of its own. All but Python-Edu have their
documents in the column `text`. Python-Edu lists the files to download from Software Heritage; see its card.

Layout: any folders of .parquet, .jsonl, .jsonl.gz and .jsonl.zst files, with a document in each row, and of .txt files,
each one document. --shard=i/n splits the documents, but each shard reads all files. To split a very large corpus among
machines, give each of them a folder of files.
"""

from corpora import common, files


def find(source, settings):
    return files.find_files(source, (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"))


def read(path, settings):
    def items(name, row):
        text = row.get(settings["field"])
        if not isinstance(text, str | None):
            raise TypeError(f"{settings['field']} is {type(text).__name__}, not text")
        yield common.Item(name, text=text)

    if path.suffix == ".txt":
        return [common.Item(path.name, text=path.read_text("utf-8", errors="surrogateescape"))]
    rows = files.parquet_rows(path, [settings["field"]]) if path.suffix == ".parquet" else files.json_lines(path)
    return files.convert(rows, items)


if __name__ == "__main__":
    common.main(
        "text", find, read, kinds=("text",),
        field="text",  # the column or field that holds the documents
    )
