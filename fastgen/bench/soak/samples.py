"""Looks at a running engine from time to time: its blocks, and the memory of the process."""

from __future__ import annotations

import statistics
import threading
import time
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from ...engine.engine import EngineCore
from ...engine.scheduler import Scheduler
from ...errors import EngineClosedError
from ..machine import rss_bytes
from .ledger import Ledger

PERIOD_S, PROGRESS_S = 0.1, 5.0
# What the first requests are let in with is not counted: buffers, threads, every page of the cache.
WARM_UP = 0.2
# Fewer samples than these after the warm-up say nothing of memory.
LEAST_SAMPLES = 40
# Between the medians of the first and the last quarter; the allocator's own ups and downs.
MAX_GROWTH_BYTES = 8 << 20


class Watcher(threading.Thread):
    """Takes samples until it is told to stop; what it finds wrong goes to the ledger.

    progress: Is told from time to time how many orders have ended.
    """

    def __init__(
        self, core: EngineCore, ledger: Ledger, num_orders: int, progress: Callable[[int], None]
    ) -> None:
        super().__init__(name="fastgen-watcher", daemon=True)
        self._core, self._ledger, self._num_orders = core, ledger, num_orders
        self._progress = progress
        self._stopped = threading.Event()
        self._rss = array("q")
        self.num_samples = 0
        self.max_used_blocks = 0

    def run(self) -> None:
        told = time.monotonic()
        while not self._stopped.wait(PERIOD_S) and self._core.alive:
            try:
                problems = self._core._mailbox.call(self._look)
            except EngineClosedError:  # its thread has just ended, which others note
                return
            for problem in problems:
                self._ledger.violation(problem)
            resident = rss_bytes()
            if resident is not None and self._ledger.num_ended >= WARM_UP * self._num_orders:
                self._rss.append(resident)
            self.num_samples += 1
            if time.monotonic() - told >= PROGRESS_S:
                told = time.monotonic()
                self._progress(self._ledger.num_ended)

    def stop(self) -> None:
        self._stopped.set()
        self.join()

    def memory(self) -> dict[str, Any]:
        """What `memory_growth` says of the samples after the warm-up."""
        return memory_growth(self._rss)

    def _look(self) -> list[str]:
        """Called on the engine's thread, between two steps."""
        scheduler = self._core._scheduler
        if scheduler is None:
            return []
        self.max_used_blocks = max(self.max_used_blocks, scheduler.pool.num_used)
        return block_faults(scheduler)


def block_faults(scheduler: Scheduler) -> list[str]:
    """What is wrong with who holds which block; counted anew, not as the pool counts."""
    pool = scheduler.pool
    holders = Counter(block for request in scheduler.running for block in request.block_ids)
    never_used = pool.num_blocks - pool._next_fresh
    num_free = never_used + len(pool._freed) + len(pool._idle)
    faults = []
    if num_free + len(holders) != pool.num_usable:
        faults.append(f"{num_free} blocks are free and {len(holders)} in use, of {pool.num_usable}")
    if holders != pool._holders:
        faults.append("the running requests hold other blocks than the pool has given out")
    private = [
        block for block, count in holders.items() if count > 1 and block not in pool._digests
    ]
    if private:
        faults.append(f"blocks {private} are in two hands and were never published")
    if any(request.block_ids for request in scheduler.waiting):
        faults.append("a request that waits holds blocks")
    return faults


def memory_growth(rss: Sequence[int]) -> dict[str, Any]:
    """Medians of the first and the last quarter of resident sizes, in bytes.

    is_flat: None if there are too few to say.
    """
    result: dict[str, Any] = {"samples": len(rss), "allowed_bytes": MAX_GROWTH_BYTES}
    if len(rss) < LEAST_SAMPLES:
        return {**result, "first_bytes": None, "last_bytes": None, "is_flat": None}
    quarter = len(rss) // 4
    first, last = statistics.median(rss[:quarter]), statistics.median(rss[-quarter:])
    return {
        **result,
        "first_bytes": int(first),
        "last_bytes": int(last),
        "is_flat": last - first <= MAX_GROWTH_BYTES,
    }
