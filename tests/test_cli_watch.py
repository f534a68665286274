"""`fastgen generate --watch`: what is shown while requests run, on a terminal and elsewhere."""

from __future__ import annotations

import io
import threading
from dataclasses import replace

import pytest
from test_histogram import histogram_of

from fastgen import EngineMetrics, SamplingParams
from fastgen.cli import watch as watching
from fastgen.cli.main import main
from fastgen.cli.watch import state, watch
from fastgen.engine.request import Request

METRICS = EngineMetrics(
    engine_steps=20,
    prompt_tokens=30,
    output_tokens=60,
    finished={"length": 1},
    num_running=2,
    num_waiting=3,
    num_blocks=100,
    num_free_blocks=75,
    cache_usage=0.25,
    cache_waste=0.125,
    prefix_tokens=40,
    prefix_cache_hit_tokens=10,
    preemptions=4,
    ttft=histogram_of([0.2] * 3),
    step_forward=histogram_of([0.004] * 20),
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class StubEngine:
    """Makes 10 tokens between two looks; at the last of them the requests end."""

    def __init__(self, requests: list[Request], num_looks: int) -> None:
        self.requests, self.num_looks, self.waits = requests, num_looks, []

    def metrics(self, wait: bool = True) -> EngineMetrics:
        self.waits.append(wait)
        if len(self.waits) == self.num_looks:
            for request in self.requests:
                request.end("length")
                request.done.set()
        return replace(METRICS, output_tokens=10 * len(self.waits))


def running(count: int = 2) -> list[Request]:
    return [Request([1], SamplingParams()) for _ in range(count)]


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
    monkeypatch.setattr(watching, "TABLE_SECONDS", 0.01)
    monkeypatch.setattr(watching, "LINE_SECONDS", 0.01)


def test_what_is_shown():
    shown = state(METRICS, 12.34, 2.0)
    assert shown == {
        "time": "2.0 s",
        "requests": "2 running, 3 waiting, ended: 1 length",
        "tokens": "30 prompt, 60 output, 12.3 output/s",
        "queue": "-",
        "TTFT": "p50 179 ms, p99 179 ms",  # of 200 ms, within 13.2 %
        "TPOT": "-",
        "end to end": "-",
        "step": "20 steps of 4 ms forward, - sampling, - host",
        "cache": "25 of 100 blocks (25.0%), waste 12.5%, prefix hits 25.0%, 4 preemptions",
    }


def test_the_speed_of_all_the_time():
    assert "30.0 output/s" in state(METRICS, None, 2.0)["tokens"]


@pytest.mark.parametrize(
    ("field", "name"),
    [
        ("kernel_fallbacks", "kernel fallbacks"),
        ("watchdog_warnings", "watchdog warnings"),
        ("queue_full", "rejected"),
        ("out_of_memory_steps", "out of memory"),
    ],
)
def test_what_should_not_happen_is_shown_when_it_did(field, name):
    assert name not in state(METRICS, 1.0, 1.0)
    assert state(replace(METRICS, **{field: 2}), 1.0, 1.0)[name] == "2"


def test_lines_without_a_terminal():
    engine, out = StubEngine(requests := running(), 4), io.StringIO()
    watch(engine, requests, out)
    lines = out.getvalue().splitlines()
    assert len(lines) == 4  # three while they ran, and the last state
    assert all(line.startswith("time ") and "2 running" in line for line in lines)
    assert "50 output" in lines[-1]
    assert "\x1b" not in out.getvalue()
    # Only the last look, when nothing runs, may wait for a step.
    assert engine.waits == [False] * 4 + [True]


def test_the_last_speed_is_that_of_all_the_time(monkeypatch):
    speeds = []
    monkeypatch.setattr(
        watching, "state", lambda metrics, speed, seconds: speeds.append(speed) or {}
    )
    watch(StubEngine(requests := running(), 4), requests, io.StringIO())
    assert speeds[-1] is None
    assert all(speed > 0 for speed in speeds[:-1])


def test_a_table_on_a_terminal():
    engine, out = StubEngine(requests := running(), 4), Terminal()
    watch(engine, requests, out)
    assert out.getvalue().count("end to end") == 5  # rich prints the last one again when it ends
    assert "\x1b[?25l" in out.getvalue()
    assert out.getvalue().rindex("\x1b[?25h") > out.getvalue().rindex("\x1b[?25l")  # the cursor


def test_requests_that_ended_before_are_shown_once():
    for request in (requests := running()):
        request.done.set()
    engine, out = StubEngine(requests, 99), io.StringIO()
    watch(engine, requests, out)
    assert len(out.getvalue().splitlines()) == 1


def test_all_requests_are_waited_for():
    first, second = running()
    first.done.set()
    out, engine = io.StringIO(), StubEngine([], 0)
    thread = threading.Thread(target=watch, args=(engine, [first, second], out), daemon=True)
    thread.start()
    thread.join(0.05)
    assert thread.is_alive()
    second.done.set()
    thread.join(20)
    assert not thread.is_alive()


def test_an_error_of_the_engine_leaves_the_terminal_as_it_was():
    class Broken(StubEngine):
        def metrics(self, wait: bool = True) -> EngineMetrics:
            if len(self.waits) == 2:
                raise RuntimeError("the engine stopped")
            return super().metrics(wait)

    out = Terminal()
    with pytest.raises(RuntimeError, match="the engine stopped"):
        watch(Broken([], 0), running(), out)
    assert out.getvalue().rindex("\x1b[?25h") > out.getvalue().rindex("\x1b[?25l")


def test_the_command_watches_and_prints_texts_at_the_end(capsys):
    prompts = ("--prompt", "def main(", "--prompt", "def add(self, key, value):\n")
    arguments = ["generate", "--model", "demo", *prompts, "--max-tokens", "12", "--watch"]
    assert main(arguments) == 0
    result = capsys.readouterr()
    first, second = result.out.split("=== prompt 2\n")
    assert first.startswith("=== prompt 1\n")
    assert len(first) > len("=== prompt 1\n\n")
    assert second.strip()
    lines = [line for line in result.err.splitlines() if line.startswith(("time", "["))]
    assert "ended: 2 length" in lines[-3]
    assert "24 output" in lines[-3]
    assert all(line.startswith("[length: 12 tokens") for line in lines[-2:])


def test_help_says_where_things_go(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for needed in ("Text goes to stdout", "metrics to stderr", "a line per second", "at the end"):
        assert needed in text
