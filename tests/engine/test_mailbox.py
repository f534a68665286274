"""The mailbox: order, answers, waiting and closing, with and without a thread behind it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from fastgen.engine.mailbox import Mailbox
from fastgen.errors import EngineClosedError

LIMIT = 30  # seconds after which a thread counts as hanging; nothing here takes long


def serve(mailbox: Mailbox) -> None:
    """What an engine thread does with its mailbox."""
    while mailbox.wait():
        while (message := mailbox.take()) is not None:
            message()


def start(mailbox: Mailbox, target=serve) -> threading.Thread:
    thread = threading.Thread(target=target, args=(mailbox,), daemon=True)
    mailbox.thread = thread
    thread.start()
    return thread


@pytest.fixture
def served():
    """A mailbox with a thread, which must be gone at the end."""
    mailbox = Mailbox()
    thread = start(mailbox)
    yield mailbox
    mailbox.close()
    thread.join(LIMIT)
    assert not thread.is_alive()


def check_order(mailbox_class: type[Mailbox]) -> None:
    """Messages of several senders: each one's in its own order, every one once."""
    mailbox, ran = mailbox_class(), []
    start(mailbox)

    def send(sender: int) -> None:
        for number in range(200):
            mailbox.post(lambda number=number: ran.append((sender, number)))

    with ThreadPoolExecutor(4) as executor:
        list(executor.map(send, range(4)))
    mailbox.call(lambda: None)
    mailbox.close()
    assert len(ran) == 800
    for sender in range(4):
        assert [number for who, number in ran if who == sender] == list(range(200))


def test_messages_run_in_order():
    check_order(Mailbox)


def test_take_gives_each_message_once_without_waiting():
    mailbox = Mailbox()
    assert mailbox.take() is None
    first, second = (lambda: 1), (lambda: 2)
    mailbox.post(first)
    mailbox.post(second)
    assert [mailbox.take(), mailbox.take()] == [first, second]
    assert mailbox.take() is None


def test_call_returns_what_the_message_returns(served):
    assert served.call(lambda: 42) == 42
    assert served.call(threading.current_thread) is served.thread


def test_call_runs_after_what_was_posted_before(served):
    ran = []
    served.post(lambda: ran.append(1))
    assert served.call(lambda: list(ran)) == [1]


@pytest.mark.parametrize("kind", [ValueError, SystemExit, KeyboardInterrupt])
def test_call_raises_what_the_message_raises_and_the_thread_goes_on(served, kind):
    error = kind("broken")

    def fail() -> None:
        raise error

    with pytest.raises(kind) as caught:
        served.call(fail)
    assert caught.value is error
    assert served.call(lambda: "alive") == "alive"


def test_call_on_the_thread_itself_runs_at_once(served):
    assert served.call(lambda: served.call(lambda: "nested")) == "nested"


def test_concurrent_calls_get_their_own_answers(served):
    with ThreadPoolExecutor(4) as executor:
        answers = list(executor.map(lambda i: served.call(lambda: i * i), range(100)))
    assert answers == [i * i for i in range(100)]


def test_wait_returns_at_once_when_there_is_a_message():
    mailbox = Mailbox()
    mailbox.post(lambda: None)
    assert mailbox.wait() is True
    assert mailbox.wait() is True, "it was not taken"


def test_wait_wakes_up_on_post():
    mailbox, woken = Mailbox(), threading.Event()
    start(mailbox, lambda mailbox: mailbox.wait() and woken.set())
    mailbox.post(lambda: None)
    assert woken.wait(LIMIT)


def test_wait_is_false_after_close():
    mailbox = Mailbox()
    mailbox.close()
    assert mailbox.wait() is False
    assert mailbox.wait() is False


def test_close_wakes_a_waiting_thread():
    mailbox = Mailbox()
    thread = start(mailbox)
    mailbox.close()
    assert not thread.is_alive(), "close waits for the thread"


def test_messages_before_close_still_run():
    mailbox, ran = Mailbox(), []
    mailbox.post(lambda: ran.append(1))
    mailbox.close()
    assert mailbox.wait() is True
    while (message := mailbox.take()) is not None:
        message()
    assert ran == [1]
    assert mailbox.wait() is False


@pytest.mark.parametrize("method", ["post", "call"])
def test_after_close_messages_are_refused(method):
    mailbox, ran = Mailbox(), []
    mailbox.close()
    with pytest.raises(EngineClosedError, match="closed"):
        getattr(mailbox, method)(lambda: ran.append(1))
    assert mailbox.take() is None
    assert ran == []


def test_closing_twice_is_once(served):
    served.close()
    served.close()
    assert served.wait() is False


def test_close_on_the_thread_itself_does_not_wait_for_itself():
    mailbox = Mailbox()
    thread = start(mailbox)
    mailbox.post(mailbox.close)
    thread.join(LIMIT)
    assert not thread.is_alive()


def test_close_need_not_wait():
    mailbox, go_on = Mailbox(), threading.Event()
    thread = start(mailbox)
    mailbox.post(lambda: go_on.wait(LIMIT))
    mailbox.close(join=False)
    assert thread.is_alive()
    go_on.set()
    thread.join(LIMIT)
    assert not thread.is_alive()


class LastInFirstOut(Mailbox):
    """Planted."""

    def post(self, message):
        with self._condition:
            self._messages.appendleft(message)
            self._condition.notify()

    def call(self, message):
        done = threading.Event()
        self._messages.append(done.set)
        with self._condition:
            self._condition.notify()
        assert done.wait(LIMIT)


class RunsTwice(Mailbox):
    """Planted."""

    again = None

    def take(self):
        message, self.again = self.again, None
        if message is None:
            message = self.again = super().take()
        return message

    def call(self, message):
        done = threading.Event()
        self.post(done.set)
        assert done.wait(LIMIT)


@pytest.mark.parametrize("broken", [LastInFirstOut, RunsTwice], ids=lambda cls: cls.__name__)
def test_planted_mistake_is_found(broken):
    with pytest.raises(AssertionError):
        check_order(broken)
