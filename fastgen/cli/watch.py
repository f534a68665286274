"""Watches an engine's metrics while requests run: a live table, or lines without a terminal."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TextIO

from ..engine.request import Request
from ..histogram import Histogram
from ..outputs import EngineMetrics

# Seconds between two looks, at a table and as lines.
TABLE_SECONDS, LINE_SECONDS = 0.25, 1.0


class Watched(Protocol):
    def metrics(self, wait: bool = True) -> EngineMetrics: ...


def watch(engine: Watched, requests: Sequence[Request], to: TextIO) -> None:
    """Show the engine's metrics until all these requests have ended, the last state included."""
    on_terminal = to.isatty()
    start = last = time.perf_counter()
    before = engine.metrics(wait=False)
    with _table(to) if on_terminal else _lines(to) as show:
        while True:
            running = not _all_end(requests, TABLE_SECONDS if on_terminal else LINE_SECONDS)
            now, metrics = time.perf_counter(), engine.metrics(wait=not running)
            speed = (metrics.output_tokens - before.output_tokens) / (now - last)
            show(state(metrics, speed if running else None, now - start))
            if not running:
                return
            before, last = metrics, now


def _all_end(requests: Sequence[Request], within: float) -> bool:
    """Whether all have ended by then; waits for it."""
    end = time.perf_counter() + within
    return all(
        request.done.wait(max(0.0, end - time.perf_counter()))
        for first in requests
        for request in first.outputs
    )


def state(metrics: EngineMetrics, speed: float | None, seconds: float) -> dict[str, str]:
    """What is shown, by name. speed: tokens/s since the last look; None: over all `seconds`."""
    if speed is None:
        speed = metrics.output_tokens / seconds
    ended = ", ".join(f"{count} {reason}" for reason, count in metrics.finished.items())
    used = metrics.num_blocks - metrics.num_free_blocks
    incidents = {
        "kernel fallbacks": metrics.kernel_fallbacks,
        "watchdog warnings": metrics.watchdog_warnings,
        "rejected": metrics.queue_full,
        "out of memory": metrics.out_of_memory_steps,
    }
    return {
        "time": f"{seconds:.1f} s",
        "requests": f"{metrics.num_running} running, {metrics.num_waiting} waiting"
        + (f", ended: {ended}" if ended else ""),
        "tokens": f"{metrics.prompt_tokens} prompt, {metrics.output_tokens} output, "
        f"{speed:.1f} output/s",
        "queue": _times(metrics.queue_time),
        "TTFT": _times(metrics.ttft),
        "TPOT": _times(metrics.tpot),
        "end to end": _times(metrics.e2e),
        "step": f"{metrics.engine_steps} steps of "
        f"{_ms(metrics.step_forward.mean)} forward, {_ms(metrics.step_sampling.mean)} sampling, "
        f"{_ms(metrics.step_host.mean)} host",
        "cache": f"{used} of {metrics.num_blocks} blocks ({metrics.cache_usage:.1%}), "
        f"waste {metrics.cache_waste:.1%}, prefix hits {metrics.prefix_cache_hit_rate:.1%}, "
        f"{metrics.preemptions} preemptions",
        **{name: str(count) for name, count in incidents.items() if count},
    }


def _times(times: Histogram) -> str:
    if not times.count:
        return "-"
    return f"p50 {_ms(times.quantile(0.5))}, p99 {_ms(times.quantile(0.99))}"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.3g} ms"


Show = Callable[[dict[str, str]], None]


@contextlib.contextmanager
def _table(to: TextIO) -> Iterator[Show]:
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

    def show(values: dict[str, str]) -> None:
        table = Table(show_header=False)
        for name, value in values.items():
            table.add_row(name, value)
        live.update(table, refresh=True)

    with Live(console=Console(file=to), auto_refresh=False) as live:
        yield show


@contextlib.contextmanager
def _lines(to: TextIO) -> Iterator[Show]:
    def show(values: dict[str, str]) -> None:
        print("; ".join(f"{name} {value}" for name, value in values.items()), file=to, flush=True)

    yield show
