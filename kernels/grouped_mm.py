"""The products of a mixture of experts: rows in groups, each by the weight of its expert.

What transformers falls back to where torch has no grouped product; as an op of our own, a graph
that has it needs nothing of transformers.
"""

from __future__ import annotations

import torch

from .registry import register


def grouped_mm_reference(input, weight, offsets):
    output = input.new_zeros(input.shape[0], weight.shape[2])
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        if end > start:
            torch.mm(input[start:end], weight[expert], out=output[start:end])
        start = end
    return output


@torch.library.custom_op("fastgen::grouped_mm", mutates_args=())
def grouped_mm(input: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Multiply each group of rows by the weight of its expert.

    Args:
        input: [num_rows, in_features], the rows of an expert together, experts in order.
        weight: [num_experts, in_features, out_features]. offsets: [num_experts] int, the row
            behind the last of each expert; rows behind them all give zeros.
    Returns: [num_rows, out_features], contiguous, dtype of input.
    Numerics: one torch.mm for each expert that has rows.
    """
    return grouped_mm_reference(input, weight, offsets)


@grouped_mm.register_fake
def _(input, weight, offsets):
    return input.new_empty((input.shape[0], weight.shape[2]))


register("fastgen::grouped_mm", "reference", grouped_mm_reference)
