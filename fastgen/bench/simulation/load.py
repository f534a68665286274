"""A trace at one rate through the scheduler: what its requests see, and what it costs the host."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

from ...engine.request import Request
from ..machine import peak_rss_bytes, reset_peak_rss
from .engine import Limits, SimulatedEngine
from .step_cost import StepCost
from .trace import Trace

NUM_PARTS = 10  # of a run, whose host times and memory are shown one after the other


@dataclass(frozen=True)
class Goal:
    """A good request has its first token and each further one, on the average, so soon."""

    ttft_ms: float = 2000.0
    tpot_ms: float = 200.0


class Quantiles:
    """Of any number of values, within 1 %, in a memory that does not grow with them."""

    _WIDTH = math.log(1.02)

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()
        self.largest = 0.0

    def add(self, value: float) -> None:
        self._counts[round(math.log(max(value, 1e-9)) / self._WIDTH)] += 1
        self.largest = max(self.largest, value)

    def quantile(self, part: float) -> float | None:
        """None if nothing was added."""
        left = part * self._counts.total()
        for bucket in sorted(self._counts):
            left -= self._counts[bucket]
            if left <= 0:
                return min(math.exp(bucket * self._WIDTH), self.largest)
        return None


class Load:
    """Runs a trace; what is kept of it does not grow with its length.

    Args:
        rate: Mean requests per second.
    """

    def __init__(
        self, limits: Limits, cost: StepCost, goal: Goal, rate: float, num_requests: int, seed: int
    ) -> None:
        self.engine = SimulatedEngine(limits, cost, seed)
        self.trace = Trace(rate, limits.max_model_len, seed)
        self.num_requests = num_requests
        self._rate, self._goal = rate, goal
        self._num_finished = self._num_good = self._num_tokens = 0
        self._max_running = self._max_waiting = self._num_steps = 0
        self._running_s = 0.0
        self._last_arrival = 0.0
        self._queue, self._ttft, self._tpot = Quantiles(), Quantiles(), Quantiles()
        self._host_step = Quantiles()
        self._parts: list[dict[str, Any]] = []
        self._parts_s = 0.0

    def run(self) -> dict[str, Any]:
        """All requests until the last one has ended. Returns: see `report`."""
        num_added = 0
        engine, clock = self.engine, self.engine.clock
        reset_peak_rss()
        while num_added < self.num_requests or engine.num_live:
            if not engine.num_live:
                clock.now = max(clock.now, self.trace.next_time)
            while num_added < self.num_requests and self.trace.next_time <= clock.now:
                self._last_arrival = self.trace.next_time
                engine.add(*self.trace.take(), arrival_time=self._last_arrival)
                num_added += 1
            self._step()
        return self.report()

    def _step(self) -> None:
        engine = self.engine
        before, started = engine.total_host_s, engine.clock.now
        output, ended = engine.step()
        self._num_steps += 1
        self._host_step.add(engine.total_host_s - before)
        self._running_s += output.num_seqs * (engine.clock.now - started)
        num_running = len(engine.scheduler.running)
        self._max_running = max(self._max_running, num_running)
        self._max_waiting = max(self._max_waiting, engine.num_live - num_running)
        for request in ended:
            self._count(request)

    def _count(self, request: Request) -> None:
        metrics, output = request.metrics(), request.output_token_ids
        assert metrics.ttft_ms is not None, "it has ended without a token"
        assert metrics.queue_time_ms is not None, "it was never let in"
        self._queue.add(metrics.queue_time_ms)
        self._ttft.add(metrics.ttft_ms)
        good = metrics.ttft_ms <= self._goal.ttft_ms
        if metrics.tpot_ms is not None:
            self._tpot.add(metrics.tpot_ms)
            good &= metrics.tpot_ms <= self._goal.tpot_ms
        self._num_good += good
        self._num_tokens += len(output)
        self._num_finished += 1
        self.trace.ended(bytes(request.prompt_token_ids + output))
        if self._num_finished * NUM_PARTS // self.num_requests > len(self._parts):
            self._close_part()

    def _close_part(self) -> None:
        number = self._num_finished - sum(part["requests"] for part in self._parts)
        spent_s = self.engine.total_host_s - self._parts_s
        self._parts_s += spent_s
        self._parts.append(
            {
                "requests": number,
                "host_us_per_request": spent_s / number * 1e6,
                "peak_rss_bytes": peak_rss_bytes(),
            }
        )
        reset_peak_rss()

    def report(self) -> dict[str, Any]:
        """Of the requests that have finished: per second of the time in which they arrived."""
        engine, stats = self.engine, self.engine.scheduler.stats
        arrived_s, host_s = self._last_arrival, engine.total_host_s

        def spread(values: Quantiles) -> dict[str, float | None]:
            return {"p50": values.quantile(0.5), "p99": values.quantile(0.99)}

        return {
            "rate": self._rate,
            "requests": self._num_finished,
            "output_tokens": self._num_tokens,
            "virtual_s": engine.clock.now,
            "arrived_per_s": self._num_finished / arrived_s,
            "goodput_per_s": self._num_good / arrived_s,
            "good_share": self._num_good / self._num_finished,
            "queue_time_ms": spread(self._queue),
            "ttft_ms": spread(self._ttft),
            "tpot_ms": spread(self._tpot),
            "prefix_hit_rate": stats.prefix_hit_tokens / max(1, stats.prefix_tokens),
            "preemptions": stats.preemptions,
            "mean_running": self._running_s / engine.clock.now,
            "max_running": self._max_running,
            "max_waiting": self._max_waiting,
            "steps": self._num_steps,
            "host_s": dict(engine.host_s),
            "host_us_per_step": host_s / self._num_steps * 1e6,
            "host_us_per_request": host_s / self._num_finished * 1e6,
            "host_us_per_token": host_s / self._num_tokens * 1e6,
            "host_step_us": {
                "p50": _micro(self._host_step.quantile(0.5)),
                "p99": _micro(self._host_step.quantile(0.99)),
                "largest": self._host_step.largest * 1e6,
            },
            "host_share": host_s / engine.clock.now,
            "parts": self._parts,
        }


def _micro(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e6


def capacity(limits: Limits, cost: StepCost, seed: int) -> float:
    """Requests per second that can be served: of their tokens, while always enough wait.

    By tokens, because those who end first are the short ones. What runs before about as many
    requests have ended as may run twice is not counted.
    """
    engine = SimulatedEngine(limits, cost, seed)
    trace = Trace(1.0, limits.max_model_len, seed)  # its times are not looked at
    unit = max(limits.max_num_seqs, 128)
    num_added = num_ended = wanted = sampled = 0
    start: tuple[int, float] | None = None
    while num_ended < 8 * unit:
        while engine.num_live < 2 * limits.max_num_seqs:
            prompt, num_output = trace.take()
            engine.add(prompt, num_output, engine.clock.now)
            num_added, wanted = num_added + 1, wanted + num_output
        output, ended = engine.step()
        sampled += len(output.decodes) + sum(item.samples for item in output.items)
        num_ended += len(ended)
        for request in ended:
            trace.ended(bytes(request.prompt_token_ids + request.output_token_ids))
        if start is None and num_ended >= 2 * unit:
            start = sampled, engine.clock.now
    assert start is not None, "requests end one by one"
    tokens_per_s = (sampled - start[0]) / (engine.clock.now - start[1])
    return tokens_per_s * num_added / wanted
