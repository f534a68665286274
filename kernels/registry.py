"""Which implementation runs an op: several per op, one schema, chosen late.

A semantic op (`fastgen::attention`, ...) is registered with torch under its reference body. Other
implementations (`sdpa`, later C++ and Triton) are plain functions with the same argument names;
each says for a call site why it cannot take it. The newest registered one that does not refuse is
chosen; the reference refuses nothing, so there is always one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class CallSite:
    """What is known of one call when its implementation is chosen.

    args maps every argument of the schema to a fake tensor or a Python value. batch_invariant:
    whether a token's result must not depend on what else is in the batch.
    """

    device: torch.device
    args: Mapping[str, Any]
    batch_invariant: bool = False


@dataclass(frozen=True)
class Implementation:
    """One way to run an op; `refuses` gives the reason why a call site cannot use it, or None.

    batch_invariant: Bit for bit, what it makes of a token depends on nothing but the token (in
    attention, and its sequence): not on how many there are, where it stands, or the threads.
    """

    op: str
    name: str
    function: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]
    refuses: Callable[[CallSite], str | None]
    batch_invariant: bool = False

    def why_not(self, call: CallSite) -> str | None:
        """Why it cannot run a call, or None."""
        if call.batch_invariant and not self.batch_invariant:
            return "its result depends on what else is in the batch"
        return self.refuses(call)


@dataclass(frozen=True)
class Choice:
    """The implementation chosen for a call site, and why the ones before it were not."""

    implementation: Implementation
    refused: tuple[tuple[str, str], ...]


class NoImplementationError(ValueError):
    """No implementation takes a call; str() says of each why not."""


_IMPLEMENTATIONS: dict[str, list[Implementation]] = {}


def schema_argument_names(op: str) -> list[str]:
    """Argument names of `namespace::name` in order, from its torch schema."""
    namespace, name = op.split("::")
    overload = getattr(getattr(torch.ops, namespace), name).default
    return [argument.name for argument in overload._schema.arguments]


def register(
    op: str,
    name: str,
    function: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]],
    refuses: Callable[[CallSite], str | None] = lambda call: None,
    batch_invariant: bool = False,
) -> None:
    """Add an implementation of `op`; the last one registered is asked first.

    Raises: TypeError if its argument names differ from the op's schema.
    """
    expected, given = schema_argument_names(op), list(inspect.signature(function).parameters)
    if expected != given:
        raise TypeError(f"{op} implementation {name!r} must take {expected}, takes {given}")
    _IMPLEMENTATIONS.setdefault(op, []).append(
        Implementation(op, name, function, refuses, batch_invariant)
    )


def implementations(op: str) -> list[Implementation]:
    """All implementations of an op in the order they are asked; the reference is last."""
    return list(reversed(_IMPLEMENTATIONS[op]))


def select(op: str, call: CallSite) -> Choice:
    """The first implementation of `op` that takes this call site.

    Raises: NoImplementationError if none does, which only batch_invariant can bring about.
    """
    refused = []
    for implementation in implementations(op):
        why = implementation.why_not(call)
        if why is None:
            return Choice(implementation, tuple(refused))
        refused.append((implementation.name, why))
    raise NoImplementationError("; ".join(f"{name}: {why}" for name, why in refused))
