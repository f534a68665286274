"""What the GPU check is made of, as far as it needs no GPU: parts, sections, and the page."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from fastgen.bench.gpu import parts, sections
from fastgen.bench.gpu.findings import Check, Figure, Missing, checked, measured, own
from fastgen.bench.gpu.parts import Ended, Part, run_parts
from fastgen.bench.gpu.report import NOT_MEASURED, report
from fastgen.bench.gpu.sections import Section, is_wrong, run_sections


def fails() -> float:
    raise RuntimeError("no such kernel")


def test_findings_name_what_failed():
    assert measured("peer", fails) == Missing("peer", "RuntimeError: no such kernel")
    assert own("ours", fails) == Check("ours", False, {"error": "RuntimeError: no such kernel"})
    assert checked("claim", fails) == Check(
        "claim", False, {"error": "RuntimeError: no such kernel"}
    )
    assert measured("peer", abs, -2) == own("peer", abs, -2) == Figure("peer", 2)
    assert checked("claim", dict, {"error": 0.1}) == Check("claim", True, {"error": 0.1})


# Generators for processes of their own, found there by the name of this file's copy.
PLANTED = """
import os, time
from fastgen.bench.gpu.findings import Check, Figure
def two(value):
    yield Figure("value", value)
    yield Figure("environment", os.environ.get("PLANTED"))
def wrong():
    yield Check("claim", False, {"error": "wrong by 2"})
def raises():
    yield Figure("before", 1)
    raise ValueError("no")
def dies():
    yield Figure("before", 1)
    os._exit(7)
def hangs():
    yield Figure("before", 1)
    time.sleep(600)
"""


@pytest.fixture
def planted():
    """A module of the package with parts that go wrong."""
    file = Path(parts.__file__).parent / f"planted_{os.getpid()}.py"
    file.write_text(PLANTED)
    yield file.stem
    file.unlink()


@pytest.mark.slow
def test_parts_that_fail_hang_or_die_cost_nothing_else(planted, tmp_path):
    given = [
        Part("hangs", f"{planted}:hangs", seconds=20),
        Part("dies", f"{planted}:dies"),
        Part("raises", f"{planted}:raises"),
        Part("two", f"{planted}:two", {"value": 3}, {"PLANTED": "yes"}),
    ]
    found: dict[str, list] = {part.name: [] for part in given}
    deadline = time.monotonic() + 120
    for part, message in run_parts(given, 4, deadline, tmp_path / "log.txt"):
        found[part.name].append(message)
    before = Figure("before", 1)
    assert found["two"] == [Figure("value", 3), Figure("environment", "yes"), Ended("done")]
    assert found["raises"] == [before, Ended("failed", "ValueError: no")]
    assert found["dies"] == [before, Ended("failed", "its process ended with exit code 7")]
    assert found["hangs"][0] == before
    assert found["hangs"][1].status == "cut"
    assert "PLANTED" not in os.environ
    assert "ValueError: no" in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize(
    ("target", "status", "wrong"),
    [("two", "done", False), ("wrong", "done", True), ("raises", "failed", True)],
)
def test_what_a_section_comes_to(planted, tmp_path, target, status, wrong):
    arguments = {"value": 1} if target == "two" else {}
    section = Section("some", 60, [Part(target, f"{planted}:{target}", arguments)])
    records = run_sections([section], tmp_path, "cpu", 500, lambda line: None)
    assert records["some"]["status"] == status
    assert is_wrong(records) == wrong
    assert (tmp_path / "some.json").is_file()


def test_a_late_section_is_skipped_by_name(tmp_path):
    known = sections.sections("cpu", tmp_path)
    records = run_sections(known, tmp_path, "cpu", 0.5, lambda line: None)
    assert {record["status"] for record in records.values()} == {"skipped"}
    assert list(records) == ["kernels", "equality", "prefill", "paged", "decode", "generate"]
    assert not is_wrong(records)
    assert "late" in report(records)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_sections_fit_the_budget(device, tmp_path):
    known = sections.sections(device, tmp_path)
    assert sum(section.seconds for section in known) <= sections.BUDGET_S
    names = [part.name for section in known for part in section.parts]
    assert len(set(names)) == len(names)


def record(**fields) -> dict:
    return {"status": "done", "machine": {"name": "H100", "versions": {"torch": "2.11"}}, **fields}


def test_page_of_nothing():
    page = report({})
    assert "Nothing was run." in page
    assert page.count(NOT_MEASURED) > 100


def test_page_sets_figures_beside_goals():
    prefill = {
        "128/2048/fastgen": 600.0,
        "128/2048/tutorial": 480.0,
        "128/2048/cuDNN": 750.0,
        "64/512/fastgen": 300.0,
    }
    decode = {"32:8/16/512": {"share": 0.61}, "read_gb_per_s": {"best": 3000.0}}
    generate = {
        "llama-3-8b/batch 1": {"ms_per_token": 5.9, "share_of_floor": 0.9, "host_ms_per_step": 0.3},
        "qwen3-0.6b/mixed, 1": {"tokens_per_s": 5000.0},
        "qwen3-0.6b/mixed, 2": {"tokens_per_s": 9000.0},
        "qwen3-0.6b/mixed, 3": {"tokens_per_s": 6000.0},
        "qwen3-0.6b/transformers one by one": {"tokens_per_s": 40.0},
        "qwen3-0.6b/graphs": {"captured": 27, "refusal": None},
    }
    page = report(
        {
            "prefill": record(figures=prefill),
            "decode": record(figures=decode),
            "generate": record(figures=generate, missing={"FlexAttention": "no compiler"}),
        }
    )
    assert "1.25 (goal ≥ 1.20)" in page
    assert "0.80 (goal ≥ 0.85, **missed**)" in page
    assert "61% (goal ≥ 60%)" in page
    assert "5.90 (goal ≤ 5.70, **missed**)" in page
    assert "150.0x (goal ≥ 20.0x)" in page
    assert f"{NOT_MEASURED} (goal ≥ 2.0x)" in page
    assert "6000 tokens/s" in page
    assert "Captured decode steps: 27." in page
    assert "generate: FlexAttention: no compiler" in page
    assert "torch 2.11" in page


def test_page_names_what_is_wrong():
    checks = {"rope": {"ok": False, "error": "error 1.0, allowed 0.1"}, "norm": {"ok": True}}
    ends = {"kernels fp32": {"status": "cut", "why": "after 90 s"}}
    page = report({"kernels": record(checks=checks, parts=ends, seconds=90.0)})
    assert "**wrong**: kernels: rope: error 1.0, allowed 0.1" in page
    assert "**cut**: kernels fp32: after 90 s" in page
    assert "1 of 2" in page
