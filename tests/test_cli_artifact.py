"""fastgen export and fastgen generate --artifact, as a user runs them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fastgen.artifact.manifest import check_folder
from fastgen.cli.main import main

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo model's folder, and the process that wrote it."""
    folder = tmp_path_factory.mktemp("export") / "demo"
    command = [sys.executable, "-m", "fastgen.cli.main", "export", "--model", "demo"]
    result = subprocess.run(
        [*command, "--out", folder], capture_output=True, text=True, cwd=ROOT, check=False
    )
    return folder, result


def test_export_tells_sizes_and_times(demo):
    folder, result = demo
    assert result.returncode == 0, result.stderr
    for needed in (str(folder), "MiB", "model.safetensors", "manifest.json", "hashes", " s"):
        assert needed in result.stdout
    stages = ("model", "graph", "weights", "hashes")
    assert result.stderr.splitlines() == [f"{stage} ..." for stage in stages]
    assert check_folder(folder).model == "LlamaForCausalLM"


def test_generate_runs_it_with_text(demo, capsys):
    asked = ("--prompt", "def main(", "--max-tokens", "20")
    assert main(["generate", "--model", "demo", *asked]) == 0
    expected = capsys.readouterr()
    assert main(["generate", "--artifact", str(demo[0]), *asked]) == 0
    found = capsys.readouterr()
    assert found.out == expected.out
    assert found.err.startswith("files compared ...\nweights packed ...\n")
    assert "[length: 20 tokens" in found.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give either --model DIR or --artifact DIR"),
        (("--model", "demo", "--artifact", "x"), "give either --model DIR or --artifact DIR"),
        (("--artifact", "nowhere"), "fastgen: nowhere is no folder; give one that"),
        (("--artifact", "x", "--dtype", "float32"), "the dtype and the device that it was"),
    ],
    ids=["none", "both", "nowhere", "dtype"],
)
def test_generate_refuses(arguments, message, capsys):
    assert main(["generate", "--prompt", "x", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_export_leaves_what_is_there(tmp_path, capsys):
    (tmp_path / "mine").write_text("kept")
    assert main(["export", "--model", "demo", "--out", str(tmp_path)]) == 1
    assert "must be new or an empty folder" in capsys.readouterr().err
