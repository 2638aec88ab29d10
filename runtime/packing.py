"""
Faster matrix products on a CPU, for inference (docs/speed.md).

Each new token needs all weights, and reading them from memory takes most of its time. So layers that read the same
input become one product, and the weights of a product are kept in one of three ways:
    PackedLinear     in the layout that oneDNN's kernels like
    StreamedLinear   as they are, for steps of one position that torch.compile takes
    Int8Linear       in 8 bits, a quarter of the size in float32
"""
import torch
import torch.nn.functional as F
from torch import nn

SMALL = 1 << 16  # weights with fewer numbers stay as they are, because packed ones take longer to call
SAME_INPUT = dict(Attention=("q_proj", "k_proj", "v_proj"), MLP=("gate_proj", "up_proj"))  # see their project()


def pack_weights(model, rows, bits=None, compiled=False):
    """Replace the linear layers and the text head of a model on a CPU, in place. It can then only be used.

    rows      how many positions are usually computed at once; the layout is chosen for it, or for 16 if there are fewer
    bits      8: round each row of a weight to whole numbers from -127 to 127; the dtype of the model must be bfloat16
    compiled  whether torch.compile takes the steps, of one position each
    Does nothing where torch has no such operations for this processor and dtype. ValueError if 8 bits are asked for.
    """
    weight = model.model.embed_tokens.weight
    is_on_cpu = weight.device.type == "cpu"
    if bits == 8:
        if not is_on_cpu or weight.dtype != torch.bfloat16:
            raise ValueError("int8: only on a CPU; choose float32, bfloat16 or float16")
        packed = Int8Linear
    elif is_on_cpu and compiled:
        packed = StreamedLinear
    elif is_on_cpu and can_pack(weight.dtype):
        packed = PackedLinear
    else:
        return
    rows = max(rows, 16)  # the layout for 16 positions is no slower for one, and in float32 it is faster
    for module in [*model.modules()]:
        names = SAME_INPUT.get(type(module).__name__, ())
        weights = [getattr(module, name).weight for name in names]
        if sum(weight.numel() for weight in weights) >= SMALL:
            module.project = Together(packed(torch.cat(weights), rows), [len(weight) for weight in weights]).forward
            for name in names:
                delattr(module, name)
    for module in [*model.modules()]:
        for name, child in [*module.named_children()]:
            if isinstance(child, nn.Linear) and child.bias is None and child.weight.numel() >= SMALL:
                setattr(module, name, packed(child.weight, rows))
    if weight.numel() >= SMALL:
        model.text_logits = packed(weight, rows).forward


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


class StreamedLinear(nn.Module):
    """y = W x with W [out, in], as a sum. torch.compile makes it one loop over W, from its first number to its last.

    For one position this loop reads memory faster than oneDNN's kernels do, and it is fused with what surrounds it.
    """

    def __init__(self, weight, rows):
        super().__init__()
        self.weight = weight.detach()

    def forward(self, x):
        if not torch.compiler.is_compiling() or x.numel() > x.size(-1):  # the prompt
            return F.linear(x, self.weight)
        y = (self.weight.float() * x.flatten().float()).sum(-1)  # [out]
        return y.to(x.dtype).view(*x.shape[:-1], -1)


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


class Together:
    """Several linear layers as one: y = W x with their weights W stacked, and y split again."""

    def __init__(self, layer, sizes):
        self.layer, self.sizes = layer, sizes

    def forward(self, x):
        return self.layer(x).split(self.sizes, -1)
