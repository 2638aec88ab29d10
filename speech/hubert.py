"""
The paper's units: k-means over HuBERT.
"""
import itertools
import os
import reprlib
from typing import NamedTuple

import numpy as np

from runtime.files import one_line, read_json
from speech.audio import SAMPLE_RATE
from speech.units import collapse, model_folder, overlapping_windows, read_vocabulary
from speech.wav2vec import check_size, frame_geometry

# The paper's units: the nearest of 500 k-means centroids to the output of layer 11 of mHuBERT at 25 Hz (TWIST, Hassid
# et al. 2023). All in float32, on a GPU too, and without TF32: many frames lie nearly between two centroids, where less
# precision means other units, and a language model should hear the units that its corpus was cut into elsewhere.
#
# Recordings are batched only with others of exactly their length. Group norm in the first convolution sees the whole
# recording, and the batch norm before the positional convolution turns zeros into something else, so padding one would
# change its units. A recording up to WHOLE seconds is encoded whole, as in textlesslib.

WHOLE, MARGIN = 100.0, 5.0  # seconds: longer recordings are encoded in windows so long, less a margin on either side
BATCH = 100.0  # seconds of audio encoded together


class HubertUnits(NamedTuple):
    model: object  # transformers.HubertModel without the layers above the one that is read
    centroids: object  # tensor float32 [k, d] on the model's device
    hash: str  # sha256 of the centroids
    hop: int  # samples from one frame to the next
    receptive_field: int  # samples that the convolutions see for one frame
    normalize: bool  # waveforms to mean 0 and variance 1 first?
    window: int  # frames; and the margin
    margin: int

    n_units = property(lambda self: len(self.centroids))
    rate = property(lambda self: SAMPLE_RATE // self.hop)
    sound = None  # HuBERT units are spoken by a vocoder

    def encode(self, waveforms):
        """Units of 16 kHz waveforms: (ids uint16 without repeats, the first frame of each, int64) for each."""
        return hubert_units(waveforms, self)


def load_hubert_units(folder, device="cpu", whole=WHOLE, margin=MARGIN):
    """
    The HuBERT vocabulary in a folder, as `python -m tools.convert units` writes it.

    units.json: {kind: "hubert", model: folder of a transformers HubertModel (relative to this one, or absolute), layer:
    1 to all, n_units, rate in Hz, sample_rate, normalize, hash}; centroids.npy: float32 [n_units, hidden size].
    whole, margin: in seconds, see above. Raises ValueError (one line) for a damaged folder, RuntimeError without
    transformers.
    """
    about, centroids = read_vocabulary(folder, "hubert")
    try:
        import torch
        from transformers import HubertModel
    except ImportError:
        raise RuntimeError("transformers is missing: pip install 'smoltolk[speech]'") from None
    path = model_folder(folder, about)
    try:
        kind = read_json(os.path.join(path, "config.json")).get("model_type")
        if kind != "hubert":
            raise ValueError(f"model_type is {kind!r}, not 'hubert'")
        check_size(HubertModel, path)
        model, report = HubertModel.from_pretrained(path, output_loading_info=True, local_files_only=True,
                                                    use_safetensors=True)
    except Exception as error:  # of many kinds, by what is damaged and by the version of transformers
        raise ValueError(f"{path}: not a HuBERT model that can be loaded ({one_line(error)})") from None
    missing = sorted(set(map(str, report["missing_keys"])) - {"masked_spec_embed"})  # this one serves training only
    if missing or report["mismatched_keys"]:
        raise ValueError(f"{path}: lacks {(missing or sorted(map(str, report['mismatched_keys'])))[0]}; "
                         "copy the model again, or get a newer transformers (mHuBERT at 25 Hz needs 4.47)")
    config, layer = model.config, about.get("layer")
    hop, receptive_field = frame_geometry(config)
    if type(layer) is not int or layer not in range(1, config.num_hidden_layers + 1):
        said = reprlib.repr(layer)
        raise ValueError(f"{folder}: layer is {said}, the model in {path} has 1 to {config.num_hidden_layers}")
    for name, said, wanted in (("rate is", about.get("rate"), SAMPLE_RATE / hop),
                               ("sample_rate is", about.get("sample_rate"), SAMPLE_RATE),
                               ("centroids have size", centroids.shape[1], config.hidden_size)):
        if said != wanted:
            raise ValueError(f"{folder}: {name} {reprlib.repr(said)}, the model in {path} means {wanted:g}")
    model.encoder.layers = model.encoder.layers[:layer]
    if config.do_stable_layer_norm:  # then the encoder ends with a norm, which is after all layers, not after this one
        model.encoder.layer_norm = torch.nn.Identity()
    model = model.eval().float().requires_grad_(False).to(device)
    frames = [int(seconds * SAMPLE_RATE / hop) for seconds in (whole, margin)]
    return HubertUnits(model, torch.from_numpy(centroids).float().to(device), about["hash"], hop, receptive_field,
                       bool(about.get("normalize", False)), *frames)


def hubert_features(batch, vocabulary):
    """float32 samples [b, receptive field + (t - 1) * hop + less than hop] -> tensor [b, t, d], on the device."""
    import torch

    batch = torch.as_tensor(batch).to(vocabulary.centroids.device)
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return vocabulary.model(batch).last_hidden_state


def hubert_units(waveforms, vocabulary):
    """Units of 16 kHz waveforms, as encode() gives them: n // hop frames of n samples, padded as slamkit does."""
    hop, extra = vocabulary.hop, vocabulary.receptive_field - vocabulary.hop
    frames, pieces = [], []
    for i, waveform in enumerate(waveforms):
        waveform = np.asarray(waveform, np.float32)
        if vocabulary.normalize and len(waveform):
            waveform = (waveform - waveform.mean()) / np.sqrt(waveform.var() + 1e-7)
        frames.append(np.zeros(len(waveform) // hop, np.int64))
        padded = np.pad(waveform, (extra // 2, extra - extra // 2))
        windows = overlapping_windows(len(frames[i]), vocabulary.window, vocabulary.margin) if len(frames[i]) else ()
        for start, end, a, b in windows:
            stop = len(padded) if end == len(frames[i]) else end * hop + extra
            pieces.append((padded[start * hop:stop], i, start, a, b))
    by_length = itertools.groupby(sorted(pieces, key=lambda piece: len(piece[0])), lambda piece: len(piece[0]))
    centroids = vocabulary.centroids
    for length, equal in by_length:
        equal, size = list(equal), max(1, int(BATCH * SAMPLE_RATE) // length)
        for batch in (equal[j:j + size] for j in range(0, len(equal), size)):
            features = hubert_features(np.stack([samples for samples, *_ in batch]), vocabulary)
            nearest = ((centroids**2).sum(1) - 2 * features @ centroids.T).argmin(-1).cpu().numpy()
            for (_, i, start, a, b), ids in zip(batch, nearest):
                frames[i][a:b] = ids[a - start:b - start]
    return [collapse(ids) for ids in frames]
