"""Sequences to attend over, dense and through pages, and fastgen's kernels on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ...kernels.attention import attend_reference
from ...kernels.gpu import flash_attention, paged_attention
from ...kernels.gpu.launch import card_of, run_all
from . import exact

_CHECKED_ROWS = 64  # the last queries of the last sequence: they see the most


@dataclass(frozen=True)
class Prompts:
    """Equal sequences side by side. query, key, value, output: [batch, length, heads, head_dim]."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor
    starts: torch.Tensor  # [batch + 1] int32
    seq_lens: torch.Tensor  # [batch] int32

    @classmethod
    def random(
        cls, batch: int, length: int, num_heads: int, head_dim: int, dtype: torch.dtype, device: str
    ) -> Prompts:
        torch.manual_seed(0)
        shape = (batch, length, num_heads, head_dim)
        query, key, value = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
        starts = torch.arange(batch + 1, dtype=torch.int32, device=device) * length
        lengths = torch.full((batch,), length, dtype=torch.int32, device=device)
        return cls(query, key, value, torch.empty_like(query), starts, lengths)

    @property
    def scale(self) -> float:
        return self.query.shape[3] ** -0.5

    @property
    def flops(self) -> int:
        batch, length, num_heads, head_dim = self.query.shape
        return flash_attention.flops(num_heads, head_dim, head_dim, batch * [length])

    def packed(self, tensor: torch.Tensor) -> torch.Tensor:
        """[num_tokens, heads, head_dim]"""
        return tensor.flatten(0, 1)

    def heads_first(self) -> list[torch.Tensor]:
        """What torch's attention takes: query, key, value, [batch, heads, length, head_dim]."""
        return [tensor.transpose(1, 2) for tensor in (self.query, self.key, self.value)]

    def dense(self) -> Callable[[], None]:
        query, key, value, output = map(
            self.packed, (self.query, self.key, self.value, self.output)
        )
        starts, card = self.starts, card_of(query.device)
        scale = self.scale
        return lambda: flash_attention.launch_of(
            query, key, value, output, starts, None, scale, 0, 0.0, None, card
        ).run()

    def paged(self, block_size: int) -> Callable[[], None]:
        """The same through scattered pages."""
        batch, length = self.query.shape[:2]
        table = scattered_table(batch, length, block_size, self.query.device)
        return paged_run(
            self.packed(self.query),
            paged_cache(self.key, table, block_size),
            paged_cache(self.value, table, block_size),
            self.packed(self.output),
            table,
            self.starts,
            self.seq_lens,
        )

    def check_tail(self, output: torch.Tensor) -> dict[str, Any]:
        """Hold the last rows of an output [batch, length, heads, head_dim] against fp64."""
        rows = min(_CHECKED_ROWS, output.shape[1])
        query, key, value = self.query[-1, -rows:], self.key[-1], self.value[-1]
        return exact.accurate(
            output[-1, -rows:],
            attend_reference(query, key, value, self.scale, 0, 0.0, None),
            exact.attention(query, key, value, self.scale),
        )


def scattered_table(
    num_seqs: int, length: int, block_size: int, device: torch.device
) -> torch.Tensor:
    """[num_seqs, blocks of a sequence] int32: every block but the null block, in random order."""
    width = -(-length // block_size)
    blocks = 1 + torch.randperm(num_seqs * width, device=device)
    return blocks.int().view(num_seqs, width)


def paged_cache(dense: torch.Tensor, table: torch.Tensor, block_size: int) -> torch.Tensor:
    """The pages that hold [num_seqs, length, heads, head_dim]; a multiple of blocks long."""
    pages = dense.unflatten(1, (-1, block_size)).transpose(2, 3).flatten(0, 1)
    cache = pages.new_empty((1 + pages.shape[0], *pages.shape[1:]))
    cache[table.flatten().long()] = pages
    return cache


def paged_run(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    output: torch.Tensor,
    table: torch.Tensor,
    starts: torch.Tensor,
    seq_lens: torch.Tensor,
) -> Callable[[], None]:
    """fastgen's attention through the pages alone. It is laid out anew at each call, as in a step:
    counters of a launch hold for one run.
    """
    scale, card = query.shape[2] ** -0.5, card_of(query.device)
    given = (query, None, None, key_cache, value_cache, output, table, starts, seq_lens)
    return lambda: run_all(paged_attention.launches_of(*given, scale, 0, 0.0, None, card))
