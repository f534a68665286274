"""A token's place in the call, where a model takes it for the token's position.

Some models count `arange(num_tokens)` instead of reading position_ids (Llama 4, to scale the
queries of long sequences). With one sequence in a call that is the same; here many share it.
"""

from __future__ import annotations

import torch
from torch import fx

from .passes import CapturedGraph
from .passes.pattern import aten, calls, value_of

_ARANGES = (aten.arange.default, aten.arange.start, aten.arange.start_step)
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


def number_by_position(captured: CapturedGraph) -> None:
    """Counts of the call's tokens that become fractional numbers become their positions.

    An index, which stays a whole number, is a place and stays one; `check_packing` sees to it that
    a place that matters otherwise is not taken for a position.
    """
    positions = captured.placeholder("batch", "positions")
    num_tokens = str(value_of(positions).shape)
    for node in list(captured.graph.nodes):
        if node.target in _ARANGES and str(value_of(node).shape) == num_tokens:
            start, step = 0, 1
            if node.target is not aten.arange.default:
                start, _, step = (*node.args, 1)[:3]
            if (start, step) == (0, 1) and value_of(node).dtype == torch.int64:
                if _becomes_fractional(node):
                    node.replace_all_uses_with(positions)
    captured.graph.eliminate_dead_code()


def _becomes_fractional(count: fx.Node) -> bool:
    """Whether all that reads this count makes floating point numbers of it."""
    stack, ends = [count], 0
    while stack:
        node = stack.pop()
        for user in node.users:
            value = user.meta.get("val")
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                if not calls(user, aten.to.dtype, aten.div.Tensor):
                    return False
                ends += 1
            elif user.target in _STEPS:
                stack.append(user)
            else:
                return False
    return ends > 0
