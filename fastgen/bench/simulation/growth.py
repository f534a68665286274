"""How the scheduler's time grows with what runs, waits and has finished, and with the pool.

Each series changes one number and holds the others. Every measured step has the same kind of work
in it: all running requests decode, and those that end are replaced by others, whose prompts are
computed. So a step may take time in proportion to the running requests, and nothing else may
change it; what a request takes in all its steps should depend on none of them.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ...engine.request import Request
from .engine import Limits, SimulatedEngine
from .step_cost import StepCost

NUM_STEPS, NUM_ROUNDS = 48, 3  # rounds of steps; the fastest counts
PROMPT, MAX_OUTPUT = 128, 192  # tokens; outputs are of 1 to MAX_OUTPUT
NUM_CANCELLED = 64
NUM_RUNNING = 256  # where something else grows

_LIMITS = Limits()

_COST = StepCost(1e-3, 0, 0, "any: nobody looks at the time")


def measure_growth(sizes: Mapping[str, Sequence[int]]) -> list[dict[str, Any]]:
    """CPU microseconds at each of the sizes of each series of SERIES.

    Returns: series; rows (size, costs); exponents: of the size in each cost, see `exponent`.
    """
    found = []
    for name, values in sizes.items():
        rows = [{"size": size, **SERIES[name](size)} for size in values]
        costs = [key for key in rows[0] if key != "size"]
        exponents = {key: exponent([(row["size"], row[key]) for row in rows]) for key in costs}
        found.append({"series": name, "rows": rows, "exponents": exponents})
    return found


def exponent(points: Sequence[tuple[int, float]]) -> float:
    """Slope of log(cost) over log(size), by least squares: 0 is independent, 1 in proportion."""
    sizes = [math.log(size) for size, _ in points]
    costs = [math.log(cost) for _, cost in points]
    middle, mean = sum(sizes) / len(sizes), sum(costs) / len(costs)
    slope = sum((x - middle) * (y - mean) for x, y in zip(sizes, costs, strict=True))
    return slope / sum((x - middle) ** 2 for x in sizes)


def _running(size: int) -> dict[str, float]:
    """Requests that run."""
    crowd = _Crowd(size)
    crowd.gather()
    return crowd.costs()


def _short(size: int) -> dict[str, float]:
    """Requests that would run if there were the blocks: there are three quarters of them."""
    crowd = _Crowd(size, size * (PROMPT + MAX_OUTPUT // 4) // _LIMITS.block_size * 3 // 4)
    crowd.gather()
    before = crowd.engine.scheduler.stats.preemptions
    costs = crowd.costs()
    assert crowd.engine.scheduler.stats.preemptions > before, "there were blocks enough"
    return costs


def _waiting(size: int) -> dict[str, float]:
    """Requests that wait."""
    crowd = _Crowd(NUM_RUNNING)
    crowd.gather(size)
    return {**crowd.costs(), "cancel_us": crowd.cancel_us(min(size, NUM_CANCELLED))}


def _finished(size: int) -> dict[str, float]:
    """Requests that have finished."""
    crowd = _Crowd(NUM_RUNNING)
    crowd.finish(size)
    crowd.gather()
    return crowd.costs()


def _pool(size: int) -> dict[str, float]:
    """Blocks in the pool, all with content that is given up for what comes."""
    crowd = _Crowd(NUM_RUNNING, size)
    pool = crowd.engine.pool
    for number in range(pool.num_free + size // 16):
        blocks = pool.allocate(1)
        assert blocks is not None, "no block was free"
        pool.publish(blocks[0], hashlib.sha256(b"%d" % number).digest())
        pool.free(blocks)
    pool.take_discarded()
    crowd.gather()
    return crowd.costs()


SERIES: dict[str, Callable[[int], dict[str, float]]] = {
    "running": _running,
    "short": _short,
    "waiting": _waiting,
    "finished": _finished,
    "pool": _pool,
}


class _Crowd:
    """As many requests as may run, and a number that wait; each that ends is replaced.

    One of them is as long as may be: the scheduler's table is as wide as its longest sequence.
    """

    def __init__(self, num_running: int, num_blocks: int | None = None) -> None:
        block_size, longest = _LIMITS.block_size, _LIMITS.max_model_len
        enough = num_running * (1 + (PROMPT + MAX_OUTPUT) // block_size) + longest // block_size
        limits = replace(
            _LIMITS,
            num_blocks=num_blocks or 2 * enough,
            max_num_seqs=num_running,
            max_num_batched_tokens=num_running * PROMPT + longest,
        )
        self.engine = SimulatedEngine(limits, _COST)
        self._num_running = num_running
        self._draw = random.Random(0)
        self._live: dict[Request, None] = {}

    def gather(self, num_waiting: int = 0) -> None:
        """Let requests of all ages run."""
        half = _LIMITS.max_model_len // 2
        self.engine.add(list(self._draw.randbytes(half)), half, 0.0)
        self._num_live = self._num_running + num_waiting
        for _ in range(MAX_OUTPUT // 2):
            self._step()

    def finish(self, count: int) -> None:
        """Let so many short requests come and go."""
        while count > 0:
            for _ in range(min(count, self._num_running)):
                self.engine.add([1] * 8, 1, 0.0)
            count -= len(self.engine.step()[1])

    def costs(self) -> dict[str, float]:
        """Of the scheduler: per step, and per request that ends."""
        found = []
        for _ in range(NUM_ROUNDS):
            before = self.engine.total_host_s
            num_ended = sum(self._step() for _ in range(NUM_STEPS))
            spent = (self.engine.total_host_s - before) * 1e6
            found.append({"step_us": spent / NUM_STEPS, "request_us": spent / max(1, num_ended)})
        return min(found, key=lambda costs: costs["step_us"])

    def cancel_us(self, count: int) -> float:
        """Of the scheduler, to end one of those that wait."""
        running = set(self.engine.scheduler.running)
        waiting = [request for request in self._live if request not in running]
        before = self.engine.total_host_s
        for request in self._draw.sample(waiting, count):
            self.engine.cancel(request)
        return (self.engine.total_host_s - before) / count * 1e6

    def _step(self) -> int:
        """How many have ended."""
        while self.engine.num_live < self._num_live:
            num_output = self._draw.randint(1, MAX_OUTPUT)
            self._live[self.engine.add(list(self._draw.randbytes(PROMPT)), num_output, 0.0)] = None
        ended = self.engine.step()[1]
        for request in ended:
            self._live.pop(request, None)
        return len(ended)
