"""Rotary position embedding of query and key, and the cache write of key and value.

    query, key = rope(query, key);  key_cache[slot] = key, value_cache[slot] = value

One op where a kernel does both in one launch; `fastgen::paged_attention` then takes no slots and
only reads. Source: Su et al. 2021, arXiv:2104.09864; Kwon et al. 2023, arXiv:2309.06180.
"""

from __future__ import annotations

import torch

from . import gpu
from .paged_attention import write_cache
from .registry import CallSite, register
from .rope import check_tables, rope_reference


def rope_store_kv_reference(
    query, key, value, cos, sin, interleaved, key_cache, value_cache, slot_mapping
):
    query, key = rope_reference(query, key, cos, sin, interleaved)
    write_cache(key, value, key_cache, value_cache, slot_mapping)
    return query, key


@torch.library.custom_op("fastgen::rope_store_kv", mutates_args=("key_cache", "value_cache"))
def rope_store_kv(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate query and key, and write the rotated key and the value into the cache.

    Args:
        query, key, cos, sin, interleaved: as in `rope`.
        value: [num_tokens, num_kv_heads, v_head_dim], the dtype of key.
        key_cache, value_cache, slot_mapping: as in `paged_attention`; mutated.
    Returns: query and key, rotated, contiguous, in their dtype.
    Raises: ValueError if the shapes or dtypes do not fit.
    Numerics: as `rope`; the cache holds the rounded results.
    """
    check_tables(query, key, cos, sin)
    return rope_store_kv_reference(
        query, key, value, cos, sin, interleaved, key_cache, value_cache, slot_mapping
    )


@rope_store_kv.register_fake
def _(query, key, value, cos, sin, interleaved, key_cache, value_cache, slot_mapping):
    check_tables(query, key, cos, sin)
    return query.new_empty(query.shape), key.new_empty(key.shape)


def rope_store_kv_triton(
    query, key, value, cos, sin, interleaved, key_cache, value_cache, slot_mapping
):
    from .gpu.rope_store_kv import launch_of

    query, key, value, cos, sin = (
        tensor if tensor.stride(-1) == 1 else tensor.contiguous()
        for tensor in (query, key, value, cos, sin)
    )
    rotated = query.new_empty(query.shape), key.new_empty(key.shape)
    launch_of(
        query,
        key,
        value,
        cos,
        sin,
        interleaved,
        *rotated,
        key_cache,
        value_cache,
        slot_mapping,
    ).run()
    return rotated


def triton_refuses(call: CallSite) -> str | None:
    if call.args["query"].shape[2] != call.args["key"].shape[2]:
        return "query and key have several head sizes"
    return gpu.refuses(call, "query", "value", "cos", "key_cache", "value_cache")


register("fastgen::rope_store_kv", "reference", rope_store_kv_reference)
register("fastgen::rope_store_kv", "triton", rope_store_kv_triton, triton_refuses)
