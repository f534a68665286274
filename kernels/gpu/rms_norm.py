"""RMSNorm, alone or of a residual sum: a Triton kernel, one program per row or some short ones.

Source: Zhang and Sennrich 2019, arXiv:1910.07467; how it rounds: `fastgen::rms_norm`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..rows import rows_of
from .launch import Launch

# Elements of a program at least: heads that are normalized by themselves are short.
_ELEMENTS = 1024


@triton.jit(do_not_specialize=["num_rows", "num_inner", "eps"])
def rms_norm(
    input_ptr,
    residual_ptr,
    weight_ptr,
    output_ptr,
    total_ptr,
    num_rows,
    num_inner,  # row i is (i // num_inner, i % num_inner) of the two dimensions
    eps,
    INPUT_OUTER: tl.constexpr,  # strides in elements
    INPUT_INNER: tl.constexpr,
    RESIDUAL_OUTER: tl.constexpr,
    RESIDUAL_INNER: tl.constexpr,
    OUTPUT_OUTER: tl.constexpr,
    OUTPUT_INNER: tl.constexpr,
    TOTAL_OUTER: tl.constexpr,
    TOTAL_INNER: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    CAST_FIRST: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    outer = (rows // num_inner).to(tl.int64)[:, None]
    inner = (rows % num_inner).to(tl.int64)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    there = (rows[:, None] < num_rows) & (columns < WIDTH)  # [ROWS, BLOCK]
    element = output_ptr.dtype.element_ty
    hidden = tl.load(
        input_ptr + outer * INPUT_OUTER + inner * INPUT_INNER + columns, mask=there, other=0.0
    ).to(tl.float32)
    if residual_ptr is not None:
        residual = tl.load(
            residual_ptr + outer * RESIDUAL_OUTER + inner * RESIDUAL_INNER + columns,
            mask=there,
            other=0.0,
        )
        total = (hidden + residual.to(tl.float32)).to(element)
        tl.store(total_ptr + outer * TOTAL_OUTER + inner * TOTAL_INNER + columns, total, mask=there)
        hidden = total.to(tl.float32)
    mean = tl.sum(hidden * hidden, 1) / WIDTH
    hidden = hidden * tl.rsqrt(mean + tl.cast(eps, tl.float32))[:, None]
    if CAST_FIRST:
        hidden = hidden.to(element).to(tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
        hidden = hidden * (weight + WEIGHT_OFFSET)
    tl.store(
        output_ptr + outer * OUTPUT_OUTER + inner * OUTPUT_INNER + columns,
        hidden.to(element),
        mask=there,
    )


def launch_of(
    input: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    output: torch.Tensor,
    total: torch.Tensor | None,
    eps: float,
    weight_offset: float,
    cast_first: bool,
) -> Launch | None:
    """The launch for `fastgen::rms_norm` or `add_rms_norm`; None if the rows lie irregularly."""
    given = [tensor for tensor in (input, residual, output, total) if tensor is not None]
    rows = rows_of(*given)
    if rows is None:
        return None
    num_outer, num_inner, found = rows
    strides = iter(found)
    by_tensor = [
        (0, 0) if tensor is None else next(strides) for tensor in (input, residual, output, total)
    ]
    names = ("INPUT", "RESIDUAL", "OUTPUT", "TOTAL")
    width = input.shape[-1]
    block = triton.next_power_of_2(width)
    rows_each = max(1, _ELEMENTS // block)
    num_rows = num_outer * num_inner
    return Launch(
        rms_norm,
        (-(-num_rows // rows_each), 1, 1),
        {
            "input_ptr": input,
            "residual_ptr": residual,
            "weight_ptr": weight,
            "output_ptr": output,
            "total_ptr": total,
        },
        {"num_rows": num_rows, "num_inner": max(1, num_inner), "eps": float(eps)},
        {
            **{
                f"{name}_{dim}": stride
                for name, pair in zip(names, by_tensor, strict=True)
                for dim, stride in zip(("OUTER", "INNER"), pair, strict=True)
            },
            "WIDTH": width,
            "BLOCK": block,
            "ROWS": rows_each,
            "WEIGHT_OFFSET": float(weight_offset),
            "CAST_FIRST": cast_first,
        },
        num_warps=min(16, max(4, block // 512)),
    )


def bytes_moved(num_rows: int, width: int, itemsize: int, with_residual: bool) -> int:
    """Input and output, with a residual also that and the sum; and the weight."""
    return (num_rows * (4 if with_residual else 2) + 1) * width * itemsize
