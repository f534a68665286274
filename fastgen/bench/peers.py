"""Peers of bench in environments of their own: a child process each, spoken to in JSON lines.

A peer's processes are stopped by a signal from each answer to the next command, so that whatever
they would do between their turns, they take no core from the others. What goes wrong with a peer
is a line in its report and ends its part; the bench goes on.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import statistics
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..reference import Reference
from .engines import Measurement
from .machine import peak_rss_bytes, processes_of_group, reset_peak_rss
from .parity import NEW_TOKENS
from .startup import Startup
from .workloads import Workload

_FOLDER = Path(__file__).parent / "drivers"
DRIVERS = {"vllm": _FOLDER / "vllm_driver.py", "openvino": _FOLDER / "openvino_driver.py"}
TIMEOUT_S = 900.0  # of one command: a start-up compiles, and a workload may be slow
MIN_CONTEXT = 4096  # tokens a peer is set up for at least, where the model has room for them


class PeerError(RuntimeError):
    """A peer cannot be measured, and why."""


def parse_peer(text: str) -> tuple[str, str]:
    """(name, python) of NAME=PYTHON. Raises: ValueError for anything else."""
    name, _, python = text.partition("=")
    if name not in DRIVERS or not python:
        raise ValueError(
            f"--peer must be NAME=PYTHON with a name of {', '.join(DRIVERS)}, got {text!r}"
        )
    return name, python


class Peer:
    """A driver in a child process, which is stopped while it is not asked anything.

    failure: one line, from when something has gone wrong; the process is ended then.
    idle_cpu_s: CPU seconds that its processes have used between their turns.
    """

    def __init__(
        self, name: str, python: str, driver: Path, threads: int, *, timeout_s: float = TIMEOUT_S
    ) -> None:
        self.name = name
        self.failure: str | None = None
        self.idle_cpu_s = 0.0
        self.loaded: dict[str, Any] = {}
        self.load_peak_rss_bytes: int | None = None
        self.first_tokens: list[int] = []
        self._timeout_s = timeout_s
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._answers: queue.Queue[str] = queue.Queue()
        self._process: subprocess.Popen[str] | None = None
        ours = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
        environment = {key: value for key, value in os.environ.items() if key not in ours}
        try:
            # A group of its own to signal; the session stays ours: should this process be
            # killed, the system ends the orphaned group, stopped as it is.
            self._process = subprocess.Popen(
                [python, str(driver), str(threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
                process_group=0,
                env={**environment, "HF_HUB_OFFLINE": "1"},
            )
        except OSError as error:
            self._fail(f"{python} does not start: {error}")
            return
        threading.Thread(target=self._read, args=(self._process,), daemon=True).start()
        self._pause()

    def load(self, model: Path, dtype: str, max_len: int, prefix_cache: bool) -> None:
        command = {"model": str(model), "dtype": dtype, "max_len": max_len}
        answer = self._try("load", prefix_cache=prefix_cache, **command)
        self.loaded = answer or {}
        self.load_peak_rss_bytes = self._peak_rss_bytes()

    def turn(self, workload: Workload) -> Measurement | None:
        """Run a workload; None if the peer has failed, now or before."""
        for pid in self._group():
            reset_peak_rss(pid)
        answer = self._try("run", requests=workload.requests, sequential=workload.sequential)
        if answer is None:
            return None
        made, wanted = [len(row) for row in answer["tokens"]], [n for _, n in workload.requests]
        if made != wanted:
            self._fail(f"every request must run to its length, {sum(wanted)} tokens; made {made}")
            return None
        self.first_tokens = answer["tokens"][0]
        ttft, tpot = answer.get("ttft_ms"), answer.get("tpot_ms")
        return Measurement(
            self.name,
            answer["seconds"],
            sum(made),
            ttft_ms=statistics.mean(ttft) if ttft else None,
            tpot_ms=statistics.mean(tpot) if tpot else None,
            all_ttft_ms=ttft if workload.sequential else None,
            peak_rss_bytes=self._peak_rss_bytes(),
        )

    def startup(self) -> Startup:
        """What `load` has measured, if it has not failed."""
        return Startup(
            f"{self.name}, from files",
            self.loaded["prepare_s"],
            self.loaded["first_token_s"],
            self.loaded["second_token_s"],
            self.load_peak_rss_bytes,
        )

    def report(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "failure": self.failure,
            "idle_cpu_s": self.idle_cpu_s,
            "load_peak_rss_bytes": self.load_peak_rss_bytes,
            **self.loaded,
        }

    def close(self) -> None:
        if self._process is None:
            return
        self._signal(signal.SIGKILL)
        self._process.wait()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process = None
        self._log.close()

    def _try(self, do: str, **command: Any) -> dict[str, Any] | None:
        if self.failure is not None:
            return None
        try:
            return self._ask({"do": do, **command})
        except PeerError as error:
            self._fail(f"{do}: {error}")
            return None

    def _ask(self, command: dict[str, Any]) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdin is not None
        self._resume()
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
            line = self._answers.get(timeout=self._timeout_s)
        except BrokenPipeError:
            line = ""
        except queue.Empty:
            raise PeerError(f"no answer within {self._timeout_s:.0f} s") from None
        finally:
            self._pause()
        if not line:
            raise PeerError(f"the process ended: {self._last_words()}")
        try:
            answer = json.loads(line)
        except ValueError:
            raise PeerError(f"an answer must be a line of JSON, got {line.strip()!r}") from None
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                self._answers.put(line)
        self._answers.put("")

    def _pause(self) -> None:
        self._signal(signal.SIGSTOP)
        self._used_s = sum(self._group().values())

    def _resume(self) -> None:
        self.idle_cpu_s += sum(self._group().values()) - self._used_s
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _group(self) -> dict[int, float]:
        return {} if self._process is None else processes_of_group(self._process.pid)

    def _peak_rss_bytes(self) -> int | None:
        peaks = [peak_rss_bytes(pid) for pid in self._group()]
        return sum(peak or 0 for peak in peaks) or None

    def _fail(self, why: str) -> None:
        self.failure = " ".join(why.split())
        self.close()

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()]
        return lines[-1] if lines else "it said nothing"


@contextlib.contextmanager
def saved(model: Any) -> Iterator[Path]:
    """A folder with a model's files, beside which a peer may keep what it makes of them."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="fastgen-bench-") as folder:
        path = Path(folder) / "model"
        model.save_pretrained(path)
        yield path


def measure_startup(
    chosen: list[tuple[str, str]], model: Path, dtype: str, threads: int, rounds: int
) -> tuple[list[Startup], list[dict[str, Any]]]:
    """Each peer afresh in every round, in turn; and the report of its last start."""
    found, reports = [], {}
    for _ in range(rounds):
        for name, python in chosen:
            with contextlib.closing(Peer(name, python, DRIVERS[name], threads)) as peer:
                peer.load(model, dtype, MIN_CONTEXT, prefix_cache=False)
                reports[name] = peer.report()
                if peer.loaded:
                    found.append(peer.startup())
    return found, list(reports.values())


@contextlib.contextmanager
def loaded(
    chosen: list[tuple[str, str]], model: Any, dtype: str, workload: Workload, threads: int
) -> Iterator[list[Peer]]:
    """The peers, given as (name, python), with a copy of a model loaded; stopped until asked."""
    if not chosen:
        yield []
        return
    needed = max(len(prompt) + length for prompt, length in workload.requests)
    max_len = min(model.config.max_position_embeddings, max(needed, MIN_CONTEXT))
    with saved(model) as path, contextlib.ExitStack() as stack:
        peers = []
        for name, python in chosen:
            peer = stack.enter_context(
                contextlib.closing(Peer(name, python, DRIVERS[name], threads))
            )
            peer.load(path, dtype, max_len, prefix_cache=workload.name == "prefix")
            peers.append(peer)
        yield peers


def reports(peers: list[Peer], model: Any, workload: Workload) -> list[dict[str, Any]]:
    """What each peer has told; of those that ran, also how many tokens equal transformers'.

    Only for information: 16-bit tokens of random weights part soon, and of one prompt at that.
    """
    if not peers:
        return []
    prompt, length = workload.requests[0]
    count = min(length, NEW_TOKENS)
    expected = Reference(model).generate(prompt, count)[0]
    found = []
    for peer in peers:
        report = peer.report()
        if peer.first_tokens:
            same = sum(a == b for a, b in zip(peer.first_tokens[:count], expected, strict=True))
            report["equal_token_share"] = same / count
        found.append(report)
    return found


def describe(peer: dict[str, Any]) -> str:
    """One line about a peer's report."""
    if peer["failure"] is not None:
        return f"{peer['name']} failed: {peer['failure']}"
    versions = ", ".join(f"{name} {version}" for name, version in peer["versions"].items())
    converted = f"converted in {peer['convert_s']:.1f} s, " if "convert_s" in peer else ""
    equal = peer.get("equal_token_share")
    return (
        f"{peer['name']} ({versions}): {converted}imported in {peer['import_s']:.1f} s, ready in "
        f"{peer['prepare_s']:.1f} s, first token after {peer['first_token_s']:.2f} s, the next "
        f"after {peer['second_token_s']:.2f} s; {peer['idle_cpu_s']:.2f} s of CPU between turns"
        + (
            ""
            if equal is None
            else f"; tokens of the first request equal transformers': {equal:.0%}"
        )
    )
