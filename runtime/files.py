"""
Files in and out. Reading: every fault is a ValueError that names the file. Writing: a file or folder appears whole.

Nothing here unpickles. Data is .npy, weights are .safetensors, everything else is json.
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

MAX_FILE = 1 << 28  # bytes of a file that is read whole; the largest tokenizer.json in use has about 1 << 25


class DataError(SystemExit):
    """Data that cannot be used: one line with the file, the fault and the remedy. It ends a script."""


# ---------------------------------------------------------------------------------------------------------------------
# reading

def one_line(error):
    """An exception of another package in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def read_bytes(path, limit=MAX_FILE):
    """The bytes of a file, unpacked if its name ends in .xz. ValueError if there are more than limit."""
    try:
        with (lzma.open if str(path).endswith(".xz") else open)(path, "rb") as file:
            raw = file.read(limit + 1)
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise ValueError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or one_line(error)})") from None
    if len(raw) > limit:
        raise ValueError(f"{path}: more than {limit} bytes")
    return raw


def read_text(path):
    """The text of a UTF-8 file, unpacked if its name ends in .xz. ValueError."""
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: cannot be read ({one_line(error)})") from None


def parse_json(text, name, *kinds):
    """The value of a json text or bytes, of one of the types `kinds`. ValueError "NAME: ..."; NaN is refused too."""
    def refuse(constant):
        raise ValueError(f"{constant} is no json")

    try:
        value = json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: no readable json ({one_line(error)})") from None
    if not isinstance(value, kinds):
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"{name}: no readable json (a {type(value).__name__}, not a {wanted})")
    return value


def read_json(path, *kinds):
    """The value in a json file, of one of the types `kinds` (default: a dict). ValueError."""
    return parse_json(read_bytes(path), path, *kinds or [dict])


def read_csv(path, columns):
    """[(line number, {column: text})] of a .csv or .csv.xz file that has these columns. ValueError names the line."""
    reader, rows = csv.reader(io.StringIO(read_text(path), newline=""), strict=True), []
    try:
        header = next(reader, [])
        for column in columns:
            if header.count(column) != 1:
                raise ValueError(f"{path}: no one column {column}; it needs {', '.join(columns)}")
        for row in filter(None, reader):  # without empty lines
            if len(row) != len(header):
                raise ValueError(f"{path}:{reader.line_num}: {len(row)} fields, {len(header)} columns")
            rows.append((reader.line_num, dict(zip(header, row))))
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: no csv ({one_line(error)})") from None
    if not rows:
        raise ValueError(f"{path}: no items")
    return rows


def get_field(value, path):
    """The value at a path such as "model.type" in nested dicts and lists, or None."""
    for key in path.split("."):
        try:
            value = value[int(key) if key.isdigit() else key]
        except (KeyError, IndexError, TypeError):
            return None
    return value


def read_array(path):
    """The numbers in an .npy file, memory-mapped and read-only. ValueError, also for bytes too few or too many."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if type(array) is not np.memmap or array.dtype.kind not in "iuf":
            raise ValueError("not an array of numbers as numpy.save writes it")
        if array.offset + array.nbytes != os.path.getsize(path):
            raise ValueError(f"{os.path.getsize(path)} bytes, its header says {array.offset + array.nbytes}")
    except Exception as error:  # a damaged header makes numpy raise many kinds of exceptions
        raise ValueError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or one_line(error)})") from None
    return array


def read_tensors(path):
    """{name: tensor} of a .safetensors file, on the CPU. ValueError, also for weights that are not finite floats."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read ({one_line(error)})") from None
    for name, tensor in tensors.items():
        counter = tensor.dtype == torch.int64 and tensor.dim() == 0  # some HuBERTs count batches in their batch norm
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64) and not counter:
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
    """A new folder to write into. It becomes `out` when the block ends well; otherwise nothing is left of it.

    OSError if `out` holds something already, or if there is no room.
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
    """Write a text file, and the folders above it, so that it holds the old text or the new one at every moment.

    SystemExit if it cannot be written.
    """
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
    """Return once a file, or the list of files in a folder, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
