"""
Functions that several corpora use: read lines, JSON and parquet, check paths, and cut long recordings.
"""

import importlib
import lzma
import os
import zlib
from pathlib import Path

from corpora.parts import Bad
from runtime.files import one_line, open_text, parse_json

JSONL = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".jsonl.xz")
BATCH = 16  # rows of a parquet file in memory at once; rows with sound are large


def need(name):
    """Import an optional module. Raises SystemExit with the name of the package if it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise SystemExit(f"{package} is missing: pip install {package}") from None


def lines(path):
    """Return the non-empty lines of a text file. Bytes that are not UTF-8 become surrogates."""
    return [line for _, line in numbered_lines(path)]


def numbered_lines(path):
    """Yield (id, line) for each non-empty line of a text file, perhaps compressed. The id is NAME:NUMBER.

    Bytes that are not UTF-8 become surrogates, so that only their line is bad. ValueError if the file breaks off.
    """
    number = 0
    try:
        with open_text(path, "surrogateescape") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path.name}:{number}", line.rstrip("\n")
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        if getattr(error, "errno", None) is not None:
            raise
        raise ValueError(f"damaged or cut short after line {number}; what follows is lost, copy it again "
                         f"({one_line(error)})") from None


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
    """Yield the items of to_items(id, record) for each (id, record), and a Bad for a record where it fails."""
    for name, record in records:
        try:
            yield from to_items(name, record)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            yield Bad(name, ValueError(f"unreadable record: {name} ({one_line(error)})"))


def convert_json(path, to_items):
    """The same for the lines of a .jsonl file, perhaps compressed, each of which holds a dict."""
    return convert(numbered_lines(path), lambda name, line: to_items(name, parse_json(line, name, dict)))


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
