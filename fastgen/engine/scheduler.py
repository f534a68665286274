"""Which tokens of which requests run in the next step. No torch, no clock but arrival times.

One rule for everything: each step has a budget of tokens, spent on requests in order of arrival
until their computed tokens have caught up with their tokens. A prompt that does not fit the budget
is chunked; a running request that needs a block when none is free takes those of the youngest,
which starts over later. Requests that wait are always younger than those that run, so the oldest
one never loses anything and there is always progress.
"""

from __future__ import annotations

import bisect
import time
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from .block_pool import BlockPool
from .request import Request, RequestStatus


@dataclass(frozen=True)
class ScheduledRequest:
    """Tokens [start, start + num_tokens) of a request run in this step.

    samples: the last of them gives the logits of the next token. is_query: the one token is the
    request's unstored query token instead.
    """

    request: Request
    start: int
    num_tokens: int
    samples: bool
    is_query: bool = False


@dataclass
class SchedulerOutput:
    """One step: what runs, and the blocks that were given back since the last one."""

    scheduled: list[ScheduledRequest] = field(default_factory=list)
    freed_blocks: list[int] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(item.num_tokens for item in self.scheduled)


@dataclass
class SchedulerStats:
    """Counts that outlive a scheduler: finished requests by reason, preemptions, cache waste."""

    finished: Counter[str] = field(default_factory=Counter)
    preemptions: int = 0
    waste_sum: float = 0.0
    waste_steps: int = 0

    @property
    def cache_waste(self) -> float:
        """Unused slots / allocated slots, averaged over the steps so far."""
        return self.waste_sum / self.waste_steps if self.waste_steps else 0.0


class Scheduler:
    """The only owner of requests' states and blocks."""

    def __init__(
        self,
        pool: BlockPool,
        *,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        stats: SchedulerStats | None = None,
    ) -> None:
        self.pool = pool
        self.block_size = block_size
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.stats = stats or SchedulerStats()
        self._freed_blocks: list[int] = []
        self._num_arrived = 0

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def fits(self, requests: Iterable[Request]) -> bool:
        """Whether these requests can be in the pool together at their full length."""
        needed = sum(self.num_blocks_for(request.max_num_tokens) for request in requests)
        return needed <= self.pool.num_usable

    @property
    def has_requests(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        """Queue a request; it must fit the pool on its own."""
        assert self.fits([request]), "a request larger than the pool was let in"
        request.status = RequestStatus.WAITING
        request.arrival_order = self._num_arrived
        self._num_arrived += 1
        self.waiting.append(request)

    def schedule(self) -> SchedulerOutput:
        """Spend one step's budget; the caller must run it and call `advance`."""
        output = SchedulerOutput()
        budget = self.max_num_batched_tokens
        index = 0
        while index < len(self.running) and budget > 0:
            request = self.running[index]
            item = self._next_tokens(request, budget)
            if item is not None:
                if not self._reserve(request, item):
                    break  # the request itself was the youngest and gave up its blocks
                output.scheduled.append(item)
                budget -= item.num_tokens
            index += 1
        while self.waiting and len(self.running) < self.max_num_seqs and budget > 0:
            request = self.waiting[0]
            if self.num_blocks_for(request.num_tokens) > self.pool.num_free:
                break
            self.waiting.popleft()
            request.status = RequestStatus.RUNNING
            if request.scheduled_time is None:
                request.scheduled_time = time.perf_counter()
            bisect.insort(self.running, request, key=_age)
            item = self._next_tokens(request, budget)
            if item is not None:
                self._allocate(request, item)
                output.scheduled.append(item)
                budget -= item.num_tokens
        output.freed_blocks, self._freed_blocks = self._freed_blocks, []
        self._count_waste(output)
        return output

    def advance(self, output: SchedulerOutput) -> None:
        """Record that a step ran: its tokens are in the cache."""
        for item in output.scheduled:
            if item.request.status is not RequestStatus.RUNNING:
                continue
            if item.is_query:
                item.request.query_done = True
            else:
                item.request.num_computed_tokens = item.start + item.num_tokens

    def append_token(self, request: Request, token_id: int) -> str | None:
        """Add a sampled token; ends the request and returns the reason if it was the last."""
        if request.status is RequestStatus.FINISHED:
            return request.finish_reason
        request.output_token_ids.append(token_id)
        if request.first_token_time is None:
            request.first_token_time = time.perf_counter()
        reason = None
        if token_id in request.stop_token_ids:
            reason = "stop"
        elif len(request.output_token_ids) >= request.sampling.max_tokens:
            reason = "length"
        if reason is not None:
            self.finish(request, reason)
        return reason

    def finish(self, request: Request, reason: str, error: BaseException | None = None) -> None:
        """End a request in any state and free its blocks; ending it again changes nothing."""
        if request.status is RequestStatus.FINISHED:
            return
        match request.status:
            case RequestStatus.RUNNING:
                self.running.remove(request)
            case RequestStatus.WAITING:
                self.waiting.remove(request)
        self._free(request)
        request.end(reason, error)
        self.stats.finished[reason] += 1

    def _next_tokens(self, request: Request, budget: int) -> ScheduledRequest | None:
        """The next piece of a request's work, or None if it waits for its token."""
        start = request.num_computed_tokens
        missing = request.num_tokens - start
        if missing:
            count = min(missing, budget)
            samples = count == missing and not request.needs_query
            return ScheduledRequest(request, start, count, samples)
        if request.needs_query:
            return ScheduledRequest(request, start, 1, samples=True, is_query=True)
        return None

    def _missing_blocks(self, request: Request, item: ScheduledRequest) -> int:
        if item.is_query:
            return 0
        return self.num_blocks_for(item.start + item.num_tokens) - len(request.block_ids)

    def _allocate(self, request: Request, item: ScheduledRequest) -> bool:
        blocks = self.pool.allocate(self._missing_blocks(request, item))
        if blocks is None:
            return False
        request.block_ids.extend(blocks)
        return True

    def _reserve(self, request: Request, item: ScheduledRequest) -> bool:
        """Blocks for a running request, from the youngest if need be; False if that is itself."""
        while not self._allocate(request, item):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._free(request)
        request.status = RequestStatus.WAITING
        request.num_computed_tokens = 0
        request.query_done = False
        request.num_preemptions += 1
        self.stats.preemptions += 1
        index = bisect.bisect_left(self.waiting, _age(request), key=_age)
        self.waiting.insert(index, request)

    def _free(self, request: Request) -> None:
        self.pool.free(request.block_ids)
        self._freed_blocks.extend(request.block_ids)
        request.block_ids = []

    def _count_waste(self, output: SchedulerOutput) -> None:
        allocated = self.pool.num_used * self.block_size
        if not output.scheduled or not allocated:
            return
        used = sum(request.num_computed_tokens for request in self.running)
        used += sum(item.num_tokens for item in output.scheduled if not item.is_query)
        self.stats.waste_sum += 1 - used / allocated
        self.stats.waste_steps += 1


def _age(request: Request) -> int:
    return request.arrival_order
