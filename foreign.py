"""
Files that someone else made are read within bounds, or refused in one line.

Nothing here runs what a file holds, or believes a number in it before the file is seen to be large enough. Every fault
is a ValueError "PATH: ...". Pickles are read nowhere but in convert.py, which runs nothing of them either.
"""
import json
import lzma
import math
import os
import re

import numpy as np

MAX_FILE = 1 << 28  # bytes of a file that is read whole; the largest tokenizer.json in use has about 1 << 25

# The header of an .npy file exactly as numpy.save writes it for numbers; numpy itself would evaluate what stands there.
NPY_MAGIC = b"\x93NUMPY\x01\x00"
NPY_HEADER = re.compile(rb"\{'descr': '(\|[biu]1|[<>][iu][248]|[<>]f[248])', 'fortran_order': (True|False), "
                        rb"'shape': \((|\d{1,18},|\d{1,18}(?:, \d{1,18}){1,7})\), \} *\n")


def one_line(error):
    """An exception of another package in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def read_bytes(path, limit=MAX_FILE):
    """The bytes of a file, unpacked if it is an .xz; ValueError if there are more than limit."""
    try:
        with (lzma.open if str(path).endswith(".xz") else open)(path, "rb") as file:
            raw = file.read(limit + 1)
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise ValueError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or one_line(error)})") from None
    if len(raw) > limit:
        raise ValueError(f"{path}: more than {limit} bytes")
    return raw


def parse_json(text, name, *kinds):
    """The value of a json text or bytes, one of the types `kinds`; ValueError "NAME: ...". NaN is no json."""
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
    """The value in a json file, one of the types `kinds`, without any a dict; ValueError."""
    return parse_json(read_bytes(path), path, *kinds or [dict])


def read_array(path):
    """The numbers in an .npy file, memory-mapped and read-only; ValueError if it is not exactly as long as it says."""
    try:
        with open(path, "rb") as file:
            magic, length = file.read(8), int.from_bytes(file.read(2), "little")
            header, start, size = NPY_HEADER.fullmatch(file.read(length)), 10 + length, os.fstat(file.fileno()).st_size
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    if magic != NPY_MAGIC or not header:
        raise ValueError(f"{path}: cannot be read (not an array of numbers as numpy.save writes it)")
    dtype, order = np.dtype(header[1].decode()), "F" if header[2] == b"True" else "C"
    shape = tuple(int(n) for n in header[3].split(b",") if n)
    if start + math.prod(shape) * dtype.itemsize != size:
        raise ValueError(f"{path}: cannot be read ({size - start} bytes of data for {dtype} {list(shape)})")
    if size == start:
        return np.empty(shape, dtype, order)
    return np.memmap(path, dtype, "r", start, shape, order)


def read_tensors(path):
    """{name: tensor} of a .safetensors file, on the CPU; ValueError also for weights that are not finite floats."""
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read ({one_line(error)})") from None
    for name, tensor in tensors.items():
        if not name.isprintable() or len(name) > 200:
            raise ValueError(f"{path}: {name[:60]!r} is no tensor's name")
        counter = tensor.dtype == torch.int64 and tensor.dim() == 0  # of batches, in the batch norm of some HuBERTs
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64) and not counter:
            raise ValueError(f"{path}: tensor {name!r} is {tensor.dtype}, not floats of 16 bits or more")
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: tensor {name!r} has values that are not finite; copy the file again")
    return tensors
