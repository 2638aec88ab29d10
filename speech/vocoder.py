"""
Units to a waveform with textlesslib's unit HiFi-GAN.
"""
import math
import os
import reprlib
from typing import NamedTuple

from runtime.files import one_line, read_json, read_tensors
from speech.audio import SAMPLE_RATE


class Vocoder(NamedTuple):
    """HiFi-GAN V1 over embedded units, with a predictor of their durations (textlesslib's CodeHiFiGANVocoder)."""
    config: dict
    weights: dict  # tensors by the names in textlesslib's checkpoint, weight norm folded in
    n_units: int
    hop: int  # samples for one frame

    def speak(self, ids, durations=None):
        """Units int64 [n] to a waveform float32 at 16 kHz; durations int64 [n] in frames, None: predicted."""
        return vocode(ids, self, durations)


VOCODER_NUMBERS = ("num_embeddings", "embedding_dim", "upsample_rates", "upsample_kernel_sizes", "var_pred_hidden_dim",
                   "resblock_kernel_sizes", "resblock_dilation_sizes", "upsample_initial_channel", "encoder_embed_dim")


def vocoder_shapes(config):
    """{tensor name: shape} of a vocoder's weights; ValueError (one line) if the config is of another kind."""
    c, shapes = config, {}

    def expect(name, *shape, bias=None):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, (bias or shape[0],)

    if not isinstance(c, dict):
        raise ValueError("not the config of a unit HiFi-GAN: no object")
    for name in ("multispkr", "multistyle", "f0", "f0_quant_num_bin", "embedder_params"):
        if c.get(name):
            said = reprlib.repr(c[name])
            raise ValueError(f"{name} is {said}: vocoders with speakers, styles or pitch cannot be used here")

    def flat(value):
        return [x for inner in value for x in (inner if isinstance(inner, list) else [inner])]

    try:
        for name, value in [*c.items(), *c["dur_predictor_params"].items()]:
            counts = flat(flat([value])) or [0]
            if name in VOCODER_NUMBERS and not all(type(x) is int and 0 < x < 1 << 16 for x in counts):
                raise TypeError(f"{name} is {reprlib.repr(value)}")
        d, channels, hop = c["embedding_dim"], c["upsample_initial_channel"], math.prod(c["upsample_rates"])
        size, hidden, inner = (c["dur_predictor_params"][name] for name in
                               ("var_pred_kernel_size", "var_pred_hidden_dim", "encoder_embed_dim"))
        for name, said, wanted in (("sampling_rate", c["sampling_rate"], SAMPLE_RATE), ("encoder_embed_dim", inner, d),
                                   ("model_in_dim", c.get("model_in_dim", d), d), ("var_pred_kernel_size", size, 3),
                                   ("code_hop_size", c.get("code_hop_size", hop), hop)):
            if said != wanted:
                raise ValueError(f"{name} is {said}, not {wanted}")
        blocks = list(zip(c["resblock_kernel_sizes"], c["resblock_dilation_sizes"], strict=True))
        for i, (_, size) in enumerate(zip(c["upsample_rates"], c["upsample_kernel_sizes"], strict=True)):
            here = channels >> i + 1
            expect(f"ups.{i}", 2 * here, here, size, bias=here)
            for j, (size, dilations) in enumerate(blocks):
                for name in (f"convs{k}.{m}" for k in (1, 2) for m in range(len(dilations))):
                    expect(f"resblocks.{i * len(blocks) + j}.{name}", here, here, size)
        shapes["dict.weight"] = (c["num_embeddings"], d)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"not the config of a unit HiFi-GAN with durations ({one_line(error)})") from None
    for name, *shape in (("conv_pre", channels, d, 7), ("conv_post", 1, here, 7), ("dur_predictor.proj", 1, hidden),
                         ("dur_predictor.conv1.0", hidden, d, 3), ("dur_predictor.conv2.0", hidden, hidden, 3),
                         ("dur_predictor.ln1", hidden), ("dur_predictor.ln2", hidden)):
        expect(name, *shape)
    return shapes


def check_weights(there, shapes, path):
    """there: {name: shape}. ValueError that names the first tensor that is missing, too much or misshaped."""
    for name in sorted(there.keys() | shapes.keys()):
        if there.get(name) != shapes.get(name):
            raise ValueError(f"{path}: {name} has shape {there.get(name)}, its config means {shapes.get(name)}")


def load_vocoder(folder, device="cpu"):
    """The vocoder that `python -m tools.convert vocoder` wrote into a folder; ValueError (one line) if anything is wrong."""
    path = os.path.join(folder, "model.safetensors")
    try:
        config, weights = read_json(os.path.join(folder, "config.json")), read_tensors(path)
    except ValueError as error:
        raise ValueError(f"{folder}: not a whole vocoder ({error}); convert it again") from None
    try:
        shapes = vocoder_shapes(config)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    check_weights({name: tuple(tensor.shape) for name, tensor in weights.items()}, shapes, path)
    weights = {name: tensor.float().to(device) for name, tensor in weights.items()}
    return Vocoder(config, weights, config["num_embeddings"], math.prod(config["upsample_rates"]))


def vocode(ids, vocoder, durations=None):
    """Units int64 [n] to a waveform float32 [frames * hop]; durations int64 [n] in frames, None: predicted."""
    import torch
    from torch.nn import functional as F

    w, config = vocoder.weights, vocoder.config

    def conv(x, name, **how):
        return F.conv1d(x, w[f"{name}.weight"], w[f"{name}.bias"], **how)

    def predict(x):  # [n, d] -> frames [n]; the predictor gives log(1 + frames)
        for layer in ("1", "2"):
            x = F.relu(conv(x.T, f"dur_predictor.conv{layer}.0", padding=1)).T
            x = F.layer_norm(x, x.shape[1:], w[f"dur_predictor.ln{layer}.weight"], w[f"dur_predictor.ln{layer}.bias"])
        log_frames = F.linear(x, w["dur_predictor.proj.weight"], w["dur_predictor.proj.bias"])[:, 0]
        return torch.round(torch.exp(log_frames) - 1).long().clamp(min=1)

    def block(x, name, size, dilations):
        for m, dilation in enumerate(dilations):
            y = conv(F.leaky_relu(x, 0.1), f"{name}.convs1.{m}", dilation=dilation, padding=(size - 1) * dilation // 2)
            x = x + conv(F.leaky_relu(y, 0.1), f"{name}.convs2.{m}", padding=(size - 1) // 2)
        return x

    blocks = list(zip(config["resblock_kernel_sizes"], config["resblock_dilation_sizes"]))
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        x = w["dict.weight"][torch.as_tensor(ids, device=w["dict.weight"].device)]
        frames = predict(x) if durations is None else torch.as_tensor(durations, device=x.device)
        x = conv(x.repeat_interleave(frames, 0).T, "conv_pre", padding=3)
        for i, (rate, size) in enumerate(zip(config["upsample_rates"], config["upsample_kernel_sizes"])):
            x = F.conv_transpose1d(F.leaky_relu(x, 0.1), w[f"ups.{i}.weight"], w[f"ups.{i}.bias"], stride=rate,
                                   padding=(size - rate) // 2)
            x = sum(block(x, f"resblocks.{i * len(blocks) + j}", *how) for j, how in enumerate(blocks)) / len(blocks)
        return torch.tanh(conv(F.leaky_relu(x), "conv_post", padding=3))[0].cpu().numpy()
