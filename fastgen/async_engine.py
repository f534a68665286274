"""`fastgen.AsyncEngine`: the engine for asyncio. The same one thread runs every step."""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from .config import Config, SamplingParams
from .engine.request import Request
from .engine.token_reader import TokenReader
from .errors import EngineClosedError
from .frontend import Engine, EventStream
from .outputs import EngineMetrics, RequestOutput, TokenEvent
from .text import Prompt

T = TypeVar("T")


class AsyncEngine:
    """Continuous batching over one model, from coroutines of any event loop.

    A front of `fastgen.Engine`, which see for all that is not said here. What may take long (a
    prompt is tokenised, changed weights are looked at) runs on a thread of its own, in the order of
    the calls; the event loop never waits for a step.
    """

    def __init__(
        self, model: Any, tokenizer: Any = None, config: Config | None = None, **fields: Any
    ) -> None:
        self.engine = Engine(model, tokenizer, config, **fields)
        self._is_shut_down = False
        self._caller = ThreadPoolExecutor(1, thread_name_prefix="fastgen-caller")
        self._bells: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Bell] = (
            weakref.WeakKeyDictionary()
        )

    async def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        cache_salt: str | None = None,
        priority: int = 0,
        deadline_s: float | None = None,
    ) -> Request:
        """Queue a prompt, as `Engine.submit`. A task that is cancelled here leaves no request."""

        def submit() -> Request:
            return self.engine.submit(
                prompt, params, cache_salt=cache_salt, priority=priority, deadline_s=deadline_s
            )

        submitted = self._start(submit)
        try:
            return await asyncio.wrap_future(submitted)
        except asyncio.CancelledError:
            submitted.add_done_callback(self._forget)
            raise

    async def stream(self, request: Request) -> AsyncIterator[TokenEvent]:
        """The request's tokens as they come; leaving the loop early cancels the request.

        Raises: RequestFailedError if the request ended by an error.
        """
        events = EventStream(request, self.engine.tokenizer)
        reader = TokenReader(request.outputs)
        try:
            with self._listening(request) as there:
                while not reader.at_end:
                    there.clear()  # before it is looked: what comes then sets it again
                    taken = reader.take()
                    for output, token_id in taken:
                        yield events.event(output, token_id)
                    if not taken:
                        await there.wait()
        finally:
            self.engine.cancel(request, wait=False)

    async def result(self, request: Request) -> RequestOutput:
        """Wait for the end of a request; an error is in the output, not raised."""
        with self._listening(request) as there:
            while not all(output.done.is_set() for output in request.outputs):
                await there.wait()
                there.clear()
        return self.engine.result(request)

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        cache_salt: str | None = None,
        priority: int = 0,
        deadline_s: float | None = None,
    ) -> RequestOutput:
        """Submit one prompt and wait; cancelling the task cancels the request."""
        request = await self.submit(
            prompt, params, cache_salt=cache_salt, priority=priority, deadline_s=deadline_s
        )
        try:
            return await self.result(request)
        finally:
            self.engine.cancel(request, wait=False)

    async def cancel(self, request: Request) -> None:
        """End a request in any state; its blocks are free when this returns."""
        self.engine.cancel(request, wait=False)
        await self.result(request)

    async def metrics(self) -> EngineMetrics:
        """A snapshot of the engine's counters."""
        return await self._call(self.engine.metrics)

    async def pause(self) -> None:
        """As `Engine.pause`."""
        await self._call(self.engine.pause)

    async def resume(self) -> None:
        """As `Engine.resume`."""
        await self._call(self.engine.resume)

    async def shutdown(self, drain: bool = True) -> None:
        """As `Engine.shutdown`; streams that are being read come to their ends."""
        if not self._is_shut_down:
            shut_down = self._start(lambda: self.engine.shutdown(drain))
            self._is_shut_down = True
            self._caller.shutdown(wait=False)
            await asyncio.wrap_future(shut_down)

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.shutdown(drain=False)

    async def _call(self, function: Callable[[], T]) -> T:
        return await asyncio.wrap_future(self._start(function))

    def _start(self, function: Callable[[], T]) -> Future[T]:
        if self._is_shut_down:
            raise EngineClosedError("this engine is shut down; make a new one")
        return self._caller.submit(function)

    def _forget(self, submitted: Future[Request]) -> None:
        if not submitted.cancelled() and submitted.exception() is None:
            self.engine.cancel(submitted.result(), wait=False)

    def _listening(self, request: Request) -> _Listener:
        loop = asyncio.get_running_loop()
        bell = self._bells.get(loop)
        if bell is None:
            bell = self._bells[loop] = _Bell(loop)
        return _Listener(request, bell)


class _Listener:
    """A coroutine's ear: `with` it, an asyncio.Event is set when a request has news."""

    def __init__(self, request: Request, bell: _Bell) -> None:
        self._news, self._bell = request.news, bell
        self.there = asyncio.Event()
        self.is_rung = False

    def __enter__(self) -> asyncio.Event:
        self._news.listen(self._hear)
        return self.there

    def __exit__(self, *exception: object) -> None:
        self._news.unlisten(self._hear)

    def _hear(self) -> None:
        if not self.is_rung:
            self.is_rung = True
            self._bell.ring(self)


class _Bell:
    """Wakes listeners of one event loop: once for all that a step has news for."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._rung: deque[_Listener] = deque()
        self._is_scheduled = False

    def ring(self, listener: _Listener) -> None:
        """Called on the engine's thread."""
        self._rung.append(listener)
        loop = self._loop()
        if self._is_scheduled or loop is None:
            return
        self._is_scheduled = True
        try:
            loop.call_soon_threadsafe(self._wake)
        except RuntimeError:  # the loop is closed, and nobody waits in it any more
            self._rung.clear()

    def _wake(self) -> None:
        self._is_scheduled = False  # first: who rings from now on schedules another call
        while self._rung:
            listener = self._rung.popleft()
            listener.is_rung = False  # first: news from now on ring again
            listener.there.set()
