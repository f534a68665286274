"""Requests in the order of a key that does not change; any of them may leave at any time."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from typing import Any

from .request import Request

# So many entries of requests that have left are kept, beside as many as there are requests.
MAX_STALE = 64


class RequestHeap:
    """A heap whose entries stay when their request leaves, until they come up.

    Entering, leaving and taking the first cost O(log n), n being the requests that are in: when
    more entries are stale than not, all of them are thrown away, which leaving pays for.
    """

    def __init__(self, key: Callable[[Request], Any]) -> None:
        self._key = key
        self._entries: list[tuple[Any, int, Request]] = []
        self._numbers: dict[Request, int] = {}  # of the entry of each request that is in
        self._num_pushed = 0

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[Request]:
        """All of them in order, for those who have time."""
        return iter([entry[2] for entry in sorted(filter(self._is_live, self._entries))])

    def push(self, request: Request) -> None:
        assert request not in self._numbers, "a request is queued twice"
        self._num_pushed += 1  # of two equal keys the one that came first is smaller
        self._numbers[request] = self._num_pushed
        heapq.heappush(self._entries, (self._key(request), self._num_pushed, request))

    def first(self) -> Request | None:
        """The one with the smallest key."""
        while self._entries and not self._is_live(self._entries[0]):
            heapq.heappop(self._entries)
        return self._entries[0][2] if self._entries else None

    def discard(self, request: Request) -> None:
        """Take a request out, if it is in."""
        if self._numbers.pop(request, None) is None:
            return
        if len(self._entries) > 2 * len(self._numbers) + MAX_STALE:
            self._entries = list(filter(self._is_live, self._entries))
            heapq.heapify(self._entries)

    def _is_live(self, entry: tuple[Any, int, Request]) -> bool:
        return self._numbers.get(entry[2]) == entry[1]
