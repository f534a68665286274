"""Who owns which block of the KV cache. Integers only."""

from __future__ import annotations

NULL_BLOCK = 0


class BlockPool:
    """Blocks 1 .. num_blocks - 1, handed out and taken back; block 0 is the null block.

    Invariant: num_free + num_used == num_blocks - 1, and no block is handed out twice. The block
    freed last is handed out first, so that memory that was never touched stays untouched.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 2:
            raise ValueError(f"a pool needs the null block and one more, got {num_blocks} blocks")
        self.num_blocks = num_blocks
        self._next_fresh = 1
        self._freed: list[int] = []
        self._used: set[int] = set()

    @property
    def num_usable(self) -> int:
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        return self.num_usable - len(self._used)

    @property
    def num_used(self) -> int:
        return len(self._used)

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks, or None (and nothing taken) if there are not so many."""
        if count > self.num_free:
            return None
        blocks = []
        for _ in range(count):
            if self._freed:
                blocks.append(self._freed.pop())
            else:
                blocks.append(self._next_fresh)
                self._next_fresh += 1
        self._used.update(blocks)
        return blocks

    def free(self, blocks: list[int]) -> None:
        """Take blocks back; each must be in use."""
        for block in blocks:
            self._used.remove(block)  # KeyError: freed twice, or never handed out
        self._freed.extend(reversed(blocks))
