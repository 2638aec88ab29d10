"""
Files that someone else made are read within bounds, or refused in one line.

Nothing here unpickles. Every fault is a ValueError "PATH: ...". Pickles are read nowhere but in convert.py, which runs
nothing of them.
"""
import json
import lzma
import os

import numpy as np

MAX_FILE = 1 << 28  # bytes of a file that is read whole; the largest tokenizer.json in use has about 1 << 25


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
