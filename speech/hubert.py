"""
The paper's units: k-means clusters of HuBERT features.

The unit of a frame is the nearest of 500 centroids to the output of layer 11 of mHuBERT at 25 Hz (TWIST, Hassid et al.
2023). Everything runs in float32, without TF32 even on a GPU. Many frames lie almost midway between two centroids. With
less precision they would get other units than in the corpus that the language model was trained on.

Only recordings of exactly the same length share a batch, because padding would change their units. The group norm of
the first convolution sees the whole recording, and the batch norm before the positional convolution turns zeros into
other values. A recording is encoded as a whole, as in textlesslib, unless it is longer than WINDOW seconds.
"""
from collections import defaultdict
from typing import NamedTuple

import numpy as np

from speech.audio import SAMPLE_RATE
from speech.units import collapse, model_folder, overlapping_windows, read_vocabulary
from speech.wav2vec import frame_geometry, load_wav2vec

WINDOW = 100  # seconds: longer recordings are encoded in overlapping windows of this length
MARGIN = 5    # seconds at each inner edge of a window whose frames are taken from the neighbouring window
BATCH = 100   # seconds of audio that are encoded together


class HubertUnits(NamedTuple):
    model: object         # transformers.HubertModel, cut off after the layer that is read
    centroids: object     # tensor float32 [n_units, d], on the device of the model
    hash: str             # SHA-256 of the centroids
    hop: int              # samples from one frame to the next
    receptive_field: int  # samples that the convolutions see for one frame
    normalize: bool       # whether waveforms are brought to mean 0 and variance 1 first
    window: int           # WINDOW in frames
    margin: int           # MARGIN in frames

    n_units = property(lambda self: len(self.centroids))
    rate = property(lambda self: SAMPLE_RATE // self.hop)
    sound = None          # HuBERT units need a vocoder to be heard

    def encode(self, waveforms):
        """For each 16 kHz waveform: (ids uint16 [n] without repeats, int64 [n] the frame where each begins)."""
        return hubert_units(waveforms, self)


def load_hubert_units(folder, device="cpu"):
    """
    The HuBERT vocabulary in a folder that `python -m tools.convert units` wrote.

    units.json names the layer to read and the folder of a transformers HubertModel, absolute or relative to `folder`.
    Raises ValueError if the folder or the model is damaged or they do not fit together, and RuntimeError if
    transformers is not installed.
    """
    about, centroids = read_vocabulary(folder, "hubert")
    try:
        import torch
        from transformers import HubertModel
    except ImportError:
        raise RuntimeError("transformers is missing: pip install -e '.[speech]'") from None
    path = model_folder(folder, about)
    model = load_wav2vec(HubertModel, path)
    layer, n_layers = about.get("layer"), model.config.num_hidden_layers
    if not isinstance(layer, int) or not 1 <= layer <= n_layers:
        raise ValueError(f"{folder}: layer is {layer!r}, but the model in {path} has layers 1 to {n_layers}")
    hop, receptive_field = frame_geometry(model.config)
    for name, value, wanted in [
            ("rate", about.get("rate"), SAMPLE_RATE / hop),
            ("sample_rate", about.get("sample_rate"), SAMPLE_RATE),
            ("size of the centroids", centroids.shape[1], model.config.hidden_size)]:
        if value != wanted:
            raise ValueError(f"{folder}: {name} is {value!r}, but the model in {path} needs {wanted:g}")
    model.encoder.layers = model.encoder.layers[:layer]
    if model.config.do_stable_layer_norm:  # its final norm belongs after the last layer only
        model.encoder.layer_norm = torch.nn.Identity()
    return HubertUnits(
        model.to(device), torch.from_numpy(centroids).to(device), about["hash"], hop, receptive_field,
        bool(about.get("normalize", False)), WINDOW * SAMPLE_RATE // hop, MARGIN * SAMPLE_RATE // hop)


def hubert_features(batch, vocabulary):
    """float32 samples [B, n] -> tensor [B, 1 + (n - receptive_field) // hop, d], on the device of the model."""
    import torch

    batch = torch.as_tensor(batch).to(vocabulary.centroids.device)
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return vocabulary.model(batch).last_hidden_state


def hubert_units(waveforms, vocabulary):
    """The units of 16 kHz waveforms, as encode() describes them. A waveform of n samples has n // hop frames."""
    hop = vocabulary.hop
    extra = vocabulary.receptive_field - hop  # padding that makes n samples give n // hop frames, as in slamkit
    frames, windows_by_length = [], defaultdict(list)
    for number, waveform in enumerate(waveforms):
        waveform = np.asarray(waveform, np.float32)
        n = len(waveform) // hop
        frames.append(np.zeros(n, np.int64))
        if n == 0:
            continue
        if vocabulary.normalize:
            waveform = (waveform - waveform.mean()) / np.sqrt(waveform.var() + 1e-7)
        padded = np.pad(waveform, (extra // 2, extra - extra // 2))
        for start, end, first, last in overlapping_windows(n, vocabulary.window, vocabulary.margin):
            samples = padded[start * hop:] if end == n else padded[start * hop:end * hop + extra]
            windows_by_length[len(samples)].append((samples, number, start, first, last))

    squares = (vocabulary.centroids**2).sum(1)
    for length, windows in windows_by_length.items():
        size = max(1, BATCH * SAMPLE_RATE // length)
        for i in range(0, len(windows), size):
            batch = windows[i:i + size]
            features = hubert_features(np.stack([window[0] for window in batch]), vocabulary)    # [B, frames, d]
            nearest = (squares - 2 * features @ vocabulary.centroids.T).argmin(-1).cpu().numpy()  # [B, frames]
            for (_, number, start, first, last), ids in zip(batch, nearest):
                frames[number][first:last] = ids[first - start:last - start]
    return [collapse(ids) for ids in frames]
