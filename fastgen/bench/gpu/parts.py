"""Parts of a section, each in a fresh process that hands over its findings as it makes them.

A process of its own bounds what can go wrong: a kernel that reads where it must not takes the CUDA
context with it, a peer may hang or take all memory, and a start is only cold in a fresh process.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path
from typing import Any

from .findings import Finding


@dataclass(frozen=True)
class Part:
    """A generator function of findings, its arguments, and what it finds in its environment.

    target: "module:function" of this package. seconds: at most; None: all that the section has.
    """

    name: str
    target: str
    arguments: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    seconds: float | None = None


@dataclass(frozen=True)
class Ended:
    """status: "done", "failed", "cut" or "not begun"."""

    status: str
    why: str = ""


def run_parts(
    parts: Sequence[Part], at_once: int, deadline: float, log: Path
) -> Iterator[tuple[Part, Finding | Ended]]:
    """Findings of all parts as they come, and for each part how it ended.

    Args:
        at_once: How many run side by side. deadline: By time.monotonic(); who still runs is killed.
        log: What the processes print is appended there.
    """
    waiting, running = list(parts), []
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                part = waiting.pop(0)
                if time.monotonic() >= deadline:
                    yield part, Ended("not begun", "the time of the section was over")
                else:
                    running.append(_Process(part, deadline, log))
            if not running:
                continue
            left = min(process.deadline for process in running) - time.monotonic()
            ready = connection.wait([process.pipe for process in running], max(0.0, left))
            for process in list(running):
                if process.pipe in ready:
                    message = process.receive()
                elif time.monotonic() >= process.deadline:
                    message = Ended("cut", f"after {time.monotonic() - process.start:.0f} s")
                else:
                    continue
                if isinstance(message, Ended):
                    running.remove(process)
                    process.kill()
                yield process.part, message
    finally:
        for process in running:
            process.kill()


class _Process:
    """A part that runs."""

    def __init__(self, part: Part, deadline: float, log: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.part, self.start = part, time.monotonic()
        self.deadline = min(deadline, self.start + (part.seconds or float("inf")))
        self.pipe, sender = context.Pipe(duplex=False)
        self._process = context.Process(target=_run, args=(part, log, sender))
        self._process.start()
        sender.close()  # so that the end of the process is the end of the pipe

    def receive(self) -> Finding | Ended:
        try:
            return self.pipe.recv()
        except EOFError:
            self._process.join(10)
            return Ended("failed", f"its process ended with exit code {self._process.exitcode}")

    def kill(self) -> None:
        """End the process, and those that it started."""
        pid = self._process.pid
        assert pid is not None
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        self._process.kill()  # if it was too young to lead a group
        self._process.join()
        self.pipe.close()


def _run(part: Part, log: Path, pipe: connection.Connection) -> None:
    """In the process: everything but the findings goes to the log."""
    os.setpgrp()
    os.environ.update(part.environment)
    with log.open("a") as file:
        file.write(f"== {part.name}\n")
        file.flush()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        module, _, function = part.target.partition(":")
        run = getattr(importlib.import_module(f".{module}", __package__), function)
        for finding in run(**part.arguments):
            pipe.send(finding)
        pipe.send(Ended("done"))
    except BaseException as error:
        traceback.print_exc()
        pipe.send(Ended("failed", f"{type(error).__name__}: {error}"[:500]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # threads that somebody left behind are not waited for
