"""A model of ints for the scheduler's tests: it stands for the graph and its KV cache.

`IntRunner` stores token ids where keys and values would be and computes the next token from what
it reads back through the block table. Whatever a schedule does (chunks, preemption, shared steps,
shared blocks), a request must end with the tokens it gets when it is alone.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from weakref import WeakKeyDictionary

from order_of_service import OrderOfService

from fastgen.config import SamplingParams
from fastgen.engine.block_pool import BlockPool
from fastgen.engine.request import Request, RequestStatus
from fastgen.engine.scheduler import ScheduledRequest, Scheduler, SchedulerOutput

VOCAB = 97


def next_token(ids: list[int], query: int | None = None) -> int:
    """A model of ints: depends on every id and on the order."""
    return _token(_read(_first_state(query), ids))


def _first_state(query: int | None) -> int:
    return 1 if query is None else 1000 + query


def _read(state: int, ids: Iterable[int]) -> int:
    for token_id in ids:
        state = (state * 31 + token_id + 7) % 1_000_003
    return state


def _token(state: int) -> int:
    return state % VOCAB


def expected_output(request: Request) -> list[int]:
    """What a request generates when nothing else runs."""
    prompt, query = request.prompt_token_ids, request.query_token_id
    output = [next_token(prompt, query)]
    state = _read(_first_state(None), [*prompt, *output])
    while len(output) < request.sampling.max_tokens and output[-1] not in request.stop_token_ids:
        output.append(_token(state))
        state = _read(state, output[-1:])
    return output


class IntRunner:
    """Cache slots that hold token ids, and are emptied when their block is freed."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.slots: list[int | None] = [None] * (num_blocks * block_size)
        # Of each request how many of its tokens were read, and the model's state then.
        self._known: WeakKeyDictionary[Request, tuple[int, int]] = WeakKeyDictionary()

    def _slot(self, request: Request, index: int) -> int:
        return request.block_ids[index // self.block_size] * self.block_size + (
            index % self.block_size
        )

    def _block(self, block: int) -> list[int | None]:
        return self.slots[block * self.block_size : (block + 1) * self.block_size]

    def run(self, output: SchedulerOutput, verify: bool = True) -> dict[Request, int]:
        """Write the scheduled tokens and give the next token of every request that samples.

        verify: Read all that the requests hold, not just what they write.
        """
        self.prepare_blocks(output)
        sampled, scheduled = {}, output.scheduled
        for item in scheduled:  # a step writes everything before it reads anything
            if item.query is None:
                self._write(item)
        for item in scheduled:
            request, end = item.request, item.start
            if item.query is None:
                end += item.num_tokens
            if verify:
                self.verify(request, end)
            if item.samples:
                assert end == request.num_tokens, "sampled before it had caught up"
                query = item.query[0] if item.query and request.needs_query else None
                sampled[request] = self._next_token(request, query)
        return sampled

    def prepare_blocks(self, output: SchedulerOutput) -> None:
        copied = [(self._block(source), target) for source, target in output.block_copies]
        empty: list[int | None] = [None] * self.block_size
        for ids, block in [(empty, block) for block in output.freed_blocks] + copied:
            start = block * self.block_size
            self.slots[start : start + self.block_size] = ids

    def _write(self, item: ScheduledRequest) -> None:
        ids = item.request.token_ids(item.start, item.start + item.num_tokens)
        for index, token_id in enumerate(ids, item.start):
            slot = self._slot(item.request, index)
            assert self.slots[slot] is None, "a slot that holds something was written"
            self.slots[slot] = token_id

    def verify(self, request: Request, end: int) -> None:
        seen = [
            token_id
            for block in request.block_ids[: -(-end // self.block_size)]
            for token_id in self._block(block)
        ]
        assert seen[:end] == request.token_ids(0, end), "the cache does not hold the tokens"

    def _next_token(self, request: Request, query: int | None) -> int:
        if query is not None or request.group is not None:
            return next_token(request.token_ids(0, request.num_tokens), query)
        num_known, state = self._known.get(request, (0, _first_state(None)))
        state = _read(state, request.token_ids(num_known, request.num_tokens))
        self._known[request] = request.num_tokens, state
        return _token(state)


class Simulation:
    """A scheduler and its runner; every step is checked against all invariants.

    Requests in `late` are never given their token by `step`: `feed` does that, as the caller of a
    lockstep group would. Time is the number of steps.

    check_every: In the steps between only what costs little is checked: the order of service, the
    budget, the blocks' number, and that no slot is written that holds something.
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
        check_every: int = 1,
    ) -> None:
        self.now = 0.0
        self.scheduler = scheduler(
            pool(num_blocks),
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            clock=lambda: self.now,
        )
        self.runner = IntRunner(num_blocks, block_size)
        self.requests: list[Request] = []
        self.late: dict[Request, int | None] = {}
        self.service = OrderOfService(self)
        self.check_every = check_every
        self.num_steps = 0
        self.shared: set[int] = set()  # blocks that became shared because they were published

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
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        request = Request(prompt, params, arrival_time=self.now, **fields)
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
        output, full = self.schedule()
        sampled = self.runner.run(output, verify=full)
        self.scheduler.advance(output)
        for request in [request for request in sampled if request in self.late]:
            self.late[request] = sampled.pop(request)
        requests, token_ids = list(sampled), list(sampled.values())
        for place in self.scheduler.append_tokens(requests, token_ids):
            self.scheduler.append_token(requests[place], token_ids[place])
        if full:
            self.check_state()
        return output

    def schedule(self) -> tuple[SchedulerOutput, bool]:
        """What runs next, checked, and whether all of this step is to be checked."""
        self.now += 1.0
        self.num_steps += 1
        full = self.num_steps % self.check_every == 0
        self.service.before()
        output = self.scheduler.schedule()
        scheduled = output.scheduled
        self.check_output(output, scheduled)
        self.service.after(output, {item.request for item in scheduled})
        if full:
            self.check_state()
        return output, full

    def undo_step(self) -> None:
        """A step that fails before it writes anything."""
        output, _ = self.schedule()
        self.note_shared()
        self.runner.prepare_blocks(output)
        self.scheduler.undo(output)
        self.service.forget()
        assert not any(item.request.block_ids for item in output.scheduled)
        self.check_state()

    def expire(self) -> list[Request]:
        """End what is too late, as the engine does before a step."""
        expired = self.scheduler.expired(self.now)
        for request in expired:
            assert request.deadline is not None
            assert request.deadline <= self.now
            self.scheduler.finish(request, "deadline")
        following = self.scheduler.next_deadline()
        assert following is None or following > self.now
        return expired

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
            for request in list(self.late):
                self.feed(request)
        raise AssertionError(f"not done after {limit} steps")

    def check_output(self, output: SchedulerOutput, scheduled: list[ScheduledRequest]) -> None:
        scheduler = self.scheduler
        requests = [item.request for item in scheduled]
        assert len(requests) == len(set(requests)), "a request runs twice in a step"
        assert output.num_tokens == sum(item.num_tokens for item in scheduled)
        assert output.num_tokens <= scheduler.max_num_batched_tokens
        assert len(requests) <= scheduler.max_num_seqs
        pool = scheduler.pool
        assert pool.num_free + pool.num_used == pool.num_usable
        for item in scheduled:
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
        self.note_shared()
        for block, count in holders.items():
            if count > 1 and block not in self.shared:
                self.check_forked(block)
        assert len(scheduler.running) <= scheduler.max_num_seqs
        self.check_queues()
        self.check_rows()
        for request in self.requests:
            if request.status is not RequestStatus.RUNNING:
                assert not request.block_ids
            assert (request.status is RequestStatus.FINISHED) == (request.finish_reason is not None)

    def note_shared(self) -> None:
        """Before blocks are forgotten: those that are published now are shared rightly."""
        pool = self.scheduler.pool
        held = {block for block, count in pool._holders.items() if count > 1}
        self.shared = held & (self.shared | pool._digests.keys())

    def check_queues(self) -> None:
        """Who waits and who runs, and in which order."""
        running, waiting = self.scheduler.running, list(self.scheduler.waiting)
        live = sorted(self.live, key=lambda request: request.service_key)
        waits = (RequestStatus.WAITING, RequestStatus.PREEMPTED)
        assert waiting == [request for request in live if request.status in waits]
        assert len(self.scheduler.waiting) == len(waiting)
        assert set(running) == {r for r in live if r.status is RequestStatus.RUNNING}
        deadlines = [request.deadline for request in live if request.deadline is not None]
        assert self.scheduler.next_deadline() == min(deadlines, default=None)
        admitted = [request.admission_order for request in running]
        assert admitted == sorted(set(admitted)), "order of admission"
        if len({request.priority for request in live}) == 1 and not self.service.is_disturbed:
            assert [*running, *waiting] == live, "first come, first served"

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
        slots = rows.slot[: rows.num_rows].tolist()
        assert sorted(slots + rows._free_slots) == list(range(len(rows.block_table)))
        for row, request in enumerate(running):
            blocks = request.block_ids
            assert rows.num_blocks[row] == len(blocks)
            table = rows.block_table[rows.slot[row]]
            assert table[: len(blocks)].tolist() == blocks
            assert not table[len(blocks) :].any()
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
            self.check_tokens(request)
        assert not any(r.status is not RequestStatus.FINISHED for r in self.requests)
        assert self.scheduler.pool.num_used == 0

    def check_tokens(self, request: Request) -> None:
        expected = expected_output(request)
        if request.finish_reason in ("cancelled", "deadline", "error"):
            expected = expected[: len(request.output_token_ids)]
        assert request.output_token_ids == expected
