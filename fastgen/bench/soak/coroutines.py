"""Callers in coroutines of one event loop: each order is acted out by one of them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from ...async_engine import AsyncEngine
from ...engine.request import Request
from ...errors import QueueFullError
from ...outputs import TokenEvent
from .ledger import Ledger
from .orders import Conduct, Order

FIRST_RETRY_S, LAST_RETRY_S = 0.05, 1.6  # whom a full queue refuses waits twice as long each time
LIMIT_S = 120.0  # an order that takes longer hangs


async def serve_all(
    engine: AsyncEngine, orders: Iterable[Order], ledger: Ledger, num_callers: int
) -> None:
    """Act out all orders, so many at a time."""
    left = iter(orders)

    async def caller() -> None:
        for order in left:  # which all callers share
            try:
                await asyncio.wait_for(_Caller(engine, order, ledger).act(), LIMIT_S)
            except Exception as error:
                ledger.failed(order, error)

    await asyncio.gather(*(caller() for _ in range(num_callers)))


class _Caller:
    """One order on its way."""

    def __init__(self, engine: AsyncEngine, order: Order, ledger: Ledger) -> None:
        self._engine, self._order, self._ledger = engine, order, ledger
        self._read: list[TokenEvent] = []
        self._has_read_enough = asyncio.Event()

    async def act(self) -> None:
        engine, order, ledger = self._engine, self._order, self._ledger
        request = await (self._give_up() if order.conduct is Conduct.GIVES_UP else self._submit())
        if request is None:
            ledger.unseen(order)
            return
        match order.conduct:
            case Conduct.WAITS | Conduct.HAS_A_DEADLINE | Conduct.GIVES_UP:
                await engine.result(request)
                ledger.ended(order, request, None)
                return
            case Conduct.READS | Conduct.LEAVES_EARLY:
                await self._consume(request)
            case Conduct.READS_SLOWLY:
                await self._consume(request, order.pause_s)
            case Conduct.CANCELS_AT_ONCE:
                await asyncio.sleep(order.pause_s)
                await self._cancel(request)
            case Conduct.CANCELS_LATE:
                await self._consume(request)
                await self._cancel(request)
                await self._cancel(request)
            case Conduct.CANCELS_MIDWAY:
                reader = asyncio.create_task(self._consume(request))
                await self._has_read_enough.wait()
                await self._cancel(request)
                await reader
            case Conduct.IS_KILLED:
                reader = asyncio.create_task(self._consume(request))
                await self._has_read_enough.wait()
                reader.cancel()
                await asyncio.gather(reader, return_exceptions=True)
            case Conduct.IS_FORGOTTEN:
                await self._begin_and_forget(request)
        await engine.result(request)  # by now it ends without anybody's doing
        ledger.ended(order, request, self._read)

    async def _submit(self) -> Request:
        """Come again while the queue is full."""
        order, retry_s = self._order, FIRST_RETRY_S
        while True:
            try:
                return await self._engine.submit(
                    order.prompt,
                    order.params,
                    priority=order.priority,
                    deadline_s=order.deadline_s,
                )
            except QueueFullError:
                self._ledger.refused()
                await asyncio.sleep(retry_s)
                retry_s = min(2 * retry_s, LAST_RETRY_S)

    async def _give_up(self) -> Request | None:
        """Submit in a task that is cancelled before it can know its request, as a rule."""
        task = asyncio.create_task(self._submit())
        await asyncio.sleep(0)  # it has begun
        task.cancel()
        await asyncio.wait([task])
        return None if task.cancelled() else task.result()

    async def _consume(self, request: Request, pause_s: float = 0.0) -> None:
        try:
            async for event in self._engine.stream(request):
                self._note(event)
                if pause_s:
                    await asyncio.sleep(pause_s)
                if self._order.conduct is Conduct.LEAVES_EARLY and self._has_read_enough.is_set():
                    break
        finally:
            self._has_read_enough.set()

    async def _begin_and_forget(self, request: Request) -> None:
        stream = self._engine.stream(request)
        async for event in stream:
            self._note(event)
            if self._has_read_enough.is_set():
                break
        del stream  # which is not closed: the event loop finds it

    def _note(self, event: TokenEvent) -> None:
        self._read.append(event)
        if len(self._read) >= self._order.patience:
            self._has_read_enough.set()

    async def _cancel(self, request: Request) -> None:
        self._ledger.cancelled(request)
        await self._engine.cancel(request)
