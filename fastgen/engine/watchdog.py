"""Warns of what takes too long: a step, or a caller that the rows of its batch wait for."""

from __future__ import annotations

import contextlib
import logging
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

logger = logging.getLogger("fastgen")


@dataclass(eq=False)
class _Activity:
    """Something that one thread does."""

    what: str
    thread_id: int = field(default_factory=threading.get_ident)
    start: float = field(default_factory=time.monotonic)
    was_reported: bool = False

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    def stack(self) -> str:
        """Where its thread is now."""
        frame = sys._current_frames().get(self.thread_id)
        return "(the thread is gone)" if frame is None else "".join(traceback.format_stack(frame))


class Watchdog:
    """A thread that looks at what others are doing; it sleeps while nobody does anything.

    Whatever lasts longer than `limit` seconds is reported once, with the stack of its thread, and
    again when it has ended. Nothing is stopped: what hangs may hold locks, and may come back.

    Args:
        limit: None: it watches nothing. on_warning: Called at each report, on its thread.
    """

    def __init__(self, limit: float | None, on_warning: Callable[[], None]) -> None:
        self.limit = limit
        self._on_warning = on_warning
        self._activities: set[_Activity] = set()
        # Not an Event: who is interrupted while setting one may keep its lock for ever.
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._is_asleep = self._is_closed = False
        if limit is not None:
            threading.Thread(target=self._watch, name="fastgen-watchdog", daemon=True).start()

    def begin(self, what: str) -> object:
        """The calling thread begins something; give what is returned to `end`."""
        activity = _Activity(what)
        self._activities.add(activity)
        if self._is_asleep:
            self._bell.put(None)
        return activity

    def end(self, activity: object) -> None:
        assert isinstance(activity, _Activity)
        self._activities.discard(activity)
        if activity.was_reported:
            logger.warning("%s went on after %.1f s", activity.what, activity.seconds)

    @contextlib.contextmanager
    def watching(self, what: str) -> Iterator[None]:
        activity = self.begin(what)
        try:
            yield
        finally:
            self.end(activity)

    def close(self) -> None:
        """End its thread."""
        self._is_closed = True
        self._bell.put(None)

    def _watch(self) -> None:
        assert self.limit is not None
        while not self._is_closed:
            self._is_asleep = True
            if not self._activities:  # who begins something after this look sees that it sleeps
                self._bell.get()
            self._is_asleep = False
            with contextlib.suppress(queue.Empty):  # nobody rings now, but for `close`
                self._bell.get(timeout=self.limit / 4)
            for activity in tuple(self._activities):
                if activity.seconds >= self.limit and not activity.was_reported:
                    self._report(activity)

    def _report(self, activity: _Activity) -> None:
        activity.was_reported = True
        self._on_warning()
        logger.warning(
            "%s has been running for %.1f s; its thread is at:\n%s",
            activity.what,
            activity.seconds,
            activity.stack(),
        )
