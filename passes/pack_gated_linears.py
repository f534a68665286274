"""pack_gated_linears: a gate and an up projection with their product -> one packed op.

    silu_mul(gate, up), gelu_mul(gate, up, tanh) of the halves of one linear
        -> `fastgen::packed_gated_linear`

Required: one linear, gate first, whose two halves nobody else reads; GELU by its tanh
approximation; a weight that can have our own layout, and room for it as in pack_linears.
Numerics: as pack_linears; rounded where the separate operations round.
"""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch import fx

from .graph import CapturedGraph
from .pack_linears import packed_input, refusal_to_pack
from .pattern import aten, calls, mutation_between, value_of
from .report import PassReport

fastgen = torch.ops.fastgen
_SPLITS = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default)


def pack_gated_linears(captured: CapturedGraph) -> PassReport:
    report = PassReport("pack_gated_linears")
    for node in list(captured.graph.nodes):
        if node.target not in (fastgen.silu_mul.default, fastgen.gelu_mul.default):
            continue
        linear, why = _linear_behind(node)
        if node.target is fastgen.gelu_mul.default and not node.args[2]:
            why = "the exact GELU is not part of the kernel"
        why = why or refusal_to_pack(captured, linear.all_input_nodes[1], "gated_tiles")
        if why is not None:
            report.refuse(node.name, why)
            continue
        input, weight, *bias = linear.all_input_nodes
        with captured.graph.inserting_before(node):
            fused = captured.graph.call_function(
                fastgen.packed_gated_linear.default,
                (
                    input,
                    packed_input(captured, weight, "gated_tiles"),
                    *(bias or [None]),
                    value_of(linear).shape[-1] // 2,
                    "silu" if node.target is fastgen.silu_mul.default else "gelu_tanh",
                ),
            )
        fused.meta = dict(node.meta)
        node.replace_all_uses_with(fused)
        report.matches += 1
    captured.graph.eliminate_dead_code()
    captured.remove_unused_inputs()
    return report


def _linear_behind(product: fx.Node) -> tuple[Any, str | None]:
    """The linear whose first half is the gate and whose second half is up; or why there is none."""
    gate, up = cast(tuple[Any, Any], product.args[:2])
    (source, gate_rows), (other, up_rows) = _rows(gate), _rows(up)
    if source is None or source is not other or not calls(source, aten.linear.default):
        return gate, "gate and up are not parts of one linear"
    width = value_of(source).shape[-1]
    if (gate_rows, up_rows) != ((0, width // 2), (width // 2, width)):
        return gate, f"of {width} outputs the gate is {gate_rows}, up {up_rows}: not the halves"
    views = {gate, up, *(part.args[0] for part in (gate, up))} - {source}
    readers = {user for view in (*views, source) for user in view.users}
    if readers - views != {product}:
        return gate, "others read the two projections, too"
    return source, mutation_between(source, product)


def _rows(part: Any) -> tuple[Any, tuple[int, int]]:
    """What a node takes a part of along the last dimension, and which."""
    last = value_of(part).dim() - 1
    if calls(part, aten.slice.Tensor) and part.args[1] in (-1, last) and len(part.args) == 4:
        source, _, start, end = part.args
        if isinstance(start, int | None) and isinstance(end, int | None):
            first, stop, _ = slice(start, end).indices(value_of(source).shape[-1])
            return source, (first, stop)
    if part.target is operator.getitem and calls(part.args[0], *_SPLITS):
        split, index = cast(tuple[Any, int], part.args)
        if len(split.args) == 3 and split.args[2] in (-1, last):
            sizes = [value.shape[-1] for value in split.meta["val"]]
            start = sum(sizes[:index])
            return split.args[0], (start, start + sizes[index])
    return None, (0, 0)
