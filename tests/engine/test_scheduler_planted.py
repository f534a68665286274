"""Mistakes planted in the scheduler and its pool: each is found by the random workloads."""

from __future__ import annotations

import pytest
from test_scheduler import run_workload

from fastgen.engine.block_pool import BlockPool
from fastgen.engine.scheduler import ScheduledRequest, Scheduler


class PreemptsTheFirst(Scheduler):
    def _last_of_running(self):
        return min(self.running, key=lambda request: request.service_key)


class PreemptsTheLastLetIn(Scheduler):
    """Right as long as nobody has a priority."""

    def _last_of_running(self):
        return self.running[-1]


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
        self.waiting.discard(request)
        request.service_key = request.service_key[0] + 1000, request.service_key[1]
        self.waiting.push(request)


class KeepsWhatAFailedStepPublished(Scheduler):
    """Blocks that were never written are found by others."""

    def undo(self, output):
        forget, self.pool.forget = self.pool.forget, lambda blocks: None
        try:
            super().undo(output)
        finally:
            self.pool.forget = forget


class PassesOverWhatDoesNotFit(Scheduler):
    """Who fits is let in, whoever waits before it."""

    def schedule(self):
        output = super().schedule()
        waiting = iter(self.waiting)
        next(waiting, None)
        for request in waiting:
            if len(self.running) < self.max_num_seqs:
                self._let_in(request)
        return output


class ForgetsDeadlinesOfThePreempted(Scheduler):
    def _preempt(self, request):
        super()._preempt(request)
        self._deadlines.discard(request)


class CountsTooFewBlocks(Scheduler):
    def _num_missing_blocks(self, plan):
        return super()._num_missing_blocks(plan) - len(plan.items)


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
        PreemptsTheFirst,
        PreemptsTheLastLetIn,
        ForgetsToFree,
        FreesAndKeeps,
        IgnoresTheBudget,
        SamplesEveryChunk,
        QueuesPreemptedLast,
        LetsTooManyRun,
        HandsOutTwice,
        KeepsWhatAFailedStepPublished,
        PassesOverWhatDoesNotFit,
        ForgetsDeadlinesOfThePreempted,
        CountsTooFewBlocks,
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
