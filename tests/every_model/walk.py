"""One process per type: a model that hangs or crashes takes no other with it."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from .classify import UNPROVEN, WRONG, Verdict, classify

# Into the process that all others are forked from.
_IMPORTED_ONCE = (
    "every_model.classify",
    "fastgen.api",
    "torch._dynamo",
    "torch._export.non_strict_utils",
    "torch.export._trace",
    "transformers.generation",
    "transformers.models.llama.modeling_llama",
)
_WALL_PER_CPU = 4  # a machine that is busy otherwise


def walk(
    types: list[str],
    out: Path,
    processes: int,
    cpu_seconds: int,
    resume: bool,
    table: Path | None,
) -> int:
    """Classify each type; returns the exit code: 1 if one is wrong or unproven."""
    from .building import TYPES

    known: dict[str, dict] = {}
    if resume and out.exists():
        known = json.loads(out.read_text())
    missing = [name for name in types or TYPES if name not in known]
    out.parent.mkdir(parents=True, exist_ok=True)
    for verdict in classified(missing, processes, cpu_seconds):
        known[verdict["model_type"]] = verdict
        out.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")
        print(
            f"{verdict['model_type']:28} {verdict['outcome']:20} {verdict['seconds']:6.1f} s  "
            f"{verdict['reason'][:160]}",
            flush=True,
        )
    counts = Counter(verdict["outcome"] for verdict in known.values())
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.most_common()))
    if table is not None:
        from .table import markdown

        table.write_text(markdown(known))
    return int(any(counts[outcome] for outcome in (WRONG, UNPROVEN)))


def classified(types: list[str], processes: int, cpu_seconds: int):
    """Yields the verdict of each type as it comes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_IMPORTED_ONCE))
    waiting, running = list(types), {}
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            while waiting and len(running) < processes:
                name = waiting.pop(0)
                place = Path(folder, name)
                place.mkdir()
                process = context.Process(target=_child, args=(name, str(place), cpu_seconds))
                process.start()
                running[name] = (process, place, time.monotonic())
            time.sleep(0.05)
            for name, (process, place, start) in list(running.items()):
                if time.monotonic() - start > _WALL_PER_CPU * cpu_seconds:
                    process.kill()
                    process.join()
                if process.is_alive():
                    continue
                del running[name]
                process.join()
                yield _verdict(name, place, process.exitcode)
                shutil.rmtree(place, ignore_errors=True)


def _verdict(name: str, place: Path, exitcode: int | None) -> dict[str, Any]:
    result = place / "verdict.json"
    if result.exists():
        return json.loads(result.read_text())
    return Verdict(name, UNPROVEN, f"its process ended with code {exitcode}").to_dict()


def _child(name: str, place: str, cpu_seconds: int) -> None:
    log = os.open(os.path.join(place, "log"), os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
    torch.set_num_threads(1)
    _own_cache_folder(Path(place))
    start = time.perf_counter()
    verdict = classify(name)
    verdict.seconds = round(time.perf_counter() - start, 1)
    partial = Path(place, "verdict.partial")
    partial.write_text(json.dumps(verdict.to_dict()))
    partial.rename(Path(place, "verdict.json"))
    os._exit(0)  # an engine's thread, or a failed model, must not hold the process


def _own_cache_folder(place: Path) -> None:
    """Graphs are cached for this process alone; the compiled kernels are the user's."""
    from fastgen.kernels.cpu import why_missing
    from fastgen.kernels.cpu.build import cache_dir

    if why_missing() is None:
        for library in cache_dir().glob("kernels-*.so"):
            shutil.copy2(library, place)
    os.environ["FASTGEN_CACHE_DIR"] = str(place)
