"""Callers in threads, all at once through one engine; they cancel one another's requests."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Sequence

from ...async_engine import AsyncEngine
from ...engine.request import Request
from ...errors import QueueFullError
from ...outputs import TokenEvent
from .coroutines import FIRST_RETRY_S, LAST_RETRY_S, LIMIT_S, serve_all
from .ledger import Ledger
from .orders import Conduct, Order


def serve_in_threads(
    engine: AsyncEngine, orders: Sequence[Order], ledger: Ledger, num_threads: int, num_callers: int
) -> None:
    """Act out all orders: every other thread with calls that wait, the rest with event loops.

    num_callers: Of each event loop.
    """
    to_cancel: queue.SimpleQueue[Request] = queue.SimpleQueue()

    def run(place: int) -> None:
        own = orders[place::num_threads]
        if place % 2:
            asyncio.run(serve_all(engine, own, ledger, num_callers))
        else:
            _WaitingCaller(engine, ledger, to_cancel).serve(own)

    threads = [
        threading.Thread(target=run, args=(place,), daemon=True, name=f"fastgen-caller-{place}")
        for place in range(num_threads)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        # Progress is what counts: nobody knows how long all of it takes.
        before = -1
        while thread.is_alive() and ledger.num_ended > before:
            before = ledger.num_ended
            thread.join(LIMIT_S)
        if thread.is_alive():
            ledger.violation(f"{thread.name} hangs: no request has ended for {LIMIT_S:g} s")


class _WaitingCaller:
    """One thread that calls `fastgen.Engine`, order after order."""

    def __init__(
        self, engine: AsyncEngine, ledger: Ledger, to_cancel: queue.SimpleQueue[Request]
    ) -> None:
        self._engine, self._ledger, self._to_cancel = engine.engine, ledger, to_cancel

    def serve(self, orders: Sequence[Order]) -> None:
        for order in orders:
            try:
                self._act(order)
            except Exception as error:
                self._ledger.failed(order, error)

    def _act(self, order: Order) -> None:
        engine = self._engine
        request = self._submit(order)
        self._cancel_others()
        read: list[TokenEvent] | None = []
        match order.conduct:
            case Conduct.WAITS | Conduct.HAS_A_DEADLINE:
                read = None
            case Conduct.CANCELS_AT_ONCE | Conduct.GIVES_UP:
                time.sleep(order.pause_s)
                self._cancel(request)
            case Conduct.CANCELS_MIDWAY:
                self._to_cancel.put(request)  # whoever comes next does it, while this one reads
                read.extend(engine.stream(request))
            case Conduct.CANCELS_LATE:
                read.extend(engine.stream(request))
                self._cancel(request)
                self._cancel(request)
            case Conduct.READS:
                read.extend(engine.stream(request))
            case Conduct.READS_SLOWLY:
                for event in engine.stream(request):
                    read.append(event)
                    time.sleep(order.pause_s)
            case Conduct.IS_KILLED:
                stream = engine.stream(request)
                read.append(next(stream))
                try:
                    stream.throw(KeyboardInterrupt)  # type: ignore[attr-defined]
                except KeyboardInterrupt:
                    pass
            case Conduct.IS_FORGOTTEN:
                stream = engine.stream(request)
                read.append(next(stream))
                del stream
            case Conduct.LEAVES_EARLY:
                for event in engine.stream(request):
                    read.append(event)
                    if len(read) >= order.patience:
                        break
        engine.result(request)
        self._ledger.ended(order, request, read)

    def _submit(self, order: Order) -> Request:
        """Come again while the queue is full."""
        retry_s = FIRST_RETRY_S
        while True:
            try:
                return self._engine.submit(
                    order.prompt,
                    order.params,
                    priority=order.priority,
                    deadline_s=order.deadline_s,
                )
            except QueueFullError:
                self._ledger.refused()
                time.sleep(retry_s)
                retry_s = min(2 * retry_s, LAST_RETRY_S)

    def _cancel_others(self) -> None:
        while True:
            try:
                self._cancel(self._to_cancel.get_nowait())
            except queue.Empty:
                return

    def _cancel(self, request: Request) -> None:
        self._ledger.cancelled(request)
        self._engine.cancel(request)
