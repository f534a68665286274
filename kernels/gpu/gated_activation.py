"""act(gate) * up: a Triton kernel. Source: Shazeer 2020, arXiv:2002.05202."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..rows import rows_of
from .launch import Launch

_BLOCK = 1024


@triton.jit(do_not_specialize=["num_inner"])
def gated_activation(
    gate_ptr,
    up_ptr,
    output_ptr,
    num_inner,
    GATE_OUTER: tl.constexpr,  # strides in elements
    GATE_INNER: tl.constexpr,
    UP_OUTER: tl.constexpr,
    UP_INNER: tl.constexpr,
    OUTPUT_OUTER: tl.constexpr,
    OUTPUT_INNER: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,  # "silu", "gelu", "gelu_tanh"
):
    row = tl.program_id(0)
    outer = (row // num_inner).to(tl.int64)
    inner = (row % num_inner).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = columns < WIDTH
    element = output_ptr.dtype.element_ty
    gate = tl.load(gate_ptr + outer * GATE_OUTER + inner * GATE_INNER + columns, mask=there)
    up = tl.load(up_ptr + outer * UP_OUTER + inner * UP_INNER + columns, mask=there)
    x = gate.to(tl.float32)
    if ACTIVATION == "silu":
        activated = x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        activated = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:  # 0.5 (1 + tanh(y)) is sigmoid(2 y)
        y = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        activated = x / (1.0 + tl.exp(-y))
    product = activated.to(element).to(tl.float32) * up.to(tl.float32)
    tl.store(
        output_ptr + outer * OUTPUT_OUTER + inner * OUTPUT_INNER + columns,
        product.to(element),
        mask=there,
    )


def launch_of(
    gate: torch.Tensor, up: torch.Tensor, output: torch.Tensor, activation: str
) -> Launch | None:
    """The launch for `fastgen::silu_mul` ("silu") or `gelu_mul` ("gelu", "gelu_tanh").

    None if the rows lie too irregularly.
    """
    rows = rows_of(gate, up, output)
    if rows is None:
        return None
    num_outer, num_inner, strides = rows
    width = gate.shape[-1]
    block = min(_BLOCK, triton.next_power_of_2(width))
    return Launch(
        gated_activation,
        (num_outer * num_inner, -(-width // block), 1),
        {"gate_ptr": gate, "up_ptr": up, "output_ptr": output},
        {"num_inner": max(1, num_inner)},
        {
            **{
                f"{name}_{dim}": stride
                for name, pair in zip(("GATE", "UP", "OUTPUT"), strides, strict=True)
                for dim, stride in zip(("OUTER", "INNER"), pair, strict=True)
            },
            "WIDTH": width,
            "BLOCK": block,
            "ACTIVATION": activation,
        },
    )


def bytes_moved(num_rows: int, width: int, itemsize: int) -> int:
    """Gate and up read, the product written."""
    return 3 * num_rows * width * itemsize
