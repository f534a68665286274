"""Two good requests, greedy and drawn, and whatever is done beside them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from engine_helpers import Gate, core_of, greedy, idle, wait_until, within
from torch.utils._python_dispatch import TorchDispatchMode

from fastgen import Engine, InvalidRequestError, SamplingParams

DRAWN = SamplingParams(max_tokens=40, temperature=1.0, top_p=0.95, seed=11)


class NoTensors(TorchDispatchMode):
    """Nothing is computed on this thread."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise AssertionError(f"a tensor was touched: {func}")


class Neighbours:
    """The good requests of one engine, which begin together with their first three steps.

    alone: The tokens of each alone.
    """

    def __init__(
        self, engine: Engine, gate: Gate, rows: list[list[int]], alone: list[list[int]]
    ) -> None:
        self.engine, self.gate = engine, gate
        self._rows, self._alone = rows, alone
        self._requests: list = []

    def begin(self) -> None:
        """Afterwards a step stands at the gate."""
        params = (greedy(40), DRAWN)
        self._requests = [
            self.engine.submit(row, each) for row, each in zip(self._rows, params, strict=True)
        ]
        self.gate.wait()
        self.gate.step(3)

    def finish(self) -> None:
        """Open the gate; the good ones have their tokens, and nothing else is left."""
        self.gate.open()
        outputs = [within(self.engine.result, request) for request in self._requests]
        assert [output.finish_reason for output in outputs] == ["length"] * 2, [
            output.error for output in outputs
        ]
        assert [output.token_ids for output in outputs] == self._alone, "a neighbour was heard"
        idle(self.engine)
        metrics = within(self.engine.metrics)
        assert metrics.num_free_blocks == metrics.num_blocks, "a block is lost"
        assert core_of(self.engine)._sampling == {}

    def beside(self, hostile: Callable[[Engine], Any]) -> Any:
        """What the hostile call returns or raises, while the good ones run.

        The gate opens when the engine hears of it, or when it is over.
        """
        self.begin()
        messages = core_of(self.engine)._mailbox._messages
        before, outcome = len(messages), {}

        def run() -> None:
            try:
                outcome["result"] = hostile(self.engine)
            except BaseException as error:
                outcome["error"] = error

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        wait_until(lambda: len(messages) > before or not thread.is_alive())
        self.finish_with(thread)
        if "error" in outcome:
            raise outcome["error"]
        return outcome["result"]

    def finish_with(self, thread: threading.Thread) -> None:
        self.gate.open()
        within(thread.join)
        self.finish()

    def refuses(self, hostile: Callable[[Engine], Any], match: str) -> InvalidRequestError:
        """The hostile call raises, and touches neither a tensor nor the engine."""

        def call(engine: Engine) -> None:
            with NoTensors():
                hostile(engine)

        before = self.engine.metrics().finished
        with pytest.raises(InvalidRequestError, match=match) as caught:
            self.beside(call)
        after = self.engine.metrics().finished
        assert after == {"length": before.get("length", 0) + 2}, "the engine heard of it"
        return caught.value


@pytest.fixture(name="alone", scope="module")
def alone_fixture(model, expected) -> list[list[int]]:
    """Transformers' tokens of the greedy one; the other's of an engine that does nothing else."""
    engine = Engine(model)
    (drawn,) = within(engine.generate, [expected[0][5]], DRAWN)
    return [expected[1][3], drawn.token_ids]


@pytest.fixture(name="make_neighbours")
def make_neighbours_fixture(alone, make_engine, gated, expected):
    """Neighbours in an engine with some settings, NaN in each block that is freed."""

    def make(**fields: Any) -> Neighbours:
        engine = make_engine(poisoned=True, **fields)
        return Neighbours(engine, gated(engine), [expected[0][3], expected[0][5]], alone)

    return make


@pytest.fixture(name="neighbours")
def neighbours_fixture(make_neighbours) -> Neighbours:
    return make_neighbours()
