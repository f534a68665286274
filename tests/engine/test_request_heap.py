"""A heap of requests that may leave at any time, against a sorted list."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgen.config import SamplingParams
from fastgen.engine.request import Request
from fastgen.engine.request_heap import MAX_STALE, RequestHeap


def request(deadline: float = 0.0) -> Request:
    return Request([1], SamplingParams(max_tokens=1), deadline=deadline)


def deadline_heap(kind: type[RequestHeap] = RequestHeap) -> RequestHeap:
    return kind(lambda request: request.deadline)


# (key, None): push a new request. (None, index): the index-th of those that are in leaves.
# (None, None): the first leaves and comes back, with another key.
Operation = tuple[int | None, int | None]


def run_operations(heap: RequestHeap, operations: list[Operation]) -> None:
    inside: list[Request] = []  # in order of arrival
    for key, index in operations:
        if key is not None:
            inside.append(request(key))
            heap.push(inside[-1])
        elif index is not None and inside:
            heap.discard(inside.pop(index % len(inside)))
        elif inside:
            first = heap.first()
            assert first is not None
            heap.discard(first)
            inside.remove(first)
            first.deadline = (first.deadline or 0) + 3
            heap.push(first)
            inside.append(first)
        expected = sorted(inside, key=lambda request: request.deadline or 0)  # stable
        assert list(heap) == expected
        assert heap.first() is (expected[0] if expected else None)
        assert len(heap) == len(expected)


KEYS = st.integers(0, 9)


@settings(deadline=None, max_examples=100)
@given(
    st.lists(
        st.one_of(
            st.tuples(KEYS, st.none()),
            st.tuples(st.none(), st.integers(0, 99)),
            st.tuples(st.none(), st.none()),
        ),
        max_size=60,
    )
)
def test_any_operations(operations):
    run_operations(deadline_heap(), operations)


def test_who_is_not_in_leaves_silently():
    heap, inside = deadline_heap(), request()
    heap.discard(inside)
    heap.push(inside)
    heap.discard(inside)
    heap.discard(inside)
    assert not heap
    assert heap.first() is None


def test_queued_twice_is_our_own_mistake():
    heap, inside = deadline_heap(), request()
    heap.push(inside)
    with pytest.raises(AssertionError, match="twice"):
        heap.push(inside)


def test_those_who_left_are_not_kept():
    """Deadlines lie far ahead: nobody comes up, and 10,000 requests with their tokens go."""
    heap = deadline_heap()
    first = request(0.0)
    heap.push(first)
    for number in range(10_000):
        other = request(1000.0 + number)
        heap.push(other)
        heap.discard(other)
        assert len(heap._entries) <= 2 * len(heap) + MAX_STALE + 1
    assert heap.first() is first


class ComparedKeys:
    """A key that counts how often it was compared."""

    num_compared = 0

    def __init__(self, value: float) -> None:
        self.value = value

    def __lt__(self, other: ComparedKeys) -> bool:
        ComparedKeys.num_compared += 1
        return self.value < other.value


@pytest.mark.parametrize("num_waiting", [100, 10_000])
def test_work_grows_with_the_logarithm(num_waiting):
    """Comparisons of each push, cancel and take among so many: at most 2 log2(n), and amortised.

    heapq compares two children at each level on the way down, one parent on the way up.
    """
    heap = RequestHeap(lambda request: ComparedKeys(float(request.deadline or 0)))
    inside = [request((7919 * number) % num_waiting) for number in range(num_waiting)]
    for each in inside:
        heap.push(each)
    ComparedKeys.num_compared = 0
    for number in range(num_waiting // 2):
        heap.discard(inside[number])
    while (first := heap.first()) is not None:
        heap.discard(first)
    # Each entry is popped once or thrown away; all heaps that are made anew have n entries.
    assert ComparedKeys.num_compared < num_waiting * (2 * num_waiting.bit_length() + 4)


class ForgetsNobody(RequestHeap):
    def _is_live(self, entry):
        return entry[2] in self._numbers


class ComesBackAsItWas(RequestHeap):
    """Entries are told apart by their request, so the one with the old key counts again."""

    def push(self, request):
        super().push(request)
        if any(entry[2] is request for entry in self._entries[:-1]):
            self._numbers[request] = next(e[1] for e in self._entries if e[2] is request)


class ThrowsAwayTheFirst(RequestHeap):
    def discard(self, request):
        super().discard(request)
        self._entries = self._entries[1:] if len(self._entries) > 3 else self._entries


@pytest.mark.parametrize(
    "broken", [ForgetsNobody, ComesBackAsItWas, ThrowsAwayTheFirst], ids=lambda c: c.__name__
)
def test_planted_mistake_is_found(broken):
    operations: list[Operation] = [(5, None), (6, None), (3, None), (4, None), (None, None)]
    operations += [(None, 1), (None, None), (7, None), (None, None), (None, 0), (1, None)]
    run_operations(deadline_heap(), operations)
    with pytest.raises(AssertionError):
        run_operations(deadline_heap(broken), operations)
