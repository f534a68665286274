"""What the tests of packed linears share: exact inputs, and calls into memory with a guard."""

from __future__ import annotations

import pytest
import torch
from fastgen.kernels import cpu
from fastgen.kernels.packing import why_not_tiles

BF16 = torch.bfloat16
TILES = why_not_tiles(torch.empty(1, 32, dtype=BF16))
needs_tiles = pytest.mark.skipif(TILES is not None, reason=f"no layout of our own here: {TILES}")
# The levels that have a kernel over our own layouts.
LEVELS = cpu.ISA_LEVELS[1:]
# One row, around groups of four rows, around a tile, around a panel, and several panels.
ROWS = (1, 2, 3, 4, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 300)
# Rows and [outputs, inputs] of inputs that do not fit into the second-level cache: the weight comes
# in parts of groups and, from 49 steps on, of steps. The last panels have 12, 25, 32 and 24 rows.
LARGE = [
    *((300, (400, 1792)), (313, (257, 1792)), (320, (33, 1792)), (600, (100, 896))),
    *((545, (65, 1024)), (363, (300, 1536))),  # rows that collide in a first-level cache
]
GUARD = 77.0


def integers(*shape: int, seed: int = 0) -> torch.Tensor:
    """-1, 0 and 1: their products sum up exactly, in any order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, shape, generator=generator).to(BF16)


def exact_sums(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """[rows, outputs] bf16: there is nothing to round up to 256."""
    sums = input.float() @ weight.float().T + (0 if bias is None else bias.float())
    assert sums.abs().max() <= 256
    return sums.to(BF16)


def surrounded(values: torch.Tensor, before: int = 32, after: int = 32) -> torch.Tensor:
    """The same values with NaN around them: rows and columns before and after."""
    *rows, width = values.shape
    size = [count + 4 for count in rows] + [before + width + after]
    memory = torch.full(size, float("nan"), dtype=values.dtype)
    inside = memory[(*[slice(2, -2)] * len(rows), slice(before, before + width))]
    return inside.copy_(values)


def guarded(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
    epilogue: int = 0,
    *,
    gap: int = 0,
    offset: int = 0,
) -> torch.Tensor:
    """Call the kernel on an output with a guard around it, and between its rows.

    gap: Elements between two rows. offset: Elements by which the output misses a cache line.
    """
    num_rows, stride = input.shape[0], out_features + gap
    memory = torch.full((64 + num_rows * stride + 64,), GUARD, dtype=BF16)
    start = -(memory.data_ptr() // 2) % 32 + 32 + offset
    memory = memory[: start + num_rows * stride + 31 - offset]
    rows = memory[start : start + num_rows * stride].view(num_rows, stride)
    cpu.function("linear", "pipppiiiibb")(
        input.data_ptr(),
        input.stride(0),
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        rows.data_ptr(),
        stride,
        num_rows,
        out_features,
        input.shape[1],
        epilogue,
        torch.get_num_threads(),
    )
    output = rows[:, :out_features].clone()
    rows[:, :out_features] = GUARD
    assert (memory == GUARD).all(), "something was written beside the output"
    return output
