"""
Folders of transformers' HuBERT and wav2vec 2.0 models.
"""
import math
import os

from runtime.files import read_tensors


def frame_geometry(config):
    """(samples from one frame to the next, samples that a frame sees) of a HuBERT's or wav2vec 2.0's convolutions."""
    if not all(type(n) is int and n > 0 for n in [*config.conv_stride, *config.conv_kernel]):
        raise ValueError(f"conv_stride {config.conv_stride} and conv_kernel {config.conv_kernel} are no whole numbers")
    receptive_field = 1 + sum((k - 1) * math.prod(config.conv_stride[:i]) for i, k in enumerate(config.conv_kernel))
    return math.prod(config.conv_stride), receptive_field


def check_size(kind, folder):
    """ValueError if config.json cannot be, or asks for a far larger model than model.safetensors holds."""
    import torch

    tensors = read_tensors(os.path.join(folder, "model.safetensors"))
    config = kind.config_class.from_pretrained(folder, local_files_only=True)
    frame_geometry(config)
    with torch.device("meta"):
        model = kind(config) if config.num_hidden_layers <= len(tensors) else None
    if model is None or model.num_parameters() > 2 * sum(tensor.numel() for tensor in tensors.values()) + 1e6:
        raise ValueError("config.json asks for a larger model than model.safetensors holds")
