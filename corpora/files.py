"""Files that several corpora come in: lines of JSON, parquet, and the cutting of long recordings."""

import gzip
import io
import os
import reprlib
from pathlib import Path

from corpora.common import Bad
from runtime.files import one_line, parse_json

MAX_LINE = 1 << 26  # bytes; a few compressed kilobytes may hold a line without end
BATCH = 16  # rows of a parquet file in memory at once: rows with sound are large


def find_files(source, suffixes):
    """All files below a folder with one of these endings, sorted; the source itself if it is such a file."""
    if Path(source).is_file():
        return [Path(source)]
    return sorted(path for path in Path(source).rglob("*") if path.name.endswith(tuple(suffixes)) and path.is_file())


def need(name):
    """The module of an optional package; SystemExit that says how to get it."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise SystemExit(f"{package} is missing: pip install {package}") from None


def lines(path):
    """The lines of a text file that are not empty. Bytes that are no UTF-8 become what text_size() refuses."""
    return [line for line in path.read_text("utf-8", errors="surrogateescape").split("\n") if line.strip()]


def json_lines(path):
    """(id, record) for each line of a .jsonl, .jsonl.gz or .jsonl.zst file; (id, Bad) for a line that is no record."""
    with open(path, "rb") as raw:
        file = raw
        if path.name.endswith(".gz"):
            file = gzip.open(raw)
        elif path.name.endswith(".zst"):
            file = io.BufferedReader(need("zstandard").ZstdDecompressor().stream_reader(raw))
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE), b""), 1):
            name = f"{path.name}:{number}"
            if len(line) == MAX_LINE:
                raise ValueError(f"line {number} has more than {MAX_LINE} bytes")
            if not line.strip():
                continue
            try:
                record = parse_json(line, f"{path}, line {number}", dict)
            except ValueError as error:
                record = Bad(name, ValueError(f"unreadable record: {error}"))
            yield name, record


def parquet_rows(path, columns):
    """(id, record of these columns) for each row of a parquet file, a few rows in memory at a time."""
    with need("pyarrow.parquet").ParquetFile(path) as file:
        missing = [column for column in columns if column not in file.schema_arrow.names]
        if missing:
            raise SystemExit(f"{path}: no column {', '.join(missing)}; there are {', '.join(file.schema_arrow.names)}")
        number = 0
        for batch in file.iter_batches(BATCH, columns=columns):
            for record in batch.to_pylist():
                number += 1
                yield f"{path.name}:{number}", record


def inside(folder, name):
    """The path of a file inside a folder; ValueError if the name leads out of it, through a link or without one."""
    if not isinstance(name, str) or not name.isprintable() or len(name) > 1000:
        raise ValueError(f"path outside the source: {reprlib.repr(name)} names no file")
    steps = Path(os.path.normpath(name)).parts
    if os.path.isabs(name) or ".." in steps[:1] or not steps:
        raise ValueError(f"path outside the source: {name[:200]}")
    path = os.path.join(folder, *steps)
    if not os.path.realpath(path).startswith(os.path.join(os.path.realpath(folder), "")):
        raise ValueError(f"path outside the source: {name[:200]} goes through a link; put the files themselves there")
    return path


def cut(start, end, longest):
    """[start, end) in as many equally long spans as are needed for none to be longer than `longest` seconds."""
    if not end - start < 1e6:
        raise ValueError(f"unreadable record: a span from {start} to {end} s")
    n = max(1, -int(-(end - start) // longest))
    return [(start + (end - start) * i / n, start + (end - start) * (i + 1) / n) for i in range(n)]


def duration(path):
    """Seconds of a sound file; ValueError if it cannot be opened."""
    import soundfile

    try:
        return soundfile.info(path).duration
    except (soundfile.LibsndfileError, OSError) as error:
        raise ValueError(f"unreadable audio: {path} ({one_line(error)})") from None
