"""pack_linears: `aten.linear` over a weight of the model -> `fastgen::packed_linear`.

The packed weight is a second copy in the GEMM's own layout (kernels/packing.py) and an input of its
own, made from the parameter or merged weight that it names, and made again whenever that changes.
Required: a weight that is an input of the graph and that the kernel can pack, and room for it in
`pack_budget_bytes`. Numerics: the same products, summed in the GEMM's order.
"""

from __future__ import annotations

import torch
from torch import fx

from ..kernels import packing
from ..kernels.packing import Layout
from .graph import CapturedGraph, InputSpec
from .pattern import aten, value_of
from .report import PassReport


def pack_linears(captured: CapturedGraph) -> PassReport:
    report = PassReport("pack_linears")
    for node in list(captured.graph.nodes):
        if node.op != "call_function" or node.target is not aten.linear.default:
            continue
        input, weight = node.args[:2]
        why = refusal_to_pack(captured, weight)
        if why is not None:
            report.refuse(node.name, why)
            continue
        packed = packed_input(captured, weight, packing.layout_of(value_of(weight)))
        bias = node.args[2] if len(node.args) > 2 else None
        with captured.graph.inserting_before(node):
            linear = captured.graph.call_function(
                torch.ops.fastgen.packed_linear.default,
                (input, packed, bias, value_of(weight).shape[0]),
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
        value_of(node).numel() * value_of(node).element_size()
        for node in captured.placeholders()
        if captured.inputs[node.name].kind == "packed"
    )


def refusal_to_pack(
    captured: CapturedGraph, weight: fx.Node, layout: Layout | None = None
) -> str | None:
    """Why a linear's weight cannot be packed, or None.

    layout: The one it must have; default: the best for it.
    """
    spec = captured.inputs.get(weight.name)
    if spec is None or spec.kind not in ("parameter", "merged"):
        return f"{weight.name} is computed, not a weight of the model"
    value = value_of(weight)
    if (why := packing.why_not_packed(value)) is not None:
        return why
    if layout not in (None, "onednn") and (why := packing.why_not_tiles(value)) is not None:
        return why
    layout = layout or packing.layout_of(value)
    if layout == "onednn" and captured.deterministic:
        return "deterministic=True, and oneDNN's sums depend on the number of rows"
    if _packed(captured, InputSpec("packed", spec.target, layout)) is not None:
        return None
    wanted = packing.packed_bytes(value.shape, layout)
    room = captured.pack_budget_bytes - packed_bytes(captured)
    if wanted > room:
        return f"a packed copy takes {wanted} bytes, and {room} are left for them"
    return None


def packed_input(captured: CapturedGraph, weight: fx.Node, layout: Layout) -> fx.Node:
    """The input that holds a weight's packed copy, made if there is none."""
    spec = InputSpec("packed", captured.inputs[weight.name].target, layout)
    found = _packed(captured, spec)
    if found is None:
        value = value_of(weight)
        packed = value.new_empty(packing.packed_shape(value.shape, layout))
        count = sum(spec.kind == "packed" for spec in captured.inputs.values())
        found = captured.add_input(f"packed_{count}", spec, packed)
    return found


def _packed(captured: CapturedGraph, spec: InputSpec) -> fx.Node | None:
    names = (name for name, known in captured.inputs.items() if known == spec)
    name = next(names, None)
    return next((node for node in captured.placeholders() if node.name == name), None)
