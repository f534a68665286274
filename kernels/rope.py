"""Rotary position embedding: pairs of a head's first `rotary_dim` elements are rotated.

    (a, b) -> (a cos - b sin, b cos + a sin)

Pairs are (i, i + rotary_dim / 2), or the neighbours (2i, 2i + 1) if interleaved; what comes after
`rotary_dim` passes unchanged. Source: Su et al. 2021, arXiv:2104.09864 (interleaved); pairs of
halves: Black et al. 2022, arXiv:2204.06745.
"""

from __future__ import annotations

import torch

from . import cpu, gpu
from .registry import CallSite, register

_ROPE = {  # by the tables' dtype
    dtype: cpu.Kernel(f"rope_{name}", "piipiipipippiiiiiibb")
    for dtype, name in ((torch.float32, "float32_tables"), (torch.bfloat16, "bfloat16_tables"))
}


def rotate_reference(
    heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """[num_tokens, num_heads, head_dim], rotated by [num_tokens, rotary_dim] tables."""
    rotary_dim = cos.shape[-1]
    rotary, rest = heads[..., :rotary_dim], heads[..., rotary_dim:]
    if interleaved:
        turned = torch.stack((-rotary[..., 1::2], rotary[..., ::2]), dim=-1).flatten(-2)
    else:
        first, second = rotary.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
    rotated = (rotary * cos.unsqueeze(1) + turned * sin.unsqueeze(1)).to(heads.dtype)
    if rotary_dim == heads.shape[-1]:
        return rotated.contiguous()
    return torch.cat((rotated, rest), dim=-1)


def rope_reference(query, key, cos, sin, interleaved):
    return (
        rotate_reference(query, cos, sin, interleaved),
        rotate_reference(key, cos, sin, interleaved),
    )


def check_tables(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> None:
    """Raise ValueError unless q, k, cos and sin fit each other."""
    if (
        cos.dim() != 2
        or cos.shape != sin.shape
        or cos.shape[0] != query.shape[0]
        or cos.shape[0] != key.shape[0]
    ):
        raise ValueError(
            "cos and sin must be [num_tokens, rotary_dim] with the tokens of query and key, got "
            f"{list(cos.shape)} and {list(sin.shape)} for {query.shape[0]} and {key.shape[0]}"
        )
    if cos.shape[1] % 2 or cos.shape[1] > min(query.shape[2], key.shape[2]):
        raise ValueError(
            f"rotary_dim must be even and at most head_dim, got {cos.shape[1]} for "
            f"{query.shape[2]} and {key.shape[2]}"
        )
    if query.dtype != key.dtype or cos.dtype != sin.dtype:
        raise ValueError(
            "query and key must have one dtype, and cos and sin one, got "
            f"{query.dtype}, {key.dtype}, {cos.dtype} and {sin.dtype}"
        )


@torch.library.custom_op("fastgen::rope", mutates_args=())
def rope(
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate query and key by the angles of their tokens.

    Args:
        query: [num_tokens, num_heads, head_dim], fp16/bf16/fp32, any strides.
        key: [num_tokens, num_kv_heads, head_dim], the same dtype.
        cos, sin: [num_tokens, rotary_dim], rotary_dim <= head_dim; an angle for every element, so
            that both elements of a pair are given theirs.
        interleaved: Pairs are neighbours, not halves.
    Returns: query and key, rotated, contiguous, in their dtype.
    Raises: ValueError if the shapes or dtypes do not fit.
    Numerics: in the promoted dtype of query and cos, rounded after each product and the sum:
        fp32 tables make it fp32 throughout, rounded once at the end.
    """
    check_tables(query, key, cos, sin)
    return rope_reference(query, key, cos, sin, interleaved)


@rope.register_fake
def _(query, key, cos, sin, interleaved):
    check_tables(query, key, cos, sin)
    return query.new_empty(query.shape), key.new_empty(key.shape)


@cpu.recordable
def rope_cpu(query, key, cos, sin, interleaved):
    query, key = _heads(query), _heads(key)
    cos, sin = _heads(cos), _heads(sin)
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads, key_dim = key.shape[1:]
    rotated_query = query.new_empty((num_tokens, num_heads, head_dim))
    rotated_key = query.new_empty((num_tokens, num_kv_heads, key_dim))
    _ROPE[cos.dtype][query.dtype](
        query.data_ptr(),
        query.stride(0),
        query.stride(1),
        key.data_ptr(),
        key.stride(0),
        key.stride(1),
        cos.data_ptr(),
        cos.stride(0),
        sin.data_ptr(),
        sin.stride(0),
        rotated_query.data_ptr(),
        rotated_key.data_ptr(),
        num_tokens,
        num_heads,
        num_kv_heads,
        head_dim,
        key_dim,
        cos.shape[1],
        interleaved,
        cpu.num_threads(),
    )
    return rotated_query, rotated_key


def _heads(tensor: torch.Tensor) -> torch.Tensor:
    """Elements of a head must be neighbours; tokens and heads may lie anywhere."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def cpu_refuses(call: CallSite) -> str | None:
    dtypes = call.args["query"].dtype, call.args["cos"].dtype
    if dtypes == (torch.float32, torch.bfloat16):
        return "query is float32, cos is bfloat16"
    return cpu.refuses(call, "query", "cos")


def rope_triton(query, key, cos, sin, interleaved):
    from .gpu.rope_store_kv import launch_of

    query, key, cos, sin = (_heads(tensor) for tensor in (query, key, cos, sin))
    rotated = query.new_empty(query.shape), key.new_empty(key.shape)
    launch_of(query, key, None, cos, sin, interleaved, *rotated, None, None, None).run()
    return rotated


def triton_refuses(call: CallSite) -> str | None:
    if call.args["query"].shape[2] != call.args["key"].shape[2]:
        return "query and key have several head sizes"
    return gpu.refuses(call, "query", "cos")


register("fastgen::rope", "reference", rope_reference)
register("fastgen::rope", "cpu", rope_cpu, cpu_refuses, batch_invariant=True)
register("fastgen::rope", "triton", rope_triton, triton_refuses)
