"""Causal attention over a paged KV cache: two Triton kernels behind one op.

`paged_prefill` runs sequences of several new tokens, `paged_decode` those of one. In both, the
query heads that share a KV head are rows of one tile, so that keys are read once for all of them;
keys and values are read from their pages by one vector of page numbers per tile. `paged_decode`
cuts each sequence into parts, and the program that ends last puts them together. Prompts without
a cached prefix go through `flash_attention`.

Source: Kwon et al. 2023, arXiv:2309.06180; parts: Dao et al. 2023, Flash-Decoding.
"""

# Inside of kernels everything is typed as what it becomes when it is compiled.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import INTERPRETED
from .attention_tile import LOG2_E, attend_range, sequence_of_tile
from .flash_attention import launch_of as dense_launch_of
from .launch import Card, Launch
from .tiles import num_splits_for, padded_head_size, tile_for


@triton.jit(do_not_specialize=["num_seqs", "table_stride", "scale", "softcap"])
def paged_prefill(
    query_ptr,
    key_cache_ptr,
    value_cache_ptr,
    output_ptr,
    block_table_ptr,
    query_start_loc_ptr,
    seq_lens_ptr,
    sinks_ptr,
    key_scale_ptr,  # [num_kv_heads] fp32 of a quantised cache, None: as stored
    value_scale_ptr,
    num_seqs,
    table_stride,
    scale,
    softcap,
    QUERY_TOKEN: tl.constexpr,  # strides in elements
    QUERY_HEAD: tl.constexpr,
    OUTPUT_TOKEN: tl.constexpr,
    OUTPUT_HEAD: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    KEY_HEAD: tl.constexpr,
    KEY_SLOT: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    VALUE_HEAD: tl.constexpr,
    VALUE_SLOT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SKIP_DENSE: tl.constexpr,  # sequences whose keys are all new are left to flash_attention
    WIDEN: tl.constexpr,  # products in fp32: the interpreter has no right bf16
):
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP  # tokens per tile
    kv_head = tl.program_id(0)
    tile = tl.program_id(1)
    scale = tl.cast(scale, tl.float32)
    softcap = tl.cast(softcap, tl.float32)
    sequence = sequence_of_tile(query_start_loc_ptr, num_seqs, tile, BLOCK_Q)
    start = tl.load(query_start_loc_ptr + sequence)
    length = tl.load(query_start_loc_ptr + sequence + 1) - start
    num_keys = tl.load(seq_lens_ptr + sequence)
    tile -= start // BLOCK_Q + sequence
    num_tiles = tl.cdiv(length, BLOCK_Q)
    if (tile >= num_tiles) | (length == 1):
        return
    if SKIP_DENSE:  # noqa: SIM102
        if num_keys == length:
            return
    first_token = (num_tiles - 1 - tile) * BLOCK_Q  # the longest first
    rows = tl.arange(0, BLOCK_M)
    local = first_token + rows // GROUP
    heads = kv_head * GROUP + rows % GROUP
    inside = (rows < BLOCK_Q * GROUP) & (local < length)
    positions = num_keys - length + local
    tokens = tl.cast(start, tl.int64) + local
    dims = tl.arange(0, BLOCK_D)
    query = tl.load(
        query_ptr + tokens[:, None] * QUERY_TOKEN + heads[:, None] * QUERY_HEAD + dims[None, :],
        mask=inside[:, None] & (dims[None, :] < HEAD_DIM),
        other=0.0,
    )
    if WIDEN:
        query = query.to(tl.float32)
    accumulator = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    if sinks_ptr is None:
        maximum = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        total = tl.zeros([BLOCK_M], dtype=tl.float32)
    else:
        maximum = tl.load(sinks_ptr + heads, mask=inside, other=0.0).to(tl.float32) * LOG2_E
        total = tl.full([BLOCK_M], 1.0, dtype=tl.float32)
    if key_scale_ptr is not None:
        scale *= tl.load(key_scale_ptr + kv_head)
    low = num_keys - length + first_token
    last = tl.minimum(low + BLOCK_Q, num_keys)
    first = 0
    if WINDOW:
        first = tl.maximum(low - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
    accumulator, maximum, total = attend_range(
        query,
        accumulator,
        maximum,
        total,
        first,
        last,
        low,
        last - 1,
        positions,
        num_keys,
        key_cache_ptr + kv_head * KEY_HEAD,
        value_cache_ptr + kv_head * VALUE_HEAD,
        block_table_ptr + tl.cast(sequence, tl.int64) * table_stride,
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
    )
    output = accumulator / total[:, None]
    if value_scale_ptr is not None:
        output *= tl.load(value_scale_ptr + kv_head)
    v_dims = tl.arange(0, BLOCK_DV)
    tl.store(
        output_ptr
        + tokens[:, None] * OUTPUT_TOKEN
        + heads[:, None] * OUTPUT_HEAD
        + v_dims[None, :],
        output.to(output_ptr.dtype.element_ty),
        mask=inside[:, None] & (v_dims[None, :] < V_HEAD_DIM),
    )


@triton.jit(do_not_specialize=["table_stride", "scale", "softcap"])
def paged_decode(
    query_ptr,
    key_cache_ptr,
    value_cache_ptr,
    output_ptr,
    block_table_ptr,
    query_start_loc_ptr,  # None: every sequence has one new token
    seq_lens_ptr,
    sinks_ptr,
    key_scale_ptr,
    value_scale_ptr,
    parts_ptr,  # [num_seqs, num_kv_heads, NUM_SPLITS, BLOCK_M, BLOCK_DV + 2] fp32
    num_ended_ptr,  # [num_seqs, num_kv_heads] int32, zeros
    table_stride,
    scale,
    softcap,
    QUERY_TOKEN: tl.constexpr,
    QUERY_HEAD: tl.constexpr,
    OUTPUT_TOKEN: tl.constexpr,
    OUTPUT_HEAD: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    KEY_HEAD: tl.constexpr,
    KEY_SLOT: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    VALUE_HEAD: tl.constexpr,
    VALUE_SLOT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    WIDEN: tl.constexpr,
):
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    sequence = tl.program_id(2)
    scale = tl.cast(scale, tl.float32)
    softcap = tl.cast(softcap, tl.float32)
    if query_start_loc_ptr is None:
        token = sequence
    else:
        token = tl.load(query_start_loc_ptr + sequence)
        if tl.load(query_start_loc_ptr + sequence + 1) - token != 1:
            return
    token = tl.cast(token, tl.int64)
    num_keys = tl.load(seq_lens_ptr + sequence)
    rows = tl.arange(0, BLOCK_M)
    heads = kv_head * GROUP + rows
    inside = rows < GROUP
    dims = tl.arange(0, BLOCK_D)
    v_dims = tl.arange(0, BLOCK_DV)
    query = tl.load(
        query_ptr + token * QUERY_TOKEN + heads[:, None] * QUERY_HEAD + dims[None, :],
        mask=inside[:, None] & (dims[None, :] < HEAD_DIM),
        other=0.0,
    )
    if WIDEN:
        query = query.to(tl.float32)
    if key_scale_ptr is not None:
        scale *= tl.load(key_scale_ptr + kv_head)
    first = 0
    if WINDOW:
        first = tl.maximum(num_keys - WINDOW, 0) // BLOCK_N * BLOCK_N
    last = num_keys
    if NUM_SPLITS > 1:
        width = tl.cdiv(tl.cdiv(num_keys - first, BLOCK_N), NUM_SPLITS) * BLOCK_N
        first += split * width
        last = tl.minimum(first + width, num_keys)
    accumulator = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    maximum = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    if first < last:
        accumulator, maximum, total = attend_range(
            query,
            accumulator,
            maximum,
            total,
            first,
            last,
            num_keys - 1,
            num_keys - 1,
            num_keys - 1 + tl.zeros([BLOCK_M], dtype=tl.int32),
            num_keys,
            key_cache_ptr + kv_head * KEY_HEAD,
            value_cache_ptr + kv_head * VALUE_HEAD,
            block_table_ptr + tl.cast(sequence, tl.int64) * table_stride,
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
        )
    if NUM_SPLITS > 1:
        PART: tl.constexpr = BLOCK_M * (BLOCK_DV + 2)
        pair = tl.cast(sequence, tl.int64) * tl.num_programs(0) + kv_head
        parts_ptr += pair * (NUM_SPLITS * PART)
        at = parts_ptr + split * PART
        tl.store(at + rows[:, None] * BLOCK_DV + v_dims[None, :], accumulator)
        tl.store(at + BLOCK_M * BLOCK_DV + rows, maximum)
        tl.store(at + BLOCK_M * (BLOCK_DV + 1) + rows, total)
        tl.debug_barrier()  # all of this program's part is written before it says so
        ended = tl.atomic_add(num_ended_ptr + pair, 1, sem="acq_rel")
        if ended < NUM_SPLITS - 1:
            return
        accumulator = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
        maximum = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        total = tl.zeros([BLOCK_M], dtype=tl.float32)
        for other in tl.range(0, NUM_SPLITS):  # in order, whoever ended last
            at = parts_ptr + other * PART
            part_maximum = tl.load(at + BLOCK_M * BLOCK_DV + rows, cache_modifier=".cg")
            part_total = tl.load(at + BLOCK_M * (BLOCK_DV + 1) + rows, cache_modifier=".cg")
            part = tl.load(at + rows[:, None] * BLOCK_DV + v_dims[None, :], cache_modifier=".cg")
            new_maximum = tl.maximum(maximum, part_maximum)
            base = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
            kept = tl.exp2(maximum - base)
            added = tl.exp2(part_maximum - base)
            accumulator = accumulator * kept[:, None] + part * added[:, None]
            total = total * kept + part_total * added
            maximum = new_maximum
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + heads, mask=inside, other=0.0).to(tl.float32) * LOG2_E
        base = tl.maximum(maximum, sink)
        kept = tl.exp2(maximum - base)
        accumulator = accumulator * kept[:, None]
        total = total * kept + tl.exp2(sink - base)
    output = accumulator / total[:, None]
    if value_scale_ptr is not None:
        output *= tl.load(value_scale_ptr + kv_head)
    tl.store(
        output_ptr + token * OUTPUT_TOKEN + heads[:, None] * OUTPUT_HEAD + v_dims[None, :],
        output.to(output_ptr.dtype.element_ty),
        mask=inside[:, None] & (v_dims[None, :] < V_HEAD_DIM),
    )


def launches_of(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    output: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: torch.Tensor | None,
    card: Card,
    key_scale: torch.Tensor | None = None,
    value_scale: torch.Tensor | None = None,
) -> list[Launch]:
    """The launches for `fastgen::paged_attention` once the new keys are in their pages.

    key, value: This step's, through which prompts without a cached prefix are run; None: all go
        through the pages. key_scale, value_scale: [num_kv_heads] fp32, factors of a quantised
        cache; None: the cache holds the values themselves.
    """
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads, block_size = key_cache.shape[1:3]
    v_head_dim = value_cache.shape[3]
    num_seqs, group = seq_lens.shape[0], num_heads // num_kv_heads
    widest, itemsize = max(head_dim, v_head_dim), query.element_size()
    only_decodes = num_tokens == num_seqs
    tensors = {
        "query_ptr": query,
        "key_cache_ptr": key_cache,
        "value_cache_ptr": value_cache,
        "output_ptr": output,
        "block_table_ptr": block_table,
        "query_start_loc_ptr": query_start_loc,
        "seq_lens_ptr": seq_lens,
        "sinks_ptr": sinks,
        "key_scale_ptr": key_scale,
        "value_scale_ptr": value_scale,
    }
    numbers = {
        "table_stride": block_table.stride(0),
        "scale": float(scale),
        "softcap": float(softcap),
    }
    strides = {
        "QUERY_TOKEN": query.stride(0),
        "QUERY_HEAD": query.stride(1),
        "OUTPUT_TOKEN": output.stride(0),
        "OUTPUT_HEAD": output.stride(1),
        "KEY_BLOCK": key_cache.stride(0),
        "KEY_HEAD": key_cache.stride(1),
        "KEY_SLOT": key_cache.stride(2),
        "VALUE_BLOCK": value_cache.stride(0),
        "VALUE_HEAD": value_cache.stride(1),
        "VALUE_SLOT": value_cache.stride(2),
        "BLOCK_SIZE": block_size,
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "V_HEAD_DIM": v_head_dim,
        "BLOCK_D": padded_head_size(head_dim),
        "BLOCK_DV": padded_head_size(v_head_dim),
    }
    launches = []
    if not only_decodes:
        if key is not None and value is not None:
            launches.append(
                dense_launch_of(
                    query,
                    key,
                    value,
                    output,
                    query_start_loc,
                    seq_lens,
                    scale,
                    window,
                    softcap,
                    sinks,
                    card,
                )
            )
        tile = tile_for("paged", widest, itemsize, card)
        block_m = max(tile.block_m, triton.next_power_of_2(group))
        block_q = block_m // group
        launches.append(
            Launch(
                paged_prefill,
                (num_kv_heads, num_tokens // block_q + num_seqs, 1),
                tensors,
                {"num_seqs": num_seqs, **numbers},
                {
                    **strides,
                    "BLOCK_M": block_m,
                    "BLOCK_N": tile.block_n,
                    "WINDOW": window,
                    "HAS_SOFTCAP": softcap != 0,
                    "SKIP_DENSE": key is not None,
                    "WIDEN": INTERPRETED,
                },
                tile.num_warps,
                tile.num_stages,
            )
        )
    tile = tile_for("decode", widest, itemsize, card)
    block_m = max(tile.block_m, triton.next_power_of_2(group))
    splits = num_splits_for(num_seqs, num_kv_heads, card)
    parts = num_ended = None
    if splits > 1:
        size = num_seqs * num_kv_heads * splits * block_m * (strides["BLOCK_DV"] + 2)
        parts = query.new_empty(size, dtype=torch.float32)
        num_ended = query.new_zeros(num_seqs * num_kv_heads, dtype=torch.int32)
    launches.append(
        Launch(
            paged_decode,
            (num_kv_heads, splits, num_seqs),
            {
                **tensors,
                "query_start_loc_ptr": None if only_decodes else query_start_loc,
                "parts_ptr": parts,
                "num_ended_ptr": num_ended,
            },
            numbers,
            {
                **strides,
                "BLOCK_M": block_m,
                "BLOCK_N": tile.block_n,
                "WINDOW": window,
                "HAS_SOFTCAP": softcap != 0,
                "NUM_SPLITS": splits,
                "WIDEN": INTERPRETED,
            },
            tile.num_warps,
            tile.num_stages,
        )
    )
    return launches


def decode_bytes(
    num_kv_heads: int, head_dim: int, v_head_dim: int, itemsize: int, seq_lens: list[int]
) -> int:
    """Keys and values that a decode step reads; all else of it is small."""
    return sum(seq_lens) * num_kv_heads * (head_dim + v_head_dim) * itemsize
