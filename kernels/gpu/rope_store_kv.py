"""Rotary embedding and cache write in one: a Triton kernel.

Rotated queries go to their tensor, rotated keys to theirs and to their pages, values to theirs.
Any part can be left out: without pages it is `fastgen::rope`, without tables only the pages are
written. Source: Su et al. 2021, arXiv:2104.09864; pages: Kwon et al. 2023, arXiv:2309.06180.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import Launch

# Elements of the heads that one program handles together.
_ELEMENTS = 1024


@triton.jit
def _rotated(
    heads_ptr,  # of this token
    cos_ptr,
    sin_ptr,
    heads,  # [HEADS]
    dims,  # [BLOCK_D]
    there,  # [HEADS, BLOCK_D]
    HEAD_STRIDE: tl.constexpr,
    ROTARY_DIM: tl.constexpr,  # 0: nothing is rotated
    INTERLEAVED: tl.constexpr,
):
    """The heads of a token, rotated, in their dtype: [HEADS, BLOCK_D]."""
    at = heads_ptr + heads[:, None] * HEAD_STRIDE
    own = tl.load(at + dims[None, :], mask=there, other=0.0)
    if ROTARY_DIM == 0:
        return own
    else:
        rotary = dims < ROTARY_DIM
        if INTERLEAVED:
            partner = dims ^ 1
            sign = tl.where(dims % 2 == 0, -1.0, 1.0)
        else:
            partner = tl.where(
                dims < ROTARY_DIM // 2, dims + ROTARY_DIM // 2, dims - ROTARY_DIM // 2
            )
            sign = tl.where(dims < ROTARY_DIM // 2, -1.0, 1.0)
        other = tl.load(at + partner[None, :], mask=there & rotary[None, :], other=0.0)
        cos = tl.load(cos_ptr + dims, mask=rotary, other=1.0)
        sin = tl.load(sin_ptr + dims, mask=rotary, other=0.0)
        straight = own.to(tl.float32) * cos.to(tl.float32)[None, :]
        turned = other.to(tl.float32) * (sin.to(tl.float32) * sign)[None, :]
        if (own.dtype != tl.float32) & (cos.dtype != tl.float32):
            # Products in the dtype of heads and tables are rounded to it.
            straight = straight.to(own.dtype).to(tl.float32)
            turned = turned.to(own.dtype).to(tl.float32)
        return tl.where(rotary[None, :], (straight + turned).to(own.dtype), own)


@triton.jit
def rope_store_kv(
    query_ptr,
    key_ptr,
    value_ptr,
    cos_ptr,
    sin_ptr,
    query_out_ptr,  # contiguous; None: there is no query
    key_out_ptr,  # contiguous; None: rotated keys are only stored
    key_cache_ptr,  # None: nothing is stored
    value_cache_ptr,
    slot_mapping_ptr,
    QUERY_TOKEN: tl.constexpr,  # strides in elements
    QUERY_HEAD: tl.constexpr,
    KEY_TOKEN: tl.constexpr,
    KEY_HEAD: tl.constexpr,
    VALUE_TOKEN: tl.constexpr,
    VALUE_HEAD: tl.constexpr,
    COS_TOKEN: tl.constexpr,
    SIN_TOKEN: tl.constexpr,
    KEY_CACHE_BLOCK: tl.constexpr,
    KEY_CACHE_HEAD: tl.constexpr,
    KEY_CACHE_SLOT: tl.constexpr,
    VALUE_CACHE_BLOCK: tl.constexpr,
    VALUE_CACHE_HEAD: tl.constexpr,
    VALUE_CACHE_SLOT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,  # at least both head sizes
    HEADS: tl.constexpr,  # of a program
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    QUERY_PROGRAMS: tl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
    KEY_PROGRAMS: tl.constexpr = (NUM_KV_HEADS + HEADS - 1) // HEADS
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    dims = tl.arange(0, BLOCK_D)
    if cos_ptr is not None:
        cos_ptr += token * COS_TOKEN
        sin_ptr += token * SIN_TOKEN
    if part < QUERY_PROGRAMS:
        if query_out_ptr is not None:
            heads = part * HEADS + tl.arange(0, HEADS)
            there = (heads[:, None] < NUM_HEADS) & (dims[None, :] < HEAD_DIM)
            rotated = _rotated(
                query_ptr + token * QUERY_TOKEN,
                cos_ptr,
                sin_ptr,
                heads,
                dims,
                there,
                QUERY_HEAD,
                ROTARY_DIM,
                INTERLEAVED,
            )
            out = query_out_ptr + (token * NUM_HEADS + heads[:, None]) * HEAD_DIM
            tl.store(out + dims[None, :], rotated, mask=there)
    else:
        heads = (part - QUERY_PROGRAMS) % KEY_PROGRAMS * HEADS + tl.arange(0, HEADS)
        slot = tl.cast(-1, tl.int64)
        if key_cache_ptr is not None:
            slot = tl.load(slot_mapping_ptr + token)
        num_stored = tl.where(slot >= 0, NUM_KV_HEADS, 0)
        block = slot // BLOCK_SIZE
        offset = slot % BLOCK_SIZE
        if part < QUERY_PROGRAMS + KEY_PROGRAMS:
            there = (heads[:, None] < NUM_KV_HEADS) & (dims[None, :] < HEAD_DIM)
            rotated = _rotated(
                key_ptr + token * KEY_TOKEN,
                cos_ptr,
                sin_ptr,
                heads,
                dims,
                there,
                KEY_HEAD,
                ROTARY_DIM,
                INTERLEAVED,
            )
            if key_out_ptr is not None:
                at = key_out_ptr + (token * NUM_KV_HEADS + heads[:, None]) * HEAD_DIM
                tl.store(at + dims[None, :], rotated, mask=there)
            if key_cache_ptr is not None:
                at = key_cache_ptr + block * KEY_CACHE_BLOCK + offset * KEY_CACHE_SLOT
                at += heads[:, None] * KEY_CACHE_HEAD
                stored = (heads[:, None] < num_stored) & (dims[None, :] < HEAD_DIM)
                tl.store(at + dims[None, :], rotated, mask=stored)
        else:
            if value_cache_ptr is not None:
                there = (heads[:, None] < num_stored) & (dims[None, :] < V_HEAD_DIM)
                at = value_ptr + token * VALUE_TOKEN + heads[:, None] * VALUE_HEAD
                value = tl.load(at + dims[None, :], mask=there, other=0.0)
                at = value_cache_ptr + block * VALUE_CACHE_BLOCK + offset * VALUE_CACHE_SLOT
                at += heads[:, None] * VALUE_CACHE_HEAD
                tl.store(at + dims[None, :], value, mask=there)


def launch_of(
    query: torch.Tensor | None,
    key: torch.Tensor,
    value: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    interleaved: bool,
    query_out: torch.Tensor | None,
    key_out: torch.Tensor | None,
    key_cache: torch.Tensor | None,
    value_cache: torch.Tensor | None,
    slot_mapping: torch.Tensor | None,
) -> Launch:
    """The launch for `fastgen::rope`, `fastgen::rope_store_kv` or the cache write alone.

    The parts that are None are left out: tables, pages, the query, the rotated keys. Key and query
    have one head size. A token whose slot is -1 is not stored.
    """
    num_tokens, num_kv_heads, head_dim = key.shape
    num_heads = 0 if query is None else query.shape[1]
    v_head_dim = head_dim if value is None else value.shape[2]
    block_d = triton.next_power_of_2(max(head_dim, v_head_dim))
    heads = max(1, min(triton.next_power_of_2(max(num_heads, num_kv_heads)), _ELEMENTS // block_d))
    query_programs, key_programs = -(-num_heads // heads), -(-num_kv_heads // heads)

    def strides(tensor: torch.Tensor | None, *dims: int) -> tuple[int, ...]:
        return tuple(0 if tensor is None else tensor.stride(dim) for dim in dims)

    names = (
        *("QUERY_TOKEN", "QUERY_HEAD", "KEY_TOKEN", "KEY_HEAD", "VALUE_TOKEN", "VALUE_HEAD"),
        *("COS_TOKEN", "SIN_TOKEN"),
        *("KEY_CACHE_BLOCK", "KEY_CACHE_HEAD", "KEY_CACHE_SLOT"),
        *("VALUE_CACHE_BLOCK", "VALUE_CACHE_HEAD", "VALUE_CACHE_SLOT"),
    )
    values = (
        *strides(query, 0, 1),
        *strides(key, 0, 1),
        *strides(value, 0, 1),
        *strides(cos, 0),
        *strides(sin, 0),
        *strides(key_cache, 0, 1, 2),
        *strides(value_cache, 0, 1, 2),
    )
    return Launch(
        rope_store_kv,
        (num_tokens, query_programs + (key_programs if key_cache is None else 2 * key_programs), 1),
        {
            "query_ptr": query,
            "key_ptr": key,
            "value_ptr": value,
            "cos_ptr": cos,
            "sin_ptr": sin,
            "query_out_ptr": query_out,
            "key_out_ptr": key_out,
            "key_cache_ptr": key_cache,
            "value_cache_ptr": value_cache,
            "slot_mapping_ptr": slot_mapping,
        },
        {},
        {
            **dict(zip(names, values, strict=True)),
            "BLOCK_SIZE": 16 if key_cache is None else key_cache.shape[2],
            "NUM_HEADS": num_heads,
            "NUM_KV_HEADS": num_kv_heads,
            "HEAD_DIM": head_dim,
            "V_HEAD_DIM": v_head_dim,
            "BLOCK_D": block_d,
            "HEADS": heads,
            "ROTARY_DIM": 0 if cos is None else cos.shape[1],
            "INTERLEAVED": interleaved,
        },
        num_warps=4,
    )


def bytes_moved(
    num_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    v_head_dim: int,
    rotary_dim: int,
    itemsize: int,
    table_itemsize: int,
) -> int:
    """Of `rope_store_kv`: q read and written, k read and written twice, v moved, the tables."""
    elements = 2 * num_heads * head_dim + num_kv_heads * (3 * head_dim + 2 * v_head_dim)
    return num_tokens * (elements * itemsize + 2 * rotary_dim * table_itemsize)
