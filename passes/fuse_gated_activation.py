"""fuse_gated_activation: act(gate) * up -> `fastgen::silu_mul` or `fastgen::gelu_mul`.

Required: the product is of two tensors of one shape and dtype, in either order, and is the only
reader of the activation; nothing is written in place between the two. Numerics: bit-equal.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .graph import CapturedGraph
from .pattern import aten, mutation_between, only_user, same_shape, value_of
from .report import PassReport


def fuse_gated_activation(captured: CapturedGraph) -> PassReport:
    report = PassReport("fuse_gated_activation")
    graph = captured.graph
    for node in list(graph.nodes):
        if node.target is not aten.mul.Tensor or len(node.args) != 2 or node.kwargs:
            continue
        operands = [arg for arg in node.args if isinstance(arg, fx.Node)]
        activated = next(filter(_is_activation, operands), None)
        if activated is None or len(operands) < 2:
            continue
        up = operands[1] if operands[0] is activated else operands[0]
        why = _refusal(node, activated, up)
        if why is not None:
            report.refuse(node.name, why)
            continue
        with graph.inserting_before(node):
            fused = _fused(graph, activated, up)
        fused.meta = dict(node.meta)
        node.replace_all_uses_with(fused)
        report.matches += 1
    graph.eliminate_dead_code()
    return report


def _is_activation(node: fx.Node) -> bool:
    return node.target in (aten.silu.default, aten.gelu.default)


def _refusal(product: fx.Node, activated: fx.Node, up: fx.Node) -> str | None:
    """Why this product must stay two operations, or None."""
    if up is activated or only_user(activated) is not product:
        return f"{activated.name} is read by others too"
    if value_of(activated).dtype != value_of(up).dtype:
        return f"the gate is {value_of(activated).dtype}, the other {value_of(up).dtype}"
    if not same_shape(activated, up):
        return "the shapes differ: it broadcasts"
    return mutation_between(activated, product)


def _fused(graph: fx.Graph, activated: fx.Node, up: fx.Node) -> fx.Node:
    gate: Any = activated.args[0]
    if activated.target is aten.silu.default:
        return graph.call_function(torch.ops.fastgen.silu_mul.default, (gate, up))
    tanh = activated.kwargs.get("approximate", "none") == "tanh"
    return graph.call_function(torch.ops.fastgen.gelu_mul.default, (gate, up, tanh))
