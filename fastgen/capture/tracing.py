"""torch.export over any number of tokens, also where export cannot prove that it is any number."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import nn
from torch._dynamo.exc import UserError

from ..errors import UnsupportedModelError

# Sizes at which a condition that export could not prove is tried: all small ones, and around
# every power of two.
_SIZES = (*range(2, 65), *(size + d for p in range(7, 21) for size in (2**p,) for d in (-1, 0, 1)))
_ROWS = (2, 3, 7, 64, 1001)


def trace(
    module: nn.Module,
    example: Mapping[str, torch.Tensor],
    tokens: tuple[str, ...],
    up_to: int | None = None,
) -> torch.export.ExportedProgram:
    """One graph of a call with keyword arguments, whose first dimensions are dynamic.

    tokens: The arguments that have as many rows as there are tokens, 2 or more. up_to: So many
    tokens, or one fewer, are enough, and the caller sees to it that calls may be longer. A trace
    rests on conditions about sizes. export proves that they hold for every number of tokens, but
    knows no minimum: where it fails, each condition is evaluated at 105 numbers of tokens.
    Raises: UnsupportedModelError if one does not hold; whatever export raises.
    """
    everything = {name: {0: torch.export.Dim.AUTO} for name in example}
    if up_to is not None:
        program = _export(module, example, everything)
        _check_sizes(program, tokens, up_to)
        return program
    num_tokens = torch.export.Dim("num_tokens", min=2)
    # Other dimensions are whatever they turn out to be: a size of its own, or that of the tokens.
    dynamic = {
        name: {0: num_tokens if name in tokens else torch.export.Dim.AUTO} for name in example
    }
    try:
        return _export(module, example, dynamic)
    except UserError as error:
        if "Constraints violated" not in str(error):
            raise
    program = _export(module, example, everything)
    _check_sizes(program, tokens, None)
    return program


def _export(
    module: nn.Module, example: Mapping[str, torch.Tensor], dynamic: dict[str, dict[int, Any]]
) -> torch.export.ExportedProgram:
    return torch.export.export(module, (), dict(example), dynamic_shapes=dynamic, strict=False)


def _check_sizes(
    program: torch.export.ExportedProgram, tokens: tuple[str, ...], up_to: int | None
) -> None:
    """Refuse a trace that does not hold for every number of tokens."""
    values = {
        node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"
    }
    symbols = set()
    for name in tokens:
        size = values[name].shape[0]
        if isinstance(size, int):
            raise UnsupportedModelError(f"the trace holds for {size} tokens alone")
        symbols.add(size.node.expr)
    if len(symbols) != 1 or not (symbol := symbols.pop()).is_Symbol:
        raise UnsupportedModelError("the trace does not hold for every number of tokens")
    wanted = _SIZES
    if up_to is not None:
        wanted = (*(size for size in _SIZES if size < up_to - 1), up_to - 1)
        taken = program.range_constraints.get(symbol)
        if taken is not None and not (taken.lower <= 2 and taken.upper >= up_to - 1):
            raise UnsupportedModelError(
                f"the model computes something else for sequences of fewer than {taken.lower} or "
                f"more than {taken.upper} tokens"
            )
    environment = values[tokens[0]].fake_mode.shape_env
    for guard in environment.guards:
        condition = environment.simplify(guard.expr)
        others = sorted(condition.free_symbols - {symbol}, key=str)
        for sizes in itertools.product(wanted, *([_ROWS] * len(others))):
            if condition.subs(dict(zip((symbol, *others), sizes, strict=True))) != sympy.true:
                raise UnsupportedModelError(
                    f"the trace holds only where {guard.expr}, which fails for {sizes[0]} tokens"
                )
