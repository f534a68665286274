"""The sections of the GPU check, and what runs them one after another within their time."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .card import describe_machine
from .findings import Check, Figure
from .parts import Ended, Part, run_parts

_LEAST_SECONDS = 5  # imports alone take so long: a section with less is not begun
Record = dict[str, Any]


@dataclass(frozen=True)
class Section:
    """seconds: of the whole check's `BUDGET_S`. at_once: parts that run side by side."""

    name: str
    seconds: float
    parts: Sequence[Part]
    at_once: int = 1


BUDGET_S = 510.0
SHAPES = ("qwen3-0.6b", "llama-3-8b", "llama-3.2-1b")
FAMILIES = ("llama", "qwen2", "mistral", "gemma2", "gpt_oss")


def sections(device: str, caches: Path) -> list[Section]:
    """All sections in order. caches: an empty folder, in which the models' starts are cold."""
    on_gpu = device == "cuda"
    here: dict[str, Any] = {"device": device}
    dtypes = ("float32", "bfloat16", "float16") if on_gpu else ("float32",)
    kernels = [
        Part(f"kernels {op} {dtype}", "kernel_checks:run", {**here, "dtype": dtype, "op": op})
        for dtype in dtypes
        for op in (("paged_attention", "attention", "others") if on_gpu else ("all",))
    ]
    kernels.append(Part("kernels coverage", "kernel_checks:coverage"))
    equality = [
        Part(f"equality {family}", "equality:run", {**here, "family": family})
        for family in (FAMILIES if on_gpu else FAMILIES[:1])
    ]
    equality.append(Part("equality live weights", "live_weights:run", here))
    equality.append(Part("equality exported", "exported:run", here))
    prefill = [Part("prefill", "prefill:run", here), Part("prefill flex", "prefill:run_flex", here)]
    return [
        Section("kernels", 90, kernels, at_once=10 if on_gpu else 1),
        Section("equality", 80, equality, at_once=6 if on_gpu else 1),
        Section("prefill", 65, prefill),
        Section("paged", 45, [Part("paged", "paged:run", here)]),
        Section("decode", 25, [Part("decode", "decode:run", here)]),
        Section("generate", 195, _generate(here, caches, on_gpu)),
    ]


def _generate(here: dict[str, Any], caches: Path, on_gpu: bool) -> list[Part]:
    """Each shape is first met by a process without any caches, and once more by one with them."""

    def part(name: str, shape: str, function: str, seconds: float) -> Part:
        folder = caches / shape
        environment = {"TRITON_CACHE_DIR": str(folder / "triton")}
        if on_gpu:  # on the CPU that would be a compilation of the C++ kernels
            environment["FASTGEN_CACHE_DIR"] = str(folder / "fastgen")
        arguments = {**here, "shape": shape}
        return Part(f"{name} {shape}", f"generate:{function}", arguments, environment, seconds)

    small, large, middle = SHAPES
    parts = [part("serve", small, "serve", 85), part("warm start", small, "warm_start", 25)]
    if on_gpu:
        parts += [
            part("one by one", large, "one_request", 50),
            part("one by one", middle, "one_request", 35),
            part("warm start", large, "warm_start", 30),
        ]
    parts += [part("static cache", middle, "static_cache", 45)]
    return parts


def run_sections(
    chosen: Sequence[Section], out: Path, device: str, budget_s: float, tell: Callable[[str], None]
) -> dict[str, Record]:
    """Run sections in order; each writes out/NAME.json whenever it finds something.

    A section may take its own share of the budget and what earlier ones left; one that would be
    late is skipped.

    Returns: the records by name; `is_wrong` says what they come to.
    """
    end = time.monotonic() + budget_s
    scale = budget_s / max(BUDGET_S, sum(section.seconds for section in chosen))
    records = {}
    for number, section in enumerate(chosen):
        later = sum(each.seconds for each in chosen[number + 1 :]) * scale
        left = end - later - time.monotonic()
        if left < _LEAST_SECONDS:
            record = _new_record(section, device)
            record |= {"status": "skipped", "why": f"late: {left:.0f} s were left"}
            _write(record, out)
        else:
            record = _run(section, time.monotonic() + left, out, device)
        records[section.name] = record
        wrong = [name for name, check in record["checks"].items() if not check["ok"]]
        tell(f"{section.name}: {record['status']}, {len(wrong)} wrong of {len(record['checks'])}")
        for name in wrong:
            tell(f"  wrong: {name}: {record['checks'][name].get('error', '')}")
        for name, part in record["parts"].items():
            if part["status"] != "done":
                tell(f"  {part['status']}: {name}: {part['why']}")
    return records


def is_wrong(records: dict[str, Record]) -> bool:
    """Whether a section failed or a check does not hold."""
    return any(
        record["status"] == "failed" or not all(c["ok"] for c in record["checks"].values())
        for record in records.values()
    )


def _new_record(section: Section, device: str) -> Record:
    return {
        "section": section.name,
        "status": "running",
        "machine": describe_machine(device),
        "seconds": 0.0,
        "checks": {},
        "figures": {},
        "missing": {},
        "parts": {},
    }


def _run(section: Section, deadline: float, out: Path, device: str) -> Record:
    start, record = time.monotonic(), _new_record(section, device)
    for part, message in run_parts(section.parts, section.at_once, deadline, out / "log.txt"):
        match message:
            case Ended():
                record["parts"][part.name] = {"status": message.status, "why": message.why}
            case Check():
                record["checks"][message.name] = {"ok": message.ok, **message.details}
            case Figure():
                record["figures"][message.name] = message.value
            case _:
                record["missing"][message.name] = message.why
        record["seconds"] = time.monotonic() - start
        _write(record, out)
    ends = {part["status"] for part in record["parts"].values()}
    record["status"] = "failed" if "failed" in ends else "done" if ends == {"done"} else "cut"
    record["machine_after"] = describe_machine(device)
    _write(record, out)
    return record


def _write(record: Record, out: Path) -> None:
    (out / f"{record['section']}.json").write_text(json.dumps(record, indent=2) + "\n")
