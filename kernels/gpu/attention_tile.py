"""What the attention kernels do with one tile of queries: an online softmax over tiles of keys.

Source: Milakov and Gimelshein 2018, arXiv:1805.02867; Dao 2023, arXiv:2307.08691. Scores are kept
in base 2, so that each exponential is one instruction.
"""

# Inside of kernels everything is typed as what it becomes when it is compiled.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def tanh(x):
    """exp loses a small x, for which the series is exact to fp32 (|x| < 0.4: 6e-8)."""
    square = x * x
    series = -0.05396825396825397 + square * (0.021869488536155203 - square * 0.008863235529902197)
    series = 1.0 + square * (-0.3333333333333333 + square * (0.13333333333333333 + square * series))
    return tl.where(tl.abs(x) < 0.4, x * series, 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0))


@triton.jit
def attend_tiles(
    query,  # [BLOCK_M, BLOCK_D], of the dtype in which products are taken
    accumulator,  # [BLOCK_M, BLOCK_DV] fp32
    maximum,  # [BLOCK_M] fp32, of the scores in base 2
    total,  # [BLOCK_M] fp32, sum of exp2(score - maximum)
    first,  # keys first, ..., last - 1 are looked at
    last,
    positions,  # [BLOCK_M] of the queries
    num_keys,  # of the sequence
    keys_ptr,  # of this head's, at the first token if dense
    values_ptr,
    block_table_ptr,  # of this sequence's row, None if dense
    scale,
    softcap,
    KEY_BLOCK: tl.constexpr,  # strides in elements
    KEY_SLOT: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    VALUE_SLOT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,  # slots of a page, 0: keys are dense
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,  # some query does not see some key of these tiles
):
    dims = tl.arange(0, BLOCK_D)
    v_dims = tl.arange(0, BLOCK_DV)
    for start in tl.range(first, last, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        there = keys < num_keys
        if BLOCK_SIZE:
            if MASKED:
                block = tl.load(block_table_ptr + keys // BLOCK_SIZE, mask=there, other=0)
            else:
                block = tl.load(block_table_ptr + keys // BLOCK_SIZE)
            block = block.to(tl.int64)
            slot = (keys % BLOCK_SIZE).to(tl.int64)
            key_at = block * KEY_BLOCK + slot * KEY_SLOT
            value_at = block * VALUE_BLOCK + slot * VALUE_SLOT
        else:
            key_at = keys.to(tl.int64) * KEY_SLOT
            value_at = keys.to(tl.int64) * VALUE_SLOT
        # [BLOCK_D, BLOCK_N]; what no query sees must be 0, not only masked: 0 * NaN is NaN.
        key_ptrs = keys_ptr + key_at[None, :] + dims[:, None]
        if MASKED:
            key = tl.load(key_ptrs, mask=there[None, :] & (dims[:, None] < HEAD_DIM), other=0.0)
        elif HEAD_DIM < BLOCK_D:
            key = tl.load(key_ptrs, mask=dims[:, None] < HEAD_DIM, other=0.0)
        else:
            key = tl.load(key_ptrs)
        value_ptrs = values_ptr + value_at[:, None] + v_dims[None, :]  # [BLOCK_N, BLOCK_DV]
        if MASKED:
            value = tl.load(
                value_ptrs, mask=there[:, None] & (v_dims[None, :] < V_HEAD_DIM), other=0.0
            )
        elif V_HEAD_DIM < BLOCK_DV:
            value = tl.load(value_ptrs, mask=v_dims[None, :] < V_HEAD_DIM, other=0.0)
        else:
            value = tl.load(value_ptrs)
        key = key.to(query.dtype)
        value = value.to(query.dtype)
        scores = tl.dot(query, key, input_precision="ieee")  # [BLOCK_M, BLOCK_N] fp32
        if HAS_SOFTCAP:
            scores = tanh(scores * (scale / softcap)) * (softcap * LOG2_E)
        else:
            scores = scores * (scale * LOG2_E)
        if MASKED:
            visible = keys[None, :] <= positions[:, None]
            if WINDOW:
                visible = visible & (keys[None, :] > positions[:, None] - WINDOW)
            scores = tl.where(visible, scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        base = new_maximum
        if MASKED:  # a row that sees nothing yet
            base = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        weights = tl.exp2(scores - base[:, None])
        kept = tl.exp2(maximum - base)
        total = total * kept + tl.sum(weights, 1)
        accumulator = accumulator * kept[:, None]
        accumulator = tl.dot(weights.to(value.dtype), value, accumulator, input_precision="ieee")
        maximum = new_maximum
    return accumulator, maximum, total


@triton.jit
def attend_range(
    query,
    accumulator,
    maximum,
    total,
    first,  # a multiple of BLOCK_N
    last,
    low,  # the smallest and the largest position of the queries
    high,
    positions,
    num_keys,
    keys_ptr,
    values_ptr,
    block_table_ptr,
    scale,
    softcap,
    KEY_BLOCK: tl.constexpr,
    KEY_SLOT: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    VALUE_SLOT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Keys first, ..., last - 1, in tiles; only those that some query does not see are masked."""
    seen_by_all = tl.maximum(tl.minimum(low + 1, last) // BLOCK_N * BLOCK_N, first)
    if WINDOW:
        in_window = tl.cdiv(tl.maximum(high - WINDOW + 1, 0), BLOCK_N) * BLOCK_N
        in_window = tl.minimum(tl.maximum(in_window, first), seen_by_all)
        accumulator, maximum, total = attend_tiles(
            query,
            accumulator,
            maximum,
            total,
            first,
            in_window,
            positions,
            num_keys,
            keys_ptr,
            values_ptr,
            block_table_ptr,
            scale,
            softcap,
            KEY_BLOCK,
            KEY_SLOT,
            VALUE_BLOCK,
            VALUE_SLOT,
            BLOCK_SIZE,
            HEAD_DIM,
            V_HEAD_DIM,
            BLOCK_D,
            BLOCK_DV,
            BLOCK_N,
            WINDOW,
            HAS_SOFTCAP,
            True,
        )
    else:
        in_window = first
    accumulator, maximum, total = attend_tiles(
        query,
        accumulator,
        maximum,
        total,
        in_window,
        seen_by_all,
        positions,
        num_keys,
        keys_ptr,
        values_ptr,
        block_table_ptr,
        scale,
        softcap,
        KEY_BLOCK,
        KEY_SLOT,
        VALUE_BLOCK,
        VALUE_SLOT,
        BLOCK_SIZE,
        HEAD_DIM,
        V_HEAD_DIM,
        BLOCK_D,
        BLOCK_DV,
        BLOCK_N,
        WINDOW,
        HAS_SOFTCAP,
        False,
    )
    return attend_tiles(
        query,
        accumulator,
        maximum,
        total,
        seen_by_all,
        last,
        positions,
        num_keys,
        keys_ptr,
        values_ptr,
        block_table_ptr,
        scale,
        softcap,
        KEY_BLOCK,
        KEY_SLOT,
        VALUE_BLOCK,
        VALUE_SLOT,
        BLOCK_SIZE,
        HEAD_DIM,
        V_HEAD_DIM,
        BLOCK_D,
        BLOCK_DV,
        BLOCK_N,
        WINDOW,
        HAS_SOFTCAP,
        True,
    )


@triton.jit
def sequence_of_tile(query_start_loc_ptr, num_seqs, tile, BLOCK_Q: tl.constexpr):
    """The sequence that a tile of BLOCK_Q queries belongs to.

    Sequence s has its tiles from query_start_loc[s] // BLOCK_Q + s on: at least as many as it
    needs, so that the grid follows from the number of tokens and sequences alone.
    """
    low = 0
    high = num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(query_start_loc_ptr + middle) // BLOCK_Q + middle <= tile:
            low = middle
        else:
            high = middle
    return low
