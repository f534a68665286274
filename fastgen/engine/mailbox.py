"""How other threads reach the engine thread: functions posted in order, and a way to stop."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from ..errors import EngineClosedError

# A lockstep group's caller answers within this time as a rule; then the engine is idle.
IDLE_SECONDS = 0.01


class Mailbox:
    """A queue of functions for one thread, which waits here while it has nothing to do.

    Callers may be interrupted (Ctrl-C) between any two steps of Python and must not keep a lock
    that the thread needs: they enter the lock itself, written in C, and not the condition. It may
    be entered again: a garbage collection that begins meanwhile may end a stream, which posts.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._condition = threading.Condition(self._lock)
        self._messages: deque[Callable[[], Any]] = deque()
        self._closed = False
        self.thread: threading.Thread | None = None

    def post(self, message: Callable[[], Any]) -> None:
        """Have the thread run `message` before its next step.

        Raises: EngineClosedError after `close`.
        """
        with self._lock:
            if self._closed:
                raise EngineClosedError("the engine is closed; make a new one")
            self._messages.append(message)
            self._condition.notify()

    def call(self, message: Callable[[], Any]) -> Any:
        """Run `message` on the thread, wait, and return or raise what it did."""
        if threading.current_thread() is self.thread:
            return message()
        answer: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

        def run() -> None:
            try:
                answer.put((message(), None))
            except BaseException as error:
                answer.put((None, error))

        self.post(run)
        result, error = answer.get()
        if error is not None:
            raise error
        return result

    def forked(self) -> None:
        """In a forked child: the thread is not here, but may have had the lock."""
        self._lock = threading.RLock()
        self._condition = threading.Condition(self._lock)
        self._messages.clear()
        self._closed, self.thread = True, None

    @property
    def closed(self) -> bool:
        return self._closed

    def take(self) -> Callable[[], Any] | None:
        """The next message, without waiting."""
        with self._lock:
            return self._messages.popleft() if self._messages else None

    def wait(
        self, on_idle: Callable[[], None] = lambda: None, timeout: float | None = None
    ) -> bool:
        """Wait for a message, or so many seconds; False once closed and empty.

        on_idle runs if none comes soon.
        """
        with self._lock:
            soon = IDLE_SECONDS if timeout is None else min(IDLE_SECONDS, timeout)
            if not self._condition.wait_for(self._has_news, soon):
                on_idle()
                self._condition.wait_for(self._has_news, timeout)
            return bool(self._messages) or not self._closed

    def _has_news(self) -> bool:
        return bool(self._messages) or self._closed

    def close(self, join: bool = True) -> None:
        """Take no more messages; the thread ends after those it has."""
        with self._lock:
            self._closed = True
            self._condition.notify()
        thread = self.thread
        if join and thread is not None and thread is not threading.current_thread():
            thread.join(timeout=10)
