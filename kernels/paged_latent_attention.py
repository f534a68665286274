"""Attention over a paged cache of latents, which it extends first.

    1. cache[slot] = [latent, k_rope] of every new token: rank + rope numbers, whatever the heads
    2. for each sequence one of two ways, which differ by rounding alone:
       expanded  [k_nope_h, v_h] = [U_h; V_h] latent, then attention over [k_nope_h, k_rope] and v_h
       absorbed  q_nope_h k_nope_h = (q_nope_h U_h) latent: the queries go to the latents. One key
                 head [latent, k_rope] serves all heads, its values are the latents again, and
                 V_h comes last: out_h = V_h (softmax_h latent)

Expanding costs rank * (nope + v) products per key and head, absorbing as many per query and head
and more for each pair of the two: prompts are expanded, single tokens absorbed. Where a token must
be the same to the last bit in a prompt, a part of it and alone, all are absorbed.

Source: DeepSeek-V2, arXiv:2405.04434.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch

from .attention import attend_reference
from .latent_attention import check_latents, expand_latents
from .paged_attention import (
    cpu_refuses,
    paged_attention_cpu,
    paged_attention_cpu_in_order,
    paged_attention_sdpa,
    read_cache,
)
from .registry import CallSite, register
from .row_linear import multiply_rows

# Slots of expanded keys come in multiples of this, as the C++ kernel takes them.
_SLOTS = 16
# Expanded keys and values that exist at once, of one sequence and some heads, have this many
# elements or fewer (64 MiB of bf16).
_MAX_EXPANDED = 1 << 25


def write_latents(
    latent: torch.Tensor, k_rope: torch.Tensor, cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """Store new latents in their slots; padding (slot -1) goes to the null block, 0."""
    slots = slot_mapping.clamp(min=0)
    block_size = cache.shape[2]
    cache[slots // block_size, 0, slots % block_size] = torch.cat((latent, k_rope), dim=-1)


@torch.library.custom_op(
    "fastgen::paged_latent_attention", mutates_args=("cache",), device_types=None
)
def paged_latent_attention(
    query: torch.Tensor,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    weight: torch.Tensor,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    window: int,
) -> torch.Tensor:
    """Write this step's latents into the cache, then attend through the block table.

    Args:
        query, latent, k_rope, weight: as in `latent_attention`, [num_tokens, ...].
        cache: [num_blocks, 1, block_size, rank + rope]; mutated. Writes are idempotent.
        slot_mapping, block_table, query_start_loc, seq_lens: as in `paged_attention`.
        scale, window: as in `attention`.
    Returns: [num_tokens, num_heads, v_head_dim], contiguous, dtype of query; rows past
        query_start_loc[-1] are zero.
    Raises: ValueError if the shapes do not fit.
    Numerics: expanded keys and values, or absorbed queries and mixed latents, are rounded to the
        dtype; scores and sums are fp32.
    """
    check_latents(query, latent, k_rope, weight)
    return paged_latent_attention_reference(
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
    )


@paged_latent_attention.register_fake
def _(
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
    v_head_dim = check_latents(query, latent, k_rope, weight)
    return query.new_empty((query.shape[0], query.shape[1], v_head_dim))


def paged_latent_attention_reference(
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
    """Every sequence expanded: the oracle of the rest."""
    write_latents(latent, k_rope, cache, slot_mapping)
    by_head = weight.unflatten(0, (query.shape[1], -1))
    rank, nope = latent.shape[1], query.shape[2] - k_rope.shape[1]
    output = query.new_zeros((*query.shape[:2], by_head.shape[1] - nope))
    starts, lengths = query_start_loc.tolist(), seq_lens.tolist()
    for sequence, length in enumerate(lengths):
        start, end = starts[sequence], starts[sequence + 1]
        blocks = block_table[sequence, : -(-length // cache.shape[2])]
        stored = read_cache(cache, blocks, length)[:, 0]
        key, value = expand_latents(stored[:, :rank], stored[:, rank:], by_head, nope)
        output[start:end] = attend_reference(query[start:end], key, value, scale, window, 0.0, None)
    return output


def absorb_pays(num_queries: int, num_keys: int, rank: int, rope: int, nope: int, v: int) -> bool:
    """Whether the absorbed way takes fewer products, for the last queries of a sequence."""
    pairs = num_queries * num_keys - num_queries * (num_queries - 1) // 2
    absorbed = num_queries * rank * (nope + v) + pairs * 2 * (rank + rope)
    expanded = num_keys * rank * (nope + v) + pairs * (nope + rope + v)
    return absorbed < expanded


# (query, key pages, value pages, block_table, query_start_loc, seq_lens, scale, window) -> output:
# attention over what is in the pages already.
_Read = Callable[..., torch.Tensor]


def _attend(
    read: _Read,
    query: torch.Tensor,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    weight: torch.Tensor,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    window: int,
) -> torch.Tensor:
    """The op by a kernel that reads pages; each sequence the cheaper way."""
    write_latents(latent, k_rope, cache, slot_mapping)
    by_head = weight.unflatten(0, (query.shape[1], -1))
    rank, rope = latent.shape[1], k_rope.shape[1]
    nope = query.shape[2] - rope
    v_head_dim = by_head.shape[1] - nope
    starts, lengths = query_start_loc.tolist(), seq_lens.tolist()
    counts = [end - start for start, end in itertools.pairwise(starts)]
    expanded = [
        sequence
        for sequence, (count, length) in enumerate(zip(counts, lengths, strict=True))
        if count > 0 and not absorb_pays(count, length, rank, rope, nope, v_head_dim)
    ]
    settings = scale, window
    if not expanded:
        batch = block_table, query_start_loc, seq_lens
        return _absorbed(read, query, by_head, cache, batch, settings, nope)
    output = query.new_zeros((*query.shape[:2], v_head_dim))
    for sequence in expanded:
        start, end = starts[sequence], starts[sequence + 1]
        blocks = block_table[sequence, : -(-lengths[sequence] // cache.shape[2])]
        stored = cache.index_select(0, blocks).flatten(0, 2)[: lengths[sequence]]
        batch = (
            block_table.new_zeros((1, 1)),
            query_start_loc.new_tensor([0, end - start]),
            seq_lens[sequence : sequence + 1],
        )
        at_once = max(1, _MAX_EXPANDED // (lengths[sequence] * (query.shape[2] + v_head_dim)))
        for head in range(0, query.shape[1], at_once):
            some = slice(head, head + at_once)
            pages = _expanded_pages(stored[:, :rank], stored[:, rank:], by_head[some], nope)
            output[start:end, some] = read(query[start:end, some], *pages, *batch, *settings)
    others = [s for s, count in enumerate(counts) if count > 0 and s not in set(expanded)]
    if others:
        tokens = [token for s in others for token in range(starts[s], starts[s + 1])]
        ends = [0]
        for sequence in others:
            ends.append(ends[-1] + counts[sequence])
        batch = block_table[others], query_start_loc.new_tensor(ends), seq_lens[others]
        output[tokens] = _absorbed(read, query[tokens], by_head, cache, batch, settings, nope)
    return output


def _absorbed(read, query, by_head, cache, batch, settings, nope) -> torch.Tensor:
    """[num_tokens, num_heads, v_head_dim], by attention over the latents themselves."""
    rank = by_head.shape[2]
    absorbed = torch.bmm(query[..., :nope].transpose(0, 1), by_head[:, :nope]).transpose(0, 1)
    queries = torch.cat((absorbed, query[..., nope:]), dim=-1)
    mixed = read(queries, cache, cache, *batch, *settings)[..., :rank]
    # The weight first: the other way round bf16 takes four times as long on the CPU.
    values = torch.bmm(by_head[:, nope:], mixed.permute(1, 2, 0))  # [num_heads, v, num_tokens]
    return values.permute(2, 0, 1).contiguous()


def _expanded_pages(latent, k_rope, by_head, nope) -> tuple[torch.Tensor, torch.Tensor]:
    """All heads' keys and values of one sequence as a cache of one block."""
    num_heads, _, _ = by_head.shape
    num_slots = -(-latent.shape[0] // _SLOTS) * _SLOTS
    pages = []
    for heads in expand_latents(latent, k_rope, by_head, nope):
        page = heads.new_empty((1, num_heads, num_slots, heads.shape[2]))
        page[0, :, : heads.shape[0]] = heads.transpose(0, 1)
        pages.append(page)
    return pages[0], pages[1]


def _read_sdpa(query, keys, values, table, starts, lengths, scale, window):
    new = keys[:, :, 0], values[:, :, 0]  # only their sizes are looked at
    return paged_attention_sdpa(
        query, *new, keys, values, None, table, starts, lengths, scale, window, 0.0, None
    )


def _read_cpu(query, keys, values, table, starts, lengths, scale, window):
    new = keys[:, :, 0], values[:, :, 0]
    unstored = starts.new_full((query.shape[0],), -1, dtype=torch.int64)
    return paged_attention_cpu(
        query, *new, keys, values, unstored, table, starts, lengths, scale, window, 0.0, None
    )


def _read_cpu_in_order(query, keys, values, table, starts, lengths, scale, window):
    new = keys[:, :, 0], values[:, :, 0]
    return paged_attention_cpu_in_order(
        query, *new, keys, values, None, table, starts, lengths, scale, window, 0.0, None
    )


def paged_latent_attention_sdpa(
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
    return _attend(
        _read_sdpa,
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
    )


def paged_latent_attention_cpu(
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
    return _attend(
        _read_cpu,
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
    )


def paged_latent_attention_cpu_in_order(
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
    """Every token absorbed, each product and sum in one order."""
    write_latents(latent, k_rope, cache, slot_mapping)
    num_tokens, num_heads, width = query.shape
    rank, nope = latent.shape[1], width - k_rope.shape[1]
    by_head = weight.unflatten(0, (num_heads, -1))
    absorbed = query.new_empty((num_heads, num_tokens, rank))
    for head, to in enumerate(absorbed):
        multiply_rows(query[:, head, :nope], by_head[head, :nope].t(), None, to)
    queries = torch.cat((absorbed.transpose(0, 1), query[..., nope:]), dim=-1)
    batch = block_table, query_start_loc, seq_lens
    mixed = _read_cpu_in_order(queries, cache, cache, *batch, scale, window)
    values = query.new_empty((num_heads, num_tokens, by_head.shape[1] - nope))
    for head, to in enumerate(values):
        multiply_rows(mixed[:, head, :rank], by_head[head, nope:], None, to)
    return values.transpose(0, 1).contiguous()


def latent_cpu_refuses(call: CallSite) -> str | None:
    """As for `paged_attention`, whose kernel reads the pages."""
    args = {
        "query": call.args["query"],
        "key": call.args["latent"],
        "value": call.args["k_rope"],
        "key_cache": call.args["cache"],
        "value_cache": call.args["cache"],
        "slot_mapping": call.args["slot_mapping"],
    }
    return cpu_refuses(CallSite(call.device, args))


register("fastgen::paged_latent_attention", "reference", paged_latent_attention_reference)
register("fastgen::paged_latent_attention", "sdpa", paged_latent_attention_sdpa)
register(
    "fastgen::paged_latent_attention",
    "cpu, in order",
    paged_latent_attention_cpu_in_order,
    latent_cpu_refuses,
    batch_invariant=True,
)
register("fastgen::paged_latent_attention", "cpu", paged_latent_attention_cpu, latent_cpu_refuses)
