"""The scheduler, with ints only: random workloads, any order of events, and one rule at a time.

Every step of a `Simulation` is checked against all invariants; see simulation.py.
"""

from __future__ import annotations

import ast
import functools
import random
import subprocess
import sys
from pathlib import Path

import pytest
from simulation import VOCAB, Simulation

import fastgen
from fastgen.config import SamplingParams
from fastgen.engine.request import Request, RequestStatus
from fastgen.engine.scheduler import ScheduledRequest

# No torch.


@pytest.mark.parametrize(
    "name", ["scheduler", "scheduler_output", "request", "request_heap", "block_pool"]
)
def test_source_imports_no_torch(name):
    source = (Path(fastgen.__file__).parent / "engine" / f"{name}.py").read_text()
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module or "")
    assert imported, "the file was not read"
    assert not [module for module in imported if module.split(".")[0] == "torch"]


def test_importing_the_scheduler_loads_no_torch():
    code = "import sys, fastgen.engine.scheduler; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# Random workloads.


def run_workload(seed: int, **classes) -> Simulation:
    """Requests arrive, are cancelled and get late tokens at random, in a pool that is too small."""
    rng = random.Random(seed)
    simulation = Simulation(
        num_blocks=rng.randint(4, 20),
        block_size=rng.choice([1, 2, 4, 16]),
        max_num_seqs=rng.randint(1, 6),
        max_num_batched_tokens=rng.choice([1, 2, 7, 32]),
        **classes,
    )
    capacity = simulation.scheduler.pool.num_usable * simulation.scheduler.block_size
    priorities = rng.choice([[0], [0, 0, 1, -2]])
    for _ in range(rng.randint(5, 25)):
        for _ in range(rng.randint(0, 3)):
            num_prompt = rng.randint(1, max(1, capacity * 2 // 3))
            simulation.add(
                num_prompt,
                rng.randint(1, max(1, capacity - num_prompt)),
                late=rng.random() < 0.2,
                salt=rng.choice([None, b"one", b"two", b"two"]),
                alike=rng.random() < 0.8,
                rng=rng,
                query_token_id=rng.randrange(VOCAB) if rng.random() < 0.2 else None,
                stop_token_ids=frozenset(rng.sample(range(VOCAB), 3)),
                priority=rng.choice(priorities),
                deadline=simulation.now + rng.randint(0, 60) if rng.random() < 0.1 else None,
            )
        for _ in range(rng.randint(0, 8)):
            simulation.expire()
            simulation.step()
        for request in simulation.live:
            if request in simulation.late and rng.random() < 0.5:
                simulation.feed(request)
            if rng.random() < 0.02:
                simulation.undo_step()
            if rng.random() < 0.05:
                simulation.scheduler.finish(request, "cancelled")
                simulation.check_state()
    simulation.run_to_end(2000)
    simulation.check_outputs()
    return simulation


plain_workload = functools.cache(run_workload)


@pytest.mark.parametrize("seed", range(40))
def test_random_workload(seed):
    plain_workload(seed)


def test_random_workloads_reach_what_they_are_for():
    simulations = [plain_workload(seed) for seed in range(40)]
    hits = [simulation.scheduler.stats.prefix_hit_tokens for simulation in simulations]
    assert sum(hit > 0 for hit in hits) > 20
    reasons = {
        reason for simulation in simulations for reason in simulation.scheduler.stats.finished
    }
    assert reasons == {"stop", "length", "cancelled", "deadline"}
    assert sum(simulation.scheduler.stats.preemptions for simulation in simulations) > 50
    finished = sum(sum(s.scheduler.stats.finished.values()) for s in simulations)
    assert finished == sum(len(s.requests) for s in simulations) > 200


# One rule at a time.


def test_prompt_within_the_budget_is_one_step():
    simulation = Simulation(num_blocks=10)
    request = simulation.add(7, 3)
    output = simulation.step()
    assert output.scheduled == [ScheduledRequest(request, 0, 7, samples=True)]
    assert len(request.output_token_ids) == 1


def test_long_prompt_is_chunked():
    simulation = Simulation(num_blocks=20, max_num_batched_tokens=16)
    request = simulation.add(50, 2)
    pieces = [simulation.step().scheduled for _ in range(4)]
    assert pieces == [
        [ScheduledRequest(request, start, count, samples=start + count == 50)]
        for start, count in [(0, 16), (16, 16), (32, 16), (48, 2)]
    ]
    assert len(request.output_token_ids) == 1
    assert simulation.run_to_end() == 1
    simulation.check_outputs()


def test_blocks_are_taken_as_tokens_are_computed():
    simulation = Simulation(num_blocks=20, block_size=4, max_num_batched_tokens=6)
    request = simulation.add(16, 3)
    lengths = []
    while not request.finish_reason:
        simulation.step()
        lengths.append(len(request.block_ids))
    assert lengths == [2, 3, 4, 5, 0], "16 tokens fill four blocks; the 17th opens the fifth"
    assert simulation.scheduler.pool.num_used == 0


def test_oldest_is_served_first_and_the_rest_of_the_budget_goes_on():
    simulation = Simulation(num_blocks=30, max_num_batched_tokens=16)
    first, second, third = (simulation.add(10, 5) for _ in range(3))
    assert [(i.request, i.num_tokens, i.samples) for i in simulation.step().scheduled] == [
        (first, 10, True),
        (second, 6, False),
    ]
    assert [(i.request, i.num_tokens, i.samples) for i in simulation.step().scheduled] == [
        (first, 1, True),
        (second, 4, True),
        (third, 10, True),
    ]


def test_max_num_seqs_holds_the_rest_back():
    simulation = Simulation(num_blocks=30, max_num_seqs=2, max_num_batched_tokens=100)
    requests = [simulation.add(3, 2) for _ in range(3)]
    assert [item.request for item in simulation.step().scheduled] == requests[:2]
    assert [item.request for item in simulation.step().scheduled] == requests[:2]
    assert [item.request for item in simulation.step().scheduled] == requests[2:]


def test_queue_while_the_pool_is_full():
    """A request whose tokens do not fit waits, even if a smaller and younger one would fit."""
    simulation = Simulation(num_blocks=5, block_size=4, max_num_batched_tokens=100)
    first = simulation.add(12, 2)
    large = simulation.add(8, 1)
    small = simulation.add(2, 1)
    assert [item.request for item in simulation.step().scheduled] == [first]
    assert list(simulation.scheduler.waiting) == [large, small]
    assert [item.request for item in simulation.step().scheduled] == [first]
    assert [item.request for item in simulation.step().scheduled] == [large, small]
    simulation.check_outputs()


def test_exactly_full_pool_needs_no_preemption():
    simulation = Simulation(num_blocks=5, block_size=4)
    simulation.add(10, 7)  # 16 tokens in the cache at the end: all four blocks
    simulation.run_to_end()
    simulation.check_outputs()
    assert simulation.scheduler.stats.preemptions == 0


def test_youngest_is_preempted_and_starts_over():
    simulation = Simulation(num_blocks=5, block_size=4, max_num_batched_tokens=100)
    old, young = simulation.add(7, 8), simulation.add(7, 8)
    simulation.step()
    simulation.step()
    assert simulation.scheduler.pool.num_free == 0
    before = list(young.output_token_ids)
    assert len(before) == 2
    output = simulation.step()
    assert [item.request for item in output.scheduled] == [old]
    assert output.freed_blocks
    assert young.status is RequestStatus.PREEMPTED
    assert (young.num_computed_tokens, young.block_ids, young.num_preemptions) == (0, [], 1)
    assert young.output_token_ids == before, "what was generated is kept"
    while young.status is RequestStatus.PREEMPTED:
        simulation.step()
    assert old.finish_reason == "length"
    assert young.output_token_ids[:2] == before
    assert young.num_computed_tokens == 9, "prompt and outputs were computed again"
    simulation.run_to_end()
    simulation.check_outputs()
    assert (old.num_preemptions, simulation.scheduler.stats.preemptions) == (0, 1)


def test_the_only_running_request_is_never_preempted():
    simulation = Simulation(num_blocks=3, block_size=2, max_num_batched_tokens=1)
    request = simulation.add(1, 4)
    simulation.run_to_end()
    simulation.check_outputs()
    assert request.num_preemptions == 0


def test_preempted_request_comes_before_those_that_never_ran():
    simulation = Simulation(num_blocks=5, block_size=4, max_num_seqs=2, max_num_batched_tokens=100)
    old, young, new = (simulation.add(7, 8) for _ in range(3))
    while not young.num_preemptions:
        simulation.step()
    assert list(simulation.scheduler.waiting) == [young, new]
    assert simulation.scheduler.running == [old]


def test_late_tokens_just_wait():
    """A lockstep row that has caught up keeps its blocks and is left alone."""
    simulation = Simulation(num_blocks=10)
    late, other = simulation.add(5, 3, late=True), simulation.add(3, 4)
    assert [item.request for item in simulation.step().scheduled] == [late, other]
    blocks = list(late.block_ids)
    for _ in range(3):
        assert [item.request for item in simulation.step().scheduled] == [other]
        assert late.block_ids == blocks
    assert other.finish_reason == "length"
    assert simulation.step().scheduled == [], "nothing to compute, although a request is running"
    assert simulation.scheduler.has_requests
    simulation.feed(late)
    assert [(i.request, i.start, i.num_tokens) for i in simulation.step().scheduled] == [
        (late, 5, 1)
    ]


def test_late_token_of_a_preempted_request():
    simulation = Simulation(num_blocks=5, block_size=4, max_num_batched_tokens=100)
    simulation.add(7, 9)
    late = simulation.add(7, 5, late=True)
    while not late.num_preemptions:
        simulation.step()
    simulation.feed(late)
    assert late.status is RequestStatus.PREEMPTED
    assert len(late.output_token_ids) == 1
    simulation.run_to_end()
    simulation.check_outputs()


def test_last_late_token_ends_a_preempted_request():
    simulation = Simulation(num_blocks=5, block_size=4, max_num_batched_tokens=100)
    old, late = simulation.add(7, 9), simulation.add(7, 1, late=True)
    while not late.num_preemptions:
        simulation.step()
    simulation.feed(late)
    assert late.finish_reason == "length"
    assert list(simulation.scheduler.waiting) == []
    assert simulation.scheduler.running == [old]


def test_query_token_runs_once_after_the_prompt():
    simulation = Simulation(num_blocks=10, max_num_batched_tokens=100)
    request = simulation.add(8, 3, query_token_id=5, query_position=11)
    assert simulation.step().scheduled == [ScheduledRequest(request, 0, 8, samples=False)]
    assert request.output_token_ids == []
    query = ScheduledRequest(request, 8, 1, samples=True, query=(5, 11))
    assert simulation.step().scheduled == [query]
    assert len(request.block_ids) == 2, "a query token takes no slot"
    assert request.num_computed_tokens == 8
    assert simulation.step().scheduled == [ScheduledRequest(request, 8, 1, samples=True)]
    simulation.run_to_end()
    simulation.check_outputs()


def test_query_token_does_not_run_again_before_a_late_token():
    simulation = Simulation(num_blocks=10)
    request = simulation.add(4, 2, late=True, query_token_id=5)
    simulation.step()
    assert simulation.step().scheduled[0].query is not None
    assert simulation.step().scheduled == []
    simulation.run_to_end()
    simulation.check_outputs()
    assert request.finish_reason == "length"


def test_query_token_runs_again_after_a_preemption():
    simulation = Simulation(num_blocks=5, block_size=4, max_num_batched_tokens=100)
    old = simulation.add(7, 9)
    asked = simulation.add(8, 2, late=True, query_token_id=5)
    while not asked.num_preemptions:
        simulation.step()
    assert asked.query_done is False
    while not old.finish_reason:
        simulation.step()
    simulation.run_to_end()
    simulation.check_outputs()


def test_prompt_of_a_query_token_only():
    simulation = Simulation(num_blocks=5)
    request = simulation.add(0, 3, query_token_id=5)
    query = ScheduledRequest(request, 0, 1, samples=True, query=(5, 0))
    assert simulation.step().scheduled == [query]
    simulation.run_to_end()
    simulation.check_outputs()


@pytest.mark.parametrize("status", ["new", "running", "preempted", "finished"])
def test_finish_in_any_state_frees_everything(status):
    simulation = Simulation(num_blocks=5, block_size=4, max_num_batched_tokens=100)
    simulation.add(7, 9)
    request = simulation.add(7, 9)
    match status:
        case "running":
            simulation.step()
        case "preempted":
            while not request.num_preemptions:
                simulation.step()
        case "finished":
            simulation.run_to_end()
    simulation.scheduler.finish(request, "cancelled")
    first_reason = request.finish_reason
    assert first_reason == ("length" if status == "finished" else "cancelled")
    finish_time = request.finish_time
    simulation.scheduler.finish(request, "error", RuntimeError("later"))
    assert (request.finish_reason, request.error) == (first_reason, None), "the first end counts"
    assert request.finish_time == finish_time
    assert request.block_ids == []
    simulation.run_to_end()
    simulation.check_outputs()
    assert sum(simulation.scheduler.stats.finished.values()) == 2


def test_stop_token_ends_at_once_and_is_the_last_token():
    simulation = Simulation(num_blocks=20)
    free = simulation.add(5, 20, rng=random.Random(3))
    simulation.run_to_end()
    stop = free.output_token_ids[4]
    expected = free.output_token_ids[: free.output_token_ids.index(stop) + 1]
    stopped = simulation.add(
        5, 20, rng=random.Random(3), stop_token_ids=frozenset([stop, VOCAB + 1])
    )
    simulation.run_to_end()
    assert (stopped.output_token_ids, stopped.finish_reason) == (expected, "stop")


def test_stop_token_as_the_last_allowed_token_is_a_stop():
    simulation = Simulation(num_blocks=20)
    request = simulation.add(5, 1, stop_token_ids=frozenset(range(VOCAB)))
    simulation.run_to_end()
    assert request.finish_reason == "stop"


def test_tokens_after_the_end_are_ignored():
    simulation = Simulation(num_blocks=5)
    request = simulation.add(3, 1)
    simulation.run_to_end()
    assert simulation.scheduler.append_token(request, 1) == "length"
    assert len(request.output_token_ids) == 1


def test_request_larger_than_the_pool_is_our_own_mistake():
    simulation = Simulation(num_blocks=3, block_size=4)
    fits = Request([1] * 5, SamplingParams(max_tokens=4))  # 8 tokens: the last is never computed
    too_large = Request([1] * 5, SamplingParams(max_tokens=5))
    assert simulation.scheduler.fits([fits])
    assert not simulation.scheduler.fits([too_large])
    assert not simulation.scheduler.fits([fits, fits])
    with pytest.raises(AssertionError, match="larger than the pool"):
        simulation.scheduler.add(too_large)
    assert not simulation.scheduler.has_requests


def test_freed_blocks_are_told_once():
    simulation = Simulation(num_blocks=10, block_size=4)
    request = simulation.add(6, 1)
    simulation.step()
    assert request.finish_reason == "length"
    assert sorted(simulation.scheduler.schedule().freed_blocks) == [1, 2]
    assert simulation.scheduler.schedule().freed_blocks == []


def test_cache_waste_by_hand():
    simulation = Simulation(num_blocks=10, block_size=4, max_num_batched_tokens=100)
    assert simulation.scheduler.stats.cache_waste == 0.0
    simulation.add(5, 2)  # 5 of 8 slots, then 6 of 8
    simulation.step()
    assert simulation.scheduler.stats.cache_waste == 3 / 8
    simulation.step()
    assert simulation.scheduler.stats.cache_waste == (3 / 8 + 2 / 8) / 2
    simulation.step()
    assert simulation.scheduler.stats.cache_waste == (3 / 8 + 2 / 8) / 2, (
        "an empty step counts nothing"
    )
    simulation.add(4, 1)
    simulation.add(1, 1)  # together 5 of 8 slots
    simulation.step()
    assert simulation.scheduler.stats.cache_waste == (3 / 8 + 2 / 8 + 3 / 8) / 3


def test_cache_waste_of_chunks_and_queries():
    simulation = Simulation(num_blocks=10, block_size=4, max_num_batched_tokens=6)
    simulation.add(8, 1, query_token_id=3)
    wastes = [2 / 8, 0.0, 0.0]  # 6 of 8, 8 of 8, and the query token that is not stored
    for steps in range(1, 4):
        simulation.step()
        assert simulation.scheduler.stats.cache_waste == sum(wastes[:steps]) / steps
