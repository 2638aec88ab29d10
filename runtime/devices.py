"""
Choose the device, set the precision of matrix products, and make the process reuse memory.
"""
import ctypes
import sys
from contextlib import nullcontext

import torch


def pick_device(name):
    """"auto", "cuda", "cpu" or "mps" -> the name of a device that this machine has. SystemExit."""
    if name not in ("auto", "cuda", "cpu", "mps"):
        raise SystemExit(f"device={name}: choose auto, cuda, cpu or mps")
    available = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    if name == "auto":
        return next(device for device in available if available[device])
    if not available[name]:
        raise SystemExit(f"device={name}: torch {torch.__version__} sees none on this machine; choose auto or cpu")
    return name


def make_autocast(dtype, device):
    """A context in which a model with float32 weights computes its matrix products in this dtype."""
    return torch.autocast(device.type, torch.bfloat16) if dtype == torch.bfloat16 else nullcontext()


def reuse_memory(device):
    """Make glibc keep freed memory. Otherwise each training step on a CPU maps and clears new pages for its tensors.

    With a GPU this would only cost memory: what loading and saving a checkpoint has freed would never be given back.
    """
    if device.type == "cpu" and sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda option, value: 0)  # musl lacks it
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give memory back
        mallopt(-4, 0)   # M_MMAP_MAX: take everything from the heap
