"""What goes wrong around the engine: failing steps, a dead thread, no memory, forgotten models,
lockstep rows that lose their blocks. One fault, one victim; nobody waits for ever."""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from engine_helpers import (  # noqa: F401 - the fixtures are used by name
    BLOCK_BYTES,
    GREEDY,
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
    within,
)
from tiny_models import prompts, tiny_model

import fastgen
from fastgen import EngineClosedError, FastgenError, RequestFailedError, SamplingParams
from fastgen.engine import delivery, memory_plan
from fastgen.engine import engine as engine_module
from fastgen.engine.request import Request

# A step that raises.


@pytest.mark.parametrize("where", ["runner", "sampler"])
def test_failing_step_ends_its_requests_only(make_engine, expected, gated, monkeypatch, where):
    rows, tokens = expected
    engine = make_engine(max_num_seqs=2)
    gate = gated(engine)
    requests = [engine.submit(row, greedy(10)) for row in rows[:4]]
    gate.wait()
    gate.step(3)  # two run, two wait
    if where == "runner":
        monkeypatch.setattr(gate, "_run", raise_once(gate._run, Boom("no luck")))
    else:
        broken = raise_once(delivery.sample, Boom("no luck"))
        monkeypatch.setattr(delivery, "sample", broken)
    gate.open()
    outputs = [within(engine.result, request) for request in requests]
    assert [output.finish_reason for output in outputs] == ["error"] * 2 + ["length"] * 2
    for output, own in zip(outputs[:2], tokens, strict=False):
        assert "Boom: no luck" in output.error
        assert output.token_ids == own[: len(output.token_ids)]
    assert [output.token_ids for output in outputs[2:]] == [own[:10] for own in tokens[2:4]]
    metrics = engine.metrics()
    assert metrics.finished == {"error": 2, "length": 2}
    assert metrics.num_free_blocks == metrics.num_blocks
    assert within(engine.generate, [rows[0]], greedy(10))[0].token_ids == tokens[0][:10]


def test_failing_step_raises_from_a_stream(engine, gate, expected):
    error = Boom("no luck")
    gate._run = raise_once(gate._run, error)
    request = engine.submit(expected[0][0], greedy(5))
    gate.open()
    with pytest.raises(RequestFailedError, match=r"Boom: no luck") as caught:
        within(lambda: list(engine.stream(request)))
    assert caught.value.__cause__ is error


# Faults outside a step. These need models of their own: at worst they are never usable again.


@pytest.fixture
def own_model():
    model = fastgen.optimize(tiny_model("qwen2"), kv_cache_memory_bytes=20 * BLOCK_BYTES)
    yield model
    if fastgen.api.lookup(model) is not None:
        within(fastgen.restore, model)


def check_usable(model, expected) -> None:
    """A new engine on the model works, and so does restore."""
    rows, tokens = expected
    engine = fastgen.Engine(model)
    assert within(engine.generate, [rows[0]], greedy(5))[0].token_ids == tokens[0][:5]
    within(engine.close)
    within(fastgen.restore, model)


def outcome(call: Callable) -> str:
    """The error that a generate call raised or put into its output, as text."""
    try:
        (output,) = within(call)
    except (FastgenError, MemoryError) as error:
        return f"{type(error).__name__}: {error}"
    return output.error or ""


def test_no_memory_for_the_cache_fails_the_request(own_model, expected, monkeypatch):
    def no_room(*arguments: object) -> None:
        raise MemoryError("no room")

    engine = fastgen.Engine(own_model)
    with monkeypatch.context() as patched:
        patched.setattr(engine_module, "KVCache", no_room)
        assert "no room" in outcome(lambda: engine.generate([expected[0][0]], greedy(5)))
    assert within(engine.generate, [expected[0][0]], greedy(5))[0].error is None
    check_usable(own_model, expected)


def test_memory_that_shrinks_before_the_pool_is_made(expected, monkeypatch):
    """The request fitted the free memory of the check, and not that of a moment later."""
    model = fastgen.optimize(tiny_model("qwen2"))
    free = iter([40 * BLOCK_BYTES])
    monkeypatch.setattr(
        memory_plan, "free_memory_bytes", lambda device: next(free, 8 * BLOCK_BYTES)
    )
    engine = fastgen.Engine(model)
    request_error = outcome(lambda: engine.generate(prompts(100), greedy(5)))
    assert "assert" not in request_error.lower(), "it was not our own mistake"
    assert within(engine.generate, [expected[0][0]], greedy(5))[0].error is None
    check_usable(model, expected)


def test_mistake_of_our_own_in_the_scheduler(own_model, expected, gated, monkeypatch):
    """It may end the thread; whoever waits is told, and the model stays usable."""
    engine = fastgen.Engine(own_model)
    gate = gated(engine)
    core = core_of(engine)
    running = engine.submit(expected[0][0], greedy(300))
    gate.wait()
    broken = raise_once(core._scheduler.schedule, AssertionError("our own"))
    monkeypatch.setattr(core._scheduler, "schedule", broken)
    queued = engine.submit(expected[0][1], greedy(5))
    gate.open()
    output = within(engine.result, running)
    assert output.finish_reason == "error"
    assert "our own" in output.error
    assert within(engine.result, queued).finish_reason in ("error", "length")
    check_usable(own_model, expected)


def test_calls_behind_a_message_that_fails(own_model, expected, gated):
    """Messages that were taken with it, or posted before the thread has died, are not lost."""
    engine = fastgen.Engine(own_model)
    gate = gated(engine)
    core = core_of(engine)
    running = engine.submit(expected[0][0], greedy(300))
    gate.wait()

    def fail() -> None:
        raise Boom("our own")

    core._mailbox.post(fail)
    queued = engine.submit(expected[0][1], greedy(5))

    def call() -> None:
        with contextlib.suppress(EngineClosedError):
            engine.metrics()

    gate.open_once_posted(call)
    for request in (running, queued):
        assert within(engine.result, request).finish_reason in ("error", "length")
    check_usable(own_model, expected)


def test_close_after_the_thread_has_died(own_model, expected, monkeypatch):
    engine = fastgen.Engine(own_model)
    core = core_of(engine)

    def fail() -> None:
        raise Boom("our own")

    monkeypatch.setattr(core, "step", fail)
    core._mailbox.post(lambda: None)
    within(core._mailbox.thread.join)
    with pytest.raises(EngineClosedError):
        core.submit(Request([1], greedy(5)))
    within(engine.close)
    check_usable(own_model, expected)


def test_new_engine_after_the_thread_has_died(own_model, expected, monkeypatch):
    """Without a close: the dead engine is not handed out again."""
    core = core_of(fastgen.Engine(own_model))

    def fail() -> None:
        raise Boom("our own")

    monkeypatch.setattr(core, "step", fail)
    core._mailbox.post(lambda: None)
    within(core._mailbox.thread.join)
    check_usable(own_model, expected)


# Closing.


@pytest.mark.parametrize("method", ["submit", "generate", "metrics", "default"])
def test_closed_engine_says_so(make_engine, method):
    engine = make_engine()
    within(engine.generate, [[1]], greedy(2))
    engine.close()
    engine.close()
    calls = {
        "submit": lambda: engine.submit([1], GREEDY),
        "generate": lambda: engine.generate([[1]], GREEDY),
        "metrics": engine.metrics,
        "default": lambda: engine.generate([[1]]),
    }
    with pytest.raises(EngineClosedError, match="closed"):
        within(calls[method])


def test_engine_that_was_never_used_can_be_closed(make_engine):
    with make_engine() as engine:
        pass
    with pytest.raises(EngineClosedError):
        engine.submit([1], GREEDY)


def test_close_ends_requests_in_every_state(make_engine, expected, gated):
    engine = make_engine(max_num_seqs=2)
    gate = gated(engine)
    requests = [engine.submit(row, greedy(300)) for row in expected[0][:3]]
    gate.wait()
    gate.step(2)
    with ThreadPoolExecutor(1) as executor:
        waiting = executor.submit(within, engine.result, requests[2])
        gate.open_once_posted(engine.close)
        assert waiting.result().finish_reason == "cancelled"
    for request in requests[:2]:
        assert within(engine.result, request).finish_reason == "cancelled"
    within(engine.cancel, requests[0])


def test_model_stays_optimised_after_close(make_engine, model, expected):
    rows, tokens = expected
    engine = make_engine()
    within(engine.generate, [rows[0]], greedy(2))
    engine.close()
    another = fastgen.Engine(model)
    assert within(another.generate, [rows[0]], greedy(5))[0].token_ids == tokens[0][:5]


# Memory that goes away.


def use_and_forget(kept: list) -> tuple[list[weakref.ref], threading.Thread]:
    """Run a request, then drop the model and the engine; `kept` may hold something back."""
    model = tiny_model("qwen2")
    engine = fastgen.Engine(model)
    within(engine.generate, [[1, 2, 3]], greedy(3))
    core = core_of(engine)
    assert core._mailbox.thread.is_alive()
    things = (model, engine, core, core._runner, core._runner.kv_cache, core.compiled)
    kept.extend(things[: kept.count("model")])
    return [weakref.ref(thing) for thing in things], core._mailbox.thread


def check_gone(references: list[weakref.ref], thread: threading.Thread) -> None:
    gc.collect()
    assert [reference() for reference in references] == [None] * len(references)
    thread.join(10)
    assert not thread.is_alive()


def test_forgotten_model_and_engine_go_away():
    check_gone(*use_and_forget([]))


def test_planted_reference_is_found():
    kept = ["model"]
    references, thread = use_and_forget(kept)
    with pytest.raises(AssertionError):
        check_gone(references, thread)
    kept.clear()
    check_gone(references, thread)


def test_planted_hang_is_found():
    with pytest.raises(AssertionError, match="did not return"):
        within(threading.Event().wait, limit=0.1)


def test_forgotten_engine_leaves_the_models_own(model, expected):
    engine = fastgen.Engine(model)
    reference, core = weakref.ref(engine), core_of(engine)
    within(engine.generate, [expected[0][0]], greedy(3))
    del engine
    gc.collect()
    assert reference() is None
    assert core._mailbox.thread.is_alive()
    assert core_of(fastgen.Engine(model)) is core


def test_closed_engines_thread_and_cache_go(make_engine):
    engine = make_engine()
    within(engine.generate, [[1, 2, 3]], greedy(3))
    core = core_of(engine)
    thread, cache = core._mailbox.thread, weakref.ref(core._runner.kv_cache)
    within(engine.close)
    assert not thread.is_alive()
    gc.collect()
    assert cache() is None


def test_released_cache_goes_and_comes_back(make_engine, expected):
    engine = make_engine()
    within(engine.generate, [expected[0][0]], greedy(3))
    cache = weakref.ref(core_of(engine)._runner.kv_cache)
    within(fastgen.release_cache, engine.model)
    gc.collect()
    assert cache() is None
    (output,) = within(engine.generate, [expected[0][0]], greedy(3))
    assert output.token_ids == expected[1][0][:3]


def test_cache_of_running_requests_is_not_released(engine, gate, expected):
    request = engine.submit(expected[0][0], greedy(50))
    gate.wait()
    errors = []

    def release() -> None:
        try:
            fastgen.release_cache(engine.model)
        except FastgenError as error:
            errors.append(str(error))

    gate.open_once_posted(release)
    assert len(errors) == 1
    assert "requests are running" in errors[0]
    assert within(engine.result, request).finish_reason == "length"


def test_finished_requests_leave_no_generator_behind(engine, expected):
    params = SamplingParams(max_tokens=3, seed=1)
    within(engine.generate, expected[0], params)
    stream = engine.stream(engine.submit(expected[0][0], SamplingParams(max_tokens=300)))
    within(next, stream)
    within(stream.close)
    assert core_of(engine)._sampling == {}
