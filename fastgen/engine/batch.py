"""A step's tensors: from the scheduler's ints to what the graph takes."""

from __future__ import annotations

from dataclasses import dataclass

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
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    logits_indices: torch.Tensor


def build_batch(output: SchedulerOutput, block_size: int, device: torch.device) -> ForwardBatch:
    """Lay out a scheduled step; sequences in the order of `output.scheduled`."""
    decodes, items = output.decodes, output.items
    num_decodes, num_tokens, num_seqs = len(decodes), output.num_tokens, output.num_seqs
    input_ids = np.empty(num_tokens, np.int64)
    positions = np.empty(num_tokens, np.int64)
    slot_mapping = np.empty(num_tokens, np.int64)
    query_start_loc = np.arange(num_seqs + 1, dtype=np.int32)
    seq_lens = np.empty(num_seqs, np.int32)
    width = max(1, decodes.block_table.shape[1], *(len(item.request.block_ids) for item in items))
    block_table = np.zeros((num_seqs, width), np.int32)

    input_ids[:num_decodes] = decodes.token_ids
    positions[:num_decodes] = decodes.positions
    seq_lens[:num_decodes] = decodes.seq_lens
    block_table[:num_decodes, : decodes.block_table.shape[1]] = decodes.block_table
    block, offset = np.divmod(decodes.seq_lens - 1, block_size)
    slot_mapping[:num_decodes] = (
        block_table[np.arange(num_decodes), block].astype(np.int64) * block_size + offset
    )
    logits_indices = list(range(num_decodes))
    token = num_decodes
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
        logits_indices.extend(range(token - item.num_logits, token))

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    return ForwardBatch(
        input_ids=tensor(input_ids),
        positions=tensor(positions),
        slot_mapping=tensor(slot_mapping),
        query_start_loc=tensor(query_start_loc),
        seq_lens=tensor(seq_lens),
        block_table=tensor(block_table),
        logits_indices=tensor(np.asarray(logits_indices, np.int64)),
    )
