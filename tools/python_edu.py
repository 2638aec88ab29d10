"""
Download the files that Python-Edu lists. The hub has only the list; Software Heritage has the files.

    python -m tools.python_edu --source=raw/smollm-corpus/python-edu --out=raw/python-edu --max_files=4e6

Source: HuggingFaceTB/smollm-corpus, python-edu/*.parquet with the column blob_id, as its dataset card says. The file is
at URL/BLOB_ID, compressed with gzip. Licence: that of each file; read Software Heritage's terms of use first.

Writes OUT/00000.jsonl.gz and so on, with {"blob_id", "text"} for each file, and OUT/00000.missing.json with the ids
that could not be had and why. Run it again after an interruption: finished files are kept. NOT RUN against the real
server.
"""
import gzip
import itertools
import json
import sys
import time
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path

from tqdm import tqdm

from configurator import configure
from corpora.files import parquet_rows
from runtime.files import find_files, one_line, read_json, replace_file

DEFAULTS = dict(
    source="",                   # folder with the parquet files
    out="",                      # folder for the downloaded texts
    url="https://softwareheritage.s3.amazonaws.com/content",  # where the files are
    max_files=0,                 # stop after this many; 0: all of them
    files_a_part=20_000,         # files in one .jsonl.gz
    connections=64,              # downloads at a time
)
TRIES, SECONDS = 3, 30  # attempts for each file, and seconds to wait for an answer


def fetch(blob_id, url):
    """(text, "") of one file, or ("", reason). Bytes that are not UTF-8 are left out, as on the dataset card."""
    reason = ""
    for attempt in range(TRIES):
        time.sleep(attempt)  # seconds
        try:
            with urllib.request.urlopen(f"{url}/{blob_id}", timeout=SECONDS) as answer:
                return gzip.decompress(answer.read()).decode("utf-8", "ignore"), ""
        except (OSError, EOFError, zlib.error, HTTPException) as error:
            reason = one_line(error)
    return "", reason


def fetch_part(blob_ids, path, c):
    """Download one part. Returns the number of files that could not be had."""
    with ThreadPoolExecutor(c["connections"]) as pool:
        answers = list(pool.map(lambda blob_id: fetch(blob_id, c["url"]), blob_ids))
    missing = {blob_id: reason for blob_id, (_, reason) in zip(blob_ids, answers) if reason}
    if len(missing) == len(blob_ids):
        raise SystemExit(f"{c['url']}: not one of {len(blob_ids)} files could be had ({next(iter(missing.values()))})")
    unfinished = path.with_name(f".{path.name}")
    with gzip.open(unfinished, "wt", encoding="utf-8") as file:
        for blob_id, (text, reason) in zip(blob_ids, answers):
            if not reason:
                file.write(json.dumps(dict(blob_id=blob_id, text=text)) + "\n")
    replace_file(path.with_name(path.name.replace(".jsonl.gz", ".missing.json")), json.dumps(missing, indent=1))
    unfinished.rename(path)
    return len(missing)


def main(argv):
    c, _ = configure(DEFAULTS, argv)
    files, out = find_files(c["source"], [".parquet"]), Path(c["out"])
    if not files or not c["out"]:
        raise SystemExit(f"--source={c['source']} --out={c['out']}: give the folder of python-edu's parquet files, and "
                         "a folder for the texts")
    out.mkdir(parents=True, exist_ok=True)
    settings = {key: c[key] for key in ("max_files", "files_a_part")}
    if (out / "settings.json").exists() and (before := read_json(out / "settings.json")) != settings:
        raise SystemExit(f"{out}: was made with {before}; give the same again, or another --out")
    replace_file(out / "settings.json", json.dumps(settings))
    rows = itertools.chain.from_iterable(parquet_rows(path, ["blob_id"]) for path in files)
    ids = itertools.islice((row["blob_id"] for _, row in rows), c["max_files"] or None)
    missing, bar = 0, tqdm(total=c["max_files"] or None, unit=" files", disable=None)
    for number in itertools.count():
        blob_ids, path = list(itertools.islice(ids, c["files_a_part"])), out / f"{number:05}.jsonl.gz"
        if not blob_ids:
            break
        if not path.exists():
            missing += fetch_part(blob_ids, path, c)
        bar.update(len(blob_ids))
    bar.close()
    print(f"{out}: {number} parts; {missing} files could not be had, see *.missing.json")


if __name__ == "__main__":
    main(sys.argv[1:])
