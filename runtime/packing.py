"""
Faster matrix products on a CPU, for inference: weights in the layout that its kernels like, or in 8 bits.

oneDNN multiplies faster by a weight that it has laid out itself (docs/speed.md). For each new token all weights are
read from memory, and in 8 bits they are a quarter as large as in float32. torch.compile uses the same operations.
"""
import torch
from torch import nn

SMALL = 1 << 16  # weights with fewer numbers stay as they are, because packed ones take longer to call


def pack_weights(model, rows, bits=None):
    """Replace the linear layers and the text head of a model on a CPU, in place. It can then no longer be trained.

    rows   how many positions are usually computed at once; the layout is chosen for it
    bits   8: round each row of a weight to whole numbers from -127 to 127; the dtype of the model must be bfloat16
    Does nothing where torch has no such operations for this processor and dtype. ValueError if 8 bits are asked for.
    """
    weight = model.model.embed_tokens.weight
    if bits == 8:
        if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
            raise ValueError("int8: only on a CPU; choose float32, bfloat16 or float16")
        layer = Int8Linear
    elif weight.device.type == "cpu" and can_pack(weight.dtype):
        layer = PackedLinear
    else:
        return
    for module in [*model.modules()]:
        for name, child in [*module.named_children()]:
            if isinstance(child, nn.Linear) and child.bias is None and child.weight.numel() >= SMALL:
                setattr(module, name, layer(child.weight, rows))
    if weight.numel() >= SMALL:
        model.text_logits = layer(weight, rows).forward


def can_pack(dtype):
    """Whether this torch and this processor multiply packed weights of a dtype."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class PackedLinear(nn.Module):
    """y = W x with W [out, in] in oneDNN's own layout."""

    def __init__(self, weight, rows):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")


class Int8Linear(nn.Module):
    """y = s W' x with W' [out, in] in 8 bits and a scale s for each row of W."""

    def __init__(self, weight, rows):
        super().__init__()
        weight = weight.detach().float()
        scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127  # [out, 1]
        self.weight, self.scale = (weight / scale).round().to(torch.int8), scale[:, 0].bfloat16()

    def forward(self, x):
        y = torch._weight_int8pack_mm(x.flatten(0, -2), self.weight, self.scale)  # [positions, out]
        return y.view(*x.shape[:-1], len(self.scale))
