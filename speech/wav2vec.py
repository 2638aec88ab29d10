"""
Load HuBERT and wav2vec 2.0 models in transformers' format. Both turn 16 kHz samples into frames by convolutions.
"""
import os

from runtime.files import read_json, read_tensors, reading
from runtime.hub import local_folder


def load_wav2vec(kind, folder):
    """
    The model in a folder with config.json and model.safetensors, in float32, for inference, on the CPU.

    kind: the class in transformers, HubertModel or Wav2Vec2ForCTC. Nothing is downloaded. Raises ValueError if the
    model cannot be loaded, or if a tensor is missing or has the wrong shape.
    """
    import torch

    folder = local_folder(folder)
    with reading(folder, f"not a {kind.__name__} that can be loaded"):
        model_type = read_json(os.path.join(folder, "config.json")).get("model_type")
        if model_type != kind.config_class.model_type:
            raise ValueError(f"model_type is {model_type!r}, not {kind.config_class.model_type!r}")
        tensors = read_tensors(os.path.join(folder, "model.safetensors"))
        config = kind.config_class.from_pretrained(folder, local_files_only=True)
        frame_geometry(config)
        # A wrong number in config.json could ask for more memory than there is. Tensors on "meta" take none.
        with torch.device("meta"):
            n_parameters = kind(config).num_parameters() if config.num_hidden_layers <= len(tensors) else float("inf")
        if n_parameters > 2 * sum(tensor.numel() for tensor in tensors.values()) + 1e6:
            raise ValueError("config.json asks for a larger model than model.safetensors holds")
        model, report = kind.from_pretrained(folder, local_files_only=True, use_safetensors=True,
                                             ignore_mismatched_sizes=True, output_loading_info=True)
    lacking = [str(key) for key in [*report["missing_keys"], *report["mismatched_keys"]]]
    lacking = sorted(key for key in lacking if not key.endswith("masked_spec_embed"))  # used in training only
    if lacking:
        raise ValueError(f"{folder}: model.safetensors does not have all of the model: {lacking[0]}; copy the folder "
                         "again, or install a newer transformers (mHuBERT at 25 Hz needs 4.47)")
    return model.float().eval().requires_grad_(False)


def frame_geometry(config):
    """(samples from one frame to the next, samples that one frame sees) for the convolutions of a model's config."""
    strides, kernels = config.conv_stride, config.conv_kernel
    if not all(type(n) is int and n > 0 for n in [*strides, *kernels]):
        raise ValueError(f"conv_stride {strides} and conv_kernel {kernels} must be positive integers")
    hop, receptive_field = 1, 1
    for stride, kernel in zip(strides, kernels):
        receptive_field += (kernel - 1) * hop
        hop *= stride
    return hop, receptive_field
