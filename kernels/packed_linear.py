"""A linear layer over a weight that was laid out for the processor's GEMM beforehand.

    output = input @ weight.T + bias

A plain weight is brought into the GEMM's layout at every call; for a few rows that costs more than
the products. `pack` does it once. The layout is oneDNN's own and opaque; `unpack` gives the plain
weight back, bit for bit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .registry import CallSite, register

# How many rows the layout is chosen for. On AMX the one for many rows is the best for few, too.
_ROWS = 256


def why_not_packed(weight: torch.Tensor) -> str | None:
    """Why a weight (it may be a fake tensor) cannot be packed, or None."""
    if weight.device.type != "cpu":
        return f"the weight is on {weight.device.type}"
    if weight.dtype != torch.bfloat16:
        return f"the weight is {str(weight.dtype).removeprefix('torch.')}"
    if not torch.backends.mkldnn.is_available():
        return "this torch was built without oneDNN"
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "this processor has no bf16 instructions that oneDNN uses"
    return None


def pack(weight: torch.Tensor) -> torch.Tensor:
    """A packed copy of a weight [out_features, in_features], an opaque tensor of its shape."""
    plain = weight.detach()
    with torch.inference_mode(False), torch.no_grad():
        return torch.ops.mkldnn._reorder_linear_weight(plain, _ROWS)


def unpack(weight: torch.Tensor, out_features: int | None = None) -> torch.Tensor:
    """The plain weight."""
    return weight.to_dense() if weight.is_mkldnn else weight


def packed_linear_reference(input, weight, bias):
    return F.linear(input, unpack(weight), bias)


def packed_linear_onednn(input, weight, bias):
    return torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")


@torch.library.custom_op("fastgen::packed_linear", mutates_args=())
def packed_linear(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Apply a packed linear layer.

    Args:
        input: [..., in_features]. weight: What `pack` made of [out_features, in_features].
        bias: [out_features] or None.
    Returns: [..., out_features], contiguous, dtype of input.
    Numerics: fp32 accumulation, rounded once, as the plain layer.
    """
    return packed_linear_reference(input, weight, bias)


@packed_linear.register_fake
def _(input, weight, bias):
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


def onednn_refuses(call: CallSite) -> str | None:
    return why_not_packed(call.args["weight"])


register("fastgen::packed_linear", "reference", packed_linear_reference)
register("fastgen::packed_linear", "onednn", packed_linear_onednn, onednn_refuses)
