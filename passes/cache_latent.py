"""cache_latent: attention over keys and values made from a latent -> `fastgen::latent_attention`.

    [k_nope_h, v_h] = linear(latent, weight), by head; key_h = [k_nope_h, k_rope]
    attention(query, key, v) -> latent_attention(query, latent, k_rope, weight)

so that the cache holds [latent, k_rope] of a token instead of every head's key and value.
Required: values and the first part of every head's key are the two parts of one head of one linear
without bias, the rest of the key is one vector for all heads; as many key heads as query heads;
one dtype; no softcap and no sinks; nothing is written in place on the way. Only on the CPU, where
an implementation reads latents faster than expanded keys. Numerics: the same function; how it is
computed for single tokens rounds elsewhere (kernels/paged_latent_attention.py).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .graph import CapturedGraph
from .pattern import aten, calls, mutates, value_of
from .report import PassReport

_ATTENTION = torch.ops.fastgen.attention.default
_LATENT = torch.ops.fastgen.latent_attention.default
_END = 2**63 - 1  # of a slice without an end


class _Refused(Exception):
    """str() is why something that looked like a latent's attention is none."""


@dataclass(frozen=True)
class _Found:
    """What a latent attention is made from, and what only its key was made by."""

    linear: fx.Node
    k_rope: fx.Node  # [1, 1, num_tokens, rope]
    copies: tuple[fx.Node, ...]


def cache_latent(captured: CapturedGraph) -> PassReport:
    report = PassReport("cache_latent")
    graph = captured.graph
    for attention in list(graph.nodes):
        if not calls(attention, _ATTENTION) or attention.args[3] is not None:
            continue
        if not _may_be_latent(attention):
            continue
        try:
            found = _match(attention)
        except _Refused as why:
            report.refuse(attention.name, str(why))
            continue
        _replace(graph, attention, found)
        report.matches += 1
    graph.eliminate_dead_code()
    return report


def _may_be_latent(attention: fx.Node) -> bool:
    """Whether keys and values, but not the queries, come from one linear."""
    query, key, value = (_linears_behind(argument) for argument in attention.args[:3])
    return bool(key & value - query)


def _linears_behind(argument: object) -> set[fx.Node]:
    """The nearest linears that a value is computed from, also by writes into its memory."""
    found: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    stack = [argument]
    while stack:
        node = stack.pop()
        if not isinstance(node, fx.Node) or node in seen or calls(node, _ATTENTION, _LATENT):
            continue
        seen.add(node)
        if node.target is aten.linear.default:
            found.add(node)
            continue
        stack.extend(node.all_input_nodes)
        stack.extend(_writers(node))
    return found


def _writers(node: fx.Node) -> list[fx.Node]:
    """What copies into the slices of a tensor that was made empty."""
    if node.target is not aten.new_empty.default:
        return []
    slices = [user for user in node.users if user.target is aten.slice.Tensor]
    return [user for part in slices for user in part.users if user.target is aten.copy_.default]


def _match(attention: fx.Node) -> _Found:
    query, key, value, _, _, _, softcap, sinks, _ = attention.args
    if softcap:
        raise _Refused("softcap")
    if sinks is not None:
        raise _Refused("sinks")
    value = _heads(value, "the values")
    parts, sizes, index = _part(value, "the values")
    key_heads = _heads(key, "the keys")
    k_nope, k_rope, copies = _two_parts(key_heads)
    k_parts, _, k_index = _part(k_nope, "the first part of the keys")
    if k_parts is not parts or (k_index, index) != (0, 1) or len(sizes) != 2:
        raise _Refused("keys and values are not the two parts of one linear's heads")
    linear = _linear_by_head(parts.args[0], sum(sizes))
    _check_shared(k_rope, num_heads=value_of(key_heads).shape[1])
    shared: fx.Node = k_rope.args[0]  # pyright: ignore
    _check_values((query, key, linear.args[0], linear.args[1], shared), sizes)
    _check_writes(linear, attention, copies)
    return _Found(linear, shared, copies)


def _heads(node: object, what: str) -> fx.Node:
    """The [1, num_heads, num_tokens, width] that became [num_tokens, num_heads, width]."""
    if calls(node, aten.transpose.int) and node.args[1:] == (0, 1):
        selected = node.args[0]
        if calls(selected, aten.select.int) and selected.args[1:] == (0, 0):
            heads = selected.args[0]
            if isinstance(heads, fx.Node) and value_of(heads).dim() == 4:
                return heads
    raise _Refused(f"{what} are not laid out by head")


def _part(node: fx.Node, what: str) -> tuple[fx.Node, list[int], int]:
    """The split of the last dimension that a value is a part of, its sizes, and which part."""
    if calls(node, operator.getitem):
        split, index = node.args
        if calls(split, aten.split_with_sizes.default) and split.args[2:] in ((-1,), (3,)):
            return split, list(split.args[1]), index  # pyright: ignore
    raise _Refused(f"{what} are no part of a linear's heads")


def _two_parts(key: fx.Node) -> tuple[fx.Node, fx.Node, tuple[fx.Node, ...]]:
    """What a key is concatenated from along its last dimension, and the copies that do it."""
    if calls(key, aten.cat.default) and key.args[1:] in ((-1,), (3,)):
        parts: list[fx.Node] = key.args[0]  # pyright: ignore
        if len(parts) == 2:
            return parts[0], parts[1], ()
    if key.target is aten.new_empty.default:
        slices = [user for user in key.users if user.target is aten.slice.Tensor]
        copies = [next(iter(part.users)) for part in slices if len(part.users) == 1]
        readers = len(key.users) - len(slices)
        if len(slices) == len(copies) == 2 and readers == 1 and _fill(key, slices, copies):
            return copies[0].args[1], copies[1].args[1], tuple(copies)  # pyright: ignore
    raise _Refused("the keys are not two parts, one beside the other")


def _fill(key: fx.Node, slices: list[fx.Node], copies: list[fx.Node]) -> bool:
    """Whether two copies into slices write every number of a key once, the first part first."""
    for part, copy in zip(slices, copies, strict=True):
        if not calls(part, aten.slice.Tensor) or len(part.args) != 4:
            return False
        if not calls(copy, aten.copy_.default) or copy.args[0] is not part or copy.users:
            return False
        if len(copy.args) != 2 or str(value_of(copy.args[1]).shape) != str(value_of(part).shape):
            return False
    (first, start, end), (second, border, last) = (part.args[1:] for part in slices)
    ends = value_of(key).shape[3], _END
    return bool([first, start, second] == [3, 0, 3] and end == border and last in ends)


def _linear_by_head(heads: object, width: int) -> fx.Node:
    """The linear without bias whose outputs were laid out as heads of `width`."""
    if calls(heads, aten.transpose.int) and heads.args[1:] == (1, 2):
        view = heads.args[0]
        if calls(view, aten.view.default, aten.reshape.default):
            linear, shape = view.args[0], value_of(view).shape
            if not calls(linear, aten.linear.default):
                raise _Refused("keys and values are computed from more than one linear")
            if linear.args[2:] not in ((), (None,)):
                raise _Refused("the linear of keys and values has a bias")
            source = value_of(linear.args[0])
            leading = {1} >= set(source.shape[:-2]) and source.dim() in (3, 4)
            if leading and shape[0] == 1 and shape[3] == width and _same_tokens(view, linear):
                return linear
    raise _Refused("keys and values are no linear's outputs by head")


def _same_tokens(heads: fx.Node, linear: fx.Node) -> bool:
    """Whether [1, num_tokens, heads, width] has the rows of [..., num_tokens, features]."""
    _, num_tokens, num_heads, width = value_of(heads).shape
    features = value_of(linear).shape[-1]
    same = str(num_tokens) == str(value_of(linear).shape[-2])
    return same and isinstance(num_heads, int) and num_heads * width == features


def _check_shared(k_rope: fx.Node, num_heads: int) -> None:
    """The rest of the key must be one head for all."""
    if calls(k_rope, aten.expand.default):
        source = value_of(k_rope.args[0]).shape
        if len(source) == 4 and source[:2] == (1, 1) and value_of(k_rope).shape[1] == num_heads:
            return
    raise _Refused("the rest of the keys is not one vector for all heads")


def _check_values(operands: tuple[Any, ...], sizes: list[int]) -> None:
    """Query, key, latent, weight and rotated key: their dtypes, and a key head per query head."""
    query, key, _, weight, _ = values = [value_of(node) for node in operands]
    if len({value.dtype for value in values}) > 1:
        dtypes = ", ".join(sorted({str(v.dtype).removeprefix("torch.") for v in values}))
        raise _Refused(f"queries, keys, latents and weight are of several dtypes ({dtypes})")
    if query.shape[1] != key.shape[1] or weight.shape[0] != query.shape[1] * sum(sizes):
        raise _Refused("there are not as many key heads as query heads")


def _check_writes(linear: fx.Node, attention: fx.Node, copies: tuple[fx.Node, ...]) -> None:
    """The latent is read where the attention stands: it must be what it was for the linear."""
    node, left = linear, set(copies)
    while node is not attention:
        if mutates(node) and node not in copies:
            raise _Refused(f"{node.name} writes in place between {linear.name} and the attention")
        left.discard(node)
        node = node.next
    if left:
        raise _Refused("the keys are written after they are read")


def _replace(graph: fx.Graph, attention: fx.Node, found: _Found) -> None:
    query, _, _, _, scale, window, _, _, layer_idx = attention.args
    weight = found.linear.args[1]
    with graph.inserting_before(attention):
        latent = _rows(graph, found.linear.args[0])  # pyright: ignore
        k_rope = _rows(graph, found.k_rope)
        arguments = (query, latent, k_rope, weight, scale, window, layer_idx)
        node = graph.call_function(_LATENT, arguments)
    node.meta = dict(attention.meta)
    attention.replace_all_uses_with(node)
    graph.erase_node(attention)
    for copy in found.copies:  # torch.fx takes them for more than what their result is used for
        graph.erase_node(copy)


def _rows(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """[num_tokens, width] of [1, ..., num_tokens, width]."""
    while (value := value_of(node)).dim() > 2:
        selected = graph.call_function(aten.select.int, (node, 0, 0))
        selected.meta["val"] = value[0]
        node = selected
    return node
