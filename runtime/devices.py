"""
Which device and which precision to compute in, and how to keep its memory.
"""
import ctypes
import sys

import torch


def pick_device(name):
    """"auto", "cuda", "cpu" or "mps" -> the name of a device that is there. SystemExit."""
    if name not in ("auto", "cuda", "cpu", "mps"):
        raise SystemExit(f"device={name}: choose auto, cuda, cpu or mps")
    there = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    if name == "auto":
        return next(device for device in there if there[device])
    if not there[name]:
        raise SystemExit(f"device={name}: torch {torch.__version__} sees none on this machine; choose auto or cpu")
    return name


def pick_dtype(name, device):
    """"auto", "bfloat16" or "float32" -> a torch dtype."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    cpu = torch.cpu.get_capabilities() if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities") else {}
    return torch.bfloat16 if cpu.get("amx_bf16") or cpu.get("avx512_bf16") else torch.float32


def reuse_memory():
    """Have glibc keep freed memory: otherwise tensors come as new pages, mapped and cleared again in every CPU step."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        for option, value in ((-1, -1), (-4, 0)):  # M_TRIM_THRESHOLD: never give back; M_MMAP_MAX: all from the heap
            getattr(libc, "mallopt", lambda *_: 0)(option, value)
