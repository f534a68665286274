"""Start-up from files, in fresh processes: what a service waits for until its first token.

torch is imported before the clock starts, and the files are in the system's cache.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .machine import peak_rss_bytes
from .startup import PROMPT, Startup

READING = "reading the weights"
ARTIFACT = "fastgen, artifact"
TRANSFORMERS = "transformers, from disk"
COLD, WARM = "fastgen, from disk, cold", "fastgen, from disk, warm"
_CHILD = """
import json, sys
from fastgen.bench import from_disk
print(json.dumps(from_disk.measure_here(*sys.argv[1:])))
"""
STARTS = (ARTIFACT, WARM, COLD, TRANSFORMERS, READING)


@contextlib.contextmanager
def folders(model: Any) -> Iterator[tuple[Path, Path]]:
    """A model as a checkpoint and as an export."""
    from .. import export
    from .peers import saved

    with saved(model) as checkpoint:
        artifact = checkpoint.parent / "artifact"
        export(model, artifact)
        yield checkpoint, artifact


def measure(what: str, checkpoint: Path, artifact: Path, dtype: str, threads: int) -> Startup:
    """One start in a fresh process. Raises: ValueError with its own words if it fails."""
    folder = artifact if what in (ARTIFACT, READING) else checkpoint
    command = [sys.executable, "-c", _CHILD, what, folder, dtype, threads]
    child = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if child.returncode:
        raise ValueError(f"the start-up of {what!r} failed: {child.stderr.strip()}")
    return Startup(**json.loads(child.stdout.splitlines()[-1]))


def measure_here(what: str, folder: str, dtype: str, threads: str) -> dict[str, Any]:
    """Run in the fresh process, whose arguments these are."""
    torch.set_num_threads(int(threads))
    return asdict(_start(what, Path(folder), dtype))


def _start(what: str, folder: Path, dtype: str) -> Startup:
    start = time.perf_counter()
    if what == READING:
        _read(folder)
        return Startup(what, 0.0, 0.0, 0.0, peak_rss_bytes(), time.perf_counter() - start)
    model = _loaded_artifact(folder) if what == ARTIFACT else _from_pretrained(folder, dtype)
    loaded = time.perf_counter()
    if what in (COLD, WARM):
        from ..api import optimize

        optimize(model, graph_cache=what == WARM)
    prepared = time.perf_counter()
    times = []
    for shift in (0, 100):
        ids = torch.tensor([[token + shift for token in PROMPT]], device=model.device)
        before = time.perf_counter()
        model.generate(ids, max_new_tokens=1, do_sample=False)
        times.append(time.perf_counter() - before)
    parts = {}
    if what != TRANSFORMERS:
        from ..registry import explain

        parts = explain(model).start_seconds()
    return Startup(
        what, prepared - loaded, times[0], times[1], peak_rss_bytes(), loaded - start, parts
    )


def _read(folder: Path) -> None:
    """The bytes of all weights into new memory."""
    for path in folder.glob("*.safetensors"):
        buffer = torch.empty(path.stat().st_size, dtype=torch.uint8).numpy().data
        with open(path, "rb", buffering=0) as file:
            done = 0
            while count := file.readinto(buffer[done:]):
                done += count


def _loaded_artifact(folder: Path) -> Any:
    from ..artifact.load import load

    return load(folder)


def _from_pretrained(folder: Path, dtype: str) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
