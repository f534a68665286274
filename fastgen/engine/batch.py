"""A step's tensors: from the scheduler's ints to what the graph takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch

from .scheduler import SchedulerOutput


@dataclass
class ForwardBatch:
    """The inputs of one step of T tokens of S sequences, all on the model's device.

    input_ids, positions: [T] int64. slot_mapping: [T] int64, block_id * block_size + offset, -1
    for a token that is not stored. query_start_loc: [S + 1] int32, prefix sum of new tokens.
    seq_lens: [S] int32, tokens in the cache after this step. block_table: [S, max_blocks] int32,
    padded with the null block. logits_indices: [R] int64, the tokens whose logits are wanted.
    numbers: The bytes of all of them but the block table, one behind the other, if they lie so.
    prompt_embeds: [T, hidden_size] and is_embed: [T] bool, for graphs that take them.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    logits_indices: torch.Tensor
    numbers: torch.Tensor | None = None
    prompt_embeds: torch.Tensor | None = None
    is_embed: torch.Tensor | None = None

    @classmethod
    def in_buffer(cls, layout: BatchLayout, buffer: torch.Tensor, table: torch.Tensor) -> Self:
        """A batch that lies in a buffer of bytes, and its block table."""
        fields = {
            name: buffer[start:end].view(dtype)
            for name, dtype, start, end in layout.places()
            if name != "block_table"
        }
        return cls(**fields, block_table=table, numbers=buffer[: layout.num_bytes])


@dataclass(frozen=True)
class BatchLayout:
    """Where the numbers of a step lie in one buffer, so that one copy brings them to a device."""

    num_tokens: int
    num_seqs: int
    num_rows: int

    def places(self) -> Iterator[tuple[str, torch.dtype, int, int]]:
        """Name, dtype, first byte and the one behind the last of each field; wide ones first."""
        start = 0
        for name, dtype, count in (
            ("input_ids", torch.int64, self.num_tokens),
            ("positions", torch.int64, self.num_tokens),
            ("slot_mapping", torch.int64, self.num_tokens),
            ("logits_indices", torch.int64, self.num_rows),
            ("query_start_loc", torch.int32, self.num_seqs + 1),
            ("seq_lens", torch.int32, self.num_seqs),
        ):
            end = start + count * dtype.itemsize
            yield name, dtype, start, end
            start = end

    @property
    def num_bytes(self) -> int:
        return 8 * (3 * self.num_tokens + self.num_rows) + 4 * (2 * self.num_seqs + 1)


def build_batch(
    output: SchedulerOutput, block_size: int, device: torch.device, num_seqs: int | None = None
) -> ForwardBatch:
    """Lay out a scheduled step; sequences in the order of `output.scheduled`.

    num_seqs: Fill a step of decodes up to so many sequences: the added ones have one token, which
        is not stored, and see one slot of the null block.
    """
    decodes, items = output.decodes, output.items
    num_decodes = len(decodes)
    num_added = 0 if num_seqs is None else num_seqs - output.num_seqs
    assert not (num_added and items), "only steps of decodes are filled up"
    layout = BatchLayout(
        output.num_tokens + num_added,
        output.num_seqs + num_added,
        num_decodes + num_added + sum(item.num_logits for item in items),
    )
    width = max(1, decodes.block_table.shape[1], *(len(item.request.block_ids) for item in items))
    table_bytes = 4 * layout.num_seqs * width
    num_bytes = layout.num_bytes
    on_gpu = device.type == "cuda"
    # Pinned, so that the copy needs no wait; torch keeps the memory until the copy is over.
    host = torch.empty(num_bytes + table_bytes, dtype=torch.uint8, pin_memory=on_gpu)
    buffer = host.numpy()
    field: dict[str, Any] = {
        name: buffer[start:end].view(np.int64 if dtype is torch.int64 else np.int32)
        for name, dtype, start, end in layout.places()
    }
    block_table = buffer[num_bytes:].view(np.int32).reshape(layout.num_seqs, width)
    block_table.fill(0)
    input_ids, positions, slot_mapping = (
        field[name] for name in ("input_ids", "positions", "slot_mapping")
    )
    query_start_loc, seq_lens = field["query_start_loc"], field["seq_lens"]
    logits_indices = field["logits_indices"]
    query_start_loc[:] = np.arange(layout.num_seqs + 1, dtype=np.int32)
    logits_indices[: num_decodes + num_added] = np.arange(num_decodes + num_added)

    input_ids[:num_decodes] = decodes.token_ids
    positions[:num_decodes] = decodes.positions
    seq_lens[:num_decodes] = decodes.seq_lens
    block_table[:num_decodes, : decodes.block_table.shape[1]] = decodes.block_table
    block, offset = np.divmod(decodes.seq_lens - 1, block_size)
    slot_mapping[:num_decodes] = (
        block_table[np.arange(num_decodes), block].astype(np.int64) * block_size + offset
    )
    if num_added:
        for array, filler in ((input_ids, 0), (positions, 0), (slot_mapping, -1), (seq_lens, 1)):
            array[num_decodes:] = filler
    token = logits_row = num_decodes
    for row, item in enumerate(items, num_decodes):
        request, start, end = item.request, item.start, item.start + item.num_tokens
        here = slice(token, token + item.num_tokens)
        block_table[row, : len(request.block_ids)] = request.block_ids
        if item.query is not None:
            input_ids[here], positions[here] = item.query
            slot_mapping[here] = -1
            seq_lens[row] = start
        else:
            input_ids[here] = request.token_ids(start, end)
            positions[here] = request.positions(start, end)
            slots = np.arange(start, end)
            slot_mapping[here] = (
                block_table[row, slots // block_size].astype(np.int64) * block_size
                + slots % block_size
            )
            seq_lens[row] = end
        token += item.num_tokens
        query_start_loc[row + 1] = token
        last_row = logits_row + item.num_logits
        logits_indices[logits_row:last_row] = np.arange(token - item.num_logits, token)
        logits_row = last_row
    data = host.to(device, non_blocking=True) if on_gpu else host
    table = data[num_bytes:].view(torch.int32).view(layout.num_seqs, width)
    return ForwardBatch.in_buffer(layout, data, table)


def add_embeds(batch: ForwardBatch, output: SchedulerOutput, like: torch.Tensor) -> None:
    """Lay out the embeddings of a step's prompts; zeros where a token has none.

    like: Tells their dtype and hidden_size.
    """
    num_tokens = batch.input_ids.shape[0]
    embeds = torch.zeros(
        (num_tokens, like.shape[-1]), dtype=like.dtype, device=batch.input_ids.device
    )
    is_embed = np.zeros(num_tokens, np.bool_)
    token = len(output.decodes)
    for item in output.items:
        given = item.request.prompt_embeds
        if given is not None and item.query is None:
            rows = given[item.start : item.start + item.num_tokens]  # what lies in the prompt
            embeds[token : token + len(rows)] = rows
            is_embed[token : token + len(rows)] = True
        token += item.num_tokens
    batch.prompt_embeds = embeds
    batch.is_embed = torch.from_numpy(is_embed).to(batch.input_ids.device)
