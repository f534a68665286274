"""fuse_rms_norm: a spelled out RMSNorm -> `fastgen::rms_norm`, or `fastgen::add_rms_norm`.

    x * rsqrt(mean(x^2, -1) + eps), rounded, times a weight, in the orders and rounding points that
    the op knows; a + b = x that is normalized becomes part of the op and its second output.

Required: the arithmetic is fp32 (x is, or is cast to it), the mean is over the last dimension and
keeps it, the result has x's dtype, nobody else reads an intermediate value, and nothing is written
in place meanwhile. Numerics: bit-equal.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .graph import CapturedGraph
from .pattern import (
    aten,
    calls,
    cast_source,
    mutation_between,
    only_user,
    other_operand,
    same_shape,
    value_of,
)
from .report import PassReport


@dataclass(frozen=True)
class _Norm:
    """A norm as it stands in the graph: `output` is the last of its nodes."""

    input: fx.Node
    weight: fx.Node | None
    eps: float
    weight_offset: float
    cast_first: bool
    output: fx.Node

    @property
    def settings(self) -> tuple[Any, ...]:
        return self.weight, self.eps, self.weight_offset, self.cast_first


def fuse_rms_norm(captured: CapturedGraph) -> PassReport:
    report = PassReport("fuse_rms_norm")
    for node in list(captured.graph.nodes):
        if not calls(node, aten.mean.dim) or not _is_square(node.args[0]):
            continue
        norm = _match(node)
        if isinstance(norm, str):
            report.refuse(node.name, norm)
            continue
        if calls(norm.input, aten.add.Tensor):
            why = _sum_refusal(norm)
            if why is None:
                _fuse_sum(captured.graph, norm)
            else:
                report.refuse(norm.input.name, f"the sum stays outside the norm: {why}")
                _fuse(captured.graph, norm)
        else:
            _fuse(captured.graph, norm)
        report.matches += 1
    captured.graph.eliminate_dead_code()
    return report


def _is_square(node: object) -> bool:
    return calls(node, aten.pow.Tensor_Scalar) and node.args[1] in (2, 2.0)


def _match(mean: fx.Node) -> _Norm | str:
    """The norm around this mean of squares, or why it is none."""
    square: Any = mean.args[0]
    wide: Any = square.args[0]  # the input in fp32
    if value_of(wide).dtype != torch.float32:
        return f"computed in {value_of(wide).dtype}, not in fp32"
    if mean.args[1:] not in (([-1], True), ([value_of(wide).dim() - 1], True)):
        return f"the mean is over dims {mean.args[1]}, or does not keep the last one"
    shifted = only_user(mean)
    if not calls(shifted, aten.add.Tensor) or not isinstance(shifted.args[1], float):
        return "no eps is added to the mean square"
    root = only_user(shifted)
    if not calls(root, aten.rsqrt.default):
        return "what follows the mean square plus eps is not rsqrt"
    scaled = only_user(root)
    if not calls(scaled, aten.mul.Tensor) or other_operand(scaled, root) is not wide:
        return "what is squared is not what is multiplied by the root"
    source = cast_source(wide)
    if source is None or value_of(source).dtype == torch.float32:
        source = wide
    elif set(wide.users) != {square, scaled}:
        return f"{wide.name}, the input in fp32, is read by others too"
    if set(square.users) != {mean}:
        return f"{square.name}, the square, is read by others too"
    norm = _match_weight(source, scaled, shifted.args[1])
    if isinstance(norm, str):
        return norm
    first = square if source is wide else wide
    return mutation_between(first, norm.output) or norm


def _match_weight(source: fx.Node, scaled: fx.Node, eps: float) -> _Norm | str:
    """From x * rsqrt(...) on: the cast to x's dtype and the weight, in either order."""
    dtype = value_of(source).dtype
    rounded = _cast_to(dtype, only_user(scaled))
    if rounded is not None and dtype != torch.float32:
        found = _weight_of(rounded)
        if found is None:
            return _Norm(source, None, eps, 0.0, False, rounded)
        product, weight, _ = found
        if value_of(weight).dtype != dtype:
            return f"the weight is {value_of(weight).dtype}, the input {dtype}"
        return _Norm(source, weight, eps, 0.0, True, product)
    product, weight, offset = _weight_of(scaled) or (scaled, None, 0.0)
    if weight is not None and value_of(weight).dtype != dtype:
        return f"the weight is {value_of(weight).dtype}, the input {dtype}"
    output = _cast_to(dtype, only_user(product))
    if output is None and dtype != torch.float32:
        return f"the result is not rounded to {dtype}, or is read before it is"
    return _Norm(source, weight, eps, offset, False, output or product)


def _weight_of(node: fx.Node) -> tuple[fx.Node, fx.Node, float] | None:
    """(product, weight, offset) if all that becomes of `node` is its product with a weight."""
    product = only_user(node)
    if not calls(product, aten.mul.Tensor):
        return None
    factor = other_operand(product, node)
    width = value_of(node).shape[-1]
    if factor is None or value_of(factor).dim() != 1 or value_of(factor).shape[0] != width:
        return None
    offset = 0.0
    in_fp32 = value_of(factor).dtype == torch.float32
    if in_fp32 and calls(factor, aten.add.Tensor) and isinstance(factor.args[1], int | float):
        factor, offset = factor.args[0], float(factor.args[1])
    if in_fp32 and value_of(node).dtype == torch.float32:
        factor = cast_source(factor) or factor  # the op multiplies in fp32 by itself
    return product, factor, offset  # pyright: ignore


def _cast_to(dtype: torch.dtype, node: fx.Node | None) -> fx.Node | None:
    """The node if it is nothing but a cast to this dtype."""
    return node if cast_source(node) is not None and value_of(node).dtype == dtype else None


def _sum_refusal(norm: _Norm) -> str | None:
    """Why a + b cannot be computed together with its norm, or None."""
    operands = norm.input.args
    if len(operands) != 2 or not all(isinstance(operand, fx.Node) for operand in operands):
        return "it is no sum of two tensors"
    input, residual = operands
    if value_of(input).dtype != value_of(residual).dtype:
        return f"it adds {value_of(input).dtype} and {value_of(residual).dtype}"
    if not same_shape(input, residual):  # pyright: ignore
        return "it broadcasts"
    if norm.weight is not None and norm.weight.op != "placeholder":
        return f"the weight {norm.weight.name} is computed, maybe after it"
    return mutation_between(norm.input, norm.output)


def _fuse(graph: fx.Graph, norm: _Norm) -> None:
    with graph.inserting_before(norm.output):
        fused = graph.call_function(
            torch.ops.fastgen.rms_norm.default, (norm.input, *norm.settings)
        )
    fused.meta = dict(norm.output.meta)
    norm.output.replace_all_uses_with(fused)


def _fuse_sum(graph: fx.Graph, norm: _Norm) -> None:
    """The op stands where the sum stood, before whoever reads the sum."""
    total = norm.input
    with graph.inserting_before(total):
        fused = graph.call_function(
            torch.ops.fastgen.add_rms_norm.default, (*total.args, *norm.settings)
        )
        parts = [graph.call_function(operator.getitem, (fused, index)) for index in (0, 1)]
    fused.meta = {**norm.output.meta, "val": (value_of(norm.output), value_of(total))}
    for old, new in zip((norm.output, total), parts, strict=True):
        new.meta = dict(old.meta)
        old.replace_all_uses_with(new)
