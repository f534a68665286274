"""A model of ints for the scheduler's tests: it stands for the graph and its KV cache.

`IntRunner` stores token ids where keys and values would be and computes the next token from what
it reads back through the block table. Whatever a schedule does (chunks, preemption, shared steps,
shared blocks), a request must end with the tokens it gets when it is alone.
"""

from __future__ import annotations

import random
from collections import Counter

from fastgen.config import SamplingParams
from fastgen.engine.block_pool import BlockPool
from fastgen.engine.request import Request, RequestStatus
from fastgen.engine.scheduler import Scheduler, SchedulerOutput

VOCAB = 97


def next_token(ids: list[int], query: int | None = None) -> int:
    """A model of ints: depends on every id and on the order."""
    state = 1 if query is None else 1000 + query
    for token_id in ids:
        state = (state * 31 + token_id + 7) % 1_000_003
    return state % VOCAB


def expected_output(request: Request) -> list[int]:
    """What a request generates when nothing else runs."""
    ids, output = list(request.prompt_token_ids), []
    query = request.query_token_id
    while len(output) < request.sampling.max_tokens:
        output.append(next_token(ids + output, query))
        query = None
        if output[-1] in request.stop_token_ids:
            break
    return output


class IntRunner:
    """Cache slots that hold token ids, and are emptied when their block is freed."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.slots: list[int | None] = [None] * (num_blocks * block_size)

    def _slot(self, request: Request, index: int) -> int:
        return request.block_ids[index // self.block_size] * self.block_size + (
            index % self.block_size
        )

    def _block(self, block: int) -> list[int | None]:
        return self.slots[block * self.block_size : (block + 1) * self.block_size]

    def run(self, output: SchedulerOutput) -> dict[Request, int]:
        """Write the scheduled tokens and give the next token of every request that samples."""
        copied = [(self._block(source), target) for source, target in output.block_copies]
        empty: list[int | None] = [None] * self.block_size
        for ids, block in [(empty, block) for block in output.freed_blocks] + copied:
            start = block * self.block_size
            self.slots[start : start + self.block_size] = ids
        sampled = {}
        for item in output.scheduled:  # a step writes everything before it reads anything
            if item.query is None:
                ids = item.request.token_ids(item.start, item.start + item.num_tokens)
                for index, token_id in enumerate(ids, item.start):
                    slot = self._slot(item.request, index)
                    assert self.slots[slot] is None, "a slot that holds something was written"
                    self.slots[slot] = token_id
        for item in output.scheduled:
            request, end = item.request, item.start
            if item.query is None:
                end += item.num_tokens
            seen = [self.slots[self._slot(request, index)] for index in range(end)]
            assert seen == request.token_ids(0, end), "the cache does not hold the request's tokens"
            if item.samples:
                assert end == request.num_tokens, "sampled before it had caught up"
                query = item.query[0] if item.query and request.needs_query else None
                sampled[request] = next_token(request.token_ids(0, end), query)
        return sampled


class Simulation:
    """A scheduler and its runner; every step is checked against all invariants.

    Requests in `late` are never given their token by `step`: `feed` does that, as the caller of a
    lockstep group would.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int = 4,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 16,
        scheduler: type[Scheduler] = Scheduler,
        pool: type[BlockPool] = BlockPool,
    ) -> None:
        self.scheduler = scheduler(
            pool(num_blocks),
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
        )
        self.runner = IntRunner(num_blocks, block_size)
        self.requests: list[Request] = []
        self.late: dict[Request, int | None] = {}

    def add(
        self,
        num_prompt: int,
        max_tokens: int,
        *,
        late: bool = False,
        salt: bytes | None = None,
        alike: bool = False,
        rng=random,
        **fields,
    ) -> Request:
        """Queue a request; those of one salt may share blocks, if they begin alike."""
        prompt = [rng.randrange(VOCAB) for _ in range(num_prompt)]
        if alike:
            same = rng.randint(0, num_prompt)
            prompt[:same] = [(7 * i) % VOCAB for i in range(same)]
        request = Request(prompt, SamplingParams(max_tokens=max_tokens, temperature=0.0), **fields)
        request.cache_root = salt
        if not self.scheduler.fits([request]):
            return request
        self.scheduler.add(request)
        self.requests.append(request)
        if late:
            self.late[request] = None
        return request

    @property
    def live(self) -> list[Request]:
        return [request for request in self.requests if request.finish_reason is None]

    def step(self) -> SchedulerOutput:
        """Schedule, run, advance and append; check everything in between."""
        oldest = self.live[0] if self.live else None
        preemptions = oldest.num_preemptions if oldest else 0
        output = self.scheduler.schedule()
        self.check_output(output)
        self.check_state()
        if oldest is not None:
            assert oldest.num_preemptions == preemptions, "the oldest lost its blocks"
            if oldest.num_computed_tokens < oldest.num_tokens or oldest.needs_query:
                assert output.scheduled, "no progress"
                assert output.scheduled[0].request is oldest, "the oldest did not come first"
        sampled = self.runner.run(output)
        self.scheduler.advance(output)
        for request in [request for request in sampled if request in self.late]:
            self.late[request] = sampled.pop(request)
        requests, token_ids = list(sampled), list(sampled.values())
        for place in self.scheduler.append_tokens(requests, token_ids):
            self.scheduler.append_token(requests[place], token_ids[place])
        self.check_state()
        return output

    def feed(self, request: Request) -> None:
        """Append the late token of a request, whether it still has its blocks or not."""
        token_id = self.late[request]
        if token_id is not None and request.finish_reason is None:
            self.late[request] = None
            self.scheduler.append_token(request, token_id)

    def run_to_end(self, limit: int = 10_000) -> int:
        """Steps until nothing is left; late tokens come as soon as they are known."""
        for steps in range(limit):
            if not self.scheduler.has_requests:
                return steps
            self.step()
            for request in self.late:
                self.feed(request)
        raise AssertionError(f"not done after {limit} steps")

    def check_output(self, output: SchedulerOutput) -> None:
        scheduler = self.scheduler
        scheduled = [item.request for item in output.scheduled]
        assert len(scheduled) == len(set(scheduled)), "a request runs twice in a step"
        assert output.num_tokens == sum(item.num_tokens for item in output.scheduled)
        assert output.num_tokens <= scheduler.max_num_batched_tokens
        assert len(scheduled) <= scheduler.max_num_seqs
        for item in output.scheduled:
            request, end = item.request, item.start + item.num_tokens
            assert request.status is RequestStatus.RUNNING
            assert item.num_tokens > 0
            assert item.start == request.num_computed_tokens
            if item.query is not None:
                assert item.num_tokens == 1
                assert item.samples
            else:
                assert end <= request.num_tokens
                assert len(request.block_ids) == scheduler.num_blocks_for(end)

    def check_state(self) -> None:
        scheduler, pool = self.scheduler, self.scheduler.pool
        assert pool.num_free + pool.num_used == pool.num_usable
        holders = Counter(block for request in self.requests for block in request.block_ids)
        assert 0 not in holders, "the null block was handed out"
        assert pool.num_used == len(holders)
        assert pool._holders == holders
        for request in self.requests:
            assert request.cache_root or not request.num_cached_tokens, "shared what it must not"
        for block, count in holders.items():
            if count > 1 and block not in pool._digests:
                self.check_forked(block)
        assert len(scheduler.running) <= scheduler.max_num_seqs
        running, waiting = list(scheduler.running), list(scheduler.waiting)
        by_status = {RequestStatus.RUNNING: running, RequestStatus.WAITING: waiting}
        for status, queue in by_status.items():
            assert [r for r in self.requests if r.status is status] == queue, "order of arrival"
        if running and waiting:
            assert running[-1].request_id < waiting[0].request_id, "an older request waits"
        self.check_rows()
        for request in self.requests:
            if request.status is not RequestStatus.RUNNING:
                assert not request.block_ids
            assert (request.status is RequestStatus.FINISHED) == (request.finish_reason is not None)

    def check_forked(self, block: int) -> None:
        """Requests of one group hold an unpublished block together, for the same tokens."""
        by = [request for request in self.requests if block in request.block_ids]
        assert by[0].group, "a private block is in two hands"
        assert len({request.group for request in by}) == 1, "a private block is in two hands"
        start = by[0].block_ids.index(block) * self.scheduler.block_size
        for request in by:
            end = min(start + self.scheduler.block_size, request.num_computed_tokens)
            assert self.runner._block(block)[: end - start] == request.token_ids(start, end)
            if end < start + self.scheduler.block_size:
                assert request.shares_last_block

    def check_rows(self) -> None:
        """The arrays say what the running requests say."""
        rows, running = self.scheduler.rows, self.scheduler.running
        assert rows.num_rows == len(running)
        for row, request in enumerate(running):
            blocks = request.block_ids
            assert rows.num_blocks[row] == len(blocks)
            assert rows.block_table[row, : len(blocks)].tolist() == blocks
            assert not rows.block_table[row, len(blocks) :].any()
            assert rows.num_tokens[row] == request.num_tokens
            assert rows.shares_last[row] == request.shares_last_block
            assert rows.num_computed[row] == request.num_computed_tokens
            assert rows.num_left[row] == request.sampling.max_tokens - len(request.output_token_ids)
            if request.num_tokens:
                assert [rows.last_token[row]] == request.token_ids(
                    request.num_tokens - 1, request.num_tokens
                )

    def check_outputs(self) -> None:
        for request in self.requests:
            expected = expected_output(request)
            if request.finish_reason == "cancelled":
                expected = expected[: len(request.output_token_ids)]
            assert request.output_token_ids == expected
        assert not any(r.status is not RequestStatus.FINISHED for r in self.requests)
        assert self.scheduler.pool.num_used == 0
