"""The command line, as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def fastgen(*arguments: str, timeout: int = 120) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "fastgen.cli.main", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
    )


def test_demo_compares_with_transformers():
    result = fastgen("demo")
    assert result.returncode == 0, result.stderr
    assert "12 of 12 equal" in result.stdout
    for needed in ("TTFT", "TPOT", "tokens/s", "transformers, one by one", "merge_linears"):
        assert needed in result.stdout


def test_generate_streams_text():
    result = fastgen("generate", "--model", "demo", "--prompt", "def main(", "--max-tokens", "20")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
    assert "[length: 20 tokens" in result.stderr


def test_generate_chat_ends_with_the_turn():
    result = fastgen(
        "generate",
        "--model",
        str(ROOT / "examples/demo_model"),
        "--chat",
        "--prompt",
        "Write a Python function, `is_empty(queue)`: Return True if the queue is empty.",
    )
    assert result.returncode == 0, result.stderr
    assert "def is_empty(queue):" in result.stdout
    assert "<|im_end|>" not in result.stdout
    assert "[stop:" in result.stderr


def test_explain_prints_text_and_json():
    assert "one graph of 6 attention layers" in fastgen("explain", "--model", "demo").stdout
    data = json.loads(fastgen("explain", "--model", "demo", "--json").stdout)
    assert data["model"] == "LlamaForCausalLM"


@pytest.mark.slow
def test_cache_is_shown_and_cleared(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTGEN_CACHE_DIR", str(tmp_path))
    (tmp_path / "kernels-0.so").write_bytes(b"0")
    (tmp_path / "graphs").mkdir(mode=0o700)
    (tmp_path / "graphs" / "a.json").write_text("{}")
    shown = fastgen("cache", "show")
    assert shown.returncode == 0, shown.stderr
    assert "1 graphs" in shown.stdout
    assert str(tmp_path) in shown.stdout
    assert "removed 1 graphs and 1 compiled" in fastgen("cache", "clear").stdout
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []
    assert fastgen("cache").returncode == 2


@pytest.mark.slow
def test_bench_measures_after_the_parity_gate():
    result = fastgen(
        "bench", "--model", "demo", "--dtype", "float32", "--workload", "single",
        "--rounds", "1", "--json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    data = json.loads(result.stdout)
    assert data["parity"]["passed"]
    assert data["parity"]["fp32_requests"] == 4
    assert [row["engine"] for row in data["engines"]] == [
        "fastgen",
        "transformers, one by one",
        "transformers, continuous batching",
    ]
    assert all(row["tokens_per_s"] > 0 for row in data["engines"])
    assert 0 < data["shares"]["read_bandwidth"] < 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "--model", "/nowhere", "--prompt", "x"), "config.json"),
        (("generate", "--model", "demo", "--prompt", ""), "at least one token"),
        (("generate", "--model", "demo", "--prompt", "x", "--max-tokens", "0"), "max_tokens"),
        (("generate", "--model", "demo", "--prompt", "x", "--max-tokens", "9999"), "max_model_len"),
        (("generate", "--model", "demo", "--prompt", "x", "--temperature", "nan"), "temperature"),
        (("explain",), "--model"),
        (("bench", "--model", "demo", "--rounds", "0"), "--rounds"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_line(arguments, message):
    result = fastgen(*arguments)
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("arguments", [(), ("nonsense",), ("bench",)], ids=str)
def test_bad_arguments_exit_with_2(arguments):
    assert fastgen(*arguments).returncode == 2


def test_the_parity_gate_can_fail(monkeypatch):
    """A wrong engine is caught before anything is timed."""
    from tiny_models import prompts, tiny_model

    from fastgen.bench import parity

    model, requests = tiny_model("llama"), [(row, 8) for row in prompts(5, 20, 150)]
    assert parity.check_parity(model, requests).passed
    right = parity._engine_tokens
    monkeypatch.setattr(
        parity, "_engine_tokens", lambda *a: [[*row[:-1], row[-1] ^ 1] for row in right(*a)]
    )
    assert not parity.check_parity(model, requests).passed
