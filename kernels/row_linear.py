"""Linear layers over plain weights whose rows are computed alike, whatever is beside them.

output = input @ weight.T + bias; of experts, each row with the weight of its own

A general matrix product chooses its order of summation by the number of rows, and treats those at
the end of a block in another way than the others: a row's last bits then tell what else was there.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from . import cpu
from .registry import CallSite, register

_ROW_LINEAR = cpu.Kernel("row_linear", "pipiippiiib")


def row_linear_reference(input, weight, bias):
    return F.linear(input, weight, bias)


def row_grouped_linear_reference(input, weight, offsets):
    output = input.new_zeros((input.shape[0], weight.shape[2]))
    for expert, rows in enumerate(_groups(offsets)):
        output[rows] = input[rows] @ weight[expert]
    return output


def _groups(offsets: torch.Tensor) -> list[slice]:
    ends = offsets.tolist()
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


@cpu.recordable
def row_linear_cpu(input, weight, bias):
    output = input.new_empty((*input.shape[:-1], weight.shape[0]))
    multiply_rows(input, weight, bias, output)
    return output


def row_grouped_linear_cpu(input, weight, offsets):
    output = input.new_zeros((input.shape[0], weight.shape[2]))  # rows of no expert stay zero
    for expert, rows in enumerate(_groups(offsets)):
        multiply_rows(input[rows], weight[expert].t(), None, output[rows])
    return output


def multiply_rows(input, weight, bias, output):
    """output[..., n] = the sum over k of input[..., k] * weight[n, k], by C++; contiguous."""
    *leading, width = input.shape
    if input.dim() != 2 or input.stride(1) != 1:
        input = input.contiguous()
    if weight.stride(1) != 1 and weight.stride(0) != 1:
        weight = weight.contiguous()
    if bias is not None:
        bias = bias.contiguous()
    _ROW_LINEAR[input.dtype](
        input.data_ptr(),
        input.stride(0) if input.dim() == 2 else width,
        weight.data_ptr(),
        *weight.stride(),
        None if bias is None else bias.data_ptr(),
        output.data_ptr(),
        math.prod(leading),
        weight.shape[0],
        width,
        cpu.num_threads(),
    )


@torch.library.custom_op("fastgen::row_linear", mutates_args=())
def row_linear(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Apply a linear layer.

    Args:
        input: [..., in_features]. weight: [out_features, in_features], strided along one of them
            by 1. bias: [out_features] or None. All fp32 or bf16.
    Returns: [..., out_features], contiguous, dtype of input.
    Numerics: fp32 accumulation, rounded once, as the plain layer.
    """
    return row_linear_reference(input, weight, bias)


@row_linear.register_fake
def _(input, weight, bias):
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


@torch.library.custom_op("fastgen::row_grouped_linear", mutates_args=())
def row_grouped_linear(
    input: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor
) -> torch.Tensor:
    """Apply to each group of rows the linear layer of its expert.

    Args:
        input: [num_rows, in_features], the rows of an expert together, experts in order.
        weight: [num_experts, in_features, out_features]. offsets: [num_experts] int, the row
            behind the last of each expert; rows behind them all give zeros.
    Returns: [num_rows, out_features], contiguous, dtype of input.
    Numerics: as `row_linear`.
    """
    return row_grouped_linear_reference(input, weight, offsets)


@row_grouped_linear.register_fake
def _(input, weight, offsets):
    return input.new_empty((input.shape[0], weight.shape[2]))


def cpu_refuses(call: CallSite) -> str | None:
    given = [call.args[name] for name in ("input", "weight", "bias") if name in call.args]
    if len({tensor.dtype for tensor in given if tensor is not None}) > 1:
        return "input, weight and bias are of several dtypes"
    return cpu.refuses(call, "input")


register("fastgen::row_linear", "reference", row_linear_reference)
register("fastgen::row_linear", "cpu", row_linear_cpu, cpu_refuses, batch_invariant=True)
register("fastgen::row_grouped_linear", "reference", row_grouped_linear_reference)
register(
    "fastgen::row_grouped_linear", "cpu", row_grouped_linear_cpu, cpu_refuses, batch_invariant=True
)
