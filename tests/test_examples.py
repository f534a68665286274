"""The scripts of examples/ and every command and snippet of the README run as they stand."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def run(*command: str, timeout: int = 300) -> subprocess.CompletedProcess:
    result = subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=ROOT)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result


def test_quickstart():
    assert (
        "pass          merge_linears: 12 (applied)"
        in run(sys.executable, "examples/quickstart.py").stdout
    )


@pytest.mark.slow
def test_gpu_check_dry_run(tmp_path):
    run(
        sys.executable, "examples/gpu_check.py", "--out", str(tmp_path), "--device", "cpu",
        "--only", "kernels", "prefill",
    )  # fmt: skip
    kernels, prefill = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("kernels", "prefill")
    )
    assert kernels["status"] == prefill["status"] == "done"
    assert len(kernels["checks"]) > 20
    assert all(check["ok"] for check in kernels["checks"].values())
    assert prefill["figures"]["64/64/fastgen"] > 0
    assert prefill["missing"]["64/64/cuDNN"] == "needs CUDA"
    assert "not measured" in (tmp_path / "README.md").read_text()


def test_gpu_check_skips_what_would_be_late(tmp_path):
    run(
        sys.executable, "examples/gpu_check.py", "--out", str(tmp_path), "--device", "cpu",
        "--budget-s", "0.5",
    )  # fmt: skip
    assert json.loads((tmp_path / "generate.json").read_text())["status"] == "skipped"


def test_training_script_smoke(tmp_path):
    pytest.importorskip("tokenizers")
    run(sys.executable, "examples/train_demo_model.py", "--help")


@pytest.mark.slow
def test_training_script_trains(tmp_path):
    run(
        sys.executable, "examples/train_demo_model.py", "--minutes", "0.2", "--no-compile",
        "--out", str(tmp_path), timeout=900,
    )  # fmt: skip
    assert (tmp_path / "model.safetensors").is_file()


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_readme_python(number):
    run(sys.executable, "-c", blocks("python")[number])


def readme_commands() -> list[str]:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [line.partition("#")[0].strip() for line in lines if line.partition("#")[0].strip()]


# Beside the first, what tests/test_cli.py runs in much the same way.
_SLOW = ("bench", "demo", "generate", "explain", "soak", "verify", "plan")
SLOW_COMMANDS = tuple(f"fastgen {name}" for name in _SLOW)


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(c, marks=pytest.mark.slow) if c.startswith(SLOW_COMMANDS) else c
        for c in readme_commands()
    ],
)
def test_readme_command(command, tmp_path):
    words = shlex.split(command)
    if words[0] == "fastgen":
        quick = ["--model", "demo", "--dtype", "float32", "--rounds", "1", "--no-peers"]
        if words[1] == "bench":  # the same command on the demo model: the shape takes minutes
            words = [w for w in words if w not in ("--shape", "qwen2-0.5b")] + quick
            words = [str(tmp_path / w) if w.endswith(".png") else w for w in words]
        run(sys.executable, "-m", "fastgen.cli.main", *words[1:])
    elif words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets
    elif words[:2] == ["pip", "install"]:
        run(sys.executable, "-m", *words, "--dry-run", "--no-deps", "--no-build-isolation")
    elif words[0] == "python":
        run(sys.executable, *words[1:])
    else:
        raise AssertionError(f"no test knows how to run {command!r}")
