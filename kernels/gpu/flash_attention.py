"""Causal attention of packed prompts over their own keys: a Triton kernel.

    out = softmax(scale Q K^T + causal and window mask) V, online over tiles of keys

One program per tile of queries and head; the tiles of a prompt with the most keys come first.
Tiles that every query sees are not masked. Source: Dao 2023, arXiv:2307.08691.
"""

# Inside of kernels everything is typed as what it becomes when it is compiled.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import INTERPRETED
from .attention_tile import LOG2_E, attend_range, sequence_of_tile
from .launch import Card, Launch
from .tiles import padded_head_size, tile_for


@triton.jit(do_not_specialize=["num_tokens", "num_seqs", "scale", "softcap"])
def flash_attention(
    query_ptr,
    key_ptr,
    value_ptr,
    output_ptr,
    query_start_loc_ptr,  # None: one sequence of num_tokens
    seq_lens_ptr,  # sequences with more keys than queries are left alone; None: all are run
    sinks_ptr,
    num_tokens,
    num_seqs,
    scale,
    softcap,
    QUERY_TOKEN: tl.constexpr,  # strides in elements
    QUERY_HEAD: tl.constexpr,
    KEY_TOKEN: tl.constexpr,
    KEY_HEAD: tl.constexpr,
    VALUE_TOKEN: tl.constexpr,
    VALUE_HEAD: tl.constexpr,
    OUTPUT_TOKEN: tl.constexpr,
    OUTPUT_HEAD: tl.constexpr,
    GROUP: tl.constexpr,  # query heads per KV head
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WIDEN: tl.constexpr,  # products in fp32: the interpreter has no right bf16
):
    head = tl.program_id(0)
    tile = tl.program_id(1)
    scale = tl.cast(scale, tl.float32)
    softcap = tl.cast(softcap, tl.float32)
    if query_start_loc_ptr is None:
        start = 0
        length = num_tokens
    else:
        sequence = sequence_of_tile(query_start_loc_ptr, num_seqs, tile, BLOCK_M)
        start = tl.load(query_start_loc_ptr + sequence)
        length = tl.load(query_start_loc_ptr + sequence + 1) - start
        tile -= start // BLOCK_M + sequence
        if seq_lens_ptr is not None:  # noqa: SIM102
            # One new token is the decode kernel's, and it may be one that is not stored.
            if (tl.load(seq_lens_ptr + sequence) != length) | (length == 1):
                return
    num_tiles = tl.cdiv(length, BLOCK_M)
    if tile >= num_tiles:
        return
    low = (num_tiles - 1 - tile) * BLOCK_M  # the longest first
    positions = low + tl.arange(0, BLOCK_M)
    start = tl.cast(start, tl.int64)
    tokens = start + positions
    dims = tl.arange(0, BLOCK_D)
    query = tl.load(
        query_ptr + head * QUERY_HEAD + tokens[:, None] * QUERY_TOKEN + dims[None, :],
        mask=(positions[:, None] < length) & (dims[None, :] < HEAD_DIM),
        other=0.0,
    )
    if WIDEN:
        query = query.to(tl.float32)
    accumulator = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    if sinks_ptr is None:
        maximum = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        total = tl.zeros([BLOCK_M], dtype=tl.float32)
    else:  # a key without a value
        sink = tl.load(sinks_ptr + head).to(tl.float32) * LOG2_E
        maximum = tl.zeros([BLOCK_M], dtype=tl.float32) + sink
        total = tl.full([BLOCK_M], 1.0, dtype=tl.float32)
    last = tl.minimum(low + BLOCK_M, length)
    first = 0
    if WINDOW:
        first = tl.maximum(low - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
    kv_head = head // GROUP
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
        length,
        key_ptr + start * KEY_TOKEN + kv_head * KEY_HEAD,
        value_ptr + start * VALUE_TOKEN + kv_head * VALUE_HEAD,
        None,
        scale,
        softcap,
        0,
        KEY_TOKEN,
        0,
        VALUE_TOKEN,
        0,
        HEAD_DIM,
        V_HEAD_DIM,
        BLOCK_D,
        BLOCK_DV,
        BLOCK_N,
        WINDOW,
        HAS_SOFTCAP,
    )
    v_dims = tl.arange(0, BLOCK_DV)
    tl.store(
        output_ptr + head * OUTPUT_HEAD + tokens[:, None] * OUTPUT_TOKEN + v_dims[None, :],
        (accumulator / total[:, None]).to(output_ptr.dtype.element_ty),
        mask=(positions[:, None] < length) & (v_dims[None, :] < V_HEAD_DIM),
    )


def launch_of(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    query_start_loc: torch.Tensor | None,
    seq_lens: torch.Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    sinks: torch.Tensor | None,
    card: Card,
) -> Launch:
    """The launch for `fastgen::attention` of one or, with query_start_loc, several sequences.

    seq_lens: If given, only sequences of more than one new token and without other keys are run.
    """
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads, v_head_dim = value.shape[1:]
    num_seqs = 1 if query_start_loc is None else query_start_loc.shape[0] - 1
    tile = tile_for("dense", max(head_dim, v_head_dim), query.element_size(), card)
    num_tiles = -(-num_tokens // tile.block_m)
    if query_start_loc is not None:
        num_tiles = num_tokens // tile.block_m + num_seqs
    return Launch(
        flash_attention,
        (num_heads, num_tiles if num_tokens else 0, 1),
        tensors={
            "query_ptr": query,
            "key_ptr": key,
            "value_ptr": value,
            "output_ptr": output,
            "query_start_loc_ptr": query_start_loc,
            "seq_lens_ptr": seq_lens,
            "sinks_ptr": sinks,
        },
        numbers={
            "num_tokens": num_tokens,
            "num_seqs": num_seqs,
            "scale": float(scale),
            "softcap": float(softcap),
        },
        constants={
            "QUERY_TOKEN": query.stride(0),
            "QUERY_HEAD": query.stride(1),
            "KEY_TOKEN": key.stride(0),
            "KEY_HEAD": key.stride(1),
            "VALUE_TOKEN": value.stride(0),
            "VALUE_HEAD": value.stride(1),
            "OUTPUT_TOKEN": output.stride(0),
            "OUTPUT_HEAD": output.stride(1),
            "GROUP": num_heads // num_kv_heads,
            "HEAD_DIM": head_dim,
            "V_HEAD_DIM": v_head_dim,
            "BLOCK_D": padded_head_size(head_dim),
            "BLOCK_DV": padded_head_size(v_head_dim),
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "WINDOW": window,
            "HAS_SOFTCAP": softcap != 0,
            "WIDEN": INTERPRETED,
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def flops(num_heads: int, head_dim: int, v_head_dim: int, seq_lens: list[int]) -> int:
    """Multiplications and additions of causal attention: each token sees itself and those before.

    2 per element of Q K^T and of P V.
    """
    pairs = sum(length * (length + 1) // 2 for length in seq_lens)
    return 2 * num_heads * (head_dim + v_head_dim) * pairs


def bytes_moved(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    v_head_dim: int,
    itemsize: int,
    seq_lens: list[int],
) -> int:
    """Q, K and V read once and the output written once."""
    per_token = num_heads * (head_dim + v_head_dim) + num_kv_heads * (head_dim + v_head_dim)
    return sum(seq_lens) * per_token * itemsize
