"""Reading a prompt's outputs while they grow.

Nothing is queued for a reader: a request keeps its tokens anyway, and a reader keeps its place in
them. So a slow reader costs no memory, and many may read one request.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, Protocol, TypeVar

from .one_shot import OneShot


class News:
    """Who wants to hear of new tokens: threads that wait, and listeners.

    Attributes:
        audience: How many they are; while there is none, `tell` needs no call.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # entered by itself: see Mailbox
        self._condition = threading.Condition(self._lock)
        self._listeners: tuple[Callable[[], None], ...] = ()
        self.audience = 0

    def tell(self) -> None:
        """Wake all. What they are to see must be there before `audience` is read."""
        for listener in self._listeners:
            listener()
        with self._lock:
            self._condition.notify_all()

    def wait_for(self, is_there: Callable[[], bool]) -> None:
        """Wait until `is_there`, which is asked now and after each `tell`."""
        with self._lock:
            self.audience += 1  # before it is asked: who changes its answer then sees us
            try:
                self._condition.wait_for(is_there)
            finally:
                self.audience -= 1

    def listen(self, listener: Callable[[], None]) -> None:
        """Call `listener` at each `tell`, on the thread that tells; it must not wait."""
        with self._lock:
            self._listeners = (*self._listeners, listener)
            self.audience += 1

    def unlisten(self, listener: Callable[[], None]) -> None:
        with self._lock:
            self._listeners = tuple(each for each in self._listeners if each != listener)
            self.audience -= 1


class Output(Protocol):
    """What is read of a request."""

    output_token_ids: list[int]
    done: OneShot
    news: News


T = TypeVar("T", bound=Output)


class TokenReader(Generic[T]):
    """One reader's places in the outputs of a prompt, from their first tokens on."""

    def __init__(self, outputs: Sequence[T]) -> None:
        self._news = outputs[0].news
        self._places = dict.fromkeys(range(len(outputs)), 0)  # of those whose end is not read yet
        self._outputs = outputs

    @property
    def at_end(self) -> bool:
        """Whether the end of every output was read."""
        return not self._places

    def has_more(self) -> bool:
        """Whether `take` would give something."""
        outputs = self._outputs
        return any(
            outputs[i].done.is_set() or len(outputs[i].output_token_ids) > place
            for i, place in self._places.items()
        )

    def take(self) -> list[tuple[T, int | None]]:
        """What came since the last time, without waiting: tokens, and None where one has ended."""
        taken: list[tuple[T, int | None]] = []
        for i, place in list(self._places.items()):
            output = self._outputs[i]
            has_ended = output.done.is_set()  # before the tokens are read: no more come after it
            token_ids = output.output_token_ids[place:]
            taken.extend((output, token_id) for token_id in token_ids)
            self._places[i] = place + len(token_ids)
            if has_ended:
                taken.append((output, None))
                del self._places[i]
        return taken

    def __iter__(self) -> Iterator[tuple[T, int | None]]:
        """Wait for what comes, to the end of every output."""
        while not self.at_end:
            self._news.wait_for(self.has_more)
            yield from self.take()
