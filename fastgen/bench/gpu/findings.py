"""What a section finds out: checks that hold or not, figures, and what could not be had and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Check:
    """Something that must hold. details: plain values that say what was seen."""

    name: str
    ok: bool
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Figure:
    """A measured number, or several that belong together, as plain values."""

    name: str
    value: Any


@dataclass(frozen=True)
class Missing:
    """A figure that could not be had here."""

    name: str
    why: str


Finding = Check | Figure | Missing


def checked(name: str, function: Callable[..., dict[str, Any] | None], *arguments: Any) -> Check:
    """A check that holds if `function` raises nothing; what it returns are the details."""
    try:
        return Check(name, True, function(*arguments) or {})
    except Exception as error:  # the next check must still run
        return Check(name, False, {"error": _words(error)})


def measured(name: str, function: Callable[..., Any], *arguments: Any) -> Figure | Missing:
    """What `function` returns, or that it failed: a peer that fails costs nothing else."""
    try:
        return Figure(name, function(*arguments))
    except Exception as error:
        return Missing(name, _words(error))


def own(name: str, function: Callable[..., Any], *arguments: Any) -> Figure | Check:
    """A figure of fastgen's own: where it cannot be had, something is wrong."""
    found = measured(name, function, *arguments)
    return found if isinstance(found, Figure) else Check(name, False, {"error": found.why})


def _words(error: Exception) -> str:
    """The first lines of an error; compilers say hundreds."""
    return f"{type(error).__name__}: {error}"[:500]
