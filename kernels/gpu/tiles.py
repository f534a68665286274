"""Which tile an attention kernel uses: a table, by the kind of launch, head size, dtype and card.

No tuning runs on the way of a token. An entry holds if it compiles without spills into what the
card has of shared memory; tests compile each of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .launch import Card

Kind = Literal["dense", "paged", "decode"]

# Cards with less shared memory than this for one block take the small tiles.
_AMPLE_SHARED_MEMORY = 160 * 1024
_WGMMA_CAPABILITY = 90


@dataclass(frozen=True)
class Tile:
    """block_m: rows of queries (for "paged" and "decode": query tokens x heads of a KV head).
    block_n: keys per turn. num_stages: turns whose loads are under way together.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# (kind, padded head size, bytes of an element) -> tile, for cards with wgmma or newer.
_TILES: dict[tuple[Kind, int, int], Tile] = {
    ("dense", 64, 2): Tile(128, 128, 8, 3),
    ("dense", 128, 2): Tile(128, 64, 8, 3),
    ("dense", 256, 2): Tile(64, 32, 8, 2),
    ("dense", 64, 4): Tile(64, 32, 8, 2),
    ("dense", 128, 4): Tile(32, 16, 8, 1),
    ("dense", 256, 4): Tile(16, 32, 8, 1),
    ("paged", 64, 2): Tile(128, 64, 8, 3),
    ("paged", 128, 2): Tile(128, 64, 8, 3),
    ("paged", 256, 2): Tile(64, 32, 8, 2),
    ("paged", 64, 4): Tile(64, 32, 8, 2),
    ("paged", 128, 4): Tile(16, 32, 8, 1),
    ("paged", 256, 4): Tile(16, 32, 8, 1),
    ("decode", 64, 2): Tile(16, 128, 4, 3),
    ("decode", 128, 2): Tile(16, 64, 4, 3),
    ("decode", 256, 2): Tile(16, 32, 4, 3),
    ("decode", 64, 4): Tile(16, 64, 4, 2),
    ("decode", 128, 4): Tile(16, 32, 8, 1),
    ("decode", 256, 4): Tile(16, 32, 8, 1),
}
# What differs where the operands of a product come from registers, and
_WITHOUT_WGMMA: dict[tuple[Kind, int, int], Tile] = {
    ("dense", 128, 2): Tile(128, 32, 8, 3),
    ("paged", 128, 2): Tile(128, 32, 8, 3),
}
# where a block has less shared memory.
_SMALL: dict[tuple[Kind, int, int], Tile] = {
    ("dense", 64, 2): Tile(128, 64, 8, 3),
    ("dense", 64, 4): Tile(64, 16, 8, 1),
    ("dense", 256, 2): Tile(64, 32, 8, 2),
    ("paged", 128, 2): Tile(64, 32, 4, 3),
    ("paged", 256, 2): Tile(64, 32, 8, 1),
    ("decode", 256, 2): Tile(16, 32, 4, 2),
    ("decode", 64, 4): Tile(16, 32, 4, 2),
}
HEAD_SIZES = (64, 128, 256)


def padded_head_size(head_dim: int) -> int:
    """The table's head size that holds this one. Raises: ValueError if none does."""
    for size in HEAD_SIZES:
        if head_dim <= size:
            return size
    raise ValueError(f"head_dim must be at most {HEAD_SIZES[-1]}, got {head_dim}")


def tile_for(kind: Kind, head_dim: int, itemsize: int, card: Card) -> Tile:
    """The table's tile; head_dim is the larger one of keys and values."""
    key = kind, padded_head_size(head_dim), itemsize
    tile = _TILES[key]
    if card.capability < _WGMMA_CAPABILITY:
        tile = _WITHOUT_WGMMA.get(key, tile)
    if card.shared_memory_bytes < _AMPLE_SHARED_MEMORY:
        tile = _SMALL.get(key, tile)
    return tile


def num_splits_for(num_seqs: int, num_kv_heads: int, card: Card) -> int:
    """Into how many parts a decode step cuts each sequence, so that every processor has work.

    It depends on the number of sequences alone, so that a captured launch holds.
    """
    programs = max(1, num_seqs * num_kv_heads)
    splits = 1
    while splits < 32 and 2 * splits * programs <= 2 * card.num_multiprocessors:
        splits *= 2
    return splits
