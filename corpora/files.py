"""
Functions that several corpora use: find files, read lines of JSON and parquet, check paths, and cut long recordings.
"""

import gzip
import importlib
import io
import os
from pathlib import Path

from corpora.parts import Bad
from runtime.files import one_line, parse_json

BATCH = 16  # rows of a parquet file in memory at once; rows with sound are large


def find_files(source, suffixes):
    """Return all files below a folder that have one of these endings, sorted. If source is a file, return that file."""
    if Path(source).is_file():
        return [Path(source)]
    return sorted(path for path in Path(source).rglob("*") if path.name.endswith(tuple(suffixes)) and path.is_file())


def need(name):
    """Import an optional module. Raises SystemExit with the name of the package if it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise SystemExit(f"{package} is missing: pip install {package}") from None


def lines(path):
    """Return the non-empty lines of a text file. Bytes that are not UTF-8 become surrogates."""
    return [line for line in path.read_text("utf-8", errors="surrogateescape").split("\n") if line.strip()]


def json_lines(path):
    """Yield (id, line) for each non-empty line of a .jsonl, .jsonl.gz or .jsonl.zst file."""
    with open(path, "rb") as file:
        if path.name.endswith(".gz"):
            file = gzip.open(file)
        elif path.name.endswith(".zst"):
            file = io.BufferedReader(need("zstandard").ZstdDecompressor().stream_reader(file))
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path.name}:{number}", line


def parquet_rows(path, columns):
    """Yield (id, {column: value}) for each row of a parquet file. Only a few rows are in memory at a time."""
    with need("pyarrow.parquet").ParquetFile(path) as file:
        missing = [column for column in columns if column not in file.schema_arrow.names]
        if missing:
            raise SystemExit(f"{path}: no column {', '.join(missing)}; there are {', '.join(file.schema_arrow.names)}")
        number = 0
        for batch in file.iter_batches(BATCH, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield f"{path.name}:{number}", row


def convert(records, to_items):
    """Yield the items of to_items(id, record) for each (id, record), and a Bad for a record where it fails.

    A record of bytes is a line of JSON, and to_items gets the dict in it.
    """
    for name, record in records:
        try:
            yield from to_items(name, parse_json(record, name, dict) if isinstance(record, bytes) else record)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            yield Bad(name, ValueError(f"unreadable record: {name} ({one_line(error)})"))


def inside(folder, name):
    """Return the path of the file `name` in a folder. Raises ValueError if the name or a link leads out of the folder.
    """
    path = os.path.normpath(os.path.join(folder, name))
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise ValueError(f"path outside the source: {name[:200]!r}")
    return path


def cut(start, end, longest):
    """Cut [start, end) into the smallest number of equally long spans of at most `longest` seconds."""
    if not end - start < 1e6:
        raise ValueError(f"unreadable record: a span from {start} to {end} s")
    n = max(1, -int(-(end - start) // longest))
    return [(start + (end - start) * i / n, start + (end - start) * (i + 1) / n) for i in range(n)]


def duration(path):
    """Return the length of a sound file in seconds. Raises ValueError if it cannot be opened."""
    import soundfile

    try:
        return soundfile.info(path).duration
    except (soundfile.LibsndfileError, OSError) as error:
        raise ValueError(f"unreadable audio: {path} ({one_line(error)})") from None
