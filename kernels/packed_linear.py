"""A linear layer over a weight that was laid out for the processor's GEMM beforehand.

output = input @ weight.T + bias
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from . import cpu
from .packing import unpack
from .registry import CallSite, register


def packed_linear_reference(input, weight, bias, out_features):
    layout = "onednn" if weight.is_mkldnn else "tiles"
    return F.linear(input, unpack(weight, layout, out_features), bias)


def packed_linear_onednn(input, weight, bias, out_features):
    return torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")


@cpu.recordable
def packed_linear_cpu(input, weight, bias, out_features):
    return linear_over_tiles(input, weight, bias, out_features, 0)


def linear_over_tiles(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
    epilogue: int,
) -> torch.Tensor:
    """Call the C++ kernel; epilogue: as cpu/linear.cpp counts them."""
    *leading, width = input.shape
    if input.dim() != 2 or input.stride(1) != 1:
        input = input.contiguous()
    if bias is not None:
        bias = bias.contiguous()
    output = input.new_empty((*leading, out_features))
    cpu.function("linear", "pipppiiiibb")(
        input.data_ptr(),
        input.stride(0) if input.dim() == 2 else width,  # dimensions of one element lie anyhow
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        output.data_ptr(),
        out_features,
        math.prod(leading),
        out_features,
        width,
        epilogue,
        cpu.num_threads(),
    )
    return output


@torch.library.custom_op("fastgen::packed_linear", mutates_args=())
def packed_linear(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out_features: int
) -> torch.Tensor:
    """Apply a packed linear layer.

    Args:
        input: [..., in_features] bf16. weight: What `pack` made of [out_features, in_features], in
            the layout "tiles" or "onednn". bias: [out_features] or None, contiguous.
    Returns: [..., out_features], contiguous, dtype of input.
    Numerics: fp32 accumulation, rounded once, as the plain layer.
    """
    return packed_linear_reference(input, weight, bias, out_features)


@packed_linear.register_fake
def _(input, weight, bias, out_features):
    return input.new_empty((*input.shape[:-1], out_features))


def onednn_refuses(call: CallSite) -> str | None:
    return "the weight has our own layout" if call.args["weight"].dim() != 2 else None


def cpu_refuses(call: CallSite) -> str | None:
    if call.args["weight"].dim() == 2:
        return "the weight has oneDNN's layout"
    return tiles_refuse(call)


def tiles_refuse(call: CallSite) -> str | None:
    """Why the C++ kernel over our own layouts cannot take a call."""
    if (why := cpu.refuses(call)) is not None:
        return why
    for name in ("input", "weight", "bias"):
        tensor = call.args[name]
        if tensor is not None and tensor.dtype != torch.bfloat16:
            return f"{name} is {str(tensor.dtype).removeprefix('torch.')}"
    if cpu.isa() == "generic":
        return "the C++ kernels have no bf16 instructions here"
    return None


register("fastgen::packed_linear", "reference", packed_linear_reference)
register("fastgen::packed_linear", "onednn", packed_linear_onednn, onednn_refuses)
register("fastgen::packed_linear", "cpu", packed_linear_cpu, cpu_refuses, batch_invariant=True)
