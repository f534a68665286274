"""Ops of fastgen written in ATen alone, for compilers that know no others.

Most are their reference bodies. Those that read pages walk over sequences there; here all tokens
meet all slots at once, behind a mask, so that nothing depends on a number that a tensor holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..kernels import implementations
from ..kernels.attention import alibi_bias, visible_keys
from ..kernels.latent_attention import expand_latents
from ..kernels.paged_attention import write_cache
from ..kernels.paged_latent_attention import write_latents


def aten_body(op: str) -> Callable[..., Any] | None:
    """A function that computes what an op does, with the op's arguments; None for ops of others."""
    if op in _BODIES:
        return _BODIES[op]
    return implementations(op)[-1].function if op.startswith("fastgen::") else None


class _Pages:
    """What a batch's tokens and the slots that its block table names have to do with each other.

    slots: [num_seqs * max_blocks_per_seq * block_size] of everything here; a slot that holds no
    token of its sequence is of no use to anyone.
    """

    def __init__(
        self,
        num_tokens: Any,
        block_size: Any,
        block_table: torch.Tensor,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
    ) -> None:
        num_seqs, width = block_table.shape
        device = block_table.device
        starts, lengths = query_start_loc.long(), seq_lens.long()
        places = torch.arange(width * block_size, device=device)  # in a sequence
        held = places < lengths[:, None]  # [num_seqs, slots of one]
        self.held = held.flatten()
        self.positions = places.expand(num_seqs, -1).flatten()
        # Entries past a sequence's end may name anything.
        first = torch.arange(width, device=device) * block_size
        self.blocks = torch.where(first < lengths[:, None], block_table, 0).flatten()
        tokens = torch.arange(num_tokens, device=device)
        # Tokens past the last sequence's are padding; they count as its own, and give zeros.
        of_token = (tokens[:, None] >= starts[1:]).sum(1).clamp(max=num_seqs - 1)
        self.is_padding = tokens >= starts[-1]
        self.token_positions = tokens + (lengths - starts[1:])[of_token]
        of_slot = torch.arange(num_seqs, device=device)[:, None].expand(-1, width * block_size)
        self.same = of_token[:, None] == of_slot.flatten()

    def read(self, cache: torch.Tensor) -> torch.Tensor:
        """[slots, num_kv_heads, head_dim], zero where no token is: there may be NaN."""
        pages = cache.index_select(0, self.blocks).transpose(1, 2)
        heads = pages.reshape(-1, *pages.shape[2:])
        return torch.where(self.held[:, None, None], heads, 0)

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        window: int,
        softcap: float,
        sinks: torch.Tensor | None,
        chunk: int,
        alibi_slopes: torch.Tensor | None,
    ) -> torch.Tensor:
        """As `attend_reference`, each token over the slots of its sequence."""
        num_tokens, num_heads, head_dim = query.shape
        num_slots, num_kv_heads, v_head_dim = values.shape
        group = num_heads // num_kv_heads
        grouped = query.float().reshape(num_tokens, num_kv_heads, group, head_dim)
        keys_t = keys.float().permute(1, 2, 0).unsqueeze(1)  # [num_kv_heads, 1, head_dim, slots]
        scores = (grouped.permute(1, 2, 0, 3) @ keys_t) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if alibi_slopes is not None:
            bias = alibi_bias(alibi_slopes, self.token_positions, self.positions)
            scores = scores + bias.reshape(num_kv_heads, group, num_tokens, num_slots)
        visible = visible_keys(self.token_positions, self.positions, window, chunk)
        visible = visible & self.same & self.held
        scores = scores.masked_fill(~visible, float("-inf"))
        if sinks is not None:
            sink = sinks.float().reshape(num_kv_heads, group, 1, 1).expand(-1, -1, num_tokens, 1)
            scores = torch.cat([scores, sink], dim=-1)
        probabilities = torch.softmax(scores, dim=-1)[..., :num_slots]
        out = probabilities @ values.float().transpose(0, 1).unsqueeze(1)
        out = out.permute(2, 0, 1, 3).reshape(num_tokens, num_heads, v_head_dim)
        return torch.where(self.is_padding[:, None, None], 0.0, out).to(query.dtype)


def _paged_attention(
    query,
    key,
    value,
    key_cache,
    value_cache,
    slot_mapping,
    block_table,
    query_start_loc,
    seq_lens,
    scale,
    window,
    softcap,
    sinks,
    chunk=0,
    alibi_slopes=None,
):
    if slot_mapping is not None:
        write_cache(key, value, key_cache, value_cache, slot_mapping)
    pages = _Pages(query.shape[0], key_cache.shape[2], block_table, query_start_loc, seq_lens)
    keys, values = pages.read(key_cache), pages.read(value_cache)
    return pages.attend(query, keys, values, scale, window, softcap, sinks, chunk, alibi_slopes)


def _paged_latent_attention(
    query,
    latent,
    k_rope,
    weight,
    cache,
    slot_mapping,
    block_table,
    query_start_loc,
    seq_lens,
    scale,
    window,
):
    write_latents(latent, k_rope, cache, slot_mapping)
    pages = _Pages(query.shape[0], cache.shape[2], block_table, query_start_loc, seq_lens)
    stored = pages.read(cache).flatten(1)
    by_head = weight.unflatten(0, (query.shape[1], -1))
    rank, nope = latent.shape[1], query.shape[2] - k_rope.shape[1]
    keys, values = expand_latents(stored[:, :rank], stored[:, rank:], by_head, nope)
    return pages.attend(query, keys, values, scale, window, 0.0, None, 0, None)


def _grouped_linear(input, weight, offsets):
    """Each group of rows by the weight of its expert; rows behind them all give zeros."""
    rows = torch.arange(input.shape[0], device=input.device)
    is_padding = (rows >= offsets[-1])[:, None]
    aligned = all(size * weight.element_size() % 16 == 0 for size in weight.shape[1:])
    if weight.dtype == torch.bfloat16 and aligned:  # what torch's own product can be traced with
        output = torch.ops.aten._grouped_mm.default(input, weight, offsets.int())
    else:
        expert = (rows[:, None] >= offsets).sum(1).clamp(max=weight.shape[0] - 1)
        output = torch.matmul(input, weight)[expert, rows]
    return torch.where(is_padding, 0, output)


_BODIES: dict[str, Callable[..., Any]] = {
    "fastgen::grouped_mm": _grouped_linear,
    "fastgen::row_grouped_linear": _grouped_linear,
    "fastgen::paged_attention": _paged_attention,
    "fastgen::paged_latent_attention": _paged_latent_attention,
}
