"""Folding of views in a lowered graph: a chain of slices, reshapes and the like is one as_strided.

Every view costs some microseconds of Python and dispatch, and a step has ten of them per layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

_VIEWS = (
    aten.slice.Tensor,
    aten.view.default,
    aten.select.int,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.permute.default,
    aten.reshape.default,
)
# What leaves a contiguous tensor's elements in their order, all of them.
_SAME_ORDER = (
    aten.view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
)


def fold_views(graph: fx.Graph) -> None:
    """Replace chains of views over an op's contiguous result, in place.

    Sizes and strides are those that were traced; they must be numbers or one of the sizes that the
    graph computes, or the chain stays as it is.
    """
    sizes = {
        node.meta["val"].node.expr: node
        for node in graph.nodes
        if isinstance(node.meta.get("val"), torch.SymInt)
    }
    for node in list(graph.nodes):
        if node.target not in _VIEWS or all(user.target in _VIEWS for user in node.users):
            continue
        base = _base(node)
        if base is node.args[0] or not _owns_contiguous_memory(base):
            continue
        layout = _layout(node.meta["val"], sizes)
        if layout is None or not _same_memory(node, base):
            continue
        with graph.inserting_before(node):
            folded = graph.call_function(torch.as_strided, (base, *layout))
        folded.meta = dict(node.meta)
        node.replace_all_uses_with(folded)
    graph.eliminate_dead_code()


def _base(node: fx.Node) -> fx.Node:
    while node.target in _VIEWS:
        node = node.args[0]  # pyright: ignore
    return node


def _owns_contiguous_memory(node: fx.Node) -> bool:
    """Whether the value is a fresh, contiguous result: strides are then those of its shape."""
    value = node.meta.get("val")
    return (
        node.op == "call_function"
        and isinstance(value, torch.Tensor)
        and getattr(node.target, "__module__", "").startswith("fastgen.")
        and value.storage_offset() == 0
        and value.is_contiguous()
    )


def _same_memory(node: fx.Node, base: fx.Node) -> bool:
    """Whether no view on the way made a copy, as reshape may."""
    first, last = base.meta["val"], node.meta["val"]
    if first.untyped_storage()._cdata == last.untyped_storage()._cdata:
        return True
    while node is not base:
        if node.target not in _SAME_ORDER:
            return False
        node = node.args[0]  # pyright: ignore
    return last.is_contiguous()


def _layout(value: torch.Tensor, sizes: dict[Any, fx.Node]) -> tuple | None:
    """Size, stride and offset as arguments of as_strided, or None."""

    def argument(number: Any) -> Any:
        if isinstance(number, int):
            return number
        expression = number.node.expr
        return int(expression) if expression.is_number else sizes.get(expression)

    size = [argument(number) for number in value.shape]
    # The stride of a dimension of one element is never used, and may be any size.
    stride = [
        1 if number == 1 else argument(step)
        for number, step in zip(size, value.stride(), strict=True)
    ]
    offset = argument(value.storage_offset())
    if None in size or None in stride or offset is None:
        return None
    return size, stride, offset
