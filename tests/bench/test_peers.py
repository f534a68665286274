"""Peers in processes of their own: turns, pauses, and what goes wrong, with a stub that speaks."""

import ast
import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastgen.bench import peers
from fastgen.bench.machine import processes_of_group
from fastgen.bench.workloads import Workload

ROOT = Path(__file__).parent.parent.parent
STUB = Path(__file__).parent / "stub_driver.py"
TOGETHER = Workload("mixed", [([1, 2, 3], 4), ([4, 5], 2)])
IN_TURN = Workload("prefill", [([7] * 9, 1), ([8] * 9, 1)], sequential=True)

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@pytest.fixture(name="start")
def start_fixture():
    """Start a stub that behaves in some way; it has loaded, or failed to."""
    with contextlib.ExitStack() as stack:

        def start(how="well", python=sys.executable, timeout_s=60.0):
            peer = peers.Peer("stub", python, STUB, 3, timeout_s=timeout_s)
            stack.enter_context(contextlib.closing(peer))
            peer.load(Path("/model"), how, 4096, prefix_cache=False)
            return peer

        yield start


def test_a_peer_loads_and_takes_turns(start):
    peer = start()
    report = peer.report()
    assert report["failure"] is None
    assert report["versions"] == {"stub": "1.0", "threads": "3"}
    assert report["first_token_s"] > 0 < report["second_token_s"]
    first, second = peer.turn(TOGETHER), peer.turn(IN_TURN)
    assert first.engine == "stub"
    assert first.output_tokens == 6
    assert first.seconds >= 0.01
    assert (first.ttft_ms, first.tpot_ms, first.all_ttft_ms) == (15.0, 2.0, None)
    assert second.all_ttft_ms == [10.0, 20.0]
    assert second.tpot_ms is None
    assert peer.first_tokens == [7]


def test_a_peer_need_not_tell_the_times_of_requests(start):
    measured = start("tells no times").turn(TOGETHER)
    assert (measured.ttft_ms, measured.tpot_ms) == (None, None)


def test_what_a_peer_prints_is_no_answer(start):
    assert start("prints").turn(TOGETHER).output_tokens == 6


@linux
def test_a_spinning_peer_is_stopped_between_its_turns(start):
    peer = start("spins")
    used = sum(processes_of_group(peer._process.pid).values())
    time.sleep(0.5)
    assert sum(processes_of_group(peer._process.pid).values()) == used
    assert peer.turn(TOGETHER) is not None
    assert peer.report()["idle_cpu_s"] == 0


@linux
def test_peak_memory_is_that_of_the_turn(start):
    modest, greedy = start(), start("takes 64 MiB")
    before = greedy.load_peak_rss_bytes
    assert greedy.turn(TOGETHER).peak_rss_bytes - before > 60 << 20
    assert greedy.turn(Workload("single", [([1], 1)])).peak_rss_bytes - before < 30 << 20
    assert abs(modest.turn(TOGETHER).peak_rss_bytes - before) < 30 << 20


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("raises", "load: MemoryError: no room for the weights"),
        ("dies", "load: the process ended: the last words"),
        ("hangs", "load: no answer within 1 s"),
    ],
)
def test_a_peer_that_does_not_load_is_told(start, how, why):
    peer = start(how, timeout_s=1.0 if how == "hangs" else 60.0)
    assert peer.failure == why
    assert peer.turn(TOGETHER) is None, "it has no turns any more"
    assert peers.describe(peer.report()) == f"stub failed: {why}"


def test_a_peer_that_does_not_start_is_told(start):
    peer = start(python="/nowhere/python")
    assert peer.failure.startswith("/nowhere/python does not start: ")
    assert peer.turn(TOGETHER) is None


def test_a_peer_that_makes_too_few_tokens_is_not_measured(start):
    peer = start("stops early")
    assert peer.turn(TOGETHER) is None
    assert peer.failure == "every request must run to its length, 6 tokens; made [3, 1]"


def test_an_answer_that_is_no_json_is_told(tmp_path):
    script = tmp_path / "driver.py"
    script.write_text("print('hello')\ninput()\n")
    with contextlib.closing(peers.Peer("stub", sys.executable, script, 1)) as peer:
        peer.load(Path("/model"), "well", 4096, prefix_cache=False)
        assert peer.failure == "load: an answer must be a line of JSON, got 'hello'"


@linux
def test_closing_ends_the_processes(start):
    peer = start("spins")
    group = peer._process.pid
    peer.close()
    assert not processes_of_group(group)


@pytest.mark.parametrize("text", ["vllm", "vllm=", "=python", "sglang=/usr/bin/python"])
def test_a_peer_is_a_known_name_and_a_python(text):
    with pytest.raises(ValueError, match="--peer must be NAME=PYTHON with a name of vllm, openv"):
        peers.parse_peer(text)


def test_a_python_may_have_any_path():
    assert peers.parse_peer("vllm=/a=b/python") == ("vllm", "/a=b/python")


def test_startup_is_measured_afresh_in_every_round(monkeypatch):
    monkeypatch.setitem(peers.DRIVERS, "vllm", STUB)
    chosen = [("vllm", sys.executable)]
    found, reports = peers.measure_startup(chosen, Path("/model"), "well", 1, rounds=2)
    assert [item.engine for item in found] == ["vllm, from files"] * 2
    assert all(item.prepare_s == 1.5 for item in found)
    assert reports[0]["failure"] is None
    found, reports = peers.measure_startup(chosen, Path("/model"), "raises", 1, rounds=1)
    assert not found
    assert reports[0]["failure"] == "load: MemoryError: no room for the weights"


@pytest.mark.parametrize(
    "driver",
    sorted(STUB.parent.parent.parent.glob("fastgen/bench/drivers/*.py")),
    ids=lambda p: p.stem,
)
def test_drivers_import_nothing_of_fastgen(driver):
    """It is not installed where they run."""
    for node in ast.walk(ast.parse(driver.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            assert not node.module.startswith("fastgen")
        elif isinstance(node, ast.Import):
            assert not any(alias.name.startswith("fastgen") for alias in node.names)


@pytest.mark.slow
def test_bench_goes_on_without_a_peer_that_fails(tmp_path):
    out = tmp_path / "result.json"
    result = subprocess.run(
        [
            *(sys.executable, "-m", "fastgen.cli.main", "bench", "--model", "demo"),
            *("--workload", "single", "--rounds", "1", "--no-transformers"),
            *("--peer", "vllm=/nowhere/python", "--out", str(out)),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr
    data = json.loads(out.read_text())
    assert [row["engine"] for row in data["engines"]] == ["fastgen"]
    assert "does not start" in data["peers"][0]["failure"]
    assert "vllm failed: /nowhere/python does not start" in result.stdout
