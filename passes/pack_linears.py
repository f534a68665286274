"""pack_linears: `aten.linear` over a weight of the model -> `fastgen::packed_linear`.

The packed weight is a second copy in the GEMM's own layout and an input of its own, made from the
parameter or merged weight that it names, and made again whenever that changes. Required: a weight
that is an input of the graph and that the kernel can pack, and room for it in
`pack_budget_bytes`. Numerics: the same products, summed in the GEMM's order.
"""

from __future__ import annotations

import torch
from torch import fx

from ..kernels.packed_linear import why_not_packed
from .graph import CapturedGraph, InputSpec
from .report import PassReport

aten = torch.ops.aten


def pack_linears(captured: CapturedGraph) -> PassReport:
    report = PassReport("pack_linears")
    packed: dict[fx.Node, fx.Node] = {}
    room = captured.pack_budget_bytes - packed_bytes(captured)
    for node in list(captured.graph.nodes):
        if node.op != "call_function" or node.target is not aten.linear.default:
            continue
        weight: fx.Node = node.args[1]  # pyright: ignore
        why = None if weight in packed else _refusal(captured, weight, room)
        if why is not None:
            report.refuse(node.name, why)
            continue
        if weight not in packed:
            source = captured.inputs[weight.name]
            spec = InputSpec("packed", source.target)
            room -= _bytes_of(weight)
            packed[weight] = captured.add_input(f"packed_{len(packed)}", spec, weight.meta["val"])
        bias = node.args[2] if len(node.args) > 2 else None
        with captured.graph.inserting_before(node):
            linear = captured.graph.call_function(
                torch.ops.fastgen.packed_linear.default, (node.args[0], packed[weight], bias)
            )
        linear.meta = dict(node.meta)
        node.replace_all_uses_with(linear)
        captured.graph.erase_node(node)
        report.matches += 1
    captured.remove_unused_inputs()
    return report


def packed_bytes(captured: CapturedGraph) -> int:
    """Memory that the packed copies take besides the weights themselves."""
    return sum(
        _bytes_of(node)
        for node in captured.placeholders()
        if captured.inputs[node.name].kind == "packed"
    )


def _refusal(captured: CapturedGraph, weight: fx.Node, room: int) -> str | None:
    spec = captured.inputs.get(weight.name)
    if spec is None or spec.kind not in ("parameter", "merged"):
        return f"{weight.name} is computed, not a weight of the model"
    if (why := why_not_packed(weight.meta["val"])) is not None:
        return why
    if _bytes_of(weight) > room:
        return f"a packed copy takes {_bytes_of(weight)} bytes, and {room} are left for them"
    return None


def _bytes_of(node: fx.Node) -> int:
    value = node.meta["val"]
    return value.numel() * value.element_size()
