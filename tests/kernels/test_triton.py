"""The Triton kernels without a GPU: interpreted, and compiled ahead of time.

A process either interprets kernels or compiles them (interpreted.py): each is one of its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import triton

TESTS = Path(__file__).parent
TABLES = TESTS.parents[1] / "results" / "kernels"


def run(*command: str, **environment: str) -> str:
    """The output of a process that ends well."""
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        cwd=TESTS.parents[1],
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


# Attention in chunks and with ALiBi is left to other implementations.
KNOWN = "not chunk- and not alibi"


def interpreted(*files: str, only: str = "") -> int:
    """Run the tests of implementations called "triton"; how many passed."""
    paths = [str(TESTS / file) for file in files]
    only_these = ("-k", f"({only}) and {KNOWN}" if only else KNOWN)
    options = ("-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts=", "-m", "not slow")
    output = run("-m", "pytest", *options, *paths, *only_these, TRITON_INTERPRET="1")
    found = re.search(r"(\d+) passed", output)
    assert found, output[-2000:]
    assert "skipped" not in output.splitlines()[-1], "an implementation refused a call of its test"
    return int(found[1])


def test_interpreted_kernels_are_accurate():
    """Each kernel in some shapes against its reference; all of them: the slow test below."""
    norms = "(896 or strided) and not fp16"
    assert interpreted("test_rms_norm.py", "test_gated_activation.py", only=norms) > 10
    assert interpreted("test_rope_store_kv.py", only="1-halves or block_sizes or slices") > 5
    assert interpreted("test_attention.py", only="variants and (together or window-16)") >= 2
    assert interpreted("test_paged_attention.py", only="settings and 80 and bf16") >= 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "file",
    ["attention", "paged_attention", "gated_activation", "rms_norm", "rope", "rope_store_kv"],
)
def test_all_shapes_interpreted(file):
    assert interpreted(f"test_{file}.py") > 20


MODEL = """
import sys
import torch
sys.path.insert(0, {tests!r})
from tiny_models import prompts, tiny_model
import fastgen

model = tiny_model({family!r})
rows = [prompts(length)[0] for length in (5, 17, 33)]
expected = [
    model.generate(torch.tensor([row]), max_new_tokens=8, do_sample=False)[0, len(row):].tolist()
    for row in rows
]
fastgen.optimize(model, max_num_batched_tokens=24, graph_cache=False)
with fastgen.Engine(model) as engine:
    params = fastgen.SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    found = [output.token_ids for output in engine.generate(rows, params)]
    assert engine.metrics().engine_steps > 8
assert found == expected, (found, expected)
for op, chosen in fastgen.explain(model).report.kernels.items():
    assert list(chosen) == ["triton"], (op, chosen)
print("equal")
"""


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=pytest.mark.slow) for f in ("llama", "gemma2", "gpt_oss")]
)
def test_tokens_of_a_model_whose_kernels_are_all_interpreted(family):
    """Prompts in chunks, decodes beside them, pages, windows, softcap, sinks: fp32 tokens equal."""
    script = MODEL.format(tests=str(TESTS.parent), family=family)
    assert "equal" in run("-c", script, TRITON_INTERPRET="1")


@pytest.mark.parametrize(
    "target",
    ["sm_80", "sm_90", *(pytest.param(t, marks=pytest.mark.slow) for t in ("sm_89", "sm_100"))],
)
def test_compiled_without_spills_for(target):
    """Exit code 0: no stack, and shared memory within the card's limit."""
    environment = {"TRITON_INTERPRET": "0"}
    output = run("-m", "fastgen.cli.main", "kernels", "--target", target, **environment)
    lines = [
        line for line in output.splitlines() if re.match(r"(flash|paged_p)\S+-(bf|fp)16 ", line)
    ]
    assert len(lines) == 12, "two kernels, three head sizes, two dtypes"
    cores = {"sm_80": "mma", "sm_89": "mma", "sm_90": "wgmma", "sm_100": "tcgen05"}[target]
    assert {line.split()[-1] for line in lines} == {cores}
    kept = (TABLES / f"{target}.txt").read_text()
    if f"Triton {triton.__version__};" in kept:  # another version makes other code
        assert output == kept, f"update it: fastgen kernels --target {target}"
