"""What transformers' tests say with fastgen, compared with the same tests without it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

KINDS = ("native", "loop", "no generate", "failed")


@dataclass
class Comparison:
    """The tests of one file. A test that does not pass without fastgen is no test of fastgen.

    Attributes:
        kinds: The kind of each test that passes without fastgen: "native" (the engine made every
            token of every call), "loop" (transformers' loop made some), "no generate" (no call
            came to an end), "failed" (it passes without fastgen only).
        failures: Why, for each that failed.
        reasons: How many tests ran transformers' loop for a reason.
        outcomes: How many tests passed, failed and were skipped without fastgen.
        not_run: Why there are no tests, although there is a file.
    """

    kinds: dict[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    reasons: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    not_run: str = ""

    def count(self, kind: str) -> int:
        return list(self.kinds.values()).count(kind)


def compare(baseline: dict[str, Any], fastgen: dict[str, Any]) -> Comparison:
    """Compare the results of tests by their names.

    Args:
        baseline, fastgen: For each test its "outcome", "reason" and "calls", as recorded.
    """
    comparison = Comparison()
    for name, plain in baseline.items():
        comparison.outcomes[plain["outcome"]] += 1
        if plain["outcome"] != "passed":
            continue
        fast = fastgen.get(name, {"outcome": "missing", "reason": "it was not run", "calls": []})
        if fast["outcome"] == "passed":
            comparison.kinds[name] = kind_of(fast["calls"])
            comparison.reasons.update({c["why"] for c in fast["calls"] if c["by"] == "loop"})
        else:
            comparison.kinds[name] = "failed"
            comparison.failures[name] = f"{fast['outcome']}: {fast['reason']}"
    return comparison


def kind_of(calls: list[dict[str, str]]) -> str:
    """The kind of a test that passed, by its calls of generate()."""
    makers = {call["by"] for call in calls}
    if "loop" in makers:
        return "loop"
    return "native" if "engine" in makers else "no generate"


def results(lines: list[dict[str, Any]], how_it_ended: str) -> dict[str, Any]:
    """Each test's result from the lines of a record; one that began and never ended has failed."""
    found: dict[str, Any] = {}
    for line in lines:
        if line["event"] == "ends":
            found[line["test"]] = line
        else:
            found[line["test"]] = {"outcome": "failed", "reason": how_it_ended, "calls": []}
    return found


def markdown(versions: dict[str, str], comparisons: dict[str, Comparison]) -> str:
    """The tables: counts for each file, why transformers' loop ran, what failed and why."""
    lines = ["# transformers' own tests, every model optimised first", ""]
    lines += [f"- {name}: {version}" for name, version in versions.items()]
    lines += [
        "",
        "| tests | pass without fastgen | native | transformers' loop | no generate() | failed "
        "| not counted: fail / skipped without fastgen |",
        "|---|---|---|---|---|---|---|",
    ]
    total, reasons = Comparison(), Counter()
    for name, comparison in comparisons.items():
        lines.append(_row(name, comparison))
        total.kinds.update({f"{name} {test}": kind for test, kind in comparison.kinds.items()})
        total.outcomes.update(comparison.outcomes)
        reasons.update(comparison.reasons)
    lines += [_row("**all**", total), "", "Why transformers' loop ran, and in how many tests:", ""]
    lines += [f"- {count} x {_one_line(why)}" for why, count in reasons.most_common()] or ["never"]
    lines += ["", "Failed with fastgen only:", ""]
    failures = [(n, w) for c in comparisons.values() for n, w in c.failures.items()]
    lines += [f"- `{name}`: {_one_line(why)}" for name, why in failures] or ["none"]
    not_run = [f"- {n}: {_one_line(c.not_run)}" for n, c in comparisons.items() if c.not_run]
    if not_run:
        lines += ["", "Could not be run:", "", *not_run]
    return "\n".join(lines) + "\n"


def _row(name: str, comparison: Comparison) -> str:
    outcomes = comparison.outcomes
    cells = [outcomes["passed"], *(comparison.count(kind) for kind in KINDS)]
    cells.append(f"{outcomes['failed']} / {outcomes['skipped']}")
    return f"| {name} | {' | '.join(map(str, cells))} |"


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]
