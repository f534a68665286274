"""merge_linears: linears that read one input and feed one consumer become one linear.

    q, k, v of one attention                  -> one linear, three slices
    gate and up of one product act(gate) * up -> one linear, two slices

Members are found from their consumer, never as siblings: routers, parallel blocks and adapters
share inputs too. They are the linears behind q, k and v (gate and up), one each, that read the one
input common to all; what LoRA adds to them on the way stays as it is. Required: weights of one
dtype and device, none tied, parametrised or sharing storage; all with a bias or none. The merged
weight is a `MergePlan`: the live model's parameters become views of it.
Numerics: the same products and sums; a GEMM of another width may round them in another order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .graph import CapturedGraph, InputSpec, MergePlan
from .pattern import aten, calls, cast_source, mutation_between
from .report import PassReport

_ATTENTION = torch.ops.fastgen.attention.default
_ACTIVATIONS = (aten.silu.default, aten.gelu.default, aten.relu.default)
# What a value can come from other than a linear; Conv1D, which keeps its weight transposed, is one.
_OTHER_PRODUCTS = (
    aten.addmm.default,
    aten.mm.default,
    aten.bmm.default,
    aten.matmul.default,
    aten._grouped_mm.default,
)


def merge_linears(captured: CapturedGraph) -> PassReport:
    report = PassReport("merge_linears")
    for node in list(captured.graph.nodes):
        if node.target is _ATTENTION:
            roles = dict(zip(("query", "key", "value"), node.args[:3], strict=True))
            members, why = _members({role: _products_behind(roles[role]) for role in roles})
        elif (gate_and_up := _gate_and_up(node)) is not None:
            members, why = _members(gate_and_up)
        else:
            continue
        members.sort(key=_order(captured.graph).__getitem__)
        why = why or _refusal(captured, members)
        if why is None:
            _merge(captured, members)
            report.matches += 1
        else:
            report.refuse(node.name, why)
    captured.graph.eliminate_dead_code()
    captured.remove_unused_inputs()
    return report


def _members(roles: dict[str, set[fx.Node]]) -> tuple[list[fx.Node], str | None]:
    """One linear per role, all of the same input; or none, and why."""
    inputs: list[set[Any]] = []
    for role, products in roles.items():
        linears = [node for node in products if _is_linear(node)]
        if not linears:
            others = "".join(sorted({f", but {node.target}" for node in products}))
            return [], f"no linear feeds the {role}{others}"
        inputs.append({linear.all_input_nodes[0] for linear in linears})
    common = set.intersection(*inputs)
    if not common:
        return [], "the linears read different inputs"
    members = []
    for role, products in roles.items():
        found = [node for node in products if _is_linear(node) and node.args[0] in common]
        if len(found) > 1:
            return [], f"{len(found)} linears of the shared input feed the {role}, not one"
        members += found
    if len(set(members)) == 1:
        return [], f"{', '.join(roles)} come from one linear already"
    if len(set(members)) < len(members):
        return [], f"two of {', '.join(roles)} come from the same linear"
    return members, None


def _products_behind(argument: Any) -> set[fx.Node]:
    """The nearest linears and other matrix products that a value is computed from."""
    found, seen, stack = set(), set(), [argument]
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        if _is_linear(current) or current.target in _OTHER_PRODUCTS:
            found.add(current)
        elif current.target is not _ATTENTION:
            stack.extend(current.all_input_nodes)
    return found


def _gate_and_up(node: fx.Node) -> dict[str, set[fx.Node]] | None:
    """The linears behind gate and up of act(gate) * up, or None if the product is another one."""
    if node.target is not aten.mul.Tensor or len(node.args) != 2:
        return None
    for activated, up in (node.args, node.args[::-1]):
        if isinstance(activated, fx.Node) and activated.target in _ACTIVATIONS:
            roles = {"gate": _linears_in_sum(activated.args[0]), "up": _linears_in_sum(up)}
            if all(roles.values()) and not roles["gate"] & roles["up"]:
                return roles
    return None


def _linears_in_sum(node: object) -> set[fx.Node]:
    """The linears that a value is, or is a sum of: a layer and its adapters."""
    if _is_linear(node):
        return {node}  # pyright: ignore
    if calls(node, aten.add.Tensor):
        return set().union(*map(_linears_in_sum, node.args))
    if calls(node, aten.mul.Tensor) and isinstance(node.args[1], float | int):
        return _linears_in_sum(node.args[0])
    source = cast_source(node)
    return set() if source is None else _linears_in_sum(source)


def _is_linear(node: object) -> bool:
    return isinstance(node, fx.Node) and node.target is aten.linear.default


def _weights(captured: CapturedGraph, linear: fx.Node) -> list[tuple[fx.Node, InputSpec | None]]:
    return [
        (node, captured.inputs.get(node.name))
        for node in linear.args[1:]
        if isinstance(node, fx.Node)
    ]


def _refusal(captured: CapturedGraph, members: list[fx.Node]) -> str | None:
    """Why these linears, in the graph's order, must not be merged, or None."""
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
    return mutation_between(members[0], members[-1])


def _merge(captured: CapturedGraph, members: list[fx.Node]) -> None:
    graph = captured.graph
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
