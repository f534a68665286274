"""canonicalize: what torch.export leaves around the arithmetic is taken away.

Regions that only switch gradients or autocast off -> their body, inlined.
`_assert_tensor_metadata`, `to` and `dropout` that change nothing, `x * 1.0` -> their input.
Required: the region's switch is off (an enabled autocast is refused). Numerics: bit-equal.
"""

from __future__ import annotations

import torch
from torch import fx

from .graph import CapturedGraph
from .pattern import mutates
from .report import PassReport

aten = torch.ops.aten
_REGIONS = ("wrap_with_set_grad_enabled", "wrap_with_autocast")


def canonicalize(captured: CapturedGraph) -> PassReport:
    report = PassReport("canonicalize")
    graph = captured.graph
    while regions := [node for node in graph.nodes if _is_region(node)]:  # regions hold regions
        for node in regions:
            report.matches += _inline_region(captured.module, node)
        graph.eliminate_dead_code()
        captured.module.delete_all_unused_submodules()
    any_writes = any(map(mutates, graph.nodes))
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)
            report.matches += 1
        elif (same := _identity_of(node)) is not None and not (_is_copy(node) and any_writes):
            node.replace_all_uses_with(same)
            graph.erase_node(node)
            report.matches += 1
    graph.eliminate_dead_code()
    captured.remove_unused_inputs()
    return report


def _inline_region(module: fx.GraphModule, node: fx.Node) -> int:
    """Replace a call of a region's submodule by the submodule's nodes."""
    kind = node.target.__name__  # pyright: ignore
    position = next(i for i, arg in enumerate(node.args) if _is_submodule(arg))
    switches = node.args[:position]
    enabled = switches[0] if kind == "wrap_with_set_grad_enabled" else switches[2]
    if kind == "wrap_with_autocast" and enabled:
        raise ValueError(f"{node.name} computes under an enabled autocast {switches}")
    submodule_node = node.args[position]
    body_name = str(submodule_node.target)  # pyright: ignore
    body = getattr(module, body_name)
    values = dict(
        zip(
            [inner for inner in body.graph.nodes if inner.op == "placeholder"],
            node.args[position + 1 :],
            strict=True,
        )
    )
    with module.graph.inserting_before(node):
        results: tuple = ()
        for inner in body.graph.nodes:
            if inner.op == "output":
                results = fx.map_arg(inner.args[0], values.__getitem__)
            elif inner.op == "get_attr":
                module.register_module(
                    name := f"{body_name}_{inner.target}", getattr(body, inner.target)
                )
                values[inner] = module.graph.get_attr(name)
            elif inner.op != "placeholder":
                values[inner] = module.graph.node_copy(inner, values.__getitem__)
    for user in list(node.users):
        user.replace_all_uses_with(results[user.args[1]])  # pyright: ignore
        module.graph.erase_node(user)
    module.graph.erase_node(node)
    return 1


def _is_region(node: fx.Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "__name__", "") in _REGIONS


def _is_submodule(arg: object) -> bool:
    return isinstance(arg, fx.Node) and arg.op == "get_attr"


def _identity_of(node: fx.Node) -> fx.Node | None:
    """The input that this node returns unchanged, if it does."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    value, result = source.meta.get("val"), node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not isinstance(result, torch.Tensor):
        return None
    same = value.dtype == result.dtype and value.device == result.device
    match node.target:
        case aten.to.dtype | aten.to.device | aten.to.dtype_layout | aten._to_copy.default:
            return source if same and not node.kwargs.get("copy") else None
        case aten.dropout.default:
            _, probability, training = node.args
            return source if not training or probability == 0 else None
        case aten.mul.Tensor:
            return source if same and node.args[1] == 1.0 and _is_number(node.args[1]) else None
        case aten.alias.default | aten.detach.default:
            return source
    return None


def _is_copy(node: fx.Node) -> bool:
    """Whether the result is new memory, on which arithmetic in place may count."""
    if node.target in (aten.mul.Tensor, aten._to_copy.default):
        return True
    schema = node.target._schema  # pyright: ignore
    given = dict(zip((argument.name for argument in schema.arguments), node.args, strict=False))
    return bool({**given, **node.kwargs}.get("copy"))


def _is_number(arg: object) -> bool:
    return isinstance(arg, float | int) and not isinstance(arg, bool)
