"""Causal attention over the tokens of one sequence: the op that capture emits.

    scores = scale * Q K^T;  scores = softcap * tanh(scores / softcap) if softcap
    scores = scores + slope * (position of the key - position of the query) if slopes are given
    out    = softmax(scores + causal, window and chunk mask, with a sink logit per head if given) V

Source: Vaswani et al. 2017, arXiv:1706.03762; grouped query heads: Ainslie et al. 2023,
arXiv:2305.13245; softcap: Gemma 2, arXiv:2408.00118; sinks: Xiao et al. 2023, arXiv:2309.17453;
slopes: Press et al. 2022, arXiv:2108.12409 (ALiBi); chunks: Llama 4's layers with RoPE.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import gpu
from .registry import CallSite, register

# The fp32 scores of one tile of queries stay under this many elements (64 MiB).
MAX_SCORES = 1 << 24
# The largest head of the Triton kernels' table of tiles.
MAX_TRITON_HEAD_DIM = 256


def attend_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: torch.Tensor | None,
    chunk: int = 0,
    alibi_slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of the last queries of one sequence over all its keys, in fp32.

    Args:
        query: [num_queries, num_heads, head_dim]; query i stands at position
            num_keys - num_queries + i.
        key, value: [num_keys, num_kv_heads, head_dim or v_head_dim].
        window: A query sees its last `window` keys, itself included; 0: all before it.
        softcap: 0 is none.
        sinks: [num_heads] extra logit per head that takes probability and gives no value, or None.
        chunk: A query at position p sees keys from position p // chunk * chunk on; 0: all.
        alibi_slopes: [num_heads] fp32 or None; slope * (key - query position) joins the scores.
    Returns: [num_queries, num_heads, v_head_dim], dtype of query.
    """
    num_queries, num_heads, head_dim = query.shape
    num_keys, num_kv_heads, v_head_dim = value.shape
    group = num_heads // num_kv_heads
    key_t = key.float().permute(1, 2, 0).unsqueeze(1)  # [num_kv_heads, 1, head_dim, num_keys]
    values = value.float().transpose(0, 1).unsqueeze(1)  # [num_kv_heads, 1, num_keys, v_head_dim]
    key_positions = torch.arange(num_keys, device=query.device)
    output = query.new_empty((num_queries, num_heads, v_head_dim))
    tile = max(1, MAX_SCORES // max(1, num_heads * num_keys))
    for start in range(0, num_queries, tile):
        rows = query[start : start + tile].float()
        num_rows = rows.shape[0]
        grouped = rows.reshape(num_rows, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
        scores = (grouped @ key_t) * scale  # [num_kv_heads, group, num_rows, num_keys]
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        positions = torch.arange(num_rows, device=query.device) + (num_keys - num_queries + start)
        if alibi_slopes is not None:
            bias = alibi_bias(alibi_slopes, positions, key_positions)
            scores = scores + bias.view(num_kv_heads, group, num_rows, num_keys)
        visible = visible_keys(positions, key_positions, window, chunk)
        scores = scores.masked_fill(~visible, float("-inf"))
        if sinks is not None:
            sink = sinks.float().view(num_kv_heads, group, 1, 1).expand(-1, -1, num_rows, 1)
            scores = torch.cat([scores, sink], dim=-1)
        probabilities = torch.softmax(scores, dim=-1)[..., :num_keys]
        out = (probabilities @ values).permute(2, 0, 1, 3)  # [num_rows, num_kv_heads, group, v]
        output[start : start + tile] = out.reshape(num_rows, num_heads, v_head_dim)
    return output


def visible_keys(
    positions: torch.Tensor, key_positions: torch.Tensor, window: int, chunk: int
) -> torch.Tensor:
    """[num_queries, num_keys] bool: which keys the queries at these positions see."""
    places, keys = positions[:, None], key_positions[None]
    visible = keys <= places
    if window:
        visible &= keys > places - window
    if chunk:
        visible &= keys >= places // chunk * chunk
    return visible


def alibi_bias(
    slopes: torch.Tensor, positions: torch.Tensor, key_positions: torch.Tensor
) -> torch.Tensor:
    """[num_heads, num_queries, num_keys] fp32: what distance adds to the scores."""
    return slopes.float()[:, None, None] * (key_positions[None] - positions[:, None])


def attend_sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    window: int,
    chunk: int = 0,
    alibi_slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    """`attend_reference` without softcap and sinks, through torch's fused attention."""
    num_queries, num_keys = query.shape[0], key.shape[0]
    if alibi_slopes is not None:
        return _attend_sdpa_alibi(query, key, value, scale, window, chunk, alibi_slopes)
    mask = None
    if num_queries != num_keys or window or chunk:
        positions = torch.arange(num_queries, device=query.device) + (num_keys - num_queries)
        key_positions = torch.arange(num_keys, device=query.device)
        mask = visible_keys(positions, key_positions, window, chunk)
    output = F.scaled_dot_product_attention(
        query.transpose(0, 1).unsqueeze(0),
        key.transpose(0, 1).unsqueeze(0),
        value.transpose(0, 1).unsqueeze(0),
        attn_mask=mask,
        is_causal=mask is None and num_queries > 1,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.squeeze(0).transpose(0, 1)


def _attend_sdpa_alibi(query, key, value, scale, window, chunk, alibi_slopes):
    """With the bias as a mask per head, which is as large as the scores: in tiles of queries."""
    num_queries, num_heads, _ = query.shape
    num_keys = key.shape[0]
    key_positions = torch.arange(num_keys, device=query.device)
    output = query.new_empty((num_queries, num_heads, value.shape[2]))
    tile = max(1, MAX_SCORES // max(1, num_heads * num_keys))
    for start in range(0, num_queries, tile):
        rows = query[start : start + tile]
        positions = torch.arange(rows.shape[0], device=query.device)
        positions += num_keys - num_queries + start
        hidden = ~visible_keys(positions, key_positions, window, chunk)
        bias = alibi_bias(alibi_slopes, positions, key_positions).masked_fill_(
            hidden, float("-inf")
        )
        output[start : start + tile] = F.scaled_dot_product_attention(
            rows.transpose(0, 1).unsqueeze(0),
            key.transpose(0, 1).unsqueeze(0),
            value.transpose(0, 1).unsqueeze(0),
            attn_mask=bias,
            scale=scale,
            enable_gqa=num_heads != key.shape[1],
        )[0].transpose(0, 1)
    return output


def check_heads(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    """Raise ValueError unless the head counts and sizes of q, k and v fit each other."""
    if query.shape[1] % key.shape[1] or key.shape[1] != value.shape[1]:
        raise ValueError(
            "num_heads must be a multiple of num_kv_heads, the same for key and value; got "
            f"{query.shape[1]} query, {key.shape[1]} key and {value.shape[1]} value heads"
        )
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            f"head_dim of query and key must be equal, got {query.shape[2]} and {key.shape[2]}"
        )


@torch.library.custom_op("fastgen::attention", mutates_args=())
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    sinks: torch.Tensor | None,
    layer_idx: int,
    chunk: int = 0,
    alibi_slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of all tokens of one sequence.

    Args:
        query: [num_tokens, num_heads, head_dim], fp16/bf16/fp32, last dim contiguous.
        key: [num_tokens, num_kv_heads, head_dim]. value: [num_tokens, num_kv_heads, v_head_dim].
        mask: Always None when the op runs. During capture it carries transformers' mask marker
            to this node, where it is turned into `window` or refused.
        scale: Factor of the scores. window: Keys seen by a query, itself included; 0: all.
        softcap: 0 is none. sinks: [num_heads] or None. layer_idx: The layer's number in the cache.
        chunk: A query at position p sees keys from position p // chunk * chunk on; 0: all.
        alibi_slopes: [num_heads] fp32 or None; slope * (key - query position) joins the scaled
            scores, after softcap.
    Returns: [num_tokens, num_heads, v_head_dim], contiguous, dtype of query. Mutates nothing.
    Raises: ValueError if the heads do not fit, or a mask is given.
    Numerics: fp32 throughout, rounded once at the end.
    """
    if mask is not None:
        raise ValueError("fastgen::attention takes no mask tensor at run time, got one")
    check_heads(query, key, value)
    return attend_reference(query, key, value, scale, window, softcap, sinks, chunk, alibi_slopes)


@attention.register_fake
def _(
    query,
    key,
    value,
    mask,
    scale,
    window,
    softcap,
    sinks,
    layer_idx,
    chunk=0,
    alibi_slopes=None,
):
    check_heads(query, key, value)
    return query.new_empty((query.shape[0], query.shape[1], value.shape[2]))


def attention_reference(
    query,
    key,
    value,
    mask,
    scale,
    window,
    softcap,
    sinks,
    layer_idx,
    chunk=0,
    alibi_slopes=None,
):
    return attend_reference(query, key, value, scale, window, softcap, sinks, chunk, alibi_slopes)


def attention_sdpa(
    query,
    key,
    value,
    mask,
    scale,
    window,
    softcap,
    sinks,
    layer_idx,
    chunk=0,
    alibi_slopes=None,
):
    return attend_sdpa(query, key, value, scale, window, chunk, alibi_slopes).contiguous()


def attention_triton(
    query,
    key,
    value,
    mask,
    scale,
    window,
    softcap,
    sinks,
    layer_idx,
    chunk=0,
    alibi_slopes=None,
):
    from .gpu.flash_attention import launch_of
    from .gpu.launch import card_of

    query, key, value = (
        tensor if tensor.stride(2) == 1 else tensor.contiguous() for tensor in (query, key, value)
    )
    output = query.new_empty((query.shape[0], query.shape[1], value.shape[2]))
    card = card_of(query.device)
    launch_of(query, key, value, output, None, None, scale, window, softcap, sinks, card).run()
    return output


def refuses_chunk_or_alibi(call: CallSite) -> str | None:
    """For implementations that know neither."""
    if call.args.get("chunk"):
        return "chunk"
    return "alibi_slopes" if call.args.get("alibi_slopes") is not None else None


def triton_refuses(call: CallSite) -> str | None:
    if (why := refuses_chunk_or_alibi(call)) is not None:
        return why
    dtype = call.args["query"].dtype
    if any(call.args[name].dtype != dtype for name in ("key", "value")):
        return "query, key and value are of several dtypes"
    if max(call.args["query"].shape[2], call.args["value"].shape[2]) > MAX_TRITON_HEAD_DIM:
        return f"heads are larger than {MAX_TRITON_HEAD_DIM}"
    return gpu.refuses(call, "query", least=gpu.LEAST_FOR_PRODUCTS)


def sdpa_refuses(call: CallSite) -> str | None:
    """torch's fused attention knows neither softcap nor sinks, and a bias of fp32 on CPUs alone."""
    if call.args["softcap"]:
        return "softcap"
    if call.args["sinks"] is not None:
        return "sinks"
    if call.args.get("alibi_slopes") is not None and call.device.type != "cpu":
        return f"alibi_slopes on {call.device.type}"
    return None


register("fastgen::attention", "reference", attention_reference)
register("fastgen::attention", "sdpa", attention_sdpa, sdpa_refuses)
register("fastgen::attention", "triton", attention_triton, triton_refuses)
