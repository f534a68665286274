"""Steps of decodes from arrays: the same steps, batches and tokens as request by request."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import torch
from simulation import VOCAB, Simulation

from fastgen.config import SamplingParams
from fastgen.engine.batch import ForwardBatch, build_batch
from fastgen.engine.block_pool import BlockPool
from fastgen.engine.request import Request, RequestStatus
from fastgen.engine.running_rows import MAX_STOP_IDS, RunningRows
from fastgen.engine.scheduler import Scheduler, SchedulerOutput

CPU = torch.device("cpu")


class RequestByRequest(Scheduler):
    """The arrays are never used."""

    def _schedule_decodes(self, output, budget):
        return 0

    def append_tokens(self, requests, token_ids):
        return list(range(len(requests)))


class Twins:
    """The same workload on the scheduler and on one that goes request by request."""

    def __init__(self, seed: int, scheduler: type[Scheduler] = Scheduler, **limits) -> None:
        self.simulations = [
            Simulation(scheduler=kind, **limits) for kind in (scheduler, RequestByRequest)
        ]
        self.block_size = limits["block_size"]
        self.seed = seed
        self.num_decodes = self.num_items = 0

    def add(self, *args, **fields) -> None:
        self.seed += 1
        for simulation in self.simulations:
            simulation.add(*args, rng=random.Random(self.seed), **fields)

    def step(self) -> None:
        outputs = [simulation.step() for simulation in self.simulations]
        self.check_outputs(*outputs)
        self.num_decodes += len(outputs[0].decodes)
        self.num_items += len(outputs[0].items)

    def each_live(self, do) -> None:
        """Call do(simulation, request, draw) for every live request, alike in both."""
        for simulation in self.simulations:
            rng = random.Random(self.seed)
            for request in simulation.live:
                do(simulation, request, rng.random())

    def check_outputs(self, fast: SchedulerOutput, slow: SchedulerOutput) -> None:
        assert not len(slow.decodes)
        assert self._described(0, fast) == self._described(1, slow)
        assert fast.freed_blocks == slow.freed_blocks
        assert (fast.num_tokens, fast.num_seqs) == (slow.num_tokens, slow.num_seqs)
        stats = [simulation.scheduler.stats for simulation in self.simulations]
        assert stats[0] == stats[1]

    def _described(self, which: int, output: SchedulerOutput) -> list[tuple]:
        place = {request: i for i, request in enumerate(self.simulations[which].requests)}
        return [
            (place[i.request], i.start, i.num_tokens, i.samples, i.query, i.request.block_ids)
            for i in output.scheduled
        ]


def assert_equal_batches(batch: ForwardBatch, other: ForwardBatch) -> None:
    for field in dataclasses.fields(batch):
        value, others = (getattr(b, field.name) for b in (batch, other))
        if value is None or others is None:  # what only prompts of embeddings bring
            assert value is others, field.name
        else:
            assert value.dtype == others.dtype, field.name
            assert torch.equal(value, others), field.name


def schedule_and_compare(twins: Twins) -> None:
    """The next step's batches, of a step that is then run."""
    batches = []
    for simulation in twins.simulations:
        schedule = simulation.scheduler.schedule

        def noting(schedule=schedule):
            output = schedule()
            if output.num_seqs:
                batches.append(build_batch(output, twins.block_size, CPU))
            return output

        simulation.scheduler.schedule = noting
    try:
        twins.step()
    finally:
        for simulation in twins.simulations:
            del simulation.scheduler.schedule
    assert len(batches) in (0, 2)
    if batches:
        assert_equal_batches(*batches)


def run_twins(seed: int, scheduler: type[Scheduler] = Scheduler) -> Twins:
    rng = random.Random(seed)
    large = seed % 4 == 0  # more rows and blocks than the arrays begin with
    twins = Twins(
        1000 * seed,
        scheduler,
        num_blocks=600 if large else rng.randint(6, 30),
        block_size=rng.choice([1, 2, 4, 16]),
        max_num_seqs=40 if large else rng.randint(2, 6),
        max_num_batched_tokens=rng.choice([64, 300] if large else [2, 7, 32]),
    )
    capacity = min(40, twins.simulations[0].scheduler.pool.num_usable * twins.block_size)
    for _ in range(4 if large else 12):
        for _ in range(15 if large else rng.randint(0, 3)):
            num_prompt = rng.randint(1, max(1, capacity * 2 // 3))
            twins.add(
                num_prompt,
                rng.randint(1, max(1, capacity - num_prompt)),
                late=rng.random() < 0.15,
                salt=rng.choice([None, b"one", b"one"]),
                alike=rng.random() < 0.7,
                query_token_id=rng.randrange(VOCAB) if rng.random() < 0.1 else None,
                first_output_position=num_prompt + 3 if rng.random() < 0.2 else None,
                stop_token_ids=frozenset(rng.sample(range(VOCAB), rng.choice([0, 1, 20]))),
            )
        for _ in range(rng.randint(0, 8)):
            schedule_and_compare(twins)
        twins.each_live(
            lambda simulation, request, draw: (
                simulation.feed(request) if request in simulation.late and draw < 0.5 else None
            )
        )
        twins.each_live(
            lambda simulation, request, draw: (
                simulation.scheduler.finish(request, "cancelled") if draw < 0.05 else None
            )
        )
    while twins.simulations[0].scheduler.has_requests:
        schedule_and_compare(twins)
        twins.each_live(
            lambda simulation, request, draw: (
                simulation.feed(request) if request in simulation.late else None
            )
        )
    for simulation in twins.simulations:
        simulation.check_outputs()
    return twins


@pytest.mark.parametrize("seed", range(24))
def test_same_steps_as_request_by_request(seed):
    run_twins(seed)


def test_the_workloads_reach_what_they_are_for():
    twins = [run_twins(seed) for seed in range(24)]
    assert sum(each.num_decodes for each in twins) > 3000
    assert sum(each.num_items for each in twins) > 300
    schedulers = [each.simulations[0].scheduler for each in twins]
    assert sum(scheduler.stats.preemptions for scheduler in schedulers) > 20
    assert sum(scheduler.stats.prefix_hit_tokens > 0 for scheduler in schedulers) > 10
    assert any(len(scheduler.rows.block_table) > 16 for scheduler in schedulers)
    assert any(scheduler.rows.block_table.shape[1] > 16 for scheduler in schedulers)


# One rule at a time.


def running(count: int, max_tokens: int = 9, **fields) -> tuple[Scheduler, list[Request]]:
    """Requests of which each has one token of output."""
    scheduler = Scheduler(
        BlockPool(100), block_size=4, max_num_seqs=count, max_num_batched_tokens=500
    )
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    requests = [Request([1, 2, 3], params, **fields) for _ in range(count)]
    for request in requests:
        scheduler.add(request)
    scheduler.advance(scheduler.schedule())
    assert scheduler.append_tokens(requests, [5] * count) == list(range(count)), "first tokens"
    for request in requests:
        assert scheduler.append_token(request, 5) is None
    return scheduler, requests


def decode(scheduler: Scheduler, requests: list[Request], token_ids: list[int]) -> list[int]:
    output = scheduler.schedule()
    assert output.decodes.requests == requests
    assert output.items == []
    scheduler.advance(output)
    return scheduler.append_tokens(requests, token_ids)


def test_a_decode_step_makes_no_items():
    scheduler, requests = running(3)
    assert decode(scheduler, requests, [6, 7, 8]) == []
    assert [request.output_token_ids for request in requests] == [[5, 6], [5, 7], [5, 8]]
    assert [request.num_computed_tokens for request in requests] == [4, 4, 4]


def test_a_stop_token_is_left_to_append_token():
    scheduler, requests = running(3, stop_token_ids=frozenset({40, 41}))
    assert decode(scheduler, requests, [6, 41, 40]) == [1, 2]
    assert [request.output_token_ids for request in requests] == [[5, 6], [5], [5]]
    assert scheduler.append_token(requests[1], 41) == "stop"
    assert scheduler.append_token(requests[2], 40) == "stop"
    assert decode(scheduler, requests[:1], [7]) == []


@pytest.mark.parametrize("count", [MAX_STOP_IDS, MAX_STOP_IDS + 1])
def test_many_stop_tokens(count):
    scheduler, requests = running(2, stop_token_ids=frozenset(range(50, 50 + count)))
    left = decode(scheduler, requests, [6, 50 + count - 1])
    assert left == ([1] if count <= MAX_STOP_IDS else [0, 1])


def test_the_last_token_is_left_to_append_token():
    scheduler, requests = running(2, max_tokens=3)
    assert decode(scheduler, requests, [6, 7]) == []
    assert decode(scheduler, requests, [8, 9]) == [0, 1]
    for request in requests:
        assert scheduler.append_token(request, 8) == "length"


def test_stop_text_is_left_to_append_token():
    class NeverFound:
        matched = None

        def push(self, token_id: int) -> bool:
            return False

    scheduler, requests = running(2, stop_text=NeverFound())
    assert decode(scheduler, requests, [6, 7]) == [0, 1]


def test_requests_that_are_not_the_first_are_left_alone():
    scheduler, requests = running(3)
    scheduler.advance(scheduler.schedule())
    for others in (requests[1:], requests[::-1], requests[:1] + requests[2:]):
        assert scheduler.append_tokens(others, [6] * len(others)) == list(range(len(others)))
    assert [request.output_token_ids for request in requests] == [[5]] * 3


@pytest.mark.parametrize("ended", [0, 1, 2])
def test_a_request_that_ends_while_its_step_runs(ended):
    scheduler, requests = running(3)
    output = scheduler.schedule()
    scheduler.finish(requests[ended], "cancelled")
    scheduler.advance(output)
    rest = [request for request in requests if request.status is RequestStatus.RUNNING]
    assert [request.num_computed_tokens for request in rest] == [4, 4]
    assert requests[ended].num_computed_tokens == 3
    scheduler.append_tokens(rest, [6, 7])
    assert decode(scheduler, rest, [8, 9]) == []
    assert [request.output_token_ids for request in rest] == [[5, 6, 8], [5, 7, 9]]


def test_a_decode_that_needs_more_blocks_than_are_free_preempts_the_youngest():
    scheduler = Scheduler(BlockPool(5), block_size=2, max_num_seqs=4, max_num_batched_tokens=50)
    params = SamplingParams(max_tokens=4, temperature=0.0)
    requests = [Request([1, 2, 3, 4], params) for _ in range(2)]
    for request in requests:
        scheduler.add(request)
    scheduler.advance(scheduler.schedule())
    for request in requests:
        scheduler.append_token(request, 5)
    output = scheduler.schedule()
    assert [item.request for item in output.scheduled] == requests[:1]
    assert requests[1].num_preemptions == 1
    assert len(output.freed_blocks) == 2


def test_decodes_are_the_receivers_own():
    """A step that runs must not see what is scheduled meanwhile."""
    scheduler, requests = running(2)
    output = scheduler.schedule()
    before = build_batch(output, 4, CPU)
    scheduler.advance(output)
    scheduler.append_tokens(requests, [6, 7])
    scheduler.schedule()
    after = build_batch(output, 4, CPU)
    assert_equal_batches(before, after)


# Planted mistakes.


class ForgetsStopTokens(RunningRows):
    def append(self, token_ids):
        self.stop_ids[:] = -1
        return super().append(token_ids)


class ForgetsTheLimit(RunningRows):
    def append(self, token_ids):
        self.num_left[:] += 1
        return super().append(token_ids)


class DoesNotMoveUp(RunningRows):
    def remove(self, row):
        self.num_rows -= 1


class KeepsOldBlocks(RunningRows):
    def remove(self, row):
        table = self.block_table.copy()
        super().remove(row)
        self.block_table = table


class TakesWaitingRows(RunningRows):
    def num_ready(self):
        return self.num_rows


class ForgetsShifts(RunningRows):
    def decodes(self, requests):
        decodes = super().decodes(requests)
        lengths = decodes.seq_lens.astype(np.int64)
        return dataclasses.replace(decodes, positions=lengths - 1)


class TakesOneTooFew(RunningRows):
    def num_ready(self):
        return max(0, super().num_ready() - 1)


def scheduler_with(rows: type[RunningRows]) -> type[Scheduler]:
    class Broken(Scheduler):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.rows = rows()

    return Broken


@pytest.mark.parametrize(
    "broken",
    [
        ForgetsStopTokens,
        ForgetsTheLimit,
        DoesNotMoveUp,
        KeepsOldBlocks,
        TakesWaitingRows,
        ForgetsShifts,
    ],
    ids=lambda cls: cls.__name__,
)
def test_planted_mistake_is_found(broken):
    def run_all() -> None:
        for seed in range(24):
            run_twins(seed, scheduler_with(broken))

    with pytest.raises(AssertionError):
        run_all()


def test_how_many_rows_are_taken_at_once_changes_nothing():
    """The rows that are left go request by request."""
    for seed in range(6):
        run_twins(seed, scheduler_with(TakesOneTooFew))
