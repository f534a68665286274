"""A token's place in the call, where a model takes it for the token's position.

Some models count the tokens of a call instead of reading position_ids: for all they do, or beside
them (Llama 4, to scale the queries of long sequences). With one sequence in a call place and
position are the same; here many share it.
"""

from __future__ import annotations

import torch
from torch import fx

from ..passes import CapturedGraph
from ..passes.pattern import aten, calls, value_of

# How models number the tokens of a call, beginning at 0.
_COUNTING = (aten.arange.default, aten.arange.start, aten.arange.start_step)
# What leaves whole numbers as they are, or moves all of them alike.
_STEPS = (
    aten._assert_tensor_metadata.default,
    aten.add.Tensor,
    aten.expand.default,
    aten.sub.Tensor,
    aten.to.dtype,
    aten.unsqueeze.default,
    aten.view.default,
)


def number_by_position(captured: CapturedGraph, *, every_count: bool) -> None:
    """Read positions where the tokens of the call are counted.

    every_count: For models that take no position_ids. Of others only those counts to which the
    number of tokens in the cache is added, 0 here (without it, transformers' loop counts from 0 in
    each step), and that become fractional numbers: what stays whole may be an index, which is a
    place and stays one. That nothing else depends on the place in the call is what `check_packing`
    shows; here a scale could change far beyond the few tokens that it tries.
    """
    positions = captured.placeholder("batch", "positions")
    value = value_of(positions)
    for node in list(captured.graph.nodes):
        if node.target not in _COUNTING:
            continue
        made = value_of(node)
        if made.dtype != value.dtype or str(made.shape) != str(value.shape):
            continue
        if every_count or _becomes_fractional(node):
            node.replace_all_uses_with(positions)
    captured.graph.eliminate_dead_code()


def _becomes_fractional(count: fx.Node) -> bool:
    """Whether all that reads this count adds 0 and makes floating point numbers of it."""
    stack: list[tuple[fx.Node, bool]] = [(count, False)]
    ends = 0
    while stack:
        node, past_added = stack.pop()
        for user in node.users:
            made = user.meta.get("val")
            if isinstance(made, torch.Tensor) and made.is_floating_point():
                if not past_added or not calls(user, aten.to.dtype, aten.div.Tensor):
                    return False
                ends += 1
            elif user.target in _STEPS:
                adds_past = calls(user, aten.add.Tensor) and user.args[1] in (0,)
                stack.append((user, past_added or adds_past))
            else:
                return False
    return ends > 0
