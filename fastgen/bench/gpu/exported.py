"""Of section `equality`: a model that was exported and loaded again gives the same tokens."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ... import api
from ...artifact.export import export
from .findings import Finding, checked
from .tiny_models import greedy, tiny_model

LENGTH, NUM_TOKENS = 33, 16
FAMILIES = ("llama", "gemma2", "gpt_oss")
_LOAD = """
import sys, time, torch, fastgen
torch.backends.cuda.matmul.allow_tf32 = False
start = time.perf_counter()
model = fastgen.load(sys.argv[1])
row = [int(token) for token in sys.argv[2].split(",")]
ids = torch.tensor([row], device=model.device)
tokens = model.generate(ids, max_new_tokens=int(sys.argv[3]), eos_token_id=None)[0, len(row):]
print(time.perf_counter() - start, *tokens.tolist())
print(*(name for name in sys.modules if name.startswith("transformers.models.")))
"""


def run(device: str) -> Iterator[Finding]:
    torch.backends.cuda.matmul.allow_tf32 = False
    for family in FAMILIES if device == "cuda" else FAMILIES[:1]:
        yield checked(
            f"{family}, exported and loaded by another process", _round_trip, device, family
        )


def _round_trip(device: str, family: str) -> dict[str, Any]:
    model = tiny_model(family, device)
    row, expected = greedy(model, LENGTH, NUM_TOKENS)
    api.optimize(model, kv_cache_memory_bytes=32 << 20)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        report = export(model, Path(folder) / "out")
        seconds = time.perf_counter() - start
        done = subprocess.run(
            [sys.executable, "-c", _LOAD, report.path, ",".join(map(str, row)), str(NUM_TOKENS)],
            capture_output=True,
            text=True,
            timeout=120,
        )
    api.restore(model)
    assert done.returncode == 0, done.stderr[-400:]
    first, modules = done.stdout.split("\n")[:2]
    load_seconds, *tokens = first.split()
    assert [int(token) for token in tokens] == expected, f"{tokens}, not {expected}"
    assert not modules, f"the code of {modules} was imported"
    return {"bytes": report.total_bytes, "export_s": seconds, "load_s": float(load_seconds)}
