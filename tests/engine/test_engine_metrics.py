"""What a running engine tells its recorder."""

from __future__ import annotations

import pytest
from engine_helpers import (  # noqa: F401 - fixtures
    core_of,
    engine_fixture,
    expected_fixture,
    gated_fixture,
    greedy,
    make_engine_fixture,
    model_fixture,
    within,
)

import fastgen


def test_an_engine_tells_its_recorder_of_everything(make_engine, expected):
    engine = make_engine(max_num_seqs=2)
    rows = expected[0][:4]
    outputs = within(engine.generate, rows, greedy(10))
    metrics = engine.metrics()
    for name in ("queue_time", "ttft", "tpot", "e2e"):
        mine = sum(getattr(output.metrics, f"{name}_ms") for output in outputs) / 1e3
        histogram = getattr(metrics, name)
        assert histogram.count == 4, name
        assert histogram.total == pytest.approx(mine), name
    assert metrics.tokens_per_prompt.total == sum(map(len, rows)) == metrics.prompt_tokens
    assert metrics.tokens_per_output.total == 40 == metrics.output_tokens
    for part in ("forward", "sampling", "host"):
        histogram = getattr(metrics, f"step_{part}")
        assert histogram.count == metrics.engine_steps
        assert histogram.total == getattr(metrics, f"{part}_seconds") > 0
    assert metrics.cache_waste == pytest.approx(metrics.cache_waste_sum / metrics.cache_waste_steps)


def test_a_snapshot_does_not_wait_for_a_step_that_hangs(engine, gated, expected):
    gate = gated(engine)
    request = engine.submit(expected[0][0], greedy(4))
    gate.wait()
    metrics = within(lambda: engine.metrics(wait=False), limit=5)
    assert (metrics.num_running, metrics.engine_steps) == (1, 0)
    assert metrics.ttft.count == 0
    gate.step(2)
    assert within(lambda: engine.metrics(wait=False), limit=5).ttft.count == 1
    gate.open()
    within(engine.result, request)


def test_a_closed_engine_has_no_metrics(make_engine):
    engine = make_engine()
    core = core_of(engine)
    within(core.close)
    for wait in (True, False):
        with pytest.raises(fastgen.EngineClosedError):
            within(core.metrics, wait)
