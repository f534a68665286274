"""Who holds which block of the KV cache, and which block holds what. Integers and digests only."""

from __future__ import annotations

from collections import Counter

NULL_BLOCK = 0


class BlockPool:
    """Blocks 1 .. num_blocks - 1, handed out, shared and taken back; block 0 is the null block.

    A full block can be published under the digest of everything its keys and values depend on
    (see prefix_cache.py). It is then read-only, may be held by several requests, and keeps its
    content when nobody holds it, until its memory is needed: the least recently held goes first.

    Invariant: num_free + num_used == num_blocks - 1. Blocks without content are handed out first,
    the one freed last before the others, so that memory that was never touched stays untouched.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 2:
            raise ValueError(f"a pool needs the null block and one more, got {num_blocks} blocks")
        self.num_blocks = num_blocks
        self._next_fresh = 1
        self._freed: list[int] = []
        self._holders: Counter[int] = Counter()  # of the blocks in use
        self._digests: dict[int, bytes] = {}  # published block -> digest
        self._published: dict[bytes, int] = {}  # and back
        self._idle: dict[int, None] = {}  # published blocks that nobody holds, oldest first
        self._discarded: list[int] = []

    @property
    def num_usable(self) -> int:
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, those with content included."""
        return self.num_usable - len(self._holders)

    @property
    def num_used(self) -> int:
        return len(self._holders)

    @property
    def num_cached(self) -> int:
        """Published blocks, held or not."""
        return len(self._digests)

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks, or None (and nothing taken) if there are not so many."""
        if count > self.num_free:
            return None
        blocks = []
        for _ in range(count):
            if self._freed:
                block = self._freed.pop()
            elif self._next_fresh < self.num_blocks:
                block = self._next_fresh
                self._next_fresh += 1
            else:
                block = next(iter(self._idle))
                self._evict(block)
            self._holders[block] = 1
            blocks.append(block)
        return blocks

    def free(self, blocks: list[int]) -> None:
        """Take blocks back from one holder; each must be in use."""
        for block in reversed(blocks):  # the end of a prefix is given up before its beginning
            if block not in self._holders:
                raise KeyError(f"block {block} is freed, and nobody holds it")
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            del self._holders[block]
            if block in self._digests:
                self._idle[block] = None
            else:
                self._discard(block)

    def publish(self, block: int, digest: bytes) -> None:
        """Let others find a full block that is in use; the first of two equal ones is kept."""
        assert block in self._holders, "only a block in use can be published"
        assert block not in self._digests, "a block is published once"
        if digest not in self._published:
            self._published[digest] = block
            self._digests[block] = digest

    def find(self, digests: list[bytes]) -> list[int]:
        """The published blocks of the longest beginning of `digests`."""
        blocks = []
        for digest in digests:
            block = self._published.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def num_idle(self, blocks: list[int]) -> int:
        """How many of these published blocks nobody holds."""
        return sum(block in self._idle for block in blocks)

    def share(self, blocks: list[int]) -> None:
        """Hold published blocks, whoever else does."""
        for block in blocks:
            assert block in self._digests, "only a published block can be shared"
            self._idle.pop(block, None)
            self._holders[block] += 1

    def hold(self, blocks: list[int]) -> None:
        """Hold blocks that others hold, published or not; see `num_holders` before you write."""
        for block in blocks:
            assert block in self._holders, "only a block in use can be held by one more"
            self._holders[block] += 1

    def num_holders(self, block: int) -> int:
        return self._holders[block]

    def forget(self, blocks: list[int]) -> None:
        """Let nobody find these blocks any more: what they hold cannot be relied on."""
        for block in blocks:
            digest = self._digests.pop(block, None)
            if digest is not None:
                del self._published[digest]
            if block in self._idle:
                del self._idle[block]
                self._discard(block)

    def forget_all(self) -> None:
        self.forget(list(self._digests))

    def take_discarded(self) -> list[int]:
        """Blocks that lost their content since the last call; some may be in use again."""
        discarded, self._discarded = self._discarded, []
        return discarded

    def _evict(self, block: int) -> None:
        self.forget([block])
        self._freed.pop()  # it is handed out at once

    def _discard(self, block: int) -> None:
        self._freed.append(block)
        self._discarded.append(block)
