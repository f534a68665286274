"""The running requests' numbers as arrays, so that a step of decodes is a few numpy calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .request import Request

# Requests with more end and stop tokens than this are asked one by one.
MAX_STOP_IDS = 8
_NO_TOKEN = -1


@dataclass(frozen=True)
class Decodes:
    """The last token of each of N requests runs and is sampled. Arrays of the receiver's own.

    token_ids, positions: [N] int64. seq_lens: [N] int32, tokens in the cache after the step.
    block_table: [N, max_blocks] int32, padded with the null block.
    """

    requests: list[Request]
    token_ids: np.ndarray
    positions: np.ndarray
    seq_lens: np.ndarray
    block_table: np.ndarray

    def __len__(self) -> int:
        return len(self.requests)


class RunningRows:
    """Row i belongs to the i-th running request; the rows behind one that leaves move up.

    The numbers are those of the requests: `write` copies them after a change to one request, and
    what changes many at once changes both.

    Attributes ([capacity] int64, the first `num_rows` are in use):
        num_tokens, num_computed, num_blocks: As of the request.
        last_token: The newest token, which is run next once the others are computed.
        shift: Position of the last token less its index.
        num_left: Tokens until max_tokens.
        is_special: 1 while more than the missing tokens decides what runs next.
        is_plain: 1 if only num_left and the stop ids can end it.
        shares_last: 1 if others may hold its last block, which is not full.
    block_table: [capacity, width] int32. stop_ids: [capacity, MAX_STOP_IDS] int64.
    """

    def __init__(self) -> None:
        self.num_rows = 0
        self.block_table = np.zeros((16, 16), np.int32)
        self.stop_ids = np.full((16, MAX_STOP_IDS), _NO_TOKEN, np.int64)
        self._name(np.zeros((9, 16), np.int64))

    def _name(self, numbers: np.ndarray) -> None:
        self._numbers = numbers
        self.num_tokens, self.num_computed, self.num_blocks, self.last_token = numbers[:4]
        self.shift, self.num_left, self.is_special, self.is_plain, self.shares_last = numbers[4:]

    def add(self, request: Request) -> None:
        """A row behind the others."""
        row = self.num_rows
        if row == len(self.block_table):
            self.block_table = np.concatenate([self.block_table, np.zeros_like(self.block_table)])
            self.stop_ids = np.concatenate([self.stop_ids, np.zeros_like(self.stop_ids)])
            self._name(np.concatenate([self._numbers, np.zeros_like(self._numbers)], axis=1))
        self.num_rows += 1
        self.set_blocks(row, request.block_ids)
        self.stop_ids[row] = _NO_TOKEN
        if len(request.stop_token_ids) <= MAX_STOP_IDS:
            self.stop_ids[row, : len(request.stop_token_ids)] = list(request.stop_token_ids)
        self.write(row, request)

    def set_blocks(self, row: int, blocks: Sequence[int]) -> None:
        """Blocks in place of those the row has."""
        self.num_blocks[row] = 0
        self.block_table[row] = 0
        self.add_blocks(row, blocks)

    def add_blocks(self, row: int, blocks: Sequence[int]) -> None:
        """Blocks that follow those the row has."""
        start = int(self.num_blocks[row])
        end = start + len(blocks)
        if end > self.block_table.shape[1]:
            wider = np.zeros((len(self.block_table), 2 * end), np.int32)
            wider[:, : self.block_table.shape[1]] = self.block_table
            self.block_table = wider
        self.block_table[row, start:end] = blocks
        self.num_blocks[row] = end

    def write(self, row: int, request: Request) -> None:
        """Copy what may have changed, but for the blocks."""
        output, num_prompt = request.output_token_ids, len(request.prompt_token_ids)
        self.num_tokens[row] = num_prompt + len(output)
        self.num_computed[row] = request.num_computed_tokens
        first = request.first_output_position
        self.shift[row] = first - num_prompt if output and first is not None else 0
        if output or num_prompt:
            self.last_token[row] = output[-1] if output else request.prompt_token_ids[-1]
        self.num_left[row] = request.sampling.max_tokens - len(output)
        self.is_special[row] = (
            request.needs_query
            or request.needs_prompt_logits
            or request.needs_fork
            or request.has_embeds_left
        )
        self.shares_last[row] = request.shares_last_block
        self.is_plain[row] = (
            request.first_token_time is not None
            and request.stop_text is None
            and len(request.stop_token_ids) <= MAX_STOP_IDS
        )

    def remove(self, row: int) -> None:
        end = self.num_rows
        if row < end - 1:
            for array in (self.block_table, self.stop_ids, self._numbers.T):
                array[row : end - 1] = array[row + 1 : end]
        self.num_rows -= 1

    def num_ready(self) -> int:
        """How many rows, from the first on, have just their last token to run."""
        here = slice(self.num_rows)
        waits = (self.num_tokens[here] - self.num_computed[here] != 1) | (self.is_special[here] > 0)
        return int(waits.argmax()) if waits.any() else self.num_rows

    def num_unused_slots(self, block_size: int) -> int:
        """Slots of the rows' blocks that hold no token."""
        here = slice(self.num_rows)
        return int(self.num_blocks[here].sum() * block_size - self.num_computed[here].sum())

    def decodes(self, requests: list[Request]) -> Decodes:
        """A step of the first rows, which are those of `requests` and have their blocks."""
        here = slice(len(requests))
        width = int(self.num_blocks[here].max()) if requests else 0
        return Decodes(
            requests,
            self.last_token[here].copy(),
            self.num_tokens[here] - 1 + self.shift[here],
            self.num_tokens[here].astype(np.int32),
            self.block_table[here, :width].copy(),
        )

    def append(self, token_ids: np.ndarray) -> np.ndarray:
        """Add a token to each of the first rows, unless it may be the request's last.

        Returns: [len(token_ids)] bool, the rows that were left as they are.
        """
        here = slice(len(token_ids))
        left_alone = (self.is_plain[here] == 0) | (self.num_left[here] <= 1)
        left_alone |= (self.stop_ids[here] == token_ids[:, None]).any(axis=1)
        added = ~left_alone
        self.num_tokens[here] += added
        self.num_left[here] -= added
        np.copyto(self.last_token[here], token_ids, where=added)
        return left_alone
