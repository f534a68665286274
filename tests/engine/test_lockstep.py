"""Lockstep groups: rows whose tokens the caller chooses, beside others and short of blocks."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from engine_helpers import (  # noqa: F401 - the fixtures are used by name
    BLOCK_BYTES,
    Boom,
    core_of,
    engine_fixture,
    expected_fixture,
    gate_fixture,
    gated_fixture,
    greedy,
    make_engine_fixture,
    model_fixture,
    raise_once,
    wait_until,
    within,
)
from tiny_models import prompts

import fastgen
from fastgen import RequestFailedError
from fastgen.engine.lockstep import LockstepGroup
from fastgen.engine.request import Request


def lockstep_group(core, rows: list[list[int]], max_tokens: int) -> LockstepGroup:
    return LockstepGroup(core, [Request(row, greedy(max_tokens)) for row in rows])


def drive(group: LockstepGroup, num_tokens: int) -> list[list[int]]:
    """Greedy tokens of every row, chosen by the caller."""
    columns = []
    with group:
        for step in range(num_tokens):
            columns.append(group.next_logits().argmax(-1).tolist())
            if step + 1 < num_tokens:
                group.feed(columns[-1])
    return [list(row) for row in zip(*columns, strict=True)]


@pytest.mark.parametrize(
    "fields",
    [{}, {"max_num_batched_tokens": 7}, {"kv_cache_memory_bytes": 9 * BLOCK_BYTES}],
    ids=["default", "chunks-of-7", "tiny-pool"],
)
def test_lockstep_rows_beside_other_requests(make_engine, expected, fields):
    rows, tokens = expected
    engine = make_engine(**fields, poisoned=True)
    others = [engine.submit(row, greedy(20)) for row in rows[2:]]
    own = within(drive, lockstep_group(core_of(engine), rows[:2], 20), 20)
    assert own == [row[:20] for row in tokens[:2]]
    for request, row in zip(others, tokens[2:], strict=True):
        assert within(engine.result, request).token_ids == row[:20]


def test_lockstep_group_must_fit_together(make_engine):
    engine = make_engine(kv_cache_memory_bytes=5 * BLOCK_BYTES, max_num_seqs=2)
    for rows, max_tokens in ((prompts(20, 20), 20), (prompts(1, 1, 1), 1)):
        group = lockstep_group(core_of(engine), rows, max_tokens)
        with pytest.raises(fastgen.CapacityError, match="together"):
            within(drive, group, 1)
    assert len(within(drive, lockstep_group(core_of(engine), prompts(20, 5), 9), 2)) == 2


def test_leaving_a_lockstep_group_early_ends_its_rows(engine, expected):
    group = lockstep_group(core_of(engine), expected[0][:2], 300)

    def leave() -> None:
        with group:
            group.next_logits()
            raise Boom

    with pytest.raises(Boom):
        within(leave)
    assert [request.finish_reason for request in group.requests] == ["cancelled"] * 2
    assert [request.block_ids for request in group.requests] == [[], []]


class CrowdedGroup:
    """A pool of six blocks, all taken: an older request has two and needs a third after two more
    steps, a lockstep group's two rows have two each."""

    def __init__(self, make_engine, gated, expected, max_tokens_of_old: int) -> None:
        engine = make_engine(kv_cache_memory_bytes=7 * BLOCK_BYTES)
        rows = [expected[0][2], expected[0][3][:17]]
        outputs = within(engine.generate, rows, greedy(3))
        self.tokens = [output.token_ids for output in outputs]
        self.core, gate = core_of(engine), gated(engine)
        self.old = engine.submit(prompts(30, seed=7)[0], greedy(max_tokens_of_old))
        gate.wait()
        self.group = lockstep_group(self.core, rows, 10)
        self.young = self.group.requests[1]
        self.group.__enter__()  # queued; the caller leaves it
        gate.open()
        assert within(self.group.next_logits).argmax(-1).tolist() == self.column(0)
        wait_until(lambda: self.young.num_preemptions)

    def column(self, index: int) -> list[int]:
        return [tokens[index] for tokens in self.tokens]


def test_lockstep_row_that_is_computed_again_before_its_token_comes(make_engine, gated, expected):
    """The group has its logits; then its youngest row loses its blocks and gets them back.

    What that row offers again is old news: it must not count for the next token.
    """
    crowded = CrowdedGroup(make_engine, gated, expected, max_tokens_of_old=18)
    group, young = crowded.group, crowded.young
    with contextlib.ExitStack() as stack:
        stack.push(group)
        wait_until(lambda: crowded.old.finish_reason)
        wait_until(lambda: young.num_computed_tokens == young.num_tokens)
        for index in (1, 2):
            group.feed(crowded.column(index - 1))
            assert within(group.next_logits).argmax(-1).tolist() == crowded.column(index)


def test_lockstep_token_comes_while_a_row_has_no_blocks(make_engine, gated, expected):
    crowded = CrowdedGroup(make_engine, gated, expected, max_tokens_of_old=18)
    with contextlib.ExitStack() as stack:
        stack.push(crowded.group)
        for index in (1, 2):
            crowded.group.feed(crowded.column(index - 1))
            assert within(crowded.group.next_logits).argmax(-1).tolist() == crowded.column(index)


def test_reading_the_cache_of_a_row_without_blocks(make_engine, gated, expected):
    """generate() reads the rows' keys when it is done; a row may have been preempted just then."""
    crowded = CrowdedGroup(make_engine, gated, expected, max_tokens_of_old=18)
    with contextlib.ExitStack() as stack:
        stack.push(crowded.group)
        caches = within(crowded.core.read_caches, crowded.group.requests)
    assert [layers[0][0].shape[1] for layers in caches] == [17, 17]


def test_two_lockstep_groups_made_at_the_same_time(make_engine, expected, gated):
    """Two threads make their requests in turn; there is room for one group and a part of the other.

    If the rows were served in the order in which they were made, each group would hold places
    that the other one waits for.
    """
    rows, tokens = expected
    engine = make_engine(max_num_seqs=4)
    gate = gated(engine)
    dummy = engine.submit(rows[0], greedy(2))
    gate.wait()
    made = [Request(rows[i // 2], greedy(5)) for i in range(6)]
    groups = [LockstepGroup(core_of(engine), made[i::2]) for i in range(2)]
    with ThreadPoolExecutor(2) as executor:
        futures = [executor.submit(within, drive, group, 5) for group in groups]
        wait_until(lambda: len(core_of(engine)._mailbox._messages) == 2)
        gate.open()
        results = [future.result() for future in futures]
    assert results == [[row[:5] for row in tokens[:3]]] * 2
    assert within(engine.result, dummy).finish_reason == "length"


def test_planted_stale_logits_are_found(engine, expected):
    """A group that gives out the last step's logits again does not pass for a right one."""
    rows, tokens = expected

    class GivesOldLogits(LockstepGroup):
        first: torch.Tensor | None = None

        def next_logits(self):
            logits = super().next_logits()
            self.first = logits if self.first is None else self.first
            return self.first

    group = GivesOldLogits(core_of(engine), [Request(row, greedy(5)) for row in rows[:2]])
    assert within(drive, group, 5) != [row[:5] for row in tokens[:2]]


def test_failing_step_of_a_lockstep_group(engine, gate, expected):
    group = lockstep_group(core_of(engine), expected[0][:2], 5)
    gate._run = raise_once(gate._run, Boom("no luck"))
    gate.open()

    def drive() -> None:
        with group:
            group.next_logits()

    with pytest.raises(RequestFailedError, match="Boom"):
        within(drive)
