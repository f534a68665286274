"""Root mean square layer normalization, alone or of a residual sum.

    hidden = input * rsqrt(mean(input^2 over the last dim) + eps)      in fp32
    output = hidden * (weight_offset + weight)

Source: Zhang and Sennrich 2019, arXiv:1910.07467. Models differ in where they round: Llama rounds
`hidden` to the input's dtype before the weight (cast_first), Gemma, OLMo 2 and gpt-oss multiply in
fp32 and round once; Gemma's weight counts from 1 (weight_offset).
"""

from __future__ import annotations

import torch

from . import cpu, gpu
from .registry import CallSite, register
from .rows import rows_of

_RMS_NORM = cpu.Kernel("rms_norm", "piipiippiipiiiiiddbb")


def rms_norm_reference(input, weight, eps, weight_offset, cast_first):
    hidden = input.float()
    variance = hidden.pow(2).mean(-1, keepdim=True)
    hidden = hidden * torch.rsqrt(variance + eps)
    if cast_first:
        hidden = hidden.to(input.dtype)
    if weight is not None:
        if weight_offset:
            weight = weight.float() + weight_offset
        hidden = hidden * weight
    return hidden.to(input.dtype)


def check_norm(
    input: torch.Tensor, weight: torch.Tensor | None, weight_offset: float, cast_first: bool
) -> None:
    """Raise ValueError unless the weight fits the input and the rounding is one that exists."""
    if weight is not None and (
        weight.dim() != 1 or weight.shape[0] != input.shape[-1] or weight.dtype != input.dtype
    ):
        raise ValueError(
            f"weight must be [hidden_size] of the input's dtype, [{input.shape[-1]}] "
            f"{input.dtype}; got {list(weight.shape)} {weight.dtype}"
        )
    if weight_offset and (weight is None or cast_first):
        raise ValueError(
            "a weight_offset needs a weight, and is added in fp32: cast_first must be False"
        )


@torch.library.custom_op("fastgen::rms_norm", mutates_args=())
def rms_norm(
    input: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    weight_offset: float,
    cast_first: bool,
) -> torch.Tensor:
    """RMSNorm over the last dimension.

    Args:
        input: [..., hidden_size], fp16/bf16/fp32, any strides.
        weight: [hidden_size], the input's dtype, or None.
        eps: Added to the mean square. weight_offset: Added to the weight in fp32.
        cast_first: Round to the input's dtype before the weight is multiplied, too.
    Returns: shape and dtype of input, laid out as `torch.empty_like(input)`.
    Raises: ValueError if the weight does not fit, or an offset comes with cast_first.
    Numerics: fp32; rounded where cast_first says, and at the end.
    """
    check_norm(input, weight, weight_offset, cast_first)
    return rms_norm_reference(input, weight, eps, weight_offset, cast_first)


@rms_norm.register_fake
def _(input, weight, eps, weight_offset, cast_first):
    check_norm(input, weight, weight_offset, cast_first)
    return torch.empty_like(input)


def add_rms_norm_reference(input, residual, weight, eps, weight_offset, cast_first):
    total = input + residual
    return rms_norm_reference(total, weight, eps, weight_offset, cast_first), total


def check_residual(input: torch.Tensor, residual: torch.Tensor) -> None:
    """Raise ValueError unless the two have one shape and dtype."""
    if input.shape != residual.shape or input.dtype != residual.dtype:
        raise ValueError(
            "input and residual must have one shape and dtype, got "
            f"{list(input.shape)} {input.dtype} and {list(residual.shape)} {residual.dtype}"
        )


@torch.library.custom_op("fastgen::add_rms_norm", mutates_args=())
def add_rms_norm(
    input: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    weight_offset: float,
    cast_first: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm of a sum, and the sum, which goes on as the residual stream.

    Args:
        input, residual: [..., hidden_size] of one dtype, fp16/bf16/fp32, any strides.
        weight, eps, weight_offset, cast_first: as in `rms_norm`.
    Returns: (rms_norm(total), total) with total = input + residual, rounded to their dtype; both
        laid out as `torch.empty_like(input)`.
    Raises: ValueError if shapes or dtypes do not fit.
    Numerics: the sum is rounded before it is normalized; then as `rms_norm`.
    """
    check_residual(input, residual)
    check_norm(input, weight, weight_offset, cast_first)
    return add_rms_norm_reference(input, residual, weight, eps, weight_offset, cast_first)


@add_rms_norm.register_fake
def _(input, residual, weight, eps, weight_offset, cast_first):
    check_residual(input, residual)
    check_norm(input, weight, weight_offset, cast_first)
    return torch.empty_like(input), torch.empty_like(input)


@cpu.recordable
def rms_norm_cpu(input, weight, eps, weight_offset, cast_first):
    return _norm_cpu(input, None, weight, eps, weight_offset, cast_first)[0]


@cpu.recordable
def add_rms_norm_cpu(input, residual, weight, eps, weight_offset, cast_first):
    return _norm_cpu(input, residual, weight, eps, weight_offset, cast_first)


def _norm_cpu(input, residual, weight, eps, weight_offset, cast_first):
    """The output and, with a residual, the sum."""
    output = _like(input)
    second = input if residual is None else residual
    total = output if residual is None else _like(input)
    rows = rows_of(input, second, output, total)
    if rows is None:
        rest = None if residual is None else residual.contiguous()
        made = _norm_cpu(input.contiguous(), rest, weight, eps, weight_offset, cast_first)
        return output.copy_(made[0]), total.copy_(made[1])
    outer, inner, strides = rows
    _RMS_NORM[input.dtype](
        input.data_ptr(),
        *strides[0],
        None if residual is None else residual.data_ptr(),
        *strides[1],
        None if weight is None else weight.data_ptr(),
        output.data_ptr(),
        *strides[2],
        total.data_ptr(),
        *strides[3],
        outer,
        inner,
        input.shape[-1],
        eps,
        weight_offset,
        cast_first,
        cpu.num_threads(),
    )
    return output, total


def _like(input):
    if input.is_contiguous():
        return input.new_empty(input.shape)
    return torch.empty_like(input)


def cpu_refuses(call: CallSite) -> str | None:
    weight = call.args["weight"]
    if weight is not None and not weight.is_contiguous():
        return "the weight is not contiguous"
    return cpu.refuses(call, "input")


def rms_norm_triton(input, weight, eps, weight_offset, cast_first):
    return _norm_triton(input, None, weight, eps, weight_offset, cast_first)[0]


def add_rms_norm_triton(input, residual, weight, eps, weight_offset, cast_first):
    return _norm_triton(input, residual, weight, eps, weight_offset, cast_first)


def _norm_triton(input, residual, weight, eps, weight_offset, cast_first):
    """The output and, with a residual, the sum."""
    from .gpu.rms_norm import launch_of

    output = _like(input)
    total = None if residual is None else _like(input)
    launch = launch_of(input, residual, weight, output, total, eps, weight_offset, cast_first)
    if launch is None:
        rest = None if residual is None else residual.contiguous()
        made = _norm_triton(input.contiguous(), rest, weight, eps, weight_offset, cast_first)
        return output.copy_(made[0]), None if total is None else total.copy_(made[1])
    launch.run()
    return output, total


def triton_refuses(call: CallSite) -> str | None:
    weight = call.args["weight"]
    if weight is not None and not weight.is_contiguous():
        return "the weight is not contiguous"
    return gpu.refuses(call, "input")


register("fastgen::rms_norm", "reference", rms_norm_reference)
register("fastgen::rms_norm", "cpu", rms_norm_cpu, cpu_refuses, batch_invariant=True)
register("fastgen::rms_norm", "triton", rms_norm_triton, triton_refuses)
register("fastgen::add_rms_norm", "reference", add_rms_norm_reference)
register("fastgen::add_rms_norm", "cpu", add_rms_norm_cpu, cpu_refuses, batch_invariant=True)
register("fastgen::add_rms_norm", "triton", add_rms_norm_triton, triton_refuses)
