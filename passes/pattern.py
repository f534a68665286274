"""What the fusing passes ask of a node: which op it is, who reads it, what happens in between."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import fx

aten = torch.ops.aten


def calls(node: object, *targets: Any) -> TypeGuard[fx.Node]:
    """Whether this is a call of one of these ops without keyword arguments."""
    return (
        isinstance(node, fx.Node)
        and node.op == "call_function"
        and node.target in targets
        and not node.kwargs
    )


def value_of(node: Any) -> torch.Tensor:
    """The fake tensor of a node."""
    return node.meta["val"]


def only_user(node: fx.Node) -> fx.Node | None:
    """The one node that reads this one, None if there are more or none."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def other_operand(node: fx.Node, operand: fx.Node) -> fx.Node | None:
    """The other tensor of a product or sum of two, in either order."""
    match node.args:
        case (first, second) if first is operand:
            return second if isinstance(second, fx.Node) else None
        case (first, second) if second is operand:
            return first if isinstance(first, fx.Node) else None
    return None


def cast_source(node: object) -> fx.Node | None:
    """The input of a node that changes at most the dtype, None for any other node."""
    if not calls(node, aten.to.dtype, aten.type_as.default) or len(node.args) != 2:
        return None
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source if value_of(source).device == value_of(node).device else None


def same_shape(first: fx.Node, second: fx.Node) -> bool:
    """Whether two values have one shape for every number of tokens."""
    return str(value_of(first).shape) == str(value_of(second).shape)


def mutates(node: fx.Node) -> bool:
    """Whether the op writes into one of its arguments."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def mutation_between(first: fx.Node, last: fx.Node) -> str | None:
    """Why nodes from `first` to `last` cannot become one: something is written meanwhile."""
    node = first
    while node is not last:
        node = node.next
        if mutates(node):
            return f"{node.name} writes in place between {first.name} and {last.name}"
    return None
