"""
Turn units into a waveform with textlesslib's unit HiFi-GAN.

Modules are named as in textlesslib's checkpoints (CodeHiFiGANVocoder). `python -m tools.convert vocoder` folds the
weight norm of such a checkpoint into the weights, and writes the folder that load_vocoder() reads.
"""
import math
import os

import torch
from torch import nn
from torch.nn import functional as F

from runtime.files import one_line, read_json, read_tensors
from runtime.hub import local_folder
from speech.audio import SAMPLE_RATE

# Settings of textlesslib's other vocoders, which need more inputs than units.
UNSUPPORTED = ("multispkr", "multistyle", "f0", "f0_quant_num_bin", "embedder_params")


class Vocoder(nn.Module):
    """HiFi-GAN V1 (Kong et al. 2020) on embeddings of units, with a predictor of the duration of each unit."""

    def __init__(self, config):
        super().__init__()
        for key in UNSUPPORTED:
            if config.get(key):
                raise ValueError(f"{key} is {config[key]!r}; vocoders with speakers, styles or pitch are not supported")
        if config["sampling_rate"] != SAMPLE_RATE:
            raise ValueError(f"sampling_rate is {config['sampling_rate']!r}; only {SAMPLE_RATE} is supported")
        if not config.get("dur_predictor_params"):
            raise ValueError("dur_predictor_params is missing; only vocoders that predict durations are supported")
        self.n_units, d = config["num_embeddings"], config["embedding_dim"]
        self.hop = math.prod(config["upsample_rates"])  # samples for one frame
        channels = config["upsample_initial_channel"]
        self.dict = nn.Embedding(self.n_units, d)
        self.dur_predictor = DurationPredictor(d, config["dur_predictor_params"])
        self.conv_pre = nn.Conv1d(d, channels, 7, padding=3)
        self.ups, self.resblocks = nn.ModuleList(), nn.ModuleList()
        for rate, size in zip(config["upsample_rates"], config["upsample_kernel_sizes"], strict=True):
            channels = channels // 2
            self.ups.append(nn.ConvTranspose1d(2 * channels, channels, size, rate, padding=(size - rate) // 2))
            for block in zip(config["resblock_kernel_sizes"], config["resblock_dilation_sizes"], strict=True):
                self.resblocks.append(ResidualBlock(channels, *block))
        self.conv_post = nn.Conv1d(channels, 1, 7, padding=3)

    @torch.inference_mode()
    def speak(self, ids, durations=None):
        """Turn units int64 [n] into float32 samples at 16 kHz. durations: int64 [n] in frames, or None to predict."""
        device = self.dict.weight.device
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            x = self.dict(torch.as_tensor(ids, device=device)).T                        # [d, n]
            frames = self.dur_predictor(x) if durations is None else torch.as_tensor(durations, device=device)
            x = self.conv_pre(x.repeat_interleave(frames, dim=1))                       # [channels, sum of frames]
            n_blocks = len(self.resblocks) // len(self.ups)
            for i, up in enumerate(self.ups):
                x = up(F.leaky_relu(x, 0.1))                                            # [channels / 2, length * rate]
                x = sum(block(x) for block in self.resblocks[i * n_blocks:(i + 1) * n_blocks]) / n_blocks
            return torch.tanh(self.conv_post(F.leaky_relu(x)))[0].cpu().numpy()         # [sum of frames * hop]


class ResidualBlock(nn.Module):
    def __init__(self, channels, size, dilations):
        super().__init__()
        self.convs1, self.convs2 = nn.ModuleList(), nn.ModuleList()
        for dilation in dilations:
            padding = (size - 1) * dilation // 2
            self.convs1.append(nn.Conv1d(channels, channels, size, dilation=dilation, padding=padding))
            self.convs2.append(nn.Conv1d(channels, channels, size, padding=(size - 1) // 2))

    def forward(self, x):
        for first, second in zip(self.convs1, self.convs2):
            x = x + second(F.leaky_relu(first(F.leaky_relu(x, 0.1)), 0.1))
        return x


class DurationPredictor(nn.Module):
    def __init__(self, d, params):
        super().__init__()
        hidden, size = params["var_pred_hidden_dim"], params["var_pred_kernel_size"]
        self.conv1 = nn.Sequential(nn.Conv1d(d, hidden, size, padding=(size - 1) // 2), nn.ReLU())
        self.ln1 = nn.LayerNorm(hidden)
        self.conv2 = nn.Sequential(nn.Conv1d(hidden, hidden, size, padding=(size - 1) // 2), nn.ReLU())
        self.ln2 = nn.LayerNorm(hidden)
        self.proj = nn.Linear(hidden, 1)

    def forward(self, x):
        """[d, n] -> int64 [n], at least 1. The network predicts log(1 + frames)."""
        x = self.ln1(self.conv1(x).T).T
        x = self.ln2(self.conv2(x).T)
        return torch.round(torch.exp(self.proj(x)[:, 0]) - 1).long().clamp(min=1)


def load_vocoder(folder, device="cpu"):
    """The vocoder in a folder that `python -m tools.convert vocoder` wrote. Raises ValueError for a damaged folder."""
    folder = local_folder(folder)
    try:
        config = read_json(os.path.join(folder, "config.json"))
        weights = read_tensors(os.path.join(folder, "model.safetensors"))
        with torch.device("meta"):  # takes no memory; the weights replace these tensors
            vocoder = Vocoder(config)
        vocoder.load_state_dict(weights, assign=True)
    except Exception as error:  # a damaged config makes torch raise exceptions of many types
        raise ValueError(f"{folder}: not a whole vocoder that can be used here ({one_line(error)}); "
                         "convert it again") from None
    return vocoder.float().eval().requires_grad_(False).to(device)
