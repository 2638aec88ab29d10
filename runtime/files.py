"""
Reading and writing files. Nothing is unpickled: data is .npy, weights are .safetensors, all else is json or text.

Readers turn every fault of a file into a one-line ValueError that names the file. Writers write a file or folder
completely or not at all.
"""
import csv
import hashlib
import io
import json
import lzma
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np

MAX_FILE = 1 << 28  # bytes of a file that is read into memory; the largest tokenizer.json in use has about 1 << 25


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


def read_bytes(path, limit=MAX_FILE):
    """The bytes of a file, decompressed if its name ends in .xz. ValueError if there are more than limit."""
    with reading(path), (lzma.open if str(path).endswith(".xz") else open)(path, "rb") as file:
        raw = file.read(limit + 1)
    if len(raw) > limit:
        raise ValueError(f"{path}: more than {limit} bytes")
    return raw


def read_text(path):
    """The text of a UTF-8 file, decompressed if its name ends in .xz. ValueError."""
    raw = read_bytes(path)
    with reading(path):
        return raw.decode("utf-8")


def parse_json(text, name, *kinds):
    """The value of a json text or bytes, which must have a type in `kinds`. ValueError "NAME: ...", also for NaN."""
    def refuse(constant):
        raise ValueError(f"{constant} is not json")

    with reading(name, "no readable json"):
        value = json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text, parse_constant=refuse)
        if not isinstance(value, kinds):
            raise ValueError(f"a {type(value).__name__}, not a {' or '.join(kind.__name__ for kind in kinds)}")
    return value


def read_json(path, *kinds):
    """The value in a json file, which must have a type in `kinds` (default: dict). ValueError."""
    return parse_json(read_bytes(path), path, *kinds or [dict])


def read_csv(path, columns):
    """[(line number, {column: text})] of a .csv or .csv.xz file that has these columns. ValueError names the line."""
    reader, rows = csv.reader(io.StringIO(read_text(path), newline=""), strict=True), []
    try:
        header = next(reader, [])
        for column in columns:
            if header.count(column) != 1:
                raise ValueError(f"{path}: no one column {column}; it needs {', '.join(columns)}")
        for row in filter(None, reader):  # empty lines are skipped
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
