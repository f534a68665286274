"""merge_linears: linears that read one input and feed one consumer become one linear.

    q, k, v of one attention                  -> one linear, three slices
    gate and up of one product act(gate) * up -> one linear, two slices

Members are found from their consumer, never as siblings: routers, parallel blocks and adapters
share inputs too. Required: exactly one linear on the way to each of q, k, v; the same input;
weights of one dtype and device, none tied, parametrised or sharing storage; all with a bias or
none. The merged weight is a `MergePlan`: the live model's parameters become views of it.
Numerics: the same products and sums; a GEMM of another width may round them in another order.
"""

from __future__ import annotations

import torch
from torch import fx

from .graph import CapturedGraph, InputSpec, MergePlan
from .report import PassReport

aten = torch.ops.aten
_ACTIVATIONS = (aten.silu.default, aten.gelu.default, aten.relu.default)


def merge_linears(captured: CapturedGraph) -> PassReport:
    report = PassReport("merge_linears")
    for node in list(captured.graph.nodes):
        if node.op != "call_function":
            continue
        members: list[fx.Node] | None = None
        if node.target is torch.ops.fastgen.attention.default:
            members = _attention_members(node, report)
        elif node.target is aten.mul.Tensor:
            members = _product_members(node)
        if members is None:
            continue
        why = _refusal(captured, members)
        if why is None:
            _merge(captured, node, members)
            report.matches += 1
        else:
            report.refuse(node.name, why)
    captured.graph.eliminate_dead_code()
    captured.remove_unused_inputs()
    return report


def _attention_members(node: fx.Node, report: PassReport) -> list[fx.Node] | None:
    """The one linear behind each of q, k and v, or None with the reason in the report."""
    members = []
    for name, argument in zip(("query", "key", "value"), node.args[:3], strict=True):
        linears = _linears_behind(argument)  # pyright: ignore
        if len(linears) != 1:
            report.refuse(node.name, f"{len(linears)} linears feed the {name}, not one")
            return None
        members.append(linears.pop())
    if len(set(members)) == 1:
        report.refuse(node.name, "q, k and v come from one linear already")
        return None
    if len(set(members)) < 3:
        report.refuse(node.name, "two of q, k, v come from the same linear")
        return None
    return members


def _linears_behind(node: fx.Node) -> set[fx.Node]:
    """The nearest linears that a value is computed from."""
    found, seen, stack = set(), set(), [node]
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.op != "call_function":
            continue
        if current.target is aten.linear.default:
            found.add(current)
        elif current.target is not torch.ops.fastgen.attention.default:
            stack.extend(current.all_input_nodes)
    return found


def _product_members(node: fx.Node) -> list[fx.Node] | None:
    """gate and up of act(gate) * up in either order, or None if the product is another one."""
    if len(node.args) != 2 or not all(isinstance(arg, fx.Node) for arg in node.args):
        return None
    for activated, up in (node.args, node.args[::-1]):
        gate = activated.args[0] if activated.target in _ACTIVATIONS else None  # pyright: ignore
        if _is_linear(gate) and _is_linear(up) and gate is not up:
            return [gate, up]  # pyright: ignore
    return None


def _is_linear(node: object) -> bool:
    return isinstance(node, fx.Node) and node.target is aten.linear.default


def _weights(captured: CapturedGraph, linear: fx.Node) -> list[tuple[fx.Node, InputSpec | None]]:
    return [
        (node, captured.inputs.get(node.name))
        for node in linear.args[1:]
        if isinstance(node, fx.Node)
    ]


def _refusal(captured: CapturedGraph, members: list[fx.Node]) -> str | None:
    """Why these linears must not be merged, or None."""
    if any(member.args[0] is not members[0].args[0] for member in members):
        return "the linears read different inputs"
    if len({len(_weights(captured, member)) for member in members}) > 1:
        return "some linears have a bias and some have none"
    values = []
    for member in members:
        for node, spec in _weights(captured, member):
            if spec is None or spec.kind != "parameter":
                return f"{node.name} is computed, not a parameter of the model"
            if spec.target in captured.parameter_refusals:
                return f"{spec.target} {captured.parameter_refusals[spec.target]}"
            if len(node.users) > 1:
                return f"{spec.target} is used more than once"
            values.append(node.meta["val"])
    if len({(value.dtype, value.device) for value in values}) > 1:
        return "the weights differ in dtype or device"
    return None


def _merge(captured: CapturedGraph, consumer: fx.Node, members: list[fx.Node]) -> None:
    graph = captured.graph
    members = sorted(members, key=_order(graph).__getitem__)
    merged_inputs = []
    for position in range(1, 1 + len(_weights(captured, members[0]))):
        nodes: list[fx.Node] = [member.args[position] for member in members]  # pyright: ignore
        plan = MergePlan(
            name="+".join(captured.inputs[node.name].target for node in nodes),
            members=tuple(captured.inputs[node.name].target for node in nodes),
        )
        captured.merges.append(plan)
        value = torch.cat([node.meta["val"] for node in nodes])
        name = f"merged_{len(captured.merges)}"
        merged_inputs.append(captured.add_input(name, InputSpec("merged", plan.name), value))
    with graph.inserting_before(members[0]):
        merged = graph.call_function(aten.linear.default, (members[0].args[0], *merged_inputs))
        merged.meta = {**members[0].meta, "val": _concatenated(members)}
        start = 0
        for member in members:
            end = start + member.args[1].meta["val"].shape[0]  # pyright: ignore
            part = graph.call_function(aten.slice.Tensor, (merged, -1, start, end))
            part.meta = dict(member.meta)
            member.replace_all_uses_with(part)
            start = end
    for member in members:
        graph.erase_node(member)


def _concatenated(members: list[fx.Node]) -> torch.Tensor:
    return torch.cat([member.meta["val"] for member in members], dim=-1)


def _order(graph: fx.Graph) -> dict[fx.Node, int]:
    return {node: index for index, node in enumerate(graph.nodes)}
