"""The engine's place in a simulation: it drives the scheduler in virtual time."""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ...config import SamplingParams
from ...engine.block_pool import BlockPool
from ...engine.prefix_cache import root_digest
from ...engine.request import Request
from ...engine.scheduler import Scheduler
from ...engine.scheduler_output import SchedulerOutput
from .step_cost import StepCost

_ROOT = root_digest(0, 0, None)
_METHODS: tuple[str, ...] = ("add", "schedule", "advance", "append", "cancel")


@dataclass(frozen=True)
class Limits:
    """Of the scheduler and its pool."""

    num_blocks: int = 1 << 14
    block_size: int = 16
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    max_model_len: int = 4096

    def __post_init__(self) -> None:
        for name, low in (("max_num_seqs", 1), ("max_num_batched_tokens", 1), ("block_size", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        least = 1 + -(-self.max_model_len // self.block_size)
        if self.num_blocks < least:
            raise ValueError(
                f"the null block and a sequence of {self.max_model_len} tokens need {least} "
                f"blocks, got {self.num_blocks}; have more, or shorter sequences"
            )


class Clock:
    """Virtual seconds; they pass when the simulation says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class SimulatedEngine:
    """Adds requests to a real scheduler and runs its steps; tokens are drawn at random.

    Attributes:
        num_live: Requests that were added and have not ended.
        host_s: CPU seconds that each of the scheduler's methods took: add, schedule, advance,
            append (which ends requests too), cancel.
    """

    def __init__(self, limits: Limits, cost: StepCost, seed: int = 0) -> None:
        self.clock = Clock()
        self.pool = BlockPool(limits.num_blocks)
        self.scheduler = Scheduler(
            self.pool,
            block_size=limits.block_size,
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            clock=self.clock,
        )
        self.num_live = 0
        self.host_s = dict.fromkeys(_METHODS, 0.0)
        self._cost = cost
        self._draw = random.Random(seed)

    @property
    def total_host_s(self) -> float:
        return sum(self.host_s.values())

    def add(self, prompt: list[int], num_output: int, arrival_time: float) -> Request:
        request = Request(
            prompt, _sampling(num_output), cache_root=_ROOT, arrival_time=arrival_time
        )
        with self.timed("add"):
            self.scheduler.add(request)
        self.num_live += 1
        return request

    def step(self) -> tuple[SchedulerOutput, list[Request]]:
        """One step, which takes its time. Returns: what ran, and the requests that it ended."""
        scheduler = self.scheduler
        with self.timed("schedule"):
            output = scheduler.schedule()
        if not output.num_seqs:
            raise RuntimeError(f"{self.num_live} requests are there, and the scheduler runs none")
        self.clock.now += self._cost.seconds(output)
        with self.timed("advance"):
            scheduler.advance(output)
        requests = output.decodes.requests + [i.request for i in output.items if i.samples]
        token_ids = list(self._draw.randbytes(len(requests)))
        ended = []
        with self.timed("append"):
            for place in reversed(scheduler.append_tokens(requests, token_ids)):
                if scheduler.append_token(requests[place], token_ids[place]) is not None:
                    ended.append(requests[place])
        self.num_live -= len(ended)
        return output, ended

    def cancel(self, request: Request) -> None:
        with self.timed("cancel"):
            self.scheduler.finish(request, "cancelled")
        self.num_live -= 1

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Count CPU time of this thread, which others that work on the machine do not add to."""
        start = time.thread_time()
        yield
        self.host_s[part] += time.thread_time() - start


@functools.cache
def _sampling(num_output: int) -> SamplingParams:
    """As many objects as there are lengths."""
    return SamplingParams(max_tokens=num_output, temperature=0.0)
