"""Pause and resume, shutdown with and without draining, and a queue that is full."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from engine_helpers import (  # noqa: F401 - the fixtures are used by name
    core_of,
    engine_fixture,
    expected_fixture,
    gate_fixture,
    gated_fixture,
    greedy,
    make_engine_fixture,
    model_fixture,
    wait_until,
    within,
)

import fastgen
from fastgen import EngineClosedError, QueueFullError


def steps(engine) -> int:
    return within(engine.metrics).engine_steps


def test_no_step_runs_while_paused(engine, expected):
    rows, tokens = expected
    within(engine.generate, rows[:1], greedy(2))
    within(engine.pause)
    before = steps(engine)
    requests = [engine.submit(row, greedy(20)) for row in rows[:3]]
    wait_until(lambda: within(engine.metrics).num_waiting == 3)
    within(engine.cancel, requests[1])
    assert steps(engine) == before
    within(engine.resume)
    outputs = [within(engine.result, request) for request in requests]
    assert [output.token_ids for output in outputs] == [tokens[0][:20], [], tokens[2][:20]]
    assert [output.finish_reason for output in outputs] == ["length", "cancelled", "length"]


def test_running_requests_go_on_where_they_were(engine, gate, expected):
    rows, tokens = expected
    request = engine.submit(rows[0], greedy(20))
    gate.wait()
    gate.step(3)
    gate.open_once_posted(engine.pause)
    before = steps(engine)
    assert not request.done.is_set()
    within(engine.resume)
    assert within(engine.result, request).token_ids == tokens[0][:20]
    assert steps(engine) > before


@pytest.mark.parametrize("paused", [False, True])
def test_shutdown_drains(make_engine, gated, expected, paused):
    rows, tokens = expected
    engine = make_engine()
    gate = gated(engine)
    requests = [engine.submit(row, greedy(20)) for row in rows[:3]]
    gate.wait()
    gate.open()
    if paused:
        within(engine.pause)
    with ThreadPoolExecutor(1) as executor:
        done = executor.submit(within, engine.shutdown)
        wait_until(lambda: engine._closed)
        with pytest.raises(EngineClosedError, match="closed"):
            engine.submit(rows[0], greedy(2))
        done.result()
    outputs = [within(engine.result, request) for request in requests]
    assert [output.token_ids for output in outputs] == [own[:20] for own in tokens[:3]]


def test_shutdown_without_draining_ends_what_runs(make_engine, gated, expected):
    engine = make_engine()
    gate = gated(engine)
    request = engine.submit(expected[0][0], greedy(20))
    gate.wait()
    gate.open()
    within(engine.shutdown, False)
    assert within(engine.result, request).finish_reason == "cancelled"
    within(engine.shutdown)  # again changes nothing


def test_a_full_queue_refuses_at_once(make_engine, expected):
    rows, tokens = expected
    engine = make_engine(max_queue=3)
    within(engine.pause)
    requests = [engine.submit(row, greedy(4)) for row in rows[:3]]
    with pytest.raises(QueueFullError, match=r"3 requests wait and 1 more .* max_queue is 3"):
        engine.submit(rows[3], greedy(4))
    with pytest.raises(QueueFullError):
        engine.generate(rows[3:5], greedy(4))
    within(engine.cancel, requests[1])
    requests[1] = engine.submit(rows[3], greedy(4))
    within(engine.resume)
    outputs = [within(engine.result, request).token_ids for request in requests]
    assert outputs == [tokens[i][:4] for i in (0, 3, 2)]
    assert within(engine.generate, rows[:3], greedy(4))[0].token_ids == tokens[0][:4]


def test_generate_of_the_model_is_not_queued_by_the_limit(make_engine, expected):
    """It must do what transformers would."""
    rows, tokens = expected
    engine = make_engine(max_queue=1)
    ids = torch.tensor([rows[1], rows[1], rows[1]])
    out = engine.model.generate(ids, max_new_tokens=8, do_sample=False)
    assert out[:, ids.shape[1] :].tolist() == [tokens[1][:8]] * 3


def test_many_threads_never_exceed_the_limit(make_engine, expected):
    engine = make_engine(max_queue=5)
    within(engine.pause)

    def try_to_submit(_):
        try:
            return engine.submit(expected[0][0], greedy(2))
        except fastgen.QueueFullError:
            return None

    with ThreadPoolExecutor(8) as executor:
        taken = [request for request in executor.map(try_to_submit, range(60)) if request]
    assert len(taken) == 5
    within(engine.resume)
    for request in taken:
        assert within(engine.result, request).finish_reason == "length"
    assert not core_of(engine)._on_the_way


def test_a_deadline_ends_a_request_as_far_as_it_has_come(make_engine, gated, expected):
    rows, tokens = expected
    engine = make_engine()
    gate = gated(engine)
    request = engine.submit(rows[0], greedy(40), deadline_s=0.2)
    other = engine.submit(rows[1], greedy(8))
    gate.wait()
    gate.step(3)
    assert not request.done.wait(0.3)
    gate.open()
    output = within(engine.result, request)
    assert output.finish_reason == "deadline"
    assert output.token_ids == tokens[0][: len(output.token_ids)]
    assert 0 < len(output.token_ids) < 40
    assert within(engine.result, other).token_ids == tokens[1][:8]
    metrics = within(engine.metrics)
    assert metrics.finished == {"deadline": 1, "length": 1}
    assert metrics.num_free_blocks == metrics.num_blocks


def test_a_deadline_comes_while_the_engine_is_paused(engine, expected):
    """Nothing wakes the engine's thread but the deadline itself."""
    within(engine.generate, expected[0][:1], greedy(2))
    within(engine.pause)
    request = engine.submit(expected[0][0], greedy(4), deadline_s=0.05)
    output = within(engine.result, request)
    assert (output.finish_reason, output.token_ids) == ("deadline", [])
    within(engine.resume)


def test_priorities_are_served_in_their_order(make_engine, gated, expected):
    engine = make_engine(max_num_seqs=1)
    gate = gated(engine)
    first = engine.submit(expected[0][0], greedy(2))
    gate.wait()
    late = [engine.submit(expected[0][0], greedy(2), priority=level) for level in (1, 0, -1)]
    gate.open()
    for request in (first, *late):
        within(engine.result, request)
    order = sorted(late, key=lambda request: request.finish_time or 0)
    assert [request.priority for request in order] == [-1, 0, 1]
