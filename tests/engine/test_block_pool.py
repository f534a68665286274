"""The block pool: who owns which block. Integers only."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgen.engine.block_pool import NULL_BLOCK, BlockPool

# (count, None): allocate so many. (None, index): free the index-th of the allocations still held.
Operation = tuple[int | None, int | None]


def run_operations(pool: BlockPool, operations: list[Operation]) -> None:
    """Run allocations and frees, comparing the pool with a plain record of what is held."""
    held: list[list[int]] = []
    peak = 0
    for count, index in operations:
        before = pool.num_free
        if count is not None:
            blocks = pool.allocate(count)
            assert (blocks is None) == (count > before), "refuses exactly what is not there"
            if blocks is None:
                assert pool.num_free == before, "a refused allocation takes nothing"
            else:
                assert len(blocks) == count
                held.append(blocks)
        elif held:
            pool.free(held.pop(index % len(held)))
        owned = [block for blocks in held for block in blocks]
        peak = max(peak, len(owned))
        assert len(owned) == len(set(owned)), "no block is in two hands"
        assert all(NULL_BLOCK < block < pool.num_blocks for block in owned)
        assert max(owned, default=0) <= peak, "memory was touched while a freed block was there"
        assert pool.num_used == len(owned)
        assert pool.num_free + pool.num_used == pool.num_usable == pool.num_blocks - 1


@settings(deadline=None, max_examples=200)
@given(
    num_blocks=st.integers(2, 12),
    operations=st.lists(
        st.one_of(
            st.tuples(st.integers(0, 6), st.none()),
            st.tuples(st.none(), st.integers(0, 11)),
        ),
        max_size=40,
    ),
)
def test_any_operations(num_blocks, operations):
    run_operations(BlockPool(num_blocks), operations)


def test_new_pool_is_free():
    pool = BlockPool(5)
    assert (pool.num_blocks, pool.num_usable, pool.num_free, pool.num_used) == (5, 4, 4, 0)


@pytest.mark.parametrize("num_blocks", [-1, 0, 1])
def test_too_small_a_pool_is_refused(num_blocks):
    with pytest.raises(ValueError, match=f"got {num_blocks} blocks"):
        BlockPool(num_blocks)


def test_all_blocks_can_be_taken_and_the_null_block_never():
    blocks = BlockPool(101).allocate(100)
    assert blocks is not None
    assert sorted(blocks) == list(range(1, 101))


def test_allocating_nothing_gives_nothing():
    pool = BlockPool(2)
    assert pool.allocate(0) == []
    assert pool.allocate(1) == [1]
    assert pool.allocate(0) == [], "none are free, none are needed"


def test_more_than_free_takes_nothing():
    pool = BlockPool(4)
    first = pool.allocate(2)
    assert pool.allocate(2) is None
    assert (pool.num_free, pool.num_used) == (1, 2)
    assert pool.allocate(1) == [3]
    assert first == [1, 2]


def test_lowest_memory_is_touched_first():
    pool = BlockPool(100)
    assert pool.allocate(3) == [1, 2, 3]
    pool.free([2])
    assert pool.allocate(2) == [2, 4], "the freed block before one that was never touched"


def test_freed_blocks_come_back_first_and_in_order():
    pool = BlockPool(100)
    first, second = pool.allocate(3), pool.allocate(2)
    assert first is not None
    assert second is not None
    pool.free(second)
    pool.free(first)
    assert pool.allocate(5) == [*first, *second]


@pytest.mark.parametrize("again", [[1], [2, 1], [3], [0]], ids=["twice", "one", "fresh", "null"])
def test_freeing_what_is_not_held_raises(again):
    pool = BlockPool(5)
    blocks = pool.allocate(2)
    assert blocks == [1, 2]
    pool.free([1])
    with pytest.raises(KeyError):
        pool.free(again)


def test_freeing_one_block_twice_in_one_list_raises():
    pool = BlockPool(5)
    pool.allocate(2)
    with pytest.raises(KeyError):
        pool.free([1, 1])


class HandsOutTwice(BlockPool):
    """Planted: an allocation does not mark its blocks."""

    def allocate(self, count):
        blocks = super().allocate(count)
        self._holders.clear()
        return blocks


class HandsOutNull(BlockPool):
    """Planted: the null block is used like any other."""

    def __init__(self, num_blocks):
        super().__init__(num_blocks)
        self._next_fresh = 0


class TakesBeforeItRefuses(BlockPool):
    """Planted: what is there is taken although it is not enough."""

    def allocate(self, count):
        if count > self.num_free:
            super().allocate(self.num_free)
            return None
        return super().allocate(count)


class FreshFirst(BlockPool):
    """Planted: freed blocks are used only once all memory was touched."""

    def allocate(self, count):
        freed, self._freed = self._freed, []
        if self._next_fresh + count > self.num_blocks:
            self._freed, freed = freed, []
        blocks = super().allocate(count)
        self._freed.extend(freed)
        return blocks


@pytest.mark.parametrize(
    "broken",
    [HandsOutTwice, HandsOutNull, TakesBeforeItRefuses, FreshFirst],
    ids=lambda c: c.__name__,
)
def test_planted_mistake_is_found(broken):
    operations: list[Operation] = [(2, None), (None, 0), (2, None), (1, None), (9, None)]
    run_operations(BlockPool(6), operations)
    with pytest.raises(AssertionError):
        run_operations(broken(6), operations)
