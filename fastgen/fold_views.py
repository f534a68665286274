"""Folding of views in a lowered graph: slices, reshapes and the like become one as_strided.

Every view costs some microseconds of Python and dispatch, and a step has ten of them per layer. A
program (native_code.py) knows as_strided and no other view, so that a single one is replaced, too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._prims_common import is_contiguous_or_false

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


def fold_views(graph: fx.Graph) -> None:
    """Replace views over an op's contiguous result, and chains of them, in place.

    Sizes and strides are those that were traced; they must be numbers or one of the sizes that the
    graph computes, or the chain stays as it is.
    """
    sizes: dict[Any, fx.Node] = {}  # that are known where the loop stands
    folded: list[tuple[fx.Node, tuple]] = []
    for node in graph.nodes:
        if isinstance(value := node.meta.get("val"), torch.SymInt):
            sizes.setdefault(value.node.expr, node)
        if node.target not in _VIEWS or all(user.target in _VIEWS for user in node.users):
            continue
        base, offset = _base_and_offset(node)
        if offset is None or not _is_fresh(base):
            continue
        layout = _layout(node.meta["val"], sizes)
        if layout is not None:
            folded.append((node, (base, *layout, offset)))
    for node, arguments in folded:
        with graph.inserting_before(node):
            view = graph.call_function(torch.as_strided, arguments)
        view.meta = dict(node.meta)
        node.replace_all_uses_with(view)
    # Kernels stay, whoever reads their results: torch.fx cannot know which of them write.
    graph.eliminate_dead_code(lambda node: _is_kernel(node) or node.is_impure())


def _base_and_offset(node: fx.Node) -> tuple[fx.Node, int | None]:
    """What a chain of views begins with, and how far into it the last one begins.

    The offset is None if it is no number, or if a reshape on the way may have made a copy. It is
    counted from the ops: traced values of one memory need not share it any more.
    """
    offset: int | None = 0
    while node.target in _VIEWS:
        source: fx.Node = node.args[0]  # pyright: ignore
        skipped = _skipped(node, source.meta["val"])
        offset = None if offset is None or skipped is None else offset + skipped
        node = source
    return node, offset


def _skipped(node: fx.Node, value: torch.Tensor) -> int | None:
    """How many elements of its input's memory a view leaves out at the start; None: unknown."""
    if node.kwargs:
        return None
    if node.target is aten.reshape.default:
        return 0 if is_contiguous_or_false(value) else None
    if node.target not in (aten.slice.Tensor, aten.select.int):
        return 0
    dim, first = (*node.args[1:3], *(0, 0)[len(node.args) - 1 :])
    if first is None or (isinstance(first, int) and first == 0):
        return 0
    stride = value.stride(dim)  # pyright: ignore
    known = isinstance(first, int) and first >= 0 and isinstance(stride, int)
    return first * stride if known else None  # pyright: ignore


def _is_fresh(node: fx.Node) -> bool:
    """Whether the value is an op's own, contiguous result: strides are then those of its shape."""
    value = node.meta.get("val")
    return (
        node.op == "call_function"
        and isinstance(value, torch.Tensor)
        and _is_kernel(node)
        and is_contiguous_or_false(value)
    )


def _is_kernel(node: fx.Node) -> bool:
    return (getattr(node.target, "__module__", None) or "").startswith("fastgen.")


def _layout(value: torch.Tensor, sizes: dict[Any, fx.Node]) -> tuple[list, list] | None:
    """Size and stride as arguments of as_strided, or None."""

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
    return None if None in size or None in stride else (size, stride)
