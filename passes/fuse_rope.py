"""fuse_rope: the spelled out rotation of an attention's query and key -> one `fastgen::rope`.

    x * cos + turn(x) * sin, turn(x) = (-second half, first half) or (-odd, even) elements, or
    cat(first * cos - second * sin, second * cos + first * sin) of the halves,

of the whole head or of its first elements, the rest of which is appended. Required: query and key
are rotated by the same tables, [1, 1, num_tokens, width], nobody else reads what is in between,
nothing is written in place meanwhile. The op takes and gives [num_tokens, num_heads, head_dim], as
attention does. Tables with one angle per pair are doubled, and tables that meet a query in fp32
are cast, once per graph. Numerics: bit-equal.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, NamedTuple

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
    value_of,
)
from .report import PassReport


@dataclass(frozen=True)
class _Rotation:
    """A rotation as it stands in the graph; `first` and `output` are the ends of its nodes.

    input, output: [1, num_heads, num_tokens, head_dim]. cos, sin: [1, 1, num_tokens, width].
    doubled: The tables hold one angle per pair. table_dtype: What they are cast to, which makes it
    the dtype of the arithmetic.
    """

    input: fx.Node
    cos: fx.Node
    sin: fx.Node
    interleaved: bool
    doubled: bool
    table_dtype: torch.dtype
    first: fx.Node
    output: fx.Node


class _Heart(NamedTuple):
    """The arithmetic of a rotation: `total` is its result, `reads` all that reads `source`."""

    source: fx.Node
    cos: fx.Node
    sin: fx.Node
    interleaved: bool
    doubled: bool
    total: fx.Node
    reads: tuple[fx.Node, ...]


class _Part(NamedTuple):
    """Elements start, start + step, ... < stop of the last dimension of `source`."""

    source: fx.Node
    start: int
    stop: int
    step: int


def fuse_rope(captured: CapturedGraph) -> PassReport:
    report = PassReport("fuse_rope")
    graph = captured.graph
    order = {node: index for index, node in enumerate(graph.nodes)}
    rotations: dict[fx.Node, _Rotation] = {}
    for node in graph.nodes:
        found = _match(node, order)
        if isinstance(found, str):
            report.refuse(node.name, found)
        elif found is not None:
            rotations[found.output] = found
    unseen = set(rotations)
    tables: dict[tuple[Any, ...], fx.Node] = {}
    for node in list(graph.nodes):
        if node.target is not torch.ops.fastgen.attention.default:
            continue
        query, key = (_rotations_behind(argument, rotations) for argument in node.args[:2])
        unseen -= {rotation.output for rotation in query + key}
        if not query and not key:
            continue
        why = _refusal(query, key, order)
        if why is None:
            _fuse(graph, query[0], key[0], tables)
            report.matches += 1
        else:
            report.refuse(node.name, why)
    for output in unseen:
        report.refuse(output.name, "rotates neither the query nor the key of an attention")
    graph.eliminate_dead_code()
    return report


def _match(node: fx.Node, order: dict[fx.Node, int]) -> _Rotation | str | None:
    """The rotation around this node, why it is none, or None if it does not look like one."""
    heart = _match_turn(node)
    if heart is None:
        heart = _match_halves(node)
    if heart is None or isinstance(heart, str):
        return heart
    source, total = heart.source, heart.total
    narrow = cast_source(source)
    upcast = narrow is not None and value_of(narrow).itemsize < value_of(source).itemsize
    if upcast and set(source.users) - set(heart.reads):
        return f"{source.name}, the cast input, is read by others too"
    input = narrow if upcast and narrow is not None else source
    dtype = value_of(input).dtype
    output = total
    if value_of(total).dtype != dtype:
        rounded = only_user(total)
        if cast_source(rounded) is None or value_of(rounded).dtype != dtype:
            return f"the result is {value_of(total).dtype}, the input {dtype}"
        output = rounded
    input, output = _with_rest(input, output)  # pyright: ignore
    if value_of(output).dim() != 4 or value_of(output).shape[0] != 1:
        return f"what is rotated is {list(value_of(output).shape)}, not [1, heads, tokens, width]"
    for table in (heart.cos, heart.sin):
        if not _is_table(table, heart):
            return (
                f"{table.name} is {list(value_of(table).shape)}, not [1, 1, num_tokens, "
                f"{'half the width' if heart.doubled else 'the width'}] of what is rotated"
            )
    if value_of(heart.cos).dtype != value_of(heart.sin).dtype:
        return "cos and sin differ in dtype"
    first = min((source, *heart.reads) if upcast else heart.reads, key=order.__getitem__)
    table_dtype = value_of(source if upcast else heart.cos).dtype
    return _Rotation(
        input,
        heart.cos,
        heart.sin,
        heart.interleaved,
        heart.doubled,
        table_dtype,
        first,
        output,
    )


def _match_turn(node: fx.Node) -> _Heart | str | None:
    """x * cos + turn(x) * sin; `node` puts the turned x together."""
    if not calls(node, aten.cat.default, aten.stack.default) or len(node.args) != 2:
        return None
    tensors: Any = node.args[0]
    negated = [calls(tensor, aten.neg.default) for tensor in tensors]
    if len(tensors) != 2 or sum(negated) != 1 or not _is_last(node.args[1], value_of(node)):
        return None
    first, second = tensors[::-1] if negated[0] else tensors
    pair = _part(first), _part(second.args[0])
    if pair[0].source is not pair[1].source:
        return None
    if not negated[0]:
        return "it turns the other way: the second part is negated, not the first"
    interleaved = _pairing(*pair)
    if interleaved is None:
        return "the parts that change places are not the two halves, nor the even and the odd"
    if interleaved != (node.target is aten.stack.default):
        return "it takes pairs of one layout (neighbours or halves) and gives the other"
    turned: fx.Node | None = node
    if interleaved:
        turned = only_user(node)
        if not calls(turned, aten.flatten.using_ints) or turned.args[1:] not in ((-2,), (-2, -1)):
            return "the stacked pairs are not flattened"
    source = pair[0].source
    by_sin = only_user(turned)  # pyright: ignore
    sin = other_operand(by_sin, turned) if calls(by_sin, aten.mul.Tensor) else None  # pyright: ignore
    total = only_user(by_sin) if sin is not None else None  # pyright: ignore
    if not calls(total, aten.add.Tensor):
        return "what is turned is not multiplied by a table and added, or others read it"
    by_cos = other_operand(total, by_sin)  # pyright: ignore
    cos = other_operand(by_cos, source) if calls(by_cos, aten.mul.Tensor) else None
    if by_cos is None or cos is None or only_user(by_cos) is not total or sin is None:
        return "what is added is not the input times a table, or others read it"
    if only_user(second) is not node:
        return f"{second.name} is read by others too"
    reads = (by_cos, second, node, *_readers(first), *_readers(second.args[0]))
    return _Heart(source, cos, sin, interleaved, False, total, reads)


def _match_halves(node: fx.Node) -> _Heart | str | None:
    """cat(first * cos - second * sin, second * cos + first * sin); `node` is the cat."""
    if not calls(node, aten.cat.default) or len(node.args) != 2:
        return None
    tensors: Any = node.args[0]
    if (
        len(tensors) != 2
        or not _is_last(node.args[1], value_of(node))
        or not calls(tensors[0], aten.sub.Tensor)
        or not calls(tensors[1], aten.add.Tensor)
    ):
        return None
    products: list[Any] = [*tensors[0].args, *tensors[1].args]
    if len(products) != 4 or not all(calls(product, aten.mul.Tensor) for product in products):
        return None
    (a, cos), (b, sin), *rest = (product.args for product in products)
    if not all(isinstance(factor, fx.Node) for factor in (a, b, cos, sin)):
        return None
    first, second = _part(a), _part(b)
    if first.source is not second.source:
        return None
    if rest != [(b, cos), (a, sin)]:
        return "the four products are not those of a rotation, factors in transformers' order"
    interleaved = _pairing(first, second)
    if interleaved is None:
        return "the parts that are rotated are not the two halves of one tensor"
    if interleaved:
        return "it takes pairs of one layout (neighbours) and gives the other (halves)"
    for value, user in ((tensors[0], node), (tensors[1], node)):
        if only_user(value) is not user:
            return f"{value.name} is read by others too"
    for product in products:
        if only_user(product) is None:
            return f"{product.name} is read by others too"
    reads = (*products, *_readers(a), *_readers(b))
    return _Heart(first.source, cos, sin, False, True, node, reads)


def _with_rest(input: fx.Node, output: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The whole heads, if this is the first part of heads whose rest is appended unchanged."""
    joined = only_user(output)
    width = value_of(output).shape[-1]
    if calls(joined, aten.cat.default) and _is_last(joined.args[1], value_of(joined)):
        tensors: Any = joined.args[0]
        if len(tensors) == 2 and tensors[0] is output:
            rotary, rest = _part(input), _part(tensors[1])
            # An empty rest is taken off the input itself.
            whole = input if rest.source is input else rotary.source
            fits = whole is input or rotary == _Part(whole, 0, width, 1)
            if fits and rest == _Part(whole, width, value_of(whole).shape[-1], 1):
                return whole, joined
    return input, output


def _part(node: fx.Node) -> _Part:
    """What a node is of another one's last dimension; the whole of itself if nothing less."""
    width = value_of(node).shape[-1]
    if calls(node, aten.slice.Tensor):
        source, dim, start, stop, step = (*node.args, *(0, 0, None, 1)[len(node.args) - 1 :])
        if _is_last(dim, value_of(source)):
            whole = value_of(source).shape[-1]
            return _Part(source, start or 0, min(whole, stop or whole), step)  # pyright: ignore
    if calls(node, operator.getitem) and calls(
        pieces := node.args[0],
        aten.chunk.default,
        aten.split.Tensor,
        aten.split_with_sizes.default,
    ):
        source: Any = pieces.args[0]
        dim = pieces.args[2] if len(pieces.args) > 2 else 0
        if _is_last(dim, value_of(source)):
            before: Any = pieces.meta["val"][: node.args[1]]
            start = sum(piece.shape[-1] for piece in before)
            return _Part(source, start, start + width, 1)
    return _Part(node, 0, width, 1)


def _readers(part: fx.Node) -> tuple[fx.Node, ...]:
    """The nodes by which a part is taken from its source."""
    return (part, part.args[0]) if calls(part, operator.getitem) else (part,)  # pyright: ignore


def _pairing(first: _Part, second: _Part) -> bool | None:
    """False: the two halves. True: the even and the odd elements. None: anything else."""
    source = first.source
    width = value_of(source).shape[-1]
    half = width // 2
    if (first, second) == (_Part(source, 0, half, 1), _Part(source, half, width, 1)):
        return False if width % 2 == 0 else None
    if (first, second) == (_Part(source, 0, width, 2), _Part(source, 1, width, 2)):
        return True if width % 2 == 0 else None
    return None


def _is_last(dim: object, value: torch.Tensor) -> bool:
    return dim in (-1, value.dim() - 1)


def _is_table(table: fx.Node, heart: _Heart) -> bool:
    rotated, shape = value_of(heart.total).shape, value_of(table).shape
    width = rotated[-1] // 2 if heart.doubled else rotated[-1]
    return len(shape) == 4 and str(shape) == str(torch.Size((1, 1, rotated[2], width)))


def _rotations_behind(argument: Any, rotations: dict[fx.Node, _Rotation]) -> list[_Rotation]:
    """The nearest rotations that an attention's argument is computed from."""
    found: dict[fx.Node, _Rotation] = {}
    seen: set[fx.Node] = set()
    stack = [argument]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in rotations:
            found[node] = rotations[node]
        elif node.target not in (aten.linear.default, torch.ops.fastgen.attention.default):
            stack.extend(node.all_input_nodes)
    return list(found.values())


def _refusal(query: list[_Rotation], key: list[_Rotation], order: dict[fx.Node, int]) -> str | None:
    """Why the rotations of an attention's query and key cannot become one op, or None."""
    if len(query) != 1 or len(key) != 1:
        return f"{len(query)} rotations behind the query, {len(key)} behind the key, not one each"
    (one,), (two,) = query, key
    if one is two:
        return "query and key are one rotation"
    if _table_source(one.cos) is not _table_source(two.cos) or _table_source(
        one.sin
    ) is not _table_source(two.sin):
        return "query and key are rotated by different tables"
    if (one.interleaved, one.doubled, one.table_dtype) != (
        two.interleaved,
        two.doubled,
        two.table_dtype,
    ):
        return "query and key are rotated in different ways"
    if value_of(one.input).dtype != value_of(two.input).dtype:
        return "query and key differ in dtype"
    start = min(one.output, two.output, key=order.__getitem__)
    needed = (one.input, two.input, one.cos, one.sin)
    if any(order[node] > order[start] for node in needed):
        return f"not everything that is rotated is known where {start.name} is"
    first = min(one.first, two.first, key=order.__getitem__)
    return mutation_between(first, max(one.output, two.output, key=order.__getitem__))


def _table_source(table: fx.Node) -> fx.Node:
    """[1, num_tokens, width] behind a table that was unsqueezed for its heads."""
    if calls(table, aten.unsqueeze.default) and table.args[1] in (1, -3):
        return table.args[0]  # pyright: ignore
    return table


def _fuse(
    graph: fx.Graph,
    query: _Rotation,
    key: _Rotation,
    tables: dict[tuple[Any, ...], fx.Node],
) -> None:
    """Put the op where the first of the two results stood."""
    start = next(node for node in graph.nodes if node in (query.output, key.output))
    with graph.inserting_before(start):
        inputs = [_tokens_first(graph, rotation.input) for rotation in (query, key)]
        cos, sin = (_flat_table(graph, query, table, tables) for table in (query.cos, query.sin))
        fused = graph.call_function(
            torch.ops.fastgen.rope.default, (*inputs, cos, sin, query.interleaved)
        )
        fused.meta = {**query.output.meta, "val": tuple(map(_new_like, inputs))}
        for index, rotation in enumerate((query, key)):
            rotated = graph.call_function(operator.getitem, (fused, index))
            rotated.meta = {**rotation.output.meta, "val": fused.meta["val"][index]}
            _replace(graph, rotation.output, rotated)


def _replace(graph: fx.Graph, heads: fx.Node, rotated: fx.Node) -> None:
    """[num_tokens, num_heads, head_dim] for who turned it so, or turned back for anybody else."""
    for chosen in list(heads.users):
        if calls(chosen, aten.select.int) and chosen.args[1:] == (0, 0):
            for turned in list(chosen.users):
                if calls(turned, aten.transpose.int) and turned.args[1:] == (0, 1):
                    turned.replace_all_uses_with(rotated)
                    graph.erase_node(turned)
            if not chosen.users:
                graph.erase_node(chosen)
    if heads.users:
        back = _call(graph, aten.transpose.int, rotated, 0, 1)
        heads.replace_all_uses_with(_call(graph, aten.unsqueeze.default, back, 0))


def _tokens_first(graph: fx.Graph, heads: fx.Node) -> fx.Node:
    """[1, num_heads, num_tokens, head_dim] as [num_tokens, num_heads, head_dim], a view."""
    if calls(heads, aten.transpose.int) and heads.args[1:] == (1, 2):
        return _call(graph, aten.select.int, heads.args[0], 0, 0)
    return _call(graph, aten.transpose.int, _call(graph, aten.select.int, heads, 0, 0), 0, 1)


def _flat_table(
    graph: fx.Graph, rotation: _Rotation, table: fx.Node, made: dict[tuple[Any, ...], fx.Node]
) -> fx.Node:
    """A table as [num_tokens, rotary_dim] in the dtype of the arithmetic; made once per graph."""
    source = _table_source(table)
    known = (source, rotation.doubled, rotation.table_dtype)
    if known not in made:
        flat = source
        while value_of(flat).dim() > 2:
            flat = _call(graph, aten.select.int, flat, 0, 0)
        if value_of(flat).dtype != rotation.table_dtype:
            flat = _call(graph, aten.to.dtype, flat, rotation.table_dtype)
        if rotation.doubled:
            flat = _call(graph, aten.cat.default, [flat, flat], -1)
        made[known] = flat
    return made[known]


def _call(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    """A new call, with the fake value that it makes."""
    node = graph.call_function(target, args)
    node.meta["val"] = target(*fx.map_arg(args, lambda arg: arg.meta["val"]))
    return node


def _new_like(heads: fx.Node) -> torch.Tensor:
    value = value_of(heads)
    return value.new_empty(value.shape)
