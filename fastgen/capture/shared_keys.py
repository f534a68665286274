"""Layers to which a model gives the keys and values of an earlier one, as Gemma 3n does."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..passes import CapturedGraph
from ..passes.graph import memory_of, written_by
from ..passes.pattern import aten, calls, value_of


def share_keys(captured: CapturedGraph) -> None:
    """Let attentions that are given the same keys and values read the same two nodes.

    Those of the first: `insert_paged_cache` then keeps them once. Not if one of them is written to
    in between, where what was stored would no longer be what is read.
    """
    first: dict[tuple[Any, Any], fx.Node] = {}
    written: dict[int | None, int] = {}  # memory -> where it was written last
    order = {node: index for index, node in enumerate(captured.graph.nodes)}
    for node, index in order.items():
        written.update({memory_of(argument): index for argument in written_by(node)})
        if node.target is not torch.ops.fastgen.attention.default:
            continue
        given = _given(node.args[1]), _given(node.args[2])
        owner = first.setdefault(given, node)
        if all(written.get(memory_of(tensor), -1) < order[owner] for tensor in given):
            node.args = (node.args[0], *owner.args[1:3], *node.args[3:])
        else:
            first[given] = node
    captured.graph.eliminate_dead_code()


def _given(argument: Any) -> fx.Node:
    """What the model gave, before capture put the tokens first: `given[0].transpose(0, 1)`."""
    if calls(argument, aten.transpose.int) and calls(row := argument.args[0], aten.select.int):
        argument = row.args[0]
    while _changes_nothing(argument):
        argument = argument.args[0]
    return argument


def _changes_nothing(node: fx.Node) -> bool:
    """A `to` of what is there already: the same tensor."""
    if node.target not in (aten.to.dtype, aten.to.device, aten.to.dtype_layout):
        return False
    before, after = value_of(node.args[0]), value_of(node)
    same = (before.dtype, before.device) == (after.dtype, after.device)
    return same and len(node.args) <= 3 and not node.kwargs.get("copy")
