"""The block pool: who owns which block. Integers only."""

from __future__ import annotations

import os
from collections import OrderedDict

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

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


# Sharing, against a plain model.


class PoolModel:
    """The same pool, kept as lists: who holds what, what is published, what is idle since when."""

    def __init__(self, num_blocks: int) -> None:
        self.hands: list[list[int]] = []  # the blocks of each holder
        self.published: dict[bytes, int] = {}
        self.idle: list[int] = []  # oldest first
        self.lost: list[int] = []
        self.num_usable = num_blocks - 1

    @property
    def held(self) -> set[int]:
        return {block for hand in self.hands for block in hand}

    def digest_of(self, block: int) -> bytes | None:
        return next((d for d, other in self.published.items() if other == block), None)

    def take(self, blocks: list[int]) -> None:
        """Blocks that the pool has handed out: empty ones, then the oldest idle ones."""
        num_empty = self.num_usable - len(self.held) - len(self.idle)
        evicted = self.idle[: max(0, len(blocks) - num_empty)]
        assert not self.held & set(blocks), "a block in two hands"
        assert set(self.idle) & set(blocks) == set(evicted), "not the oldest, or too many"
        for block in evicted:
            self.forget(block)
        self.hands.append(blocks)

    def give_back(self, index: int) -> None:
        for block in reversed(self.hands.pop(index)):
            if block not in self.held and block not in self.idle:
                if self.digest_of(block) is None:
                    self.lost.append(block)
                else:
                    self.idle.append(block)

    def forget(self, block: int) -> None:
        digest = self.digest_of(block)
        if digest is not None:
            del self.published[digest]
        if block in self.idle:
            self.idle.remove(block)
            self.lost.append(block)


class PoolMachine(RuleBasedStateMachine):
    """Any order of everything that the pool can do."""

    pool_class = BlockPool

    @initialize(num_blocks=st.integers(2, 9))
    def start(self, num_blocks):
        self.pool, self.model = self.pool_class(num_blocks), PoolModel(num_blocks)

    @rule(count=st.integers(0, 5))
    def allocate(self, count):
        free = self.pool.num_free
        blocks = self.pool.allocate(count)
        assert (blocks is None) == (count > free)
        if blocks is not None:
            assert len(set(blocks)) == len(blocks) == count
            self.model.take(blocks)

    @rule(index=st.integers(0, 9))
    def free(self, index):
        if hands := self.model.hands:
            self.pool.free(list(hands[index % len(hands)]))
            self.model.give_back(index % len(hands))

    @rule(index=st.integers(0, 99), digest=st.binary(min_size=1, max_size=1))
    def publish(self, index, digest):
        open_blocks = sorted(b for b in self.model.held if self.model.digest_of(b) is None)
        if open_blocks:
            block = open_blocks[index % len(open_blocks)]
            self.pool.publish(block, digest)
            self.model.published.setdefault(digest, block)

    @rule(count=st.integers(1, 3), digest=st.integers(0, 200))
    def a_request_comes_and_goes(self, count, digest):
        if self.pool.num_free >= count:
            self.allocate(count)
            for block in self.model.hands[-1]:
                self.pool.publish(block, bytes([digest, block]))
                self.model.published.setdefault(bytes([digest, block]), block)
            self.free(len(self.model.hands) - 1)

    @rule(index=st.integers(0, 99), count=st.integers(1, 3))
    def share(self, index, count):
        """Some published blocks, held or idle."""
        known = sorted(self.model.published)
        start = index % len(known) if known else 0
        wanted = known[start : start + count]
        blocks = self.pool.find(wanted)
        assert blocks == [self.model.published[digest] for digest in wanted]
        assert self.pool.num_idle(blocks) == len(set(blocks) & set(self.model.idle))
        self.pool.share(blocks)
        self.model.idle = [block for block in self.model.idle if block not in blocks]
        self.model.hands.append(blocks)

    @rule(index=st.integers(0, 99), start=st.integers(0, 3))
    def hold(self, index, start):
        """A fork: what one holds, from some block on, is held by one more."""
        if hands := self.model.hands:
            blocks = hands[index % len(hands)][start:]
            self.pool.hold(blocks)
            self.model.hands.append(blocks)

    @rule(index=st.integers(0, 99))
    def find_ends_at_the_first_unknown(self, index):
        known = sorted(self.model.published)
        wanted = [*known[: index % 4], b"unknown", *known]
        found = [self.model.published[digest] for digest in known[: index % 4]]
        assert self.pool.find(wanted) == found

    @rule(blocks=st.lists(st.integers(1, 8), max_size=3, unique=True))
    def forget(self, blocks):
        self.pool.forget(blocks)
        for block in blocks:
            self.model.forget(block)

    @rule()
    def forget_all(self):
        self.pool.forget_all()
        for block in list(self.model.published.values()):
            self.model.forget(block)

    @rule()
    def take_discarded(self):
        assert sorted(self.pool.take_discarded()) == sorted(self.model.lost)
        self.model.lost = []

    @invariant()
    def agrees(self):
        if hasattr(self, "pool"):
            pool, model = self.pool, self.model
            assert NULL_BLOCK not in model.held
            assert pool.num_used == len(model.held)
            assert pool.num_free == pool.num_usable - len(model.held)
            assert pool.num_cached == len(model.published)
            for block in range(1, pool.num_blocks):
                assert pool.num_holders(block) == sum(block in hand for hand in model.hands)
            for digest, block in model.published.items():
                assert pool.find([digest]) == [block]

    def teardown(self):
        if hasattr(self, "pool"):
            while self.model.hands:
                self.free(0)
            self.pool.forget_all()
            assert self.pool.num_free == self.pool.num_usable
            blocks = self.pool.allocate(self.pool.num_usable)
            assert sorted(blocks or []) == list(range(1, self.pool.num_blocks))


# test_scheduler_life.py says what the variable is for; a pool of nine blocks needs less.
NUM_EXAMPLES = max(1, int(os.environ.get("FASTGEN_TEST_STEPS", "100000")) // 1000)

PoolMachine.TestCase.settings = settings(
    max_examples=NUM_EXAMPLES, stateful_step_count=30, deadline=None
)
TestPoolMachine = PoolMachine.TestCase


def test_the_oldest_idle_block_goes_first_and_the_end_of_a_prefix_before_its_beginning():
    pool = BlockPool(6)
    first, second = pool.allocate(2), pool.allocate(3)
    assert first == [1, 2]
    assert second == [3, 4, 5]
    for block in (1, 2, 3, 4, 5):
        pool.publish(block, bytes([block]))
    pool.free(first)
    pool.free(second)
    pool.share([1])
    pool.free([1])  # used again: the youngest now
    assert [pool.allocate(1) for _ in range(5)] == [[2], [5], [4], [3], [1]]


def test_the_first_of_two_equal_blocks_is_kept():
    pool = BlockPool(4)
    pool.allocate(2)
    pool.publish(1, b"a")
    pool.publish(2, b"a")
    assert pool.find([b"a"]) == [1]
    pool.free([2])
    assert pool.take_discarded() == [2], "nobody can find it"


@pytest.mark.parametrize(
    "call",
    [
        lambda pool: pool.publish(3, b"b"),
        lambda pool: pool.publish(1, b"b"),
        lambda pool: pool.share([2]),
    ],
    ids=["free block", "published twice", "shared unpublished"],
)
def test_misuse_is_our_own_mistake(call):
    pool = BlockPool(4)
    pool.allocate(2)
    pool.publish(1, b"a")
    with pytest.raises(AssertionError):
        call(pool)


# Planted mistakes.


class EvictsTheYoungest(BlockPool):
    def allocate(self, count):
        self._idle = OrderedDict(reversed(self._idle.items()))
        try:
            return super().allocate(count)
        finally:
            self._idle = OrderedDict(reversed(self._idle.items()))


class KeepsSharedIdle(BlockPool):
    def share(self, blocks):
        idle = OrderedDict(self._idle)
        super().share(blocks)
        self._idle = idle


class KeepsWhatIsForgotten(BlockPool):
    def forget(self, blocks):
        pass


class FreesForAll(BlockPool):
    def free(self, blocks):
        for block in blocks:
            if block in self._holders:
                self._holders[block] = 1
        super().free(blocks)


class HoldsWithoutCounting(BlockPool):
    def hold(self, blocks):
        pass


@pytest.mark.parametrize(
    "broken",
    [EvictsTheYoungest, KeepsSharedIdle, KeepsWhatIsForgotten, FreesForAll, HoldsWithoutCounting],
    ids=lambda c: c.__name__,
)
def test_planted_mistake_in_sharing_is_found(broken):
    class Broken(PoolMachine):
        pool_class = broken

    explore = settings(
        max_examples=300, deadline=None, database=None, derandomize=True, phases=[Phase.generate]
    )
    with pytest.raises((AssertionError, KeyError, IndexError)):
        run_state_machine_as_test(Broken, settings=explore)


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
