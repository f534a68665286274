"""Fixtures and helpers of the engine's tests: one optimised model, and steps under control."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from tiny_models import has_clear_margin, prompts, tiny_model

import fastgen
from fastgen import Engine, SamplingParams
from fastgen.engine.engine import EngineCore

LIMIT = 20  # seconds after which a call counts as hanging
# Of the tiny models: 2 layers, keys and values of 2 heads of 16, fp32, 16 tokens.
BLOCK_BYTES = 2 * 2 * 2 * 16 * 4 * 16
GREEDY = SamplingParams(temperature=0.0)


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0)


def within(function: Callable, *args: Any, limit: float = LIMIT) -> Any:
    """What `function` returns or raises; a failure instead of a hang."""
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return future.result(limit)
    except TimeoutError:
        raise AssertionError(f"{function} did not return within {limit} s") from None


def wait_until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.001)


def idle(engine: Engine) -> None:
    """Wait until no request is left."""
    wait_until(lambda: not _has_requests(engine.metrics()))


def _has_requests(metrics: fastgen.EngineMetrics) -> int:
    return metrics.num_running + metrics.num_waiting


def core_of(engine: Engine) -> EngineCore:
    return fastgen.api.require(engine.model).engine()


class Boom(Exception):
    pass


def raise_once(function: Callable, error: BaseException) -> Callable:
    """Like `function`, but the next call raises."""
    calls = iter([error])

    def wrapped(*args, **kwargs):
        for pending in calls:
            raise pending
        return function(*args, **kwargs)

    return wrapped


class TokenTokenizer:
    """One printable character per token id."""

    bos_token_id = None
    chat_template = None

    def __call__(self, text: str) -> Any:
        class Encoded:
            input_ids = [ord(character) - 0x100 for character in text]

        return Encoded

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(chr(0x100 + token_id) for token_id in ids)


class Gate:
    """Stands before every step of an engine: steps run one by one until it is opened."""

    def __init__(self, core: EngineCore) -> None:
        core._mailbox.call(core._make_pool)  # makes the runner
        runner: Any = core._runner
        self._mailbox, self._run = core._mailbox, runner.run
        self._opened = threading.Event()
        self._permits, self._arrived = threading.Semaphore(0), threading.Semaphore(0)
        runner.run = self._gated_run

    def _gated_run(self, output: Any) -> Any:
        self._arrived.release()
        if not self._opened.is_set():
            assert self._permits.acquire(timeout=LIMIT)
        return self._run(output)

    def wait(self) -> None:
        """Until a step stands at the gate."""
        assert self._arrived.acquire(timeout=LIMIT)

    def step(self, count: int = 1) -> None:
        """Let steps through; the next one stands at the gate afterwards."""
        for _ in range(count):
            self._permits.release()
            self.wait()

    def open(self) -> None:
        self._opened.set()
        self._permits.release()

    def open_once_posted(self, call: Callable[[], Any]) -> None:
        """Run a call that waits for the engine; the gate opens when its message is there."""
        before = len(self._mailbox._messages)
        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        wait_until(lambda: len(self._mailbox._messages) > before)
        self.open()
        thread.join(LIMIT)
        assert not thread.is_alive(), "the call did not return"


# Fixtures, for the test modules that import them.


@pytest.fixture(name="expected", scope="module")
def expected_fixture() -> tuple[list[list[int]], list[list[int]]]:
    """Prompts of many lengths and transformers' greedy tokens of each, alone."""
    model = tiny_model("qwen2")
    # Different seeds: prompts that begin alike would hide a read of another's block.
    pairs = [_clear_greedy(model, n, 100 * i) for i, n in enumerate((3, 16, 17, 33, 1, 40))]
    return [row for row, _ in pairs], [tokens for _, tokens in pairs]


def _clear_greedy(model: Any, length: int, first_seed: int) -> tuple[list[int], list[int]]:
    """A prompt and its greedy continuation, which comes near no tie."""
    for seed in range(first_seed, first_seed + 20):
        (row,) = prompts(length, seed=seed)
        out = model.generate(
            torch.tensor([row]),
            max_new_tokens=40,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        if has_clear_margin(out.logits):
            return row, out.sequences[0, length:].tolist()
    raise AssertionError("every prompt comes near a tie")


@pytest.fixture(name="model", scope="module")
def model_fixture():
    """One optimised model; tests change the settings of its engine by `make_engine`."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the model is too small for two to help
    model = fastgen.optimize(tiny_model("qwen2"))
    yield model
    fastgen.restore(model)
    torch.set_num_threads(num_threads)


@pytest.fixture(name="make_engine")
def make_engine_fixture(model):
    """Engines of the same model with other settings, without capturing it again."""
    optimized = fastgen.api.require(model)
    config = optimized.config

    def make(*, poisoned: bool = False, **fields: Any) -> Engine:
        optimized.close_engine()
        optimized.config = config.replace(**fields)
        engine = Engine(model)
        optimized.engine().poison_freed_blocks = poisoned
        return engine

    yield make
    within(optimized.close_engine)
    optimized.config = config


@pytest.fixture(name="engine")
def engine_fixture(model):
    """An engine with default settings, which must be empty at the end."""
    engine = Engine(model)
    yield engine
    metrics = within(engine.metrics)
    assert not _has_requests(metrics), "a request is left"
    assert metrics.num_free_blocks == metrics.num_blocks, "a block is left"
    within(fastgen.api.require(model).close_engine)


@pytest.fixture(name="gated")
def gated_fixture():
    """Put a gate before an engine's steps; opened at the end."""
    gates = []

    def put(engine: Engine) -> Gate:
        gates.append(Gate(core_of(engine)))
        return gates[-1]

    yield put
    for gate in gates:
        gate.open()


@pytest.fixture(name="gate")
def gate_fixture(engine, gated) -> Gate:
    return gated(engine)
