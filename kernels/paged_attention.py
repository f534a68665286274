"""Causal attention of packed queries over a paged KV cache, which it extends first.

    1. key_cache[slot] = key, value_cache[slot] = value for every new token
    2. for each sequence: attention of its new queries over the keys its block table names

Source: Kwon et al. 2023, arXiv:2309.06180.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import cpu, gpu
from .attention import (
    MAX_TRITON_HEAD_DIM,
    attend_reference,
    attend_sdpa,
    check_heads,
    refuses_chunk_or_alibi,
    sdpa_refuses,
)
from .registry import CallSite, register

_PAGED_ATTENTION = cpu.Kernel("paged_attention", "piipiipiippiiiiipipiippiididipppbb", "b")

_INTEGER_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def write_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Store new keys and values in their slots; padding (slot -1) goes to the null block, 0."""
    block_size = key_cache.shape[2]
    slots = slot_mapping.clamp(min=0)
    blocks, offsets = slots // block_size, slots % block_size
    key_cache[blocks, :, offsets] = key
    value_cache[blocks, :, offsets] = value


def read_cache(cache: torch.Tensor, block_ids: torch.Tensor, length: int) -> torch.Tensor:
    """The first `length` slots of one sequence as [length, num_kv_heads, head_dim]."""
    num_kv_heads, head_dim = cache.shape[1], cache.shape[3]
    pages = cache.index_select(0, block_ids)  # [blocks, num_kv_heads, block_size, head_dim]
    return pages.transpose(1, 2).reshape(-1, num_kv_heads, head_dim)[:length]


@torch.library.custom_op(
    "fastgen::paged_attention", mutates_args=("key_cache", "value_cache"), device_types=None
)
def paged_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor | None,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: torch.Tensor | None,
    chunk: int = 0,
    alibi_slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Write this step's keys and values into the cache, then attend through the block table.

    Args:
        query: [num_tokens, num_heads, head_dim], fp16/bf16/fp32, last dim contiguous.
        key: [num_tokens, num_kv_heads, head_dim]. value: [num_tokens, num_kv_heads, v_head_dim].
        key_cache, value_cache: [num_blocks, num_kv_heads, block_size, head_dim or v_head_dim];
            mutated. Writes are idempotent: a repeated step gives the same cache.
        slot_mapping: [num_tokens] int64, block_id * block_size + offset; -1: not stored (it goes
            to block 0, the null block, which no sequence reads). None: keys and values are in the
            cache already, `rope_store_kv` or another layer's attention has written them.
        block_table: [num_seqs, max_blocks_per_seq] int32; entries past seq_lens are never read.
        query_start_loc: [num_seqs + 1] int32, prefix sum of new tokens. Where there are as many
            tokens as sequences, each has one.
        seq_lens: [num_seqs] int32, in tokens, including this step's. A query of a sequence stands
            at position seq_len - (its new tokens) + i.
        scale, window, softcap, sinks, chunk, alibi_slopes: as in `attention`.
    Returns: [num_tokens, num_heads, v_head_dim], contiguous, dtype of query; rows past
        query_start_loc[-1] are zero.
    Raises: ValueError if the heads do not fit.
    Numerics: fp32 throughout, rounded once at the end.
    """
    check_heads(query, key, value)
    return paged_attention_reference(
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
        chunk,
        alibi_slopes,
    )


@paged_attention.register_fake
def _(
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
    check_heads(query, key, value)
    return query.new_empty((query.shape[0], query.shape[1], value.shape[2]))


def paged_attention_reference(
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
    output = query.new_zeros((query.shape[0], query.shape[1], value.shape[2]))
    starts, lengths = query_start_loc.tolist(), seq_lens.tolist()
    for sequence, length in enumerate(lengths):
        start, end = starts[sequence], starts[sequence + 1]
        blocks = block_table[sequence, : -(-length // key_cache.shape[2])]
        output[start:end] = attend_reference(
            query[start:end],
            read_cache(key_cache, blocks, length),
            read_cache(value_cache, blocks, length),
            scale,
            window,
            softcap,
            sinks,
            chunk,
            alibi_slopes,
        )
    return output


def paged_attention_sdpa(
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
    """torch's fused attention: all one-token sequences in one call, each prompt chunk in its own.

    A sequence with one new token needs no causal mask, so its grouped heads become the query rows
    of one attention per KV head over pages padded to the longest such sequence.
    """
    if slot_mapping is not None:
        write_cache(key, value, key_cache, value_cache, slot_mapping)
    output = query.new_zeros((query.shape[0], query.shape[1], value.shape[2]))
    starts, lengths = query_start_loc.tolist(), seq_lens.tolist()
    settings = scale, window, chunk, alibi_slopes
    single = _attend_chunks(
        query, key_cache, value_cache, block_table, starts, lengths, output, *settings
    )
    if single:
        rows = torch.tensor(single, device=query.device)
        tokens = query_start_loc.index_select(0, rows).long()
        output[tokens] = _attend_single(
            query.index_select(0, tokens),
            key_cache,
            value_cache,
            block_table.index_select(0, rows),
            seq_lens.index_select(0, rows),
            max(lengths[sequence] for sequence in single),
            *settings,
        )
    return output


def _attend_chunks(query, key_cache, value_cache, block_table, starts, lengths, output, *settings):
    """Attention of every sequence with several new tokens, into `output`.

    settings: scale, window, chunk, alibi_slopes.
    Returns: the sequences with one new token, which are left to the caller.
    """
    single = []
    for sequence, length in enumerate(lengths):
        start, end = starts[sequence], starts[sequence + 1]
        if end - start == 1:
            single.append(sequence)
        elif end > start:
            blocks = block_table[sequence, : -(-length // key_cache.shape[2])]
            output[start:end] = attend_sdpa(
                query[start:end],
                read_cache(key_cache, blocks, length),
                read_cache(value_cache, blocks, length),
                *settings,
            )
    return single


def _attend_single(
    query,
    key_cache,
    value_cache,
    block_table,
    seq_lens,
    longest,
    scale,
    window,
    chunk,
    alibi_slopes,
):
    """One query per sequence: [num_seqs, num_heads, head_dim] over pages cut at `longest`."""
    num_seqs, num_heads, head_dim = query.shape
    num_kv_heads, block_size = key_cache.shape[1], key_cache.shape[2]
    num_pages = -(-longest // block_size)
    positions = torch.arange(num_pages * block_size, device=query.device)
    hidden = positions[None] >= seq_lens[:, None]
    if window:
        hidden |= positions[None] < seq_lens[:, None] - window
    if chunk:
        hidden |= positions[None] < (seq_lens[:, None] - 1) // chunk * chunk
    used = positions[::block_size][None] < seq_lens[:, None]
    pages = torch.where(used, block_table[:, :num_pages], 0)  # entries past the end may be anything
    heads = torch.arange(num_kv_heads, device=query.device)
    rows = (pages.unsqueeze(1) * num_kv_heads + heads[:, None]).flatten()  # [seqs, heads, pages]

    def padded(cache: torch.Tensor) -> torch.Tensor:
        """[num_seqs, num_kv_heads, positions, head_dim], zero where hidden."""
        by_head = cache.flatten(2).flatten(0, 1)  # [blocks * heads, block_size * head_dim]
        gathered = by_head.index_select(0, rows).view(*grouped.shape[:2], positions.numel(), -1)
        # A freed block may hold NaN, and 0 * NaN is NaN: hidden slots must be zero, not masked.
        # Clearing their bits is 15 times as fast as masked_fill_ (bf16, 24 x 2 x 512 slots of 64).
        integer = _INTEGER_OF_SIZE[cache.element_size()]
        gathered.view(integer).bitwise_and_(visible[:, None, :, None].to(integer).neg())
        return gathered

    visible = ~hidden
    grouped = query.view(num_seqs, num_kv_heads, num_heads // num_kv_heads, head_dim)
    mask = visible[:, None, None, :]
    if alibi_slopes is not None:
        distance = positions[None] - (seq_lens[:, None] - 1)  # [num_seqs, positions]
        slopes = alibi_slopes.float().view(num_kv_heads, -1, 1)
        mask = (slopes * distance[:, None, None, :]).masked_fill(~mask, float("-inf"))
    output = F.scaled_dot_product_attention(
        grouped,
        padded(key_cache),
        padded(value_cache),
        attn_mask=mask,
        scale=scale,
    )
    return output.reshape(num_seqs, num_heads, -1)


@cpu.recordable
def paged_attention_cpu(
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
    """One call of C++ for all sequences: it writes the pages and reads them in place."""
    return _attend_cpu(
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
        chunk,
        alibi_slopes,
        True,
    )


@cpu.recordable
def paged_attention_cpu_in_order(
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
    """The same, the slots of each sequence summed in order, however few the sequences are."""
    return _attend_cpu(
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
        chunk,
        alibi_slopes,
        False,
    )


def _attend_cpu(
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
    chunk,
    alibi_slopes,
    splits,
):
    query, key, value = (
        tensor if tensor.stride(2) == 1 else tensor.contiguous() for tensor in (query, key, value)
    )
    num_blocks, num_kv_heads, block_size, head_dim = key_cache.shape
    num_tokens, num_heads, _ = query.shape
    v_head_dim = value_cache.shape[3]
    sinks, slopes = (
        None if per_head is None else per_head.float().contiguous()
        for per_head in (sinks, alibi_slopes)
    )
    output = query.new_empty((num_tokens, num_heads, v_head_dim))
    error = _PAGED_ATTENTION[query.dtype](
        query.data_ptr(),
        query.stride(0),
        query.stride(1),
        key.data_ptr(),
        key.stride(0),
        key.stride(1),
        value.data_ptr(),
        value.stride(0),
        value.stride(1),
        key_cache.data_ptr(),
        value_cache.data_ptr(),
        num_blocks,
        num_kv_heads,
        block_size,
        head_dim,
        v_head_dim,
        None if slot_mapping is None else slot_mapping.data_ptr(),
        num_tokens,
        block_table.data_ptr(),
        block_table.stride(0),
        block_table.shape[1],
        query_start_loc.data_ptr(),
        seq_lens.data_ptr(),
        seq_lens.shape[0],
        num_heads // num_kv_heads,
        scale,
        window,
        softcap,
        chunk,
        None if slopes is None else slopes.data_ptr(),
        None if sinks is None else sinks.data_ptr(),
        output.data_ptr(),
        cpu.num_threads(),
        splits,
    )
    if error:
        raise ValueError(_CPU_ERRORS[error - 1])
    return output


# What the kernel returns if its arguments do not fit, minus one: it would read or write past the
# end of something.
_CPU_ERRORS = (
    "the block table must hold each sequence, seq_lens has one that is longer",
    "the block table must name blocks of the cache, has another for a token of a sequence",
    "slot_mapping must name slots of the cache, has one past its end",
    "query_start_loc must count tokens of the query, goes past its end",
    "a block of the cache must have a multiple of 16 slots",
)


def _has_several_dtypes(call: CallSite) -> bool:
    names = ("query", "key", "value", "key_cache", "value_cache")
    return len({call.args[name].dtype for name in names}) > 1


def cpu_refuses(call: CallSite) -> str | None:
    if _has_several_dtypes(call):
        return "query, key, value and cache are of several dtypes"
    if call.args["key_cache"].shape[2] % 16:
        return f"a block has {call.args['key_cache'].shape[2]} slots, not a multiple of 16"
    return cpu.refuses(call, "query")


def paged_attention_triton(
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
    """Prompts without a cached prefix over their own keys, the rest over the pages."""
    from .gpu.launch import card_of, run_all
    from .gpu.paged_attention import launches_of
    from .gpu.rope_store_kv import launch_of

    query, key, value = (
        tensor if tensor.stride(2) == 1 else tensor.contiguous() for tensor in (query, key, value)
    )
    if slot_mapping is not None:
        launch_of(
            *(None, key, value, None, None, False, None, None),
            key_cache,
            value_cache,
            slot_mapping,
        ).run()
    shape = (query.shape[0], query.shape[1], value.shape[2])
    # Only a step with prompts can have rows that belong to no sequence.
    only_decodes = query.shape[0] == seq_lens.shape[0]
    output = query.new_empty(shape) if only_decodes else query.new_zeros(shape)
    run_all(
        launches_of(
            query,
            key,
            value,
            key_cache,
            value_cache,
            output,
            block_table,
            query_start_loc,
            seq_lens,
            scale,
            window,
            softcap,
            sinks,
            card_of(query.device),
        )
    )
    return output


def triton_refuses(call: CallSite) -> str | None:
    if (why := refuses_chunk_or_alibi(call)) is not None:
        return why
    if _has_several_dtypes(call):
        return "query, key, value and cache are of several dtypes"
    if max(call.args["query"].shape[2], call.args["value"].shape[2]) > MAX_TRITON_HEAD_DIM:
        return f"heads are larger than {MAX_TRITON_HEAD_DIM}"
    return gpu.refuses(call, "query", least=gpu.LEAST_FOR_PRODUCTS)


register("fastgen::paged_attention", "reference", paged_attention_reference)
register("fastgen::paged_attention", "sdpa", paged_attention_sdpa, sdpa_refuses)
register(
    "fastgen::paged_attention",
    "cpu, in order",
    paged_attention_cpu_in_order,
    cpu_refuses,
    batch_invariant=True,
)
register("fastgen::paged_attention", "cpu", paged_attention_cpu, cpu_refuses)
register("fastgen::paged_attention", "triton", paged_attention_triton, triton_refuses)
