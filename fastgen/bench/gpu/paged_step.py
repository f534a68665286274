"""A step of paged attention in which everything that no sequence may read is NaN."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class PagedStep:
    """arguments: of `fastgen::paged_attention`. keys, values: of each sequence, without pages.

    places: of each sequence, where its tokens lie: (blocks, offsets).
    """

    arguments: dict[str, Any]
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    places: list[tuple[torch.Tensor, torch.Tensor]]
    starts: list[int]

    def query(self, sequence: int) -> torch.Tensor:
        return self.arguments["query"][self.starts[sequence] : self.starts[sequence + 1]]

    def assert_stored(self) -> None:
        """The new tokens are in their pages, nothing else was written but to the null block."""
        for role, dense in (("key_cache", self.keys), ("value_cache", self.values)):
            cache = self.arguments[role]
            used = torch.zeros(cache.shape[0], cache.shape[2], dtype=torch.bool)
            for (blocks, offsets), tokens in zip(self.places, dense, strict=True):
                found = cache[blocks.to(cache.device), :, offsets.to(cache.device)]
                assert torch.equal(found, tokens), f"the {role} does not hold a sequence's tokens"
                used[blocks, offsets] = True
            others = cache.transpose(1, 2)[1:][~used[1:].to(cache.device)]
            assert bool(others.isnan().all()), (
                f"a slot of the {role} was written that is no token's"
            )


def paged_step(
    sequences: list[tuple[int, int]],
    *,
    heads: tuple[int, int],
    head_dim: int,
    v_head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    device: str,
    settings: dict[str, Any],
) -> PagedStep:
    """Random numbers for sequences of (computed tokens, new ones).

    Blocks are scattered, and the table's entries past a sequence name blocks of anybody.

    Args:
        heads: query heads, KV heads. settings: window, softcap, sinks as of the op.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    (num_heads, num_kv_heads), lengths = heads, [sum(both) for both in sequences]
    widths = [-(-length // block_size) for length in lengths]
    num_blocks = 1 + sum(widths) + 3  # the null block, the used ones, three of nobody
    scattered = 1 + torch.randperm(num_blocks - 1, generator=generator)
    owned = scattered[: sum(widths)].split(widths)
    table = torch.randint(num_blocks, (len(widths), max(widths) + 2), generator=generator)
    shape = (num_blocks, num_kv_heads, block_size)
    key_cache = torch.full((*shape, head_dim), torch.nan).to(dtype)
    value_cache = torch.full((*shape, v_head_dim), torch.nan).to(dtype)
    starts, slots, keys, values, places = [0], [], [], [], []
    for row, ((computed, new), length, blocks) in enumerate(
        zip(sequences, lengths, owned, strict=True)
    ):
        table[row, : len(blocks)] = blocks
        place = torch.arange(length)
        block, offset = blocks[place // block_size], place % block_size
        keys.append(random(length, num_kv_heads, head_dim))
        values.append(random(length, num_kv_heads, v_head_dim))
        for cache, dense in ((key_cache, keys[-1]), (value_cache, values[-1])):
            cache[block[:computed], :, offset[:computed]] = dense[:computed]
        places.append((block, offset))
        slots.append((block * block_size + offset)[computed:])
        starts.append(starts[-1] + new)
    new_keys, new_values = (
        torch.cat([dense[computed:] for dense, (computed, _) in zip(all, sequences, strict=True)])
        for all in (keys, values)
    )
    arguments = {
        "query": random(starts[-1], num_heads, head_dim),
        "key": new_keys,
        "value": new_values,
        "key_cache": key_cache,
        "value_cache": value_cache,
        "slot_mapping": torch.cat(slots),
        "block_table": table.int(),
        "query_start_loc": torch.tensor(starts, dtype=torch.int32),
        "seq_lens": torch.tensor(lengths, dtype=torch.int32),
        "scale": head_dim**-0.5,
        **settings,
    }
    there = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }
    return PagedStep(
        there,
        [dense.to(device) for dense in keys],
        [dense.to(device) for dense in values],
        places,
        starts,
    )
