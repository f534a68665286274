"""replace_sdpa: `aten.scaled_dot_product_attention` of one causal sequence -> `fastgen::attention`.

    sdpa(q, repeat_kv(k), repeat_kv(v), is_causal=True) -> attention(q, k, v)
    sdpa(q, k, v, mask that is the causal triangle)     -> attention(q, k, v)

Required: one sequence, as many keys as queries, no dropout, a floating type of 32 bits or less,
and causality that is proven: by `is_causal` without a mask, or by a boolean mask that depends on
fixed sizes alone, which is then computed here and compared. Numerics: the same softmax; another
kernel may round its sums in another order.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .graph import CapturedGraph, fake_mode_of, memory_of, written_by
from .report import PassReport

aten = torch.ops.aten
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Ops that read no more of their first argument than its shape, type and place.
_SHAPE_READERS = (
    aten.ones_like.default,
    aten.zeros_like.default,
    aten.full_like.default,
    aten.new_ones.default,
    aten.new_zeros.default,
    aten.new_full.default,
)
# More elements than this are not computed to prove that a mask is causal: 16384 x 16384.
_MAX_MASK_ELEMENTS = 1 << 28


def replace_sdpa(captured: CapturedGraph) -> PassReport:
    report = PassReport("replace_sdpa")
    nodes = [
        node
        for node in captured.graph.nodes
        if node.target is aten.scaled_dot_product_attention.default
    ]
    written = {memory_of(read) for node in captured.graph.nodes for read in written_by(node)}
    proven: dict[fx.Node, str | None] = {}
    for index, node in enumerate(nodes):
        given = _arguments(node)
        why = _refusal(given)
        if why is None and (mask := given["attn_mask"]) is not None:
            if mask not in proven:  # all layers share one mask
                proven[mask] = _mask_refusal(captured, mask, written)
            why = proven[mask]
        if why is None:
            _replace(captured, node, given, index, written)
            report.matches += 1
        else:
            report.refuse(node.name, why)
    captured.graph.eliminate_dead_code()
    return report


def _arguments(node: fx.Node) -> dict[str, Any]:
    """Every argument of the call by name, defaults included."""
    schema = node.target._schema.arguments  # pyright: ignore
    given = {argument.name: argument.default_value for argument in schema}
    given.update(zip((argument.name for argument in schema), node.args, strict=False))
    return {**given, **node.kwargs}


def _size(node: fx.Node, dim: int) -> Any:
    return node.meta["val"].shape[dim]


def _refusal(given: dict[str, Any]) -> str | None:
    """Why this call is not causal attention of one sequence, the mask's values aside, or None."""
    values = [given[name].meta["val"] for name in ("query", "key", "value")]
    query, key, value = values
    if any(value.dim() != 4 for value in values):
        return f"attention of {query.dim()} dimensions; [batch, heads, tokens, head_dim] is known"
    for number in (query.shape[0], key.shape[0], value.shape[0]):
        if not isinstance(number, int) or number != 1:
            return f"a batch of {number} sequences; the op takes one"
    if given["dropout_p"]:
        return f"dropout of {given['dropout_p']}"
    if {value.dtype for value in values} - set(_DTYPES) or len({v.dtype for v in values}) > 1:
        return f"types {', '.join(str(value.dtype) for value in values)}"
    if not all(isinstance(size, int) for v in values for size in (v.shape[1], v.shape[3])):
        return "the number of heads or their size varies"
    if key.shape[1] != value.shape[1] or query.shape[3] != key.shape[3]:
        return "keys do not fit the values or the queries"
    if query.shape[1] != key.shape[1] and not given["enable_gqa"]:
        return "keys are broadcast over the heads"
    if query.shape[1] % key.shape[1]:
        return f"{query.shape[1]} heads over {key.shape[1]} key heads"
    if any(not statically_known_true(value.stride(3) == 1) for value in values):
        return "heads that are not contiguous"
    if not isinstance(given["scale"], float | int | None):
        return "the scale is computed"
    if not statically_known_true(query.shape[2] == key.shape[2]):
        return f"{query.shape[2]} queries over {key.shape[2]} keys"
    return _causality_refusal(given)


def _causality_refusal(given: dict[str, Any]) -> str | None:
    """Why it cannot be causal, as far as that shows without computing the mask, or None."""
    mask, num_tokens = given["attn_mask"], _size(given["query"], 2)
    if mask is None:
        alone = isinstance(num_tokens, int) and num_tokens == 1
        return None if given["is_causal"] or alone else "neither a mask nor is_causal"
    value = mask.meta["val"]
    if value.dtype != torch.bool:
        return f"a mask of type {value.dtype}; a boolean one can be proven causal"
    if given["is_causal"]:
        return "a mask and is_causal"
    if not all(isinstance(size, int) for size in value.shape):
        return "the mask's size varies, so that it is not proven causal"
    if tuple(value.shape) != (1, 1, num_tokens, num_tokens):
        return f"a mask of shape {list(value.shape)}"
    if value.numel() > _MAX_MASK_ELEMENTS:
        return f"a mask of {value.numel()} elements is not proven causal"
    return None


def _mask_refusal(captured: CapturedGraph, mask: fx.Node, written: set[int | None]) -> str | None:
    """Compute a mask that depends on sizes alone; why it is not the causal triangle, or None."""
    order, why = _ancestors(captured, mask, written)
    if why is not None:
        return f"the mask {why}, so that it is not proven causal"
    computed: dict[fx.Node, Any] = {}

    def result(node: fx.Node) -> Any:
        if node in computed:
            return computed[node]
        value = node.meta["val"]  # of a node that only its shape is read from
        return torch.empty(value.shape, dtype=value.dtype, device=value.device)

    with torch.no_grad():
        for node in order:
            args, kwargs = fx.map_arg((node.args, node.kwargs), result)
            computed[node] = node.target(*args, **kwargs)  # pyright: ignore
        triangle = torch.ones_like(computed[mask][0, 0]).tril()
        if torch.equal(computed[mask][0, 0], triangle):
            return None
    return "the mask hides other keys than a causal one"


def _ancestors(
    captured: CapturedGraph, mask: fx.Node, written: set[int | None]
) -> tuple[list[fx.Node], str | None]:
    """What must be computed for the mask, in order, or why it depends on more than sizes."""
    needed, stack = set(), [mask]
    while stack:
        node = stack.pop()
        if node in needed:
            continue
        if node.op != "call_function":
            return [], f"is computed from {captured.inputs[node.name].target}"
        if not isinstance(node.target, torch._ops.OpOverload):
            return [], f"is computed by {node.target}"
        if node.target._schema.is_mutable or memory_of(node) in written:
            return [], f"is written in place ({node.name})"
        if torch.Tag.nondeterministic_seeded in node.target.tags:
            return [], f"is random ({node.name})"
        needed.add(node)
        read = node.all_input_nodes
        stack.extend(read[1:] if node.target in _SHAPE_READERS else read)
    sizes = [size for node in needed for size in _tensor(node).shape]
    if not all(isinstance(size, int) for size in sizes):
        return [], "is computed from sizes that vary"
    return [node for node in mask.graph.nodes if node in needed], None


def _tensor(node: fx.Node) -> torch.Tensor:
    value = node.meta.get("val")
    return value if isinstance(value, torch.Tensor) else torch.empty(0)


def _replace(
    captured: CapturedGraph,
    node: fx.Node,
    given: dict[str, Any],
    index: int,
    written: set[int | None],
) -> None:
    graph, fake_mode = captured.graph, fake_mode_of(captured.placeholders())

    def call(target: Any, *args: Any) -> fx.Node:
        new = graph.call_function(target, args)
        values = fx.map_arg(args, lambda read: read.meta["val"])
        with fake_mode:
            new.meta = {**node.meta, "val": target(*values)}
        return new

    scale = given["scale"]
    if scale is None:
        scale = 1 / math.sqrt(_size(given["query"], 3))
    key, value = _unrepeated(given["key"]), _unrepeated(given["value"])
    # Repeated heads are a copy; what they were copied from must still hold the same here.
    if _size(key, 1) != _size(value, 1) or {memory_of(key), memory_of(value)} & written:
        key, value = given["key"], given["value"]
    with graph.inserting_before(node):
        # [1, heads, tokens, head_dim] -> [tokens, heads, head_dim], as in a captured graph
        packed = [
            call(aten.transpose.int, call(aten.select.int, x, 0, 0), 0, 1)
            for x in (given["query"], key, value)
        ]
        attention = call(
            torch.ops.fastgen.attention.default, *packed, None, float(scale), 0, 0.0, None, index
        )
        rows = call(aten.unsqueeze.default, attention, 0)
        replaced = _with_reshapes(node)
        user = _only_user(replaced[-1])
        if user is not None and user.target is aten.transpose.int and user.args[1:] == (1, 2):
            replaced.append(user)
            user.replace_all_uses_with(rows)
        else:
            replaced[-1].replace_all_uses_with(call(aten.transpose.int, rows, 1, 2))
    for old in reversed(replaced):
        graph.erase_node(old)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _with_reshapes(node: fx.Node) -> list[fx.Node]:
    """The node and the reshapes behind it that leave it as it is."""
    nodes = [node]
    while (user := _only_user(nodes[-1])) is not None and user.target is aten.reshape.default:
        if str(user.meta["val"].shape) != str(node.meta["val"].shape):
            break
        nodes.append(user)
    return nodes


def _unrepeated(node: fx.Node) -> fx.Node:
    """The keys or values before each head was repeated for its group of queries, if they were."""
    expanded = node.args[0] if node.target is aten.reshape.default else None
    if not isinstance(expanded, fx.Node) or expanded.target is not aten.expand.default:
        return node
    source: Any = _without_full_slices(expanded.args[0])
    if source.target is not aten.unsqueeze.default or source.args[1] != 2:
        return node
    source = _without_full_slices(source.args[0])
    one, kv_heads, num_tokens, head_dim = source.meta["val"].shape
    group = _size(expanded, 2)
    same = [
        (tuple(expanded.meta["val"].shape), (one, kv_heads, group, num_tokens, head_dim)),
        (tuple(node.meta["val"].shape), (one, kv_heads * group, num_tokens, head_dim)),
    ]
    equal = all(
        len(shape) == len(wanted)
        and all(statically_known_true(a == b) for a, b in zip(shape, wanted, strict=True))
        for shape, wanted in same
    )
    contiguous = statically_known_true(source.meta["val"].stride(3) == 1)
    return source if equal and contiguous else node


def _without_full_slices(node: Any) -> Any:
    """`x[:, :]` leaves slices that take everything."""
    while node.target is aten.slice.Tensor and node.args[2:] == (0, torch.iinfo(torch.int64).max):
        node = node.args[0]
    return node
