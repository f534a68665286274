"""Readers of growing outputs: all tokens in order, one end, no wake-up lost, nothing queued."""

from __future__ import annotations

import random
import sys
import threading
import time

import pytest

from fastgen.config import SamplingParams
from fastgen.engine.request import Request
from fastgen.engine.token_reader import News, TokenReader

LIMIT = 30  # seconds after which a thread counts as hanging


def make_outputs(count: int = 1) -> list[Request]:
    news = News()
    return [Request([1], SamplingParams(), index=i, news=news) for i in range(count)]


def add(request: Request, *token_ids: int) -> None:
    """What the engine does for each token."""
    for token_id in token_ids:
        request.output_token_ids.append(token_id)
        if request.news.audience:
            request.news.tell()


def end(request: Request) -> None:
    request.end("length")
    request.done.set()
    if request.news.audience:
        request.news.tell()


def read_all(reader: TokenReader, pause=lambda: None) -> list[tuple[int, int | None]]:
    found = []
    for request, token_id in reader:
        found.append((request.index, token_id))
        pause()
    return found


def test_take_gives_what_is_new():
    (request,) = make_outputs()
    reader = TokenReader([request])
    assert (reader.take(), reader.has_more()) == ([], False)
    add(request, 5, 6)
    assert reader.has_more()
    assert reader.take() == [(request, 5), (request, 6)]
    add(request, 7)
    end(request)
    assert reader.take() == [(request, 7), (request, None)]
    assert reader.at_end
    assert reader.take() == []


def test_readers_do_not_take_from_one_another():
    (request,) = make_outputs()
    early = TokenReader([request])
    add(request, 5)
    assert early.take() == [(request, 5)]
    add(request, 6)
    end(request)
    expected = [(request, 5), (request, 6), (request, None)]
    assert TokenReader([request]).take() == expected
    assert [*early] == expected[1:]


def test_the_end_is_not_seen_before_the_last_token(monkeypatch):
    """A token and the end come between two looks of a reader."""
    (request,) = make_outputs()

    class EndsMeanwhile(threading.Event):
        def is_set(self):
            was_set = super().is_set()
            if not was_set:
                add(request, 9)
                request.end("length")
                self.set()
            return was_set

    request.done = EndsMeanwhile()
    assert read_all(TokenReader([request])) == [(0, 9), (0, None)]


@pytest.mark.parametrize("seed", range(4))
def test_nothing_is_lost_between_threads(seed):
    """Two outputs, three readers of different speed, threads that switch as often as they can."""
    rng = random.Random(seed)
    outputs = make_outputs(2)
    readers = [TokenReader(outputs) for _ in range(3)]
    pauses = [lambda: None, lambda: time.sleep(0), lambda: time.sleep(1e-4)]
    found: list[list] = [[] for _ in readers]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [
            threading.Thread(
                target=lambda i=i: found[i].extend(read_all(readers[i], pauses[i])), daemon=True
            )
            for i in range(len(readers))
        ]
        for thread in threads:
            thread.start()
        for step in range(300):
            for output in outputs:
                add(output, step)
                if rng.random() < 0.1:
                    time.sleep(0)
        for output in outputs:
            end(output)
        for thread in threads:
            thread.join(LIMIT)
            assert not thread.is_alive(), "a reader waits for ever"
    finally:
        sys.setswitchinterval(interval)
    for events in found:
        for output in outputs:
            own = [token for index, token in events if index == output.index]
            assert own == [*range(300), None]
    assert outputs[0].news.audience == 0


def test_a_lost_wake_up_is_found():
    """The planted mistake: the audience is counted after it has looked."""
    (request,) = make_outputs()

    class LooksFirst(News):
        def wait_for(self, is_there):
            if not is_there():
                add(request, 1)  # just now
                with self._condition:
                    self.audience += 1
                    assert self._condition.wait(timeout=0.05), "waits for ever"

    request.news = LooksFirst()
    with pytest.raises(AssertionError, match="waits for ever"):
        read_all(TokenReader([request]))


def test_listeners():
    (request,) = make_outputs()
    heard = []
    listeners = [lambda: heard.append("a"), lambda: heard.append("b")]
    for listener in listeners:
        request.news.listen(listener)
    add(request, 1)
    request.news.unlisten(listeners[0])
    add(request, 2)
    request.news.unlisten(listeners[1])
    add(request, 3)
    assert heard == ["a", "b", "b"]
    assert request.news.audience == 0
