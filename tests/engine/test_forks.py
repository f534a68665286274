"""Requests that go on from one another's blocks: the scheduler with ints, and the real cache."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
import torch
from engine_helpers import (  # noqa: F401 - the fixtures are used by name
    BLOCK_BYTES,
    core_of,
    engine_fixture,
    expected_fixture,
    greedy,
    make_engine_fixture,
    model_fixture,
    within,
)
from fastgen.passes import CacheSpec, LayerCache
from fork_simulation import ForkSimulation, run_fork_workload
from tiny_models import VOCAB, prompts, tiny_model

from fastgen.engine.block_pool import BlockPool
from fastgen.engine.kv_cache import KVCache
from fastgen.engine.lockstep import LockstepGroup
from fastgen.engine.request import Request
from fastgen.engine.runner import Runner
from fastgen.engine.scheduler import Scheduler

# The scheduler, with ints only.


@pytest.mark.parametrize("seed", range(40))
def test_random_forks(seed):
    run_fork_workload(seed)


def test_random_forks_reach_what_they_are_for():
    simulations = [run_fork_workload(seed) for seed in range(40)]
    stats = [simulation.scheduler.stats for simulation in simulations]
    assert sum(each.forks for each in stats) > 300
    assert sum(each.block_copies for each in stats) > 100
    rows = [row for each in simulations for group in each.groups for row in group.rows]
    assert sum(row.num_preemptions for row in rows if row.output_token_ids) > 20
    assert sum(each.prefix_hit_tokens for each in stats) > 100


def one_group(num_beams: int, num_prompt: int, block_size: int = 4, **classes: Any):
    """A group of one prompt, forked once: all of its rows go on from the first."""
    simulation = ForkSimulation(random.Random(0), num_blocks=40, block_size=block_size, **classes)
    group = simulation.add_group(1, num_beams, num_prompt, 20)
    assert group is not None
    output = simulation.step()
    assert [item.request for item in output.scheduled] == [group.rows[0]]
    assert simulation.scheduler.pool.num_used == -(-num_prompt // block_size)
    simulation.feed(group.rows[0])
    return simulation, group


def test_the_prompt_is_computed_once_and_its_full_blocks_stay_shared():
    simulation, group = one_group(num_beams=3, num_prompt=10)
    assert simulation.scheduler.pool.num_used == 3
    simulation.step()
    assert simulation.scheduler.pool.num_used == 2 + 3
    assert {tuple(row.block_ids[:2]) for row in group.rows} == {tuple(group.rows[0].block_ids[:2])}


def test_the_last_of_those_who_write_keeps_the_block():
    simulation, group = one_group(num_beams=3, num_prompt=10)
    shared = group.rows[0].block_ids[-1]
    output = simulation.step()
    assert [source for source, _ in output.block_copies] == [shared, shared]
    assert [shared in row.block_ids for row in group.rows] == [False, False, True]


@pytest.mark.parametrize("num_prompt", [4, 8])
def test_full_blocks_are_never_copied(num_prompt):
    simulation, _ = one_group(num_beams=3, num_prompt=num_prompt)
    assert simulation.step().block_copies == []
    assert simulation.scheduler.stats.block_copies == 0


def test_rows_that_change_places_copy_nothing():
    simulation, group = one_group(num_beams=2, num_prompt=9)
    simulation.step()
    tables = [list(row.block_ids) for row in group.rows]
    simulation.scheduler.fork(group.rows, [1, 0])
    assert [row.block_ids for row in group.rows] == tables[::-1]
    assert not any(row.shares_last_block for row in group.rows)


def test_blocks_of_a_row_that_nobody_goes_on_from_are_free():
    simulation, group = one_group(num_beams=2, num_prompt=9)
    simulation.step()
    assert simulation.scheduler.pool.num_used == 2 + 2
    simulation.scheduler.fork(group.rows, [0, 0])
    assert simulation.scheduler.pool.num_used == 3
    simulation.check_state()


def test_a_row_goes_on_from_one_that_lost_its_blocks():
    """Its blocks are given up, and what it takes over is computed again."""
    simulation, group = one_group(num_beams=2, num_prompt=9)
    simulation.step()
    first, second = group.rows
    simulation.scheduler._preempt(second)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulation, "choose_parents", lambda _: [1, 0])
        simulation.feed(first)
    assert (first.block_ids, first.num_computed_tokens) == ([], 0)
    simulation.check_state()
    simulation.run_to_end()
    simulation.check_outputs()


# Mistakes planted in the scheduler and its pool.


class NeverCopies(Scheduler):
    def _must_copy(self, request):
        return False


class ForgetsTheCopies(Scheduler):
    def schedule(self):
        output = super().schedule()
        output.block_copies = []
        return output


class ForgetsWhoShares(Scheduler):
    def fork(self, requests, parents):
        super().fork(requests, parents)
        for request in requests:
            request.shares_last_block = False


class TellsTheRowsNothing(Scheduler):
    """The arrays of the running rows keep the tables from before the fork."""

    def fork(self, requests, parents):
        set_blocks, self.rows.set_blocks = self.rows.set_blocks, lambda row, blocks: None
        try:
            super().fork(requests, parents)
        finally:
            self.rows.set_blocks = set_blocks


class ForksOneByOne(Scheduler):
    """A row that was overwritten is gone on from."""

    def fork(self, requests, parents):
        for index, parent in enumerate(parents):
            places = list(range(len(requests)))
            places[index] = parent
            super().fork(requests, places)


class KeepsItsDigests(Scheduler):
    """Blocks are published under the tokens of the row's former history."""

    def fork(self, requests, parents):
        before = [request.block_digests for request in requests]
        super().fork(requests, parents)
        for request, digests in zip(requests, before, strict=True):
            request.block_digests = digests


class HoldsNothing(BlockPool):
    def hold(self, blocks):
        pass


@pytest.mark.parametrize(
    "broken",
    [
        NeverCopies,
        ForgetsTheCopies,
        ForgetsWhoShares,
        TellsTheRowsNothing,
        ForksOneByOne,
        KeepsItsDigests,
        HoldsNothing,
    ],
    ids=lambda cls: cls.__name__,
)
def test_planted_mistake_is_found(broken):
    classes: dict = {"pool" if issubclass(broken, BlockPool) else "scheduler": broken}

    def run_all() -> None:
        for seed in range(40):
            run_fork_workload(seed, **classes)

    with pytest.raises((AssertionError, KeyError, IndexError)):
        run_all()


# The tensors.


def test_blocks_are_copied_as_they_were_before_all_copies():
    spec = CacheSpec(
        [LayerCache("kv", 2, 4, 3, torch.float32, 0), LayerCache("kv", 1, 4, 4, torch.bfloat16, 0)]
    )
    cache = KVCache(spec, num_blocks=5, block_size=2, device=torch.device("cpu"))
    for number, tensor in enumerate(cache.tensors.values()):
        tensor.copy_(torch.arange(5).view(5, 1, 1, 1) + 10 * number)
    cache.copy_blocks([(1, 2), (3, 1), (1, 4)])
    for number, tensor in enumerate(cache.tensors.values()):
        assert tensor[:, 0, 0, 0].tolist() == [10 * number + block for block in (0, 3, 1, 3, 1)]
        assert (tensor == tensor[:, :1, :1, :1]).all()


# The engine.


class Driver:
    """A group whose rows go on from random ones; every step's logits against the plain model's."""

    def __init__(self, core: Any, rows: list[list[int]], num_beams: int, max_tokens: int) -> None:
        self.plain = tiny_model("qwen2")
        self.histories = [list(row) for row in rows for _ in range(num_beams)]
        requests = [Request(list(row), greedy(max_tokens)) for row in self.histories]
        self.group, self.num_beams = LockstepGroup(core, requests, num_beams), num_beams
        self.max_tokens, self.rng = max_tokens, random.Random(0)

    def run(self) -> float:
        """The largest difference of a logit."""
        largest = 0.0
        with self.group:
            for step in range(self.max_tokens):
                logits = self.group.next_logits()
                with torch.no_grad():
                    plain = torch.stack(
                        [self.plain(torch.tensor([ids])).logits[0, -1] for ids in self.histories]
                    )
                difference = (logits - plain).abs().max().item()
                largest = max(largest, difference) if difference == difference else float("inf")
                if step + 1 < self.max_tokens:
                    self.choose()
        return largest

    def choose(self) -> None:
        rows = range(len(self.histories))
        parents = [row - row % self.num_beams + self.rng.randrange(self.num_beams) for row in rows]
        token_ids = [self.rng.randrange(VOCAB) for _ in rows]
        self.histories = [
            [*self.histories[parent], token_id]
            for parent, token_id in zip(parents, token_ids, strict=True)
        ]
        self.group.feed(token_ids, parents)


NOISE = 1e-4  # of two fp32 forwards of these models, whose logits go up to 30


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"prefix_cache": False},
        {"max_num_batched_tokens": 7},
        {"kv_cache_memory_bytes": 23 * BLOCK_BYTES},
    ],
    ids=["default", "no-prefix-cache", "chunks-of-7", "tiny-pool"],
)
def test_forked_rows_beside_other_requests(make_engine, expected, fields, monkeypatch):
    rows, tokens = expected
    # Slow steps: the others must not be done before the forked rows have grown.
    run = Runner.run
    monkeypatch.setattr(Runner, "run", lambda *args: time.sleep(0.02) or run(*args))
    engine = make_engine(**fields, poisoned=True)
    others = [engine.submit(row, greedy(40)) for row in rows[2:]]
    assert within(Driver(core_of(engine), [rows[0], rows[2]], 4, 20).run) < NOISE
    for request, row in zip(others, tokens[2:], strict=True):
        assert within(engine.result, request).token_ids == row
    metrics = engine.metrics()
    assert metrics.num_free_blocks == metrics.num_blocks
    assert (metrics.preemptions > 0) == ("kv_cache_memory_bytes" in fields)


def test_counters_of_forks(engine):
    (row,) = prompts(40)
    assert within(Driver(core_of(engine), [row], 4, 3).run) < NOISE
    metrics = engine.metrics()
    assert metrics.computed_tokens == 40 + 2 * 4
    assert metrics.prompt_tokens == 40
    assert metrics.output_tokens == 1 + 2 * 4
    assert 3 <= metrics.forks <= 7
    assert 3 <= metrics.block_copies <= 6


def test_planted_mistake_in_the_cache_is_found(engine, expected, monkeypatch):
    """Blocks that are handed out as copies and hold what they held."""
    monkeypatch.setattr(KVCache, "copy_blocks", lambda *_: None)
    driver = Driver(core_of(engine), expected[0][:1], 4, 8)
    core_of(engine).poison_freed_blocks = True
    assert not within(driver.run) < NOISE


def test_planted_copy_after_the_poison_is_found(make_engine, expected, monkeypatch):
    """Freed blocks lose their content after the copies: what was copied is NaN."""

    def prepare(self, output, poison):
        if output.block_copies:
            self.kv_cache.copy_blocks(output.block_copies)
        self.kv_cache.poison(output.freed_blocks)

    monkeypatch.setattr(Runner, "prepare_blocks", prepare)
    engine = make_engine(poisoned=True)
    assert within(Driver(core_of(engine), expected[0][:1], 4, 8).run) == float("inf")


def test_the_first_feed_of_beams_names_their_parents(engine):
    requests = [Request(row, greedy(3)) for row in prompts(5, 5)]
    with LockstepGroup(core_of(engine), requests, 2) as group:
        within(group.next_logits)
        with pytest.raises(AssertionError, match="no parents"):
            group.feed([1, 2])
