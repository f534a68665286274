"""An event that happens once."""

from __future__ import annotations

import threading
import time

_LOOK_AGAIN_SECONDS = 1.0


class OneShot:
    """Like threading.Event, but who is interrupted while waiting never stops who sets it.

    A KeyboardInterrupt may strike a waiter between any two steps of Python. An Event's waiter may
    then keep the lock that `set` needs, for ever; here `set` needs none.
    """

    __slots__ = ("_gate", "_is_set")

    def __init__(self) -> None:
        self._is_set = False
        self._gate = threading.Lock()  # closed until it is set
        self._gate.acquire()

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        """Wake all who wait; by one thread, setting it again changes nothing."""
        if not self._is_set:
            self._is_set = True
            self._gate.release()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is set, or so many seconds; whether it is set."""
        end = None if timeout is None else time.monotonic() + timeout
        while not self._is_set:
            left = _LOOK_AGAIN_SECONDS if end is None else end - time.monotonic()
            if left <= 0:
                break
            # A waiter that was interrupted may have left the gate closed: look again by and by.
            if self._gate.acquire(timeout=min(left, _LOOK_AGAIN_SECONDS)):
                self._gate.release()
        return self._is_set
