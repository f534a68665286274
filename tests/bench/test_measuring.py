"""Engines, memory, start-up and pictures of bench, on the demo model and on tiny ones."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model

import fastgen
from fastgen.bench import engines, from_disk, machine, startup
from fastgen.bench.parity import check_parity
from fastgen.bench.plot import plot_bars
from fastgen.bench.workloads import Workload, make_workload
from fastgen.cli.bench import cost_of_determinism, summarize

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module", name="bench_model")
def bench_model_fixture():
    model = tiny_model("llama")
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def test_all_engines_make_the_same_tokens_of_a_workload(bench_model):
    workload = make_workload("prefix", 128, 512, seed=0)
    measured = engines.measure(engines.engines_for(bench_model, workload, 16, True), rounds=1)
    assert [item.engine.split(" (")[0] for item in measured] == [
        "fastgen",
        "transformers, one by one",
        "transformers, one static batch of 16",
        "transformers, continuous batching",
    ]
    assert "(8 of 16 requests)" in measured[1].engine
    assert [item.output_tokens for item in measured] == [512, 256, 512, 512]
    assert measured[0].prefix_hit_rate == pytest.approx(15 * 256 / (16 * 272 + 3), abs=0.01)
    assert all(item.seconds > 0 for item in measured)
    assert fastgen.api.lookup(bench_model) is None, "transformers must see the model restored"
    assert bench_model.config._attn_implementation == "sdpa"


def test_sequential_requests_are_timed_one_by_one(bench_model):
    workload = Workload("prefill", [([1] * 20, 1), ([2] * 40, 1)], sequential=True)
    measured = engines.measure(engines.engines_for(bench_model, workload, 16, True), rounds=1)
    assert [item.engine for item in measured] == ["fastgen", "transformers, one by one"]
    for item in measured:
        assert item.all_ttft_ms is not None
        assert len(item.all_ttft_ms) == 2


def test_deterministic_takes_its_turn_beside_fastgen(bench_model, monkeypatch):
    seen, optimize = [], engines.api.optimize
    monkeypatch.setattr(
        engines.api,
        "optimize",
        lambda model, **given: seen.append(given["deterministic"]) or optimize(model, **given),
    )
    workload = Workload("short", [([1] * 20, 2), ([2] * 40, 2)])
    turns = engines.engines_for(bench_model, workload, 16, False, deterministic=True)
    measured = engines.measure(turns, rounds=2)
    assert seen == [False, True, False, True]
    assert [item.engine for item in measured] == ["fastgen", engines.DETERMINISTIC] * 2
    assert [item.output_tokens for item in measured] == [4] * 4


def test_the_cost_of_deterministic_is_told():
    seconds = {"fastgen": 4.0, engines.DETERMINISTIC: 5.0, "transformers": 9.0}
    rounds = [engines.Measurement(name, time, 240) for name, time in seconds.items()]
    rows = summarize(rounds)
    assert cost_of_determinism(rows) == "deterministic=True takes 25.0% more time per token"
    assert cost_of_determinism(rows[:1]) is None


def test_a_prompt_may_hold_the_padding_token(bench_model):
    """generate() masks it where it is given no mask; the engine has nothing to mask."""
    assert bench_model.generation_config.pad_token_id == 0
    assert check_parity(bench_model, [([0, 5, 0, 0, 9, 0, 3, 8] * 4, 8)]).fp32_equal


def test_peak_memory_begins_anew():
    if machine.peak_rss_bytes() is None:
        pytest.skip("this system does not tell the resident set")
    big = torch.ones(1 << 26)  # 256 MiB
    high = machine.peak_rss_bytes()
    del big
    machine.reset_peak_rss()
    assert high - machine.peak_rss_bytes() > 128 << 20


@pytest.mark.slow
def test_startup_runs_in_fresh_processes():
    arguments = ["--model", "demo", "--workload", "startup", "--rounds", "1", "--json"]
    result = subprocess.run(
        [sys.executable, "-m", "fastgen.cli.main", "bench", *arguments],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    rows = json.loads(result.stdout)["engines"]
    assert [row["engine"] for row in rows] == ["fastgen", "transformers"]
    assert rows[0]["prepare_s"] > 0.01 > rows[1]["prepare_s"]
    assert all(row["total_s"] == row["prepare_s"] + row["first_token_s"] for row in rows)


@pytest.mark.slow
def test_startup_from_disk():
    arguments = ["--model", "demo", "--workload", "startup", "--rounds", "1", "--json"]
    result = subprocess.run(
        [sys.executable, "-m", "fastgen.cli.main", "bench", *arguments, "--from-disk"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    rows = {row["engine"]: row for row in json.loads(result.stdout)["engines"]}
    assert list(rows) == ["fastgen", "transformers", *from_disk.STARTS]
    assert all(row["load_s"] > 0 for name, row in rows.items() if name in from_disk.STARTS)
    assert "graph read" in rows[from_disk.ARTIFACT]["parts"]
    assert "graph from cache" in rows[from_disk.WARM]["parts"]
    assert "capture" in rows[from_disk.COLD]["parts"]


def test_a_child_that_fails_is_told():
    with pytest.raises(ValueError, match=r"start-up of fastgen failed: .*config\.json"):
        startup.measure_fresh("fastgen", ["--model", "/nowhere"])


def test_plot_writes_a_picture(tmp_path):
    path = tmp_path / "bars.png"
    plot_bars("title", "tokens/s", [("fastgen", 2.0), ("another", 1.0)], path)
    assert path.read_bytes().startswith(b"\x89PNG")
