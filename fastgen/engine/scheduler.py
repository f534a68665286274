"""Which tokens of which requests run in the next step. No torch, and no clock but the caller's.

One rule for everything: each step has a budget of tokens, spent on the running requests in the
order in which they were let in, until their computed tokens have caught up with their tokens. A
prompt that does not fit the budget is chunked; it is the last one, so that the others' next tokens
do not wait for it. What is left of the budget goes to requests that wait.

Who comes first has the smallest key: the time of arrival, later by PRIORITY_SECONDS for each level
of priority. A key never changes, so that waiting brings everybody to the front: only requests that
arrive within a fixed time can come before one that is there. Waiting requests are let in in this
order and nobody is passed over; when blocks are short, the running request with the largest key
gives its own up and starts over later. So the first of all never loses anything, nobody is let in
before it, and those who run end: there is always progress.

Requests of a lockstep group wait for one another. Their keys follow one another, and a request
that waits may take the place of those with larger keys when nothing else can run.

A request that is let in begins with the blocks of its prefix that were published before it. Blocks
are published as soon as their tokens are scheduled: a step writes all keys and values before it
reads any, so that requests of the same step share too.

A fork lets a request go on from what another one has computed. Both hold the same blocks from then
on; of those who are about to write into a block that is not full all but the last copy it first.
"""

from __future__ import annotations

import bisect
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from .block_pool import BlockPool
from .prefix_cache import block_digests
from .request import Request, RequestStatus
from .request_heap import RequestHeap
from .running_rows import RunningRows
from .scheduler_output import ScheduledRequest, SchedulerOutput

# A request of priority 1 is served like one of priority 0 that came so much later.
PRIORITY_SECONDS = 10.0

# Prompt tokens of a step whose logits are wanted: each costs a row of the vocabulary's size.
MAX_PROMPT_LOGITS = 256


@dataclass
class SchedulerStats:
    """Counts that outlive a scheduler.

    finished: requests by reason. prefix_tokens: tokens of requests when they were first let in;
    prefix_hit_tokens: those of them that were found in the cache. forks: requests that went on
    from another one's blocks; block_copies: blocks that were copied for them.
    """

    finished: Counter[str] = field(default_factory=Counter)
    preemptions: int = 0
    prefix_tokens: int = 0
    prefix_hit_tokens: int = 0
    forks: int = 0
    block_copies: int = 0
    waste_sum: float = 0.0
    waste_steps: int = 0

    @property
    def cache_waste(self) -> float:
        """Unused slots / allocated slots, averaged over the steps so far."""
        return self.waste_sum / self.waste_steps if self.waste_steps else 0.0


class Scheduler:
    """The only owner of requests' states and blocks.

    clock: Seconds; what deadlines and all times of requests are told by.
    running: In the order in which they were let in. waiting: In the order of service.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        stats: SchedulerStats | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.pool = pool
        self.block_size = block_size
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.clock = clock
        self.waiting = RequestHeap(_service_key)
        self.running: list[Request] = []
        self.rows = RunningRows()
        self.stats = stats or SchedulerStats()
        self._deadlines = RequestHeap(lambda request: request.deadline)
        self._num_arrived = self._num_admitted = 0
        self._arrival_time = 0.0

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
        """Queue a request, which must fit the pool on its own.

        The rows of a group must follow one another: no other request may come between them.
        """
        assert self.fits([request]), "a request larger than the pool was let in"
        if request.row == 0:
            self._arrival_time = self.clock()
        key_time = self._arrival_time + request.priority * PRIORITY_SECONDS
        request.service_key = key_time, self._num_arrived
        self._num_arrived += 1
        request.move_to(RequestStatus.WAITING)
        self.waiting.push(request)
        if request.deadline is not None:
            self._deadlines.push(request)

    def expired(self, now: float | None = None) -> list[Request]:
        """The requests whose deadline has come, to be finished with the reason "deadline"."""
        now = self.clock() if now is None else now
        requests = []
        while (deadline := self.next_deadline()) is not None and deadline <= now:
            request = self._deadlines.first()
            assert request is not None
            self._deadlines.discard(request)
            requests.append(request)
        return requests

    def next_deadline(self) -> float | None:
        """The earliest deadline of a request that has not ended, by the clock."""
        request = self._deadlines.first()
        return None if request is None else request.deadline

    def schedule(self) -> SchedulerOutput:
        """Spend one step's budget; the caller must run it and call `advance`, or `undo`."""
        plan = self._plan()
        while self._num_missing_blocks(plan) > self.pool.num_free:
            self._preempt(self._last_of_running())
            plan = self._plan()
        output, budget = SchedulerOutput(), plan.budget
        self._take_decodes(plan, output)
        for item in plan.items:
            self._take(item, output)
        while budget.tokens > 0 and (request := self.waiting.first()) is not None:
            if len(self.running) < self.max_num_seqs and self._let_in(request):
                item = self._next_tokens(request, budget)
                if item is not None:
                    budget.spend(item)
                    self._take(item, output)
            elif output.num_seqs or not self._make_room(request):
                break
        output.freed_blocks = self.pool.take_discarded()
        self.stats.block_copies += len(output.block_copies)
        self._count_waste(output)
        return output

    def undo(self, output: SchedulerOutput) -> None:
        """Take back the last step, which did not run: its requests give up their blocks and wait.

        Blocks that it would have filled were published, and may be shared within the step alone.
        """
        for item in output.scheduled:
            if item.request.status is RequestStatus.RUNNING:
                self.pool.forget(item.request.block_ids)
                self._preempt(item.request)

    def advance(self, output: SchedulerOutput) -> None:
        """Record that a step ran: its tokens are in the cache."""
        decodes, items = output.decodes, output.items
        if self._are_first(decodes.requests):
            self.rows.num_computed[: len(decodes)] = decodes.seq_lens
            for request, num_computed in zip(
                decodes.requests, decodes.seq_lens.tolist(), strict=True
            ):
                request.num_computed_tokens = num_computed
        else:  # one of them ended while the step ran
            items = output.scheduled
        for item in items:
            request = item.request
            if request.status is not RequestStatus.RUNNING:
                continue
            if item.query is not None:
                request.query_done, request.last_is_cached = True, False
            else:
                request.num_computed_tokens = item.start + item.num_tokens
            self.rows.write(self._row(request), request)

    def append_tokens(self, requests: list[Request], token_ids: Sequence[int]) -> list[int]:
        """Add a sampled token to each request that it cannot end.

        Returns: the places of the others, which `append_token` must take.
        """
        if not self._are_first(requests):
            return list(range(len(requests)))
        left_alone = self.rows.append(np.array(token_ids, np.int64)).tolist()
        for request, token_id, skip in zip(requests, token_ids, left_alone, strict=True):
            if not skip:
                request.output_token_ids.append(token_id)
        return [place for place, skip in enumerate(left_alone) if skip]

    def append_token(self, request: Request, token_id: int) -> str | None:
        """Add a sampled token; ends the request and returns the reason if it was the last."""
        if request.status is RequestStatus.FINISHED:
            return request.finish_reason
        request.output_token_ids.append(token_id)
        if request.first_token_time is None:
            request.first_token_time = self.clock()
        reason, is_last = None, len(request.output_token_ids) >= request.sampling.max_tokens
        if token_id in request.stop_token_ids:
            reason = "stop"
            if token_id in request.sampling.stop_token_ids:
                request.stop_reason = token_id
        elif request.stop_text is not None and request.stop_text.push(token_id, is_last):
            reason = "stop"
            request.stop_reason = request.stop_text.matched
        elif is_last:
            reason = "length"
        if reason is not None:
            self.finish(request, reason)
        elif request.status is RequestStatus.RUNNING:
            self.rows.write(self._row(request), request)
        return reason

    def fork(self, requests: list[Request], parents: Sequence[int]) -> None:
        """Request i goes on from what request parents[i] has generated and computed.

        Who takes part must have caught up with its tokens once since the last fork; of those that
        were preempted meanwhile only the tokens are taken over, and computed again.
        """
        if any(request.status is RequestStatus.FINISHED for request in requests):
            return  # an error has ended one of them: the caller will hear of it
        changed = [
            (request, _History(requests[parent]), request.block_ids)
            for request, parent in zip(requests, parents, strict=True)
            if requests[parent] is not request
        ]
        for request, history, _ in changed:
            history.give(request)
            self.pool.hold(request.block_ids)
            request.needs_fork = False
        for _, _, blocks in changed:  # when all that goes on is held
            self.pool.free(blocks)
        for request in requests:
            request.shares_last_block = (
                request.num_computed_tokens % self.block_size > 0
                and self.pool.num_holders(request.block_ids[-1]) > 1
            )
        for request in requests:
            if request.status is RequestStatus.RUNNING:
                row = self._row(request)
                self.rows.set_blocks(row, request.block_ids)
                self.rows.write(row, request)
        self.stats.forks += len(changed)

    def finish(self, request: Request, reason: str, error: BaseException | None = None) -> None:
        """End a request in any state and free its blocks; ending it again changes nothing."""
        if request.status is RequestStatus.FINISHED:
            return
        match request.status:
            case RequestStatus.RUNNING:
                self._leave(request)
            case RequestStatus.WAITING | RequestStatus.PREEMPTED:
                self.waiting.discard(request)
        self._deadlines.discard(request)
        if error is not None:
            self.pool.forget(request.block_ids)  # the step that was to fill them may have failed
        self._free(request)
        request.end(reason, error, at=self.clock())
        self.stats.finished[reason] += 1

    def _let_in(self, request: Request) -> bool:
        """Move the first waiting request to the running ones, if there are blocks for it."""
        shared = self._published_prefix(request)
        fresh = self.num_blocks_for(request.num_tokens) - len(shared)
        if request.needs_fork:
            fresh = 0
        if fresh > self.pool.num_free - self.pool.num_idle(shared):
            return False
        self.waiting.discard(request)
        request.move_to(RequestStatus.RUNNING)
        num_cached = len(shared) * self.block_size
        if request.scheduled_time is None:
            request.scheduled_time = self.clock()
            if not request.needs_fork:
                request.num_cached_tokens = num_cached
                self.stats.prefix_tokens += request.num_tokens
                self.stats.prefix_hit_tokens += num_cached
        self.pool.share(shared)
        request.block_ids = shared
        request.num_published_blocks = len(shared)
        request.num_computed_tokens = num_cached
        request.last_is_cached = num_cached == request.num_tokens and not request.needs_query
        request.admission_order = self._num_admitted
        self._num_admitted += 1
        self.running.append(request)
        self.rows.add(request)
        return True

    def _make_room(self, request: Request) -> bool:
        """Preempt a running request that comes after this one, which waits and cannot be let in.

        Only while nothing else can run: those who hold rows and blocks may wait for this request.
        """
        last = self._last_of_running()
        if _service_key(last) < _service_key(request):
            return False
        self._preempt(last)
        return True

    def _last_of_running(self) -> Request:
        return max(self.running, key=_service_key)

    def _leave(self, request: Request) -> None:
        row = self._row(request)
        del self.running[row]
        self.rows.remove(row)

    def _row(self, request: Request) -> int:
        """The place of a running request."""
        return bisect.bisect_left(self.running, request.admission_order, key=_admission_order)

    def _are_first(self, requests: list[Request]) -> bool:
        """Whether these are the first running requests, in order."""
        return self.running[: len(requests)] == requests

    def _published_prefix(self, request: Request) -> list[int]:
        if request.needs_prompt_logits or request.needs_fork or request.wants_hidden_states:
            return []  # every prompt token must be computed, or none
        return self.pool.find(block_digests(request, request.num_tokens, self.block_size))

    def _plan(self) -> _Plan:
        """What the running requests would run if there were the blocks for it."""
        budget = _Budget(self.max_num_batched_tokens, MAX_PROMPT_LOGITS)
        count = self._num_decodes(budget)
        budget.tokens -= count
        items = []
        for request in itertools.islice(self.running, count, None):
            if not budget.tokens:
                break
            item = self._next_tokens(request, budget)
            if item is not None:
                budget.spend(item)
                items.append(item)
        opens = self.rows.num_blocks[:count] * self.block_size < self.rows.num_tokens[:count]
        return _Plan(opens, self.rows.shares_last[:count] > 0, items, budget)

    def _num_decodes(self, budget: _Budget) -> int:
        """How many requests, from the first on, have just their last token to run."""
        return min(self.rows.num_ready(), budget.tokens)

    def _num_missing_blocks(self, plan: _Plan) -> int:
        """Blocks that a plan takes beside those that its requests hold."""
        writers = [self.running[row] for row in np.flatnonzero(plan.shares)]
        num_opened = int(np.count_nonzero(plan.opens))
        for item in plan.items:
            num_opened += self._num_to_open(item)
            if self._writes_into_last(item):
                writers.append(item.request)
        last_blocks = Counter(request.block_ids[-1] for request in writers)
        return num_opened + sum(
            min(num_writers, self.pool.num_holders(block) - 1)
            for block, num_writers in last_blocks.items()
        )

    def _take_decodes(self, plan: _Plan, output: SchedulerOutput) -> None:
        count = len(plan.opens)
        num_tokens = self.rows.num_tokens[:count]
        fills = num_tokens % self.block_size == 0
        for row in np.flatnonzero(plan.opens | fills | plan.shares).tolist():
            request = self.running[row]
            if plan.shares[row]:
                self._own_last_block(request, row, output)
            if plan.opens[row]:
                blocks = self._allocate(1)
                request.block_ids.extend(blocks)
                self.rows.add_blocks(row, blocks)
            if fills[row]:
                self._publish(request, int(num_tokens[row]))
        output.decodes = self.rows.decodes(self.running[:count])

    def _next_tokens(self, request: Request, budget: _Budget) -> ScheduledRequest | None:
        """The next piece of a request's work, or None if it waits for its token or its turn."""
        if request.needs_fork:
            return None
        start = request.num_computed_tokens
        if missing := request.num_tokens - start:
            all_logits = request.needs_prompt_logits
            count = min(missing, budget.tokens)
            if all_logits:
                count = min(count, budget.prompt_logits)
            samples = count == missing and not request.needs_query
            return (
                ScheduledRequest(request, start, count, samples, None, all_logits)
                if count
                else None
            )
        if request.needs_query:
            assert request.query_token_id is not None
            query = request.query_token_id, request.query_position
        elif request.last_is_cached:
            (position,) = request.positions(start - 1, start)
            query = request.token_ids(start - 1, start)[0], position
        else:
            return None
        return ScheduledRequest(request, start, 1, samples=True, query=query)

    def _take(self, item: ScheduledRequest, output: SchedulerOutput) -> None:
        """Give an item its blocks and have it run."""
        request = item.request
        if self._writes_into_last(item):
            self._own_last_block(request, self._row(request), output)
        if count := self._num_to_open(item):
            blocks = self._allocate(count)
            request.block_ids.extend(blocks)
            self.rows.add_blocks(self._row(request), blocks)
        output.items.append(item)
        if item.query is None:
            self._publish(request, item.start + item.num_tokens)

    def _publish(self, request: Request, num_tokens: int) -> None:
        """Let others find the blocks that this step fills."""
        digests = block_digests(request, num_tokens, self.block_size)
        for index in range(request.num_published_blocks, len(digests)):
            self.pool.publish(request.block_ids[index], digests[index])
            request.num_published_blocks = index + 1

    def _num_to_open(self, item: ScheduledRequest) -> int:
        """Blocks that an item's request needs behind those that it has."""
        if item.query is not None:
            return 0
        return self.num_blocks_for(item.start + item.num_tokens) - len(item.request.block_ids)

    def _writes_into_last(self, item: ScheduledRequest) -> bool:
        """Whether an item writes into a block that others may hold."""
        return item.query is None and item.request.shares_last_block

    def _must_copy(self, request: Request) -> bool:
        """Whether others hold the block that the request's next token goes into."""
        return request.shares_last_block and self.pool.num_holders(request.block_ids[-1]) > 1

    def _own_last_block(self, request: Request, row: int, output: SchedulerOutput) -> None:
        """Before a request writes into its last block, which others may hold."""
        if self._must_copy(request):
            blocks = self._allocate(1)
            shared = request.block_ids[-1]
            output.block_copies.append((shared, blocks[0]))
            self.pool.free([shared])
            request.block_ids[-1:] = blocks
            self.rows.set_blocks(row, request.block_ids)
        request.shares_last_block = False
        self.rows.shares_last[row] = 0

    def _allocate(self, count: int) -> list[int]:
        blocks = self.pool.allocate(count)
        assert blocks is not None, "free blocks were counted and not found"
        return blocks

    def _preempt(self, request: Request) -> None:
        self._leave(request)
        self._free(request)
        request.move_to(RequestStatus.PREEMPTED)
        request.num_computed_tokens = 0
        request.query_done = request.last_is_cached = request.shares_last_block = False
        request.num_preemptions += 1
        self.stats.preemptions += 1
        self.waiting.push(request)

    def _free(self, request: Request) -> None:
        self.pool.free(request.block_ids)
        request.block_ids = []
        request.num_published_blocks = 0

    def _count_waste(self, output: SchedulerOutput) -> None:
        """Only the end of a request's last blocks is unused: shared blocks are full.

        But for those of forked requests that wait: theirs count once for each.
        """
        allocated = self.pool.num_used * self.block_size
        if not output.num_seqs or not allocated:
            return
        unused = self.rows.num_unused_slots(self.block_size) - len(output.decodes)
        unused -= sum(item.num_tokens for item in output.items if item.query is None)
        self.stats.waste_sum += unused / allocated
        self.stats.waste_steps += 1


class _History:
    """What a request has generated and computed, for those who go on from it."""

    def __init__(self, request: Request) -> None:
        self._output_token_ids = request.output_token_ids
        self._block_digests = request.block_digests
        self._block_ids = request.block_ids
        self._num_computed_tokens = request.num_computed_tokens
        self._num_published_blocks = request.num_published_blocks
        self._last_is_cached = request.last_is_cached

    def give(self, request: Request) -> None:
        """The lists are the request's own; one that waits gets no blocks."""
        request.output_token_ids = list(self._output_token_ids)
        request.block_digests = list(self._block_digests)
        if request.status is RequestStatus.RUNNING:
            request.block_ids = list(self._block_ids)
            request.num_computed_tokens = self._num_computed_tokens
            request.num_published_blocks = self._num_published_blocks
            request.last_is_cached = self._last_is_cached


@dataclass
class _Budget:
    """What is left of a step: tokens, and prompt tokens whose logits are wanted."""

    tokens: int
    prompt_logits: int

    def spend(self, item: ScheduledRequest) -> None:
        self.tokens -= item.num_tokens
        if item.all_logits:
            self.prompt_logits -= item.num_tokens


@dataclass
class _Plan:
    """A step of the running requests: a token of each of the first N, then items of others.

    opens, shares: [N] bool, whether its token opens a block; whether others may hold the block
    that it goes into. budget: What is left.
    """

    opens: np.ndarray
    shares: np.ndarray
    items: list[ScheduledRequest]
    budget: _Budget


def _service_key(request: Request) -> tuple[float, int]:
    return request.service_key


def _admission_order(request: Request) -> int:
    return request.admission_order
