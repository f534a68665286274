"""Which tokens of which requests run in the next step. No torch, no clock but arrival times.

One rule for everything: each step has a budget of tokens, spent on requests in order of arrival
until their computed tokens have caught up with their tokens. A prompt that does not fit the budget
is chunked; a running request that needs a block when none is free takes those of the youngest,
which starts over later. Requests that wait are always younger than those that run, so the oldest
one never loses anything and there is always progress.

A request that is let in begins with the blocks of its prefix that were published before it. Blocks
are published as soon as their tokens are scheduled: a step writes all keys and values before it
reads any, so that requests of the same step share too.

A fork lets a request go on from what another one has computed. Both hold the same blocks from then
on; of those who are about to write into a block that is not full all but the last copy it first.
"""

from __future__ import annotations

import bisect
import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from .block_pool import BlockPool
from .prefix_cache import block_digests
from .request import Request, RequestStatus
from .running_rows import Decodes, RunningRows

# Prompt tokens of a step whose logits are wanted: each costs a row of the vocabulary's size.
MAX_PROMPT_LOGITS = 256


@dataclass(frozen=True)
class ScheduledRequest:
    """Tokens [start, start + num_tokens) of a request run in this step.

    samples: the last of them gives the logits of the next token. query: (token id, position) of a
    token that is asked and not stored, in place of the tokens: the request's own query token, or
    its last token, whose keys and values were in the cache already. all_logits: the logits of all
    tokens are wanted, for the prompt's logprobs.
    """

    request: Request
    start: int
    num_tokens: int
    samples: bool
    query: tuple[int, int] | None = None
    all_logits: bool = False

    @property
    def num_logits(self) -> int:
        """Rows of logits that this item gives."""
        return self.num_tokens if self.all_logits else int(self.samples)


@dataclass
class SchedulerOutput:
    """One step: what runs, and the blocks whose content was given up since the last one.

    block_copies: (source, target) of blocks to copy before the step: all sources are read first,
    then freed blocks may lose their content, a target never. decodes: The oldest requests, if they
    run their last token; nearly all of most steps. items: Of the requests that follow them.
    """

    items: list[ScheduledRequest] = field(default_factory=list)
    freed_blocks: list[int] = field(default_factory=list)
    block_copies: list[tuple[int, int]] = field(default_factory=list)
    decodes: Decodes = field(default_factory=lambda: RunningRows().decodes([]))

    @property
    def num_tokens(self) -> int:
        return len(self.decodes) + sum(item.num_tokens for item in self.items)

    @property
    def num_seqs(self) -> int:
        return len(self.decodes) + len(self.items)

    @property
    def scheduled(self) -> list[ScheduledRequest]:
        """All of the step in one form, for those who have time."""
        decodes = zip(self.decodes.requests, self.decodes.seq_lens.tolist(), strict=True)
        return [ScheduledRequest(r, length - 1, 1, samples=True) for r, length in decodes] + [
            *self.items
        ]


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
        self.rows = RunningRows()
        self.stats = stats or SchedulerStats()
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
        budget = _Budget(self.max_num_batched_tokens, MAX_PROMPT_LOGITS)
        index = self._schedule_decodes(output, budget)
        while index < len(self.running) and budget.tokens > 0:
            request = self.running[index]
            item = self._next_tokens(request, budget)
            if item is not None:
                if not self._reserve(request, item, output):
                    break  # the request itself was the youngest and gave up its blocks
                self._add(output, item, budget)
            index += 1
        while self.waiting and len(self.running) < self.max_num_seqs and budget.tokens > 0:
            if not self._let_in(request := self.waiting[0]):
                break
            item = self._next_tokens(request, budget)
            if item is not None:
                allocated = self._allocate(request, item, output)
                assert allocated, "a request was let in without the blocks for it"
                self._add(output, item, budget)
        output.freed_blocks = self.pool.take_discarded()
        self.stats.block_copies += len(output.block_copies)
        self._count_waste(output)
        return output

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
            request.first_token_time = time.perf_counter()
        reason = None
        if token_id in request.stop_token_ids:
            reason = "stop"
            if token_id in request.sampling.stop_token_ids:
                request.stop_reason = token_id
        elif request.stop_text is not None and request.stop_text.push(token_id):
            reason = "stop"
            request.stop_reason = request.stop_text.matched
        elif len(request.output_token_ids) >= request.sampling.max_tokens:
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
            case RequestStatus.WAITING:
                self.waiting.remove(request)
        if error is not None:
            self.pool.forget(request.block_ids)  # the step that was to fill them may have failed
        self._free(request)
        request.end(reason, error)
        self.stats.finished[reason] += 1

    def _let_in(self, request: Request) -> bool:
        """Move the first waiting request to the running ones, if there are blocks for it."""
        shared = self._published_prefix(request)
        fresh = self.num_blocks_for(request.num_tokens) - len(shared)
        if request.needs_fork:
            fresh = 0
        if fresh > self.pool.num_free - self.pool.num_idle(shared):
            return False
        self.waiting.popleft()
        request.status = RequestStatus.RUNNING
        num_cached = len(shared) * self.block_size
        if request.scheduled_time is None:
            request.scheduled_time = time.perf_counter()
            if not request.needs_fork:
                request.num_cached_tokens = num_cached
                self.stats.prefix_tokens += request.num_tokens
                self.stats.prefix_hit_tokens += num_cached
        self.pool.share(shared)
        request.block_ids = shared
        request.num_published_blocks = len(shared)
        request.num_computed_tokens = num_cached
        request.last_is_cached = num_cached == request.num_tokens and not request.needs_query
        assert not self.running or _age(self.running[-1]) < _age(request), "an older one waited"
        self.running.append(request)
        self.rows.add(request)
        return True

    def _leave(self, request: Request) -> None:
        row = self._row(request)
        del self.running[row]
        self.rows.remove(row)

    def _row(self, request: Request) -> int:
        """The place of a running request."""
        return bisect.bisect_left(self.running, _age(request), key=_age)

    def _are_first(self, requests: list[Request]) -> bool:
        """Whether these are the oldest running requests, in order."""
        return self.running[: len(requests)] == requests

    def _published_prefix(self, request: Request) -> list[int]:
        if request.needs_prompt_logits or request.needs_fork or request.wants_hidden_states:
            return []  # every prompt token must be computed, or none
        return self.pool.find(block_digests(request, request.num_tokens, self.block_size))

    def _schedule_decodes(self, output: SchedulerOutput, budget: _Budget) -> int:
        """The oldest requests that have just their last token to run, and how many they are.

        None if there are not the blocks for all of them: then the youngest gives up its own.
        """
        count = min(self.rows.num_ready(), budget.tokens)
        num_tokens = self.rows.num_tokens[:count]
        opens = self.rows.num_blocks[:count] * self.block_size < num_tokens
        shares = self.rows.shares_last[:count] > 0
        if not count or np.count_nonzero(opens | shares) > self.pool.num_free:
            return 0
        fills = num_tokens % self.block_size == 0
        for row in np.flatnonzero(opens | fills | shares).tolist():
            request = self.running[row]
            if shares[row]:
                self._own_last_block(request, row, output)
            if opens[row]:
                blocks = self.pool.allocate(1)
                assert blocks is not None, "free blocks were counted and not found"
                request.block_ids.extend(blocks)
                self.rows.add_blocks(row, blocks)
            if fills[row]:
                self._publish(request, int(num_tokens[row]))
        output.decodes = self.rows.decodes(self.running[:count])
        budget.tokens -= count
        return count

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

    def _add(self, output: SchedulerOutput, item: ScheduledRequest, budget: _Budget) -> None:
        output.items.append(item)
        budget.tokens -= item.num_tokens
        if item.all_logits:
            budget.prompt_logits -= item.num_tokens
        if item.query is None:
            self._publish(item.request, item.start + item.num_tokens)

    def _publish(self, request: Request, num_tokens: int) -> None:
        """Let others find the blocks that this step fills."""
        digests = block_digests(request, num_tokens, self.block_size)
        for index in range(request.num_published_blocks, len(digests)):
            self.pool.publish(request.block_ids[index], digests[index])
            request.num_published_blocks = index + 1

    def _missing_blocks(self, request: Request, item: ScheduledRequest) -> int:
        if item.query is not None:
            return 0
        return self.num_blocks_for(item.start + item.num_tokens) - len(request.block_ids)

    def _must_copy(self, request: Request) -> bool:
        """Whether others hold the block that the request's next token goes into."""
        return request.shares_last_block and self.pool.num_holders(request.block_ids[-1]) > 1

    def _own_last_block(self, request: Request, row: int, output: SchedulerOutput) -> None:
        """Before a request writes into its last block, which others may hold."""
        if self._must_copy(request):
            blocks = self.pool.allocate(1)
            assert blocks is not None, "free blocks were counted and not found"
            shared = request.block_ids[-1]
            output.block_copies.append((shared, blocks[0]))
            self.pool.free([shared])
            request.block_ids[-1:] = blocks
            self.rows.set_blocks(row, request.block_ids)
        request.shares_last_block = False
        self.rows.shares_last[row] = 0

    def _allocate(self, request: Request, item: ScheduledRequest, output: SchedulerOutput) -> bool:
        writes_into_last = item.query is None and request.shares_last_block
        needed = self._missing_blocks(request, item)
        if needed + (writes_into_last and self._must_copy(request)) > self.pool.num_free:
            return False
        if writes_into_last:
            self._own_last_block(request, self._row(request), output)
        blocks = self.pool.allocate(needed)
        assert blocks is not None, "free blocks were counted and not found"
        if blocks:
            request.block_ids.extend(blocks)
            self.rows.add_blocks(self._row(request), blocks)
        return True

    def _reserve(self, request: Request, item: ScheduledRequest, output: SchedulerOutput) -> bool:
        """Blocks for a running request, from the youngest if need be; False if that is itself."""
        while not self._allocate(request, item, output):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _preempt(self, request: Request) -> None:
        self._leave(request)
        self._free(request)
        request.status = RequestStatus.WAITING
        request.num_computed_tokens = 0
        request.query_done = request.last_is_cached = request.shares_last_block = False
        request.num_preemptions += 1
        self.stats.preemptions += 1
        index = bisect.bisect_left(self.waiting, _age(request), key=_age)
        self.waiting.insert(index, request)

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


def _age(request: Request) -> int:
    return request.arrival_order
