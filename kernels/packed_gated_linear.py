"""A gate and an up projection in one packed weight, with their product.

    output = activation(input @ gate.T + b_gate) * (input @ up.T + b_up)

The two projections of a row are never written: each group of the weight holds the same outputs of
both. Source: Shazeer 2020, arXiv:2002.05202.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import cpu
from .gated_activation import gelu_mul_reference, silu_mul_reference
from .packed_linear import linear_over_tiles, tiles_refuse
from .packing import unpack
from .registry import register

# As cpu/linear.cpp counts them.
_EPILOGUES = {"silu": 1, "gelu_tanh": 2}


def packed_gated_linear_reference(input, weight, bias, out_features, activation):
    both = F.linear(input, unpack(weight, "gated_tiles", 2 * out_features), bias)
    gate, up = both.split(out_features, dim=-1)
    if activation == "silu":
        return silu_mul_reference(gate, up)
    return gelu_mul_reference(gate, up, tanh=True)


@cpu.recordable
def packed_gated_linear_cpu(input, weight, bias, out_features, activation):
    return linear_over_tiles(input, weight, bias, out_features, _EPILOGUES[activation])


@torch.library.custom_op("fastgen::packed_gated_linear", mutates_args=())
def packed_gated_linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
    activation: str,
) -> torch.Tensor:
    """Apply a packed gate and up projection, and multiply.

    Args:
        input: [..., in_features] bf16. weight: What `pack` made of [2 * out_features, in_features],
            the gate above the up projection, in the layout "gated_tiles". bias: [2 * out_features]
            or None, contiguous. activation: "silu" or "gelu_tanh".
    Returns: [..., out_features], contiguous, dtype of input.
    Raises: ValueError for another activation.
    Numerics: fp32 accumulation; rounded where separate layers would round: both projections, the
        activation, the product.
    """
    check_activation(activation)
    return packed_gated_linear_reference(input, weight, bias, out_features, activation)


@packed_gated_linear.register_fake
def _(input, weight, bias, out_features, activation):
    check_activation(activation)
    return input.new_empty((*input.shape[:-1], out_features))


def check_activation(activation: str) -> None:
    if activation not in _EPILOGUES:
        raise ValueError(f"activation must be one of {list(_EPILOGUES)}, got {activation!r}")


register("fastgen::packed_gated_linear", "reference", packed_gated_linear_reference)
register(
    "fastgen::packed_gated_linear",
    "cpu",
    packed_gated_linear_cpu,
    tiles_refuse,
    batch_invariant=True,
)
