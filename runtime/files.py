"""
Reading and writing files. Nothing is unpickled: data is .npy, weights are .safetensors, all else is json or text.

Readers turn every fault of a file into a one-line ValueError that names the file. Writers write a file or folder
completely or not at all.
"""
import codecs
import csv
import gzip
import hashlib
import io
import json
import lzma
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np

MAX_FILE = 1 << 28  # characters of a file that is read into memory; the largest tokenizer.json has about 1 << 25
BYTE_ORDER_MARKS = {  # and the codec that reads what follows; the mark of UTF-32 begins like the one of UTF-16
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16"}


class DataError(SystemExit):
    """Data that cannot be used. Ends the script with a one-line message that names the file, the fault and the remedy.
    """


# ---------------------------------------------------------------------------------------------------------------------
# reading

def one_line(error):
    """The type and message of an exception in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


@contextmanager
def reading(path, fault="cannot be read"):
    """Turn any exception of the block into a ValueError that names the file. Damaged files cause exceptions of many
    types in the libraries that read them.
    """
    try:
        yield
    except Exception as error:
        raise ValueError(f"{path}: {fault} ({getattr(error, 'strerror', None) or one_line(error)})") from None


def find_files(source, endings=("",), hidden=False):
    """All files below a folder whose names end like this, in upper or lower case, sorted. Links are followed.

    source: the folder, or one file, which is returned whatever its name. Hidden files and folders, such as macOS's
    "._name", are left out, unless `hidden`. OSError for a folder that cannot be opened.
    """
    if os.path.isfile(source):
        return [Path(source)]
    found, entered = [], set()

    def stop(error):
        raise error

    for folder, folders, names in os.walk(source, onerror=stop, followlinks=True):
        identity = os.stat(folder).st_dev, os.stat(folder).st_ino
        if identity in entered:  # a link leads back to it, or a second link leads to it
            folders.clear()
            continue
        entered.add(identity)
        if not hidden:
            folders[:] = [name for name in folders if not name.startswith(".")]
            names = [name for name in names if not name.startswith(".")]
        found += [Path(folder, name) for name in names if name.lower().endswith(tuple(endings))]
    return sorted(found)


def open_bytes(path):
    """Open a file to read bytes, decompressed if its name ends in .gz, .xz or .zst.

    While it is read, a compressed file that breaks off raises EOFError or OSError.
    """
    ending = os.path.splitext(path)[1].lower()
    if ending == ".zst":
        try:
            import pyarrow  # zstandard would return the part of the file that there is
        except ImportError:
            raise RuntimeError(f"pyarrow, which {path} needs, is missing: pip install pyarrow") from None
        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(os.fspath(path)), "zstd"))
    return {".gz": gzip.open, ".xz": lzma.open}.get(ending, open)(path, "rb")


def open_text(path, errors="strict"):
    """Open a text file to read it as it was meant: without byte order mark, and with \\n at the end of each line.

    The text is UTF-8, or UTF-16 or UTF-32 with a byte order mark. errors: of bytes.decode(). See open_bytes().
    """
    file = open_bytes(path)
    start = file.peek(4)[:4]
    codec = next((codec for mark, codec in BYTE_ORDER_MARKS.items() if start.startswith(mark)), "utf-8-sig")
    if codec == "utf-8-sig" and start[1::2] == b"\0\0" != start[::2]:
        codec = "utf-16-le"  # Latin letters without a byte order mark; they would be valid UTF-8
    if codec == "utf-8-sig" and start[::2] == b"\0\0" != start[1::2]:
        codec = "utf-16-be"
    return io.TextIOWrapper(file, codec, errors)


def read_text(path, limit=MAX_FILE):
    """The text of a file, as open_text() reads it. ValueError, also for more than `limit` characters."""
    with reading(path), open_text(path) as file:
        text = file.read(limit + 1)
    if len(text) > limit:
        raise ValueError(f"{path}: more than {limit} characters")
    return text


def parse_json(text, name, *kinds):
    """The value of a json text, which must have a type in `kinds`. ValueError "NAME: ...", also for NaN."""
    def refuse(constant):
        raise ValueError(f"{constant} is not json")

    with reading(name, "no readable json"):
        value = json.loads(text, parse_constant=refuse)
        if not isinstance(value, kinds):
            raise ValueError(f"a {type(value).__name__}, not a {' or '.join(kind.__name__ for kind in kinds)}")
    return value


def read_json(path, *kinds):
    """The value in a json file, which must have a type in `kinds` (default: dict). ValueError."""
    return parse_json(read_text(path), path, *kinds or [dict])


def read_csv(path, columns):
    """[(line number, {column: text})] of a .csv file that has these columns. ValueError names the line."""
    reader, rows = csv.reader(io.StringIO(read_text(path), newline=""), strict=True), []
    try:
        header = next(reader, [])
        for column in columns:
            if header.count(column) != 1:
                raise ValueError(f"{path}: no one column {column}; it needs {', '.join(columns)}")
        for row in reader:
            if not any(cell.strip() for cell in row):  # an empty line
                continue
            if len(row) != len(header):
                raise ValueError(f"{path}:{reader.line_num}: {len(row)} fields, {len(header)} columns")
            rows.append((reader.line_num, dict(zip(header, row))))
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: no csv ({one_line(error)})") from None
    if not rows:
        raise ValueError(f"{path}: no items")
    return rows


def read_array(path):
    """The numbers in an .npy file, memory-mapped and read-only. ValueError, also for missing or extra bytes."""
    with reading(path):
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if type(array) is not np.memmap or array.dtype.kind not in "iuf":
            raise ValueError("not an array of numbers as numpy.save writes it")
        if array.offset + array.nbytes != os.path.getsize(path):
            raise ValueError(f"{os.path.getsize(path)} bytes, its header says {array.offset + array.nbytes}")
    return array


def read_tensors(path):
    """{name: tensor} of a .safetensors file, on the CPU. ValueError, also for weights that are not finite floats."""
    import torch
    from safetensors.torch import load_file

    with reading(path):
        tensors = load_file(path)
    for name, tensor in tensors.items():
        is_counter = tensor.dtype == torch.int64 and tensor.dim() == 0  # batch norm in some HuBERTs counts its batches
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64) and not is_counter:
            raise ValueError(f"{path}: tensor {name[:60]!r} is {tensor.dtype}, not floats of 16 bits or more")
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: tensor {name[:60]!r} has values that are not finite; copy the file again")
    return tensors


def digest(path):
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# writing

@contextmanager
def whole_folder(out):
    """Give a temporary folder to write into. If the block succeeds, the folder is renamed to `out`, otherwise removed.

    OSError if `out` exists and is not empty, or if the disk is full.
    """
    out = Path(out)
    folder = out.with_name(f".{out.name}.{os.getpid()}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
        for path in [*folder.rglob("*"), folder]:
            to_disk(path)
        os.replace(folder, out)
        to_disk(out.parent)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def replace_file(path, text):
    """Write a text file, and make its parent folders. The file always holds the old or the new text. SystemExit."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        to_disk(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise SystemExit(f"{path}: cannot be written ({error.strerror}); make room there, or write elsewhere") from None


def to_disk(path):
    """Wait until a file, or the list of files in a folder, is on the disk and would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
