"""What was rewritten, what was not and why: the data behind `explain`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class PassReport:
    """One pass over one graph. status: applied, off (by name), rolled back (it failed), or
    not for the graph's kind of device."""

    name: str
    matches: int = 0
    refused: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0
    status: str = "applied"

    def refuse(self, where: str, why: str) -> None:
        """Record a place that looked like a match and was left alone."""
        self.refused.append((where, why))


@dataclass
class Report:
    """Everything `explain` knows about one compiled graph."""

    passes: list[PassReport] = field(default_factory=list)
    kernels: dict[str, dict[str, Any]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
