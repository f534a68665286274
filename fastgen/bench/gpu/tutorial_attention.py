"""A plain causal flash attention forward in Triton, as one learns to write it: the kernel to beat.

One program per block of queries and head; keys before the block in one loop without a mask, those
of the block in a second one with it. Source: Dao 2023, arXiv:2307.08691 (algorithm 1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

# block_m, block_n, num_warps, num_stages: whoever runs it picks the fastest for a size.
CONFIGS = ((128, 64, 8, 3), (128, 128, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3))


@triton.jit
def _over_keys(
    q, k_ptr, v_ptr, acc, top, total, begin, end, rows, length, stride, scale,
    MASKED: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    dims = tl.arange(0, D)
    for start in range(begin, end, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        there = columns[:, None] < length
        at = columns[:, None] * stride + dims[None, :]
        k = tl.load(k_ptr + at, mask=there, other=0.0)
        scores = tl.dot(q, tl.trans(k)) * scale  # [BLOCK_M, BLOCK_N], in powers of two
        if MASKED:
            scores = tl.where(rows[:, None] >= columns[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        kept = tl.exp2(top - new_top)
        total = total * kept + tl.sum(weights, 1)
        v = tl.load(v_ptr + at, mask=there, other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc * kept[:, None])
        top = new_top
    return acc, top, total


@triton.jit
def _attention(
    q_ptr, k_ptr, v_ptr, out_ptr, length, num_heads, stride, scale,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    block, pair = tl.program_id(0), tl.program_id(1)
    base = (pair // num_heads).to(tl.int64) * length * stride + (pair % num_heads) * D
    rows, dims = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, D)
    at = base + rows[:, None] * stride + dims[None, :]
    there = rows[:, None] < length
    q = tl.load(q_ptr + at, mask=there, other=0.0)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    middle = block * BLOCK_M
    acc, top, total = _over_keys(
        q, k_ptr + base, v_ptr + base, acc, top, total, 0, middle, rows, length, stride, scale,
        False, D, BLOCK_N,  # pyright: ignore
    )  # fmt: skip
    acc, top, total = _over_keys(
        q, k_ptr + base, v_ptr + base, acc, top, total, middle, middle + BLOCK_M, rows, length,
        stride, scale, True, D, BLOCK_N,  # pyright: ignore
    )  # fmt: skip
    tl.store(out_ptr + at, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=there)


def runs(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor
) -> list[Callable[[], None]]:
    """A call per configuration. All tensors [batch, length, num_heads, head_dim], contiguous."""
    batch, length, num_heads, head_dim = query.shape
    scale = head_dim**-0.5 * 1.4426950408889634  # exp2 instead of exp

    kernel: Any = _attention

    def run(block_m: int, block_n: int, num_warps: int, num_stages: int) -> None:
        kernel[(triton.cdiv(length, block_m), batch * num_heads)](
            query, key, value, output, length, num_heads, query.stride(1), scale,
            D=head_dim, BLOCK_M=block_m, BLOCK_N=block_n,
            num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip

    return [lambda config=config: run(*config) for config in CONFIGS]
