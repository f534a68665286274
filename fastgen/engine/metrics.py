"""What an engine counts and times, in memory that does not grow. No torch here.

A step and a request that ends cost a few additions each, however many rows the step has. One lock
guards them, so that a snapshot can be taken from any thread, even while a step hangs.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from typing import TYPE_CHECKING, Any, Literal

from ..histogram import NO_COUNTS, NO_SECONDS, Histogram
from ..outputs import EngineMetrics
from .request import Request
from .scheduler import Scheduler, SchedulerStats

if TYPE_CHECKING:
    from .decode_graphs import DecodeGraphs

# What should not happen, and is counted where it does.
Incident = Literal["kernel_fallbacks", "watchdog_warnings", "queue_full", "out_of_memory_steps"]


class MetricsRecorder:
    """The counters of one engine, which outlive its scheduler and its cache.

    scheduler_stats: What schedulers count themselves; of their thread. Methods may be called from
    any thread.
    """

    def __init__(self) -> None:
        self.scheduler_stats = SchedulerStats()
        self._lock = threading.Lock()
        self._engine_steps = self._computed_tokens = 0
        self._prompt_tokens = self._output_tokens = 0
        self._first_step_seconds = 0.0
        self._finished: Counter[str] = Counter()
        self._incidents: Counter[str] = Counter()
        self._queue_time, self._ttft = _Tally(NO_SECONDS), _Tally(NO_SECONDS)
        self._tpot, self._e2e = _Tally(NO_SECONDS), _Tally(NO_SECONDS)
        self._tokens_per_prompt, self._tokens_per_output = _Tally(NO_COUNTS), _Tally(NO_COUNTS)
        self._forward, self._sampling = _Tally(NO_SECONDS), _Tally(NO_SECONDS)
        self._host = _Tally(NO_SECONDS)

    def admitted(self, num_prompt_tokens: int) -> None:
        """A prompt was queued."""
        with self._lock:
            self._prompt_tokens += num_prompt_tokens

    def step(
        self, num_tokens: int, num_sampled: int, *, seconds: float, forward: float, sampling: float
    ) -> None:
        """A step ended without an error.

        Args:
            num_tokens, num_sampled: That ran, and that were chosen.
            seconds: Of the whole step; forward, sampling: of these parts of it.
        """
        with self._lock:
            self._engine_steps += 1
            self._computed_tokens += num_tokens
            self._output_tokens += num_sampled
            self._first_step_seconds = self._first_step_seconds or seconds
            self._forward.add(forward)
            self._sampling.add(sampling)
            self._host.add(max(0.0, seconds - forward - sampling))

    def first_token(self, request: Request) -> None:
        """A request has its first token."""
        times = request.metrics()
        with self._lock:
            self._queue_time.add_ms(times.queue_time_ms)
            self._ttft.add_ms(times.ttft_ms)

    def finished(self, request: Request) -> None:
        """A request ended, for whatever reason; it is told of its first token before."""
        assert request.finish_reason is not None, "a request is counted when it has ended"
        times = request.metrics()
        with self._lock:
            self._finished[request.finish_reason] += 1
            self._tokens_per_prompt.add(times.num_prompt_tokens)
            self._tokens_per_output.add(times.num_output_tokens)
            if times.ttft_ms is None:
                self._queue_time.add_ms(times.queue_time_ms)
            self._tpot.add_ms(times.tpot_ms)
            self._e2e.add_ms(times.e2e_ms)

    def note(self, incident: Incident) -> None:
        """Count something that should not happen."""
        with self._lock:
            self._incidents[incident] += 1

    def snapshot(self, scheduler: Scheduler | None, graphs: DecodeGraphs | None) -> EngineMetrics:
        """All of it now; what a scheduler and captured graphs say of themselves, if there are any.

        Called by another thread than the engine's while a step runs, the scheduler's numbers may
        be those of different moments of that step.
        """
        stats, now = self.scheduler_stats, {}
        if scheduler is not None:
            now |= _load(scheduler)
        if graphs is not None:
            now["captured_graphs"] = graphs.num_captured
            now["replayed_steps"] = graphs.num_replayed
            now["capture_refusal"] = graphs.refusal
        with self._lock:
            return EngineMetrics(
                engine_steps=self._engine_steps,
                computed_tokens=self._computed_tokens,
                prompt_tokens=self._prompt_tokens,
                output_tokens=self._output_tokens,
                finished=dict(self._finished),
                preemptions=stats.preemptions,
                prefix_tokens=stats.prefix_tokens,
                prefix_cache_hit_tokens=stats.prefix_hit_tokens,
                cache_waste=stats.cache_waste,
                cache_waste_sum=stats.waste_sum,
                cache_waste_steps=stats.waste_steps,
                forks=stats.forks,
                block_copies=stats.block_copies,
                forward_seconds=self._forward.total,
                sampling_seconds=self._sampling.total,
                host_seconds=self._host.total,
                first_step_seconds=self._first_step_seconds,
                queue_time=self._queue_time.frozen(),
                ttft=self._ttft.frozen(),
                tpot=self._tpot.frozen(),
                e2e=self._e2e.frozen(),
                tokens_per_prompt=self._tokens_per_prompt.frozen(),
                tokens_per_output=self._tokens_per_output.frozen(),
                step_forward=self._forward.frozen(),
                step_sampling=self._sampling.frozen(),
                step_host=self._host.frozen(),
                **self._incidents,
                **now,
            )


def _load(scheduler: Scheduler) -> dict[str, Any]:
    """How full a scheduler and its pool are; used and free blocks are always all blocks."""
    pool = scheduler.pool
    used, usable = pool.num_used, pool.num_usable
    return {
        "num_running": len(scheduler.running),
        "num_waiting": len(scheduler.waiting),
        "num_blocks": usable,
        "num_free_blocks": usable - used,
        "num_cached_blocks": pool.num_cached,
        "cache_usage": used / usable,
    }


class _Tally:
    """A histogram that grows; it begins as what it is like, which is empty."""

    __slots__ = ("_counts", "_like", "total")

    def __init__(self, like: Histogram) -> None:
        self._like, self._counts, self.total = like, list(like.counts), like.total

    def add(self, value: float) -> None:
        self._counts[bisect_left(self._like.bounds, value)] += 1
        self.total += value

    def add_ms(self, milliseconds: float | None) -> None:
        if milliseconds is not None:
            self.add(milliseconds / 1e3)

    def frozen(self) -> Histogram:
        like = self._like
        return Histogram(like.bounds, tuple(self._counts), self.total, like.whole)
