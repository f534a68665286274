"""Mistakes planted in the scheduler and its pool: each is found by the random workloads."""

from __future__ import annotations

import pytest
from test_scheduler import run_workload

from fastgen.engine.block_pool import BlockPool
from fastgen.engine.scheduler import ScheduledRequest, Scheduler


class PreemptsOldest(Scheduler):
    def _reserve(self, request, item):
        while not self._allocate(request, item):
            victim = self.running[0]
            self._preempt(victim)
            if victim is request:
                return False
        return True


class ForgetsToFree(Scheduler):
    def _free(self, request):
        request.block_ids = []


class FreesAndKeeps(Scheduler):
    def _free(self, request):
        blocks = list(request.block_ids)
        super()._free(request)
        request.block_ids = blocks


class IgnoresTheBudget(Scheduler):
    def _next_tokens(self, request, budget):
        budget.tokens += 1
        try:
            return super()._next_tokens(request, budget)
        finally:
            budget.tokens -= 1


class SamplesEveryChunk(Scheduler):
    def _next_tokens(self, request, budget):
        item = super()._next_tokens(request, budget)
        return item and ScheduledRequest(item.request, item.start, item.num_tokens, samples=True)


class QueuesPreemptedLast(Scheduler):
    def _preempt(self, request):
        super()._preempt(request)
        self.waiting.remove(request)
        self.waiting.append(request)


class LetsTooManyRun(Scheduler):
    def schedule(self):
        self.max_num_seqs += 1
        try:
            return super().schedule()
        finally:
            self.max_num_seqs -= 1


class HandsOutTwice(BlockPool):
    def allocate(self, count):
        blocks = super().allocate(count)
        if blocks:
            self._freed.append(blocks[0])
        return blocks


class PublishesAhead(Scheduler):
    """A chunked prompt's blocks are found before they are computed."""

    def _publish(self, request, num_tokens):
        super()._publish(request, len(request.block_ids) * self.block_size)


class NeverAsksTheLastToken(Scheduler):
    """A request whose tokens were all found waits for ever."""

    def _let_in(self, request):
        let_in = super()._let_in(request)
        request.last_is_cached = False
        return let_in


class IgnoresRoots(Scheduler):
    """Blocks are found whatever weights, adapters and salt they were computed with.

    Seen as a request that finds blocks while it must not share.
    """

    def _published_prefix(self, request):
        root, request.cache_root = request.cache_root, request.cache_root or b"one"
        try:
            return super()._published_prefix(request)
        finally:
            request.cache_root = root


class SharesWithoutCounting(BlockPool):
    def share(self, blocks):
        before = dict(self._holders)
        super().share(blocks)
        for block in blocks:
            if block in before:
                self._holders[block] -= 1


class EvictsAndRemembers(BlockPool):
    """A block that is handed out again is still found under its old digest."""

    def _evict(self, block):
        digest = self._digests[block]
        super()._evict(block)
        self._published.setdefault(digest, block)


@pytest.mark.parametrize(
    "broken",
    [
        PublishesAhead,
        NeverAsksTheLastToken,
        IgnoresRoots,
        SharesWithoutCounting,
        EvictsAndRemembers,
        PreemptsOldest,
        ForgetsToFree,
        FreesAndKeeps,
        IgnoresTheBudget,
        SamplesEveryChunk,
        QueuesPreemptedLast,
        LetsTooManyRun,
        HandsOutTwice,
    ],
    ids=lambda cls: cls.__name__,
)
def test_planted_mistake_is_found(broken):
    classes = {"pool" if issubclass(broken, BlockPool) else "scheduler": broken}

    def run_all() -> None:
        for seed in range(40):
            run_workload(seed, **classes)

    with pytest.raises((AssertionError, KeyError, TypeError, IndexError)):
        run_all()
