"""How the C++ kernels are built, kept and called."""

from __future__ import annotations

import os
import stat
import subprocess
import sys

import pytest
from fastgen.kernels import cpu
from fastgen.kernels.cpu.build import cache_dir

needs_library = pytest.mark.skipif(
    cpu.why_missing() is not None, reason=f"no C++ kernels here: {cpu.why_missing()}"
)
CHILD = """
import torch
from fastgen.kernels import cpu
print(cpu.why_missing())
"""


def child(code: str = CHILD, **environment: str) -> str:
    """What a fresh process prints."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return result.stdout.strip()


@needs_library
def test_it_is_compiled_once_and_kept(tmp_path):
    assert child(FASTGEN_CACHE_DIR=str(tmp_path)) == "None"
    (built,) = tmp_path.glob("*.so")
    before = built.stat().st_mtime_ns
    assert child(FASTGEN_CACHE_DIR=str(tmp_path)) == "None"
    assert built.stat().st_mtime_ns == before
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([built.name, "kernels.lock"])


@needs_library
def test_concurrent_first_runs_share_one_build(tmp_path):
    command = [sys.executable, "-c", CHILD]
    environment = {**os.environ, "FASTGEN_CACHE_DIR": str(tmp_path)}
    children = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert [process.communicate(timeout=120)[0].strip() for process in children] == ["None"] * 3
    assert len(list(tmp_path.glob("*.so"))) == 1


def test_without_a_compiler_the_reason_is_told(tmp_path):
    said = child(FASTGEN_CACHE_DIR=str(tmp_path), CXX="no-such-compiler", PATH="/nonexistent")
    assert said == "no C++ compiler (g++ or $CXX) was found"


def test_a_compiler_that_fails_is_told(tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'bad flag' >&2\nexit 1\n")
    compiler.chmod(0o755)
    said = child(FASTGEN_CACHE_DIR=str(tmp_path / "cache"), CXX=str(compiler))
    assert said == "the C++ kernels do not compile here: bad flag"


def test_a_folder_that_others_may_write_is_refused(tmp_path):
    tmp_path.chmod(0o777)
    assert "writable by no other" in child(FASTGEN_CACHE_DIR=str(tmp_path))


def test_a_new_cache_folder_is_private(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTGEN_CACHE_DIR", str(tmp_path / "a" / "b"))
    assert stat.S_IMODE(cache_dir().stat().st_mode) == 0o700


def test_a_model_generates_without_a_compiler_and_explain_says_why(tmp_path):
    code = """
import torch, transformers, fastgen
config = transformers.LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=2,
)
model = fastgen.optimize(transformers.LlamaForCausalLM(config))
model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=3, do_sample=False)
print(fastgen.explain(model))
"""
    said = child(code, FASTGEN_CACHE_DIR=str(tmp_path), CXX="no-such-compiler", PATH="/nonexistent")
    assert "fastgen::silu_mul x 1: reference" in said
    assert "not cpu: no C++ compiler (g++ or $CXX) was found" in said
    assert "fallbacks     none" in said


@needs_library
def test_one_openmp_runtime():
    """The kernels run on torch's worker threads."""
    code = """
import torch
from fastgen.kernels import cpu
cpu.library()
print(len({line.split()[-1] for line in open("/proc/self/maps") if "gomp" in line}))
"""
    assert child(code) == "1"


# How tensors are handed over.
