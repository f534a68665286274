"""Steps that fail for a reason that is not their requests' own: a kernel, memory, or they hang."""

from __future__ import annotations

import logging
import threading
import time

import pytest
import torch
from engine_helpers import (  # noqa: F401 - the fixtures are used by name
    core_of,
    expected_fixture,
    gated_fixture,
    greedy,
    make_engine_fixture,
    model_fixture,
    raise_once,
    wait_until,
    within,
)
from fastgen.kernels import registry
from tiny_models import tiny_model

import fastgen
from fastgen import SamplingParams
from fastgen.engine import delivery
from fastgen.engine import engine as engine_module
from fastgen.engine.out_of_memory import TokenBudget, is_out_of_memory
from fastgen.engine.watchdog import Watchdog

# A kernel that fails.


class Broken:
    """An implementation of an op that fails once it is told to."""

    def __init__(self, monkeypatch, op: str, error: Exception) -> None:
        self.op, self.error, self.fails, self.num_calls = op, error, False, 0
        self.reference = registry.implementations(op)[-1]

        def function(*arguments, **named):
            self.num_calls += 1
            if self.fails:
                raise self.error
            return self.reference.function(*arguments, **named)

        known = registry._IMPLEMENTATIONS[op]
        broken = registry.Implementation(
            op, "broken", function, lambda call: None, batch_invariant=True
        )
        monkeypatch.setitem(registry._IMPLEMENTATIONS, op, [*known, broken])


def own_engine(**fields) -> fastgen.Engine:
    model = fastgen.optimize(tiny_model("qwen2"), graph_cache=False, **fields)
    return fastgen.Engine(model)


@pytest.mark.parametrize("op", ["fastgen::rms_norm", "fastgen::paged_attention"])
@pytest.mark.parametrize(
    "params", [greedy(10), SamplingParams(max_tokens=10, seed=1)], ids=["greedy", "drawn"]
)
def test_a_kernel_that_fails_is_replaced_by_its_reference(monkeypatch, caplog, op, params):
    broken = Broken(monkeypatch, op, RuntimeError("no such instruction"))
    engine = own_engine()
    rows = [[5, 6, 7], list(range(40)), [9]]
    expected = [output.token_ids for output in within(engine.generate, rows, params)]
    core = core_of(engine)
    core.begin_epoch(1)  # nothing of it is found
    step, steps = core._runner._run_once, []

    def fail_in_the_fifth(output):
        steps.append(output.num_tokens)
        broken.fails = len(steps) >= 5
        return step(output)

    monkeypatch.setattr(core._runner, "_run_once", fail_in_the_fifth)
    outputs = within(engine.generate, rows, params)
    assert [output.error for output in outputs] == [None] * 3
    assert [output.token_ids for output in outputs] == expected
    assert steps[4] == steps[5], "the step was repeated"
    metrics = engine.metrics()
    assert metrics.kernel_fallbacks == 1
    warnings = [r.getMessage() for r in caplog.records if "its reference runs" in r.getMessage()]
    assert len(warnings) == 1
    assert f"broken of {op}" in warnings[0]
    assert "no such instruction" in warnings[0]
    num_calls = broken.num_calls
    within(engine.generate, rows, params)
    assert broken.num_calls == num_calls, "it does not run any more"
    (chosen,) = fastgen.explain(engine.model).report.kernels[op].items()
    assert chosen[0] == "reference"
    assert "no such instruction" in chosen[1]["refused"]["broken"]
    fastgen.restore(engine.model)


@pytest.mark.parametrize(
    ("fields", "error"),
    [({"deterministic": True}, RuntimeError("broke")), ({}, ValueError("a block too many"))],
    ids=["deterministic", "arguments that do not fit"],
)
def test_what_is_not_replaced(monkeypatch, fields, error):
    broken = Broken(monkeypatch, "fastgen::rms_norm", error)
    engine = own_engine(**fields)
    expected = within(engine.generate, [[1, 2, 3]], greedy(5))[0].token_ids
    broken.fails = True
    (output,) = within(engine.generate, [[1, 2, 3]], greedy(5))
    assert str(error) in output.error
    assert engine.metrics().kernel_fallbacks == 0
    broken.fails = False
    assert within(engine.generate, [[1, 2, 3]], greedy(5))[0].token_ids == expected
    fastgen.restore(engine.model)


# Memory.


def test_errors_of_allocators_are_known():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError())
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))


def test_the_budget_comes_back():
    budget = TokenBudget(100)
    assert budget.shrink(90)
    assert budget.shrink(45)
    assert budget.tokens == 22
    seen = set()
    for _ in range(1000):
        budget.ran()
        seen.add(budget.tokens)
    assert seen == {22, 44, 88, 100}
    assert not budget.shrink(1)


@pytest.mark.parametrize("where", ["forward", "sampler"])
@pytest.mark.parametrize(
    "params", [greedy(12), SamplingParams(max_tokens=12, seed=3)], ids=["greedy", "drawn"]
)
def test_a_step_without_memory_is_done_in_parts(
    make_engine, expected, monkeypatch, caplog, where, params
):
    """Steps of more than 20 tokens find no memory, or the third step's sampler finds none."""
    rows, _ = expected
    engine = make_engine(poisoned=True)
    alone = [within(engine.generate, [row], params)[0].token_ids for row in rows]
    core = core_of(engine)
    core.begin_epoch(99)
    run, sizes = core._runner.run, []

    def run_small_ones(output):
        sizes.append(output.num_tokens)
        if where == "forward" and output.num_tokens > 20:
            raise MemoryError("no room")
        if where == "sampler" and len(sizes) == 3:
            monkeypatch.setattr(delivery, "sample", raise_once(delivery.sample, MemoryError()))
        return run(output)

    monkeypatch.setattr(core._runner, "run", run_small_ones)
    outputs = within(engine.generate, rows, params)
    assert [output.error for output in outputs] == [None] * len(rows)
    assert [output.token_ids for output in outputs] == alone
    metrics = engine.metrics()
    assert metrics.out_of_memory_steps > 0
    assert metrics.preemptions > 0
    assert metrics.num_free_blocks == metrics.num_blocks
    assert "no memory for a step" in caplog.text


def test_a_token_without_memory_ends_its_request_only(make_engine, expected, monkeypatch):
    rows, tokens = expected
    engine = make_engine()
    within(engine.generate, [[1]], greedy(1))
    core = core_of(engine)
    run = core._runner.run

    def run_others(output):
        if any(item.request.prompt_token_ids == rows[1] for item in output.scheduled):
            raise MemoryError("no room")
        return run(output)

    monkeypatch.setattr(core._runner, "run", run_others)
    outputs = within(engine.generate, rows[:3], greedy(8))
    assert [output.finish_reason for output in outputs] == ["length", "error", "length"]
    assert "no room" in outputs[1].error
    assert [outputs[i].token_ids for i in (0, 2)] == [tokens[i][:8] for i in (0, 2)]


def test_a_lockstep_batch_goes_on_after_a_step_without_memory(model, make_engine, monkeypatch):
    engine = make_engine()
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    asked = {"max_new_tokens": 8, "do_sample": True}
    torch.manual_seed(0)
    expected = within(lambda: model.generate(ids, **asked))
    core = core_of(engine)
    core.begin_epoch(99)
    failing = raise_once(core._runner.run, MemoryError("no room"))
    monkeypatch.setattr(core._runner, "run", failing)
    torch.manual_seed(0)
    assert torch.equal(within(lambda: model.generate(ids, **asked)), expected)
    assert engine.metrics().out_of_memory_steps == 1


def test_a_pool_without_memory_is_made_smaller(make_engine, expected, monkeypatch, caplog):
    rows, tokens = expected
    make, asked = engine_module.KVCache, []

    def make_small(spec, num_blocks, *rest):
        asked.append(num_blocks)
        if num_blocks > 40:
            raise MemoryError("no room")
        return make(spec, num_blocks, *rest)

    monkeypatch.setattr(engine_module, "KVCache", make_small)
    engine = make_engine()
    outputs = within(engine.generate, rows, greedy(8))
    assert [output.token_ids for output in outputs] == [own[:8] for own in tokens[: len(rows)]]
    assert len(asked) > 1
    assert engine.metrics().num_blocks == asked[-1] - 1 <= 40
    assert "no memory for the KV cache" in caplog.text


# What takes too long.


def warnings_of(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if "has been running" in r.getMessage()]


def test_a_step_that_hangs_is_reported_with_its_stack(make_engine, monkeypatch, caplog):
    engine = make_engine(watchdog_s=0.1)
    within(engine.generate, [[1]], greedy(1))
    core, let_go = core_of(engine), threading.Event()
    run = core._runner.run

    def a_step_that_hangs(output):
        let_go.wait(20)
        return run(output)

    monkeypatch.setattr(core._runner, "run", a_step_that_hangs)
    request = engine.submit([1, 2], greedy(2))
    wait_until(lambda: engine.metrics(wait=False).watchdog_warnings)
    time.sleep(0.3)  # it is reported once, however long it lasts
    let_go.set()
    assert within(engine.result, request).error is None
    (warning,) = warnings_of(caplog)
    assert "a step of the engine" in warning
    assert "a_step_that_hangs" in warning
    wait_until(lambda: "a step of the engine went on after" in caplog.text)


def test_a_callback_that_hangs_is_reported_and_holds_nobody_up(make_engine, model, caplog):
    engine = make_engine(watchdog_s=0.1)
    let_go, entered = threading.Event(), threading.Event()

    def a_processor_that_hangs(input_ids, scores):
        entered.set()
        let_go.wait(20)
        return scores

    def call():
        return model.generate(
            torch.tensor([[1, 2, 3]]), max_new_tokens=2, logits_processor=[a_processor_that_hangs]
        )

    thread = threading.Thread(target=call)
    thread.start()
    assert entered.wait(20)
    assert within(engine.generate, [[4, 5]], greedy(4))[0].error is None
    wait_until(lambda: engine.metrics(wait=False).watchdog_warnings)
    let_go.set()
    thread.join(20)
    (warning,) = warnings_of(caplog)
    assert "the next tokens of 1 rows" in warning
    assert "a_processor_that_hangs" in warning


def test_quick_steps_are_not_reported(make_engine, caplog):
    engine = make_engine(watchdog_s=5.0)
    within(engine.generate, [[1, 2, 3]] * 4, greedy(20))
    assert engine.metrics().watchdog_warnings == 0
    assert not warnings_of(caplog)


def test_no_limit_no_thread():
    before = threading.active_count()
    watchdog = Watchdog(None, lambda: None)
    with watchdog.watching("nothing"):
        assert threading.active_count() == before


def test_a_closed_watchdogs_thread_ends(caplog):
    with caplog.at_level(logging.WARNING):
        watchdog = Watchdog(0.01, lambda: None)
        with watchdog.watching("something"):
            wait_until(lambda: warnings_of(caplog))
        watchdog.close()
        named = lambda: [t for t in threading.enumerate() if t.name == "fastgen-watchdog"]  # noqa: E731
        count = len(named())
        wait_until(lambda: len(named()) < max(1, count) or not named())
