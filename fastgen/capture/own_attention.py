"""Attention that a model writes itself becomes `fastgen::attention`, once it is proven to be one.

    softmax(scale * (q @ k^T) + bias) @ v

What lies between the product and the softmax is not taken by its looks: it is a function of the
scores and of constants, so it is computed, for scores of zero and for random ones, in fp64. It is
attention if every visible score is multiplied by one number, if what is hidden is what a causal
mask or a sliding window hides, and if what is added is ALiBi: slope * (key - query position), up to
a number per query. In the model's own dtypes it may differ from that by rounding only. Anything
else is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_map

from ..errors import UnsupportedModelError
from ..passes import CapturedGraph, InputSpec
from ..passes.graph import fake_mode_of
from ..passes.pattern import value_of
from .mask_marker import mask_marker  # noqa: F401 (registers the op)

aten = torch.ops.aten
_MARKER = torch.ops.fastgen.mask_marker.default

_PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.baddbmm.default)
_SOFTMAX = (aten.softmax.int, aten._softmax.default)
# What may lie between the product and the softmax: one of the arguments comes from the scores.
_BETWEEN = {
    *("add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_", "where", "masked_fill"),
    *("masked_fill_", "max", "maximum", "to", "_to_copy", "type_as", "view", "reshape"),
    *("unsqueeze", "squeeze", "expand", "contiguous", "clone", "dropout", "alias"),
}
# What may lie between the softmax and the product with the values: nothing that computes.
_AFTER = {"to", "_to_copy", "type_as", "view", "reshape", "contiguous", "clone", "dropout", "alias"}
# Ops that read no more of a tensor than its shape, type and place.
_SHAPE_READERS = {"ones_like", "zeros_like", "full_like", "new_ones", "new_zeros", "new_full"}
_SHAPE_READERS |= {"new_empty", "empty_like", "sym_size"}

# A score below this is hidden: its weight is zero in every dtype, next to that of the query itself.
_HIDDEN = -5000.0
# Tokens over which a function is computed, and the window of the marker meanwhile.
_NUM_TOKENS, _STAND_IN_WINDOW = 24, 5
# Elements of the scores over which tables (buffers, ALiBi) are computed: 128 MiB of fp64.
_MAX_SCORES = 1 << 24


class _NoAttention(Exception):
    """str() says what keeps this softmax from being that of causal attention."""


@dataclass(frozen=True)
class _Found:
    """Causal attention, in the graph's terms."""

    scale: float
    window: int
    slopes: torch.Tensor | None  # [num_heads] fp32


def replace_own_attention(
    captured: CapturedGraph, tensor_of: Callable[[InputSpec], torch.Tensor], max_length: int
) -> None:
    """Rewrite every attention that the graph spells out, in place.

    Args:
        tensor_of: The value of a parameter, buffer or constant of the graph.
        max_length: Tokens of the longest sequence, over which masks from buffers are compared.
    Raises: UnsupportedModelError, naming the layer and what was found instead.
    """
    for node in reversed(captured.graph.nodes):
        if _name(node) == "_assert_tensor_metadata":  # it would keep masks alive
            captured.graph.erase_node(node)
    data = _data_dependent(captured)
    num_tokens = captured.placeholder("batch", "input_ids").meta["val"].shape[0]
    layer_idx = 0
    for node in list(captured.graph.nodes):
        if node.target not in _SOFTMAX or not _is_over_tokens(node, num_tokens):
            continue
        try:
            attention = _Attention(captured, node, data, tensor_of)
            attention.replace(attention.prove(max_length), layer_idx)
        except _NoAttention as why:
            raise UnsupportedModelError(
                f"the attention of layer {layer_idx}, which the model writes itself, is not "
                f"understood: {why}"
            ) from None
        layer_idx += 1
    captured.graph.eliminate_dead_code()
    captured.remove_unused_inputs()
    captured.module.recompile()


def _name(node: fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return schema.name.split("::")[1] if schema is not None else ""


def _same(first: Any, second: Any) -> bool:
    return str(first) == str(second)


def _is_over_tokens(node: fx.Node, num_tokens: Any) -> bool:
    """A softmax of [..., num_tokens, num_tokens], along any dimension."""
    return [str(size) for size in node.meta["val"].shape[-2:]] == 2 * [str(num_tokens)]


def _data_dependent(captured: CapturedGraph) -> set[fx.Node]:
    """Nodes whose values, not shapes alone, depend on what is asked."""
    data: set[fx.Node] = set()
    for node in captured.graph.nodes:
        if node.op == "placeholder":
            if captured.inputs[node.name].kind == "batch":
                data.add(node)
        elif (
            isinstance(node.meta.get("val"), torch.Tensor | tuple | list)
            and _name(node) not in _SHAPE_READERS
            and node.target is not _MARKER  # what it hides is known
            and any(read in data for read in node.all_input_nodes)
        ):
            data.add(node)
    return data


class _Attention:
    """One softmax, the product before it, the product after it, and all between."""

    def __init__(
        self,
        captured: CapturedGraph,
        softmax: fx.Node,
        data: set[fx.Node],
        tensor_of: Callable[[InputSpec], torch.Tensor],
    ) -> None:
        self.captured, self.data, self.tensor_of = captured, data, tensor_of
        self.softmax = softmax
        if softmax.args[1] not in (-1, softmax.meta["val"].dim() - 1):
            raise _NoAttention(f"the softmax is over dimension {softmax.args[1]}, not the keys")
        self.between = self._walk_back()  # from the product to what the softmax reads
        self.product = self.between[0]
        self.after = self._walk_on()  # from the softmax to the product with the values
        operands = self.product.args[:3]
        query, key_t = operands[1:] if self.product.target is aten.baddbmm.default else operands
        value = self.after[-1].args[1]
        if value in self.between or value in self.after:
            raise _NoAttention("the values are made from the scores")
        self.query, self.key_t, self.value = query, key_t, value
        self._check_shapes()
        self._check_dtypes()

    def _walk_back(self) -> list[fx.Node]:
        found: list[fx.Node] = []
        node: Any = self.softmax.args[0]
        while True:
            found.insert(0, node)
            sources = [read for read in node.all_input_nodes if read in self.data]
            if node.target in _PRODUCTS and len(sources) == 2:
                return found
            if _name(node) not in _BETWEEN:
                raise _NoAttention(f"{node.target} between the product and the softmax")
            if len(sources) != 1:
                raise _NoAttention(
                    f"{node.target} joins the scores with something that depends on the tokens"
                )
            _check_no_dropout(node)
            node = sources[0]

    def _walk_on(self) -> list[fx.Node]:
        found, node = [self.softmax], self.softmax
        while True:
            readers = [user for user in node.users if _name(user) not in _SHAPE_READERS]
            if len(readers) != 1:
                raise _NoAttention(f"the weights have {len(readers)} readers")
            node, before = readers[0], node
            found.append(node)
            if node.target in _PRODUCTS[:2] and node.args[0] is before:
                if node.args[1] not in self.data:
                    raise _NoAttention("the weights are multiplied with constants")
                return found
            if _name(node) not in _AFTER:
                raise _NoAttention(f"{node.target} between the softmax and the values")
            _check_no_dropout(node)

    def _check_shapes(self) -> None:
        shapes = [value_of(node).shape for node in (self.query, self.key_t, self.value)]
        for shape in shapes:  # [heads, rows, columns], perhaps with a batch of one
            if len(shape) not in (3, 4) or (len(shape) == 4 and shape[0] != 1):
                raise _NoAttention(f"a product of {list(shape)}, not of one sequence's heads")
        heads = [shape[-3] for shape in shapes]
        if not all(isinstance(number, int) for number in heads) or heads[1] != heads[2]:
            raise _NoAttention(f"{heads} heads of queries, keys and values")
        if heads[0] != heads[1] != 1:
            raise _NoAttention(
                f"{heads[0]} heads over {heads[1]} key heads, without repeating them"
            )
        self.num_heads: int = heads[0]
        for node in (*self.between, *self.after[:-1]):
            if [str(size) for size in node.meta["val"].shape[-3:-2]] != [str(self.num_heads)]:
                raise _NoAttention(f"{node.name} has the shape {list(node.meta['val'].shape)}")

    def _check_dtypes(self) -> None:
        """Queries and keys may be cast up before the product: the op computes in fp32 anyway."""
        dtype = value_of(self.value).dtype
        for name, node in (("queries", self.query), ("keys", self.key_t)):
            own = value_of(node).dtype
            if own != dtype and not _is_upcast(node, dtype):
                raise _NoAttention(f"{name} are {own}, values {dtype}")

    # The proof.

    def prove(self, max_length: int) -> _Found:
        """What this attention is. Raises: _NoAttention."""
        sources = self._constants()
        markers = [node for node in sources if node.target is _MARKER]
        if len(markers) > 1:
            raise _NoAttention("several masks are added up")
        if any(marker.args[1] not in ("causal", "sliding") for marker in markers):
            raise _NoAttention(f"its mask is {markers[0].args[1]}")
        marked = markers[0].args[2] if markers else 0
        generator = torch.Generator().manual_seed(0)
        scores = 10 * torch.randn(
            self.num_heads, _NUM_TOKENS, _NUM_TOKENS, generator=generator, dtype=torch.float64
        )
        scale, window, slopes = _understand(
            self._compute(scores * 0), self._compute(scores), scores
        )
        has_tables = any(node.op == "placeholder" or _name(node) == "arange" for node in sources)
        if has_tables or slopes is not None or not markers:
            window = self._look_far(slopes, max_length)
        if marked:
            if window != _STAND_IN_WINDOW:
                raise _NoAttention(f"a window of {marked} and another one of {window}")
            window = marked
        slopes = None if slopes is None else slopes.float()
        return _Found(scale, int(window), slopes)  # pyright: ignore

    def _look_far(self, slopes: torch.Tensor | None, max_length: int) -> int:
        """The window, by as many tokens as there can be; the bias must go on as it began."""
        shapes = [_value(node).shape for node in self._constants() if node.op == "placeholder"]
        square = [shape[-1] for shape in shapes if len(shape) > 1 and shape[-1] == shape[-2]]
        longest = min([max_length, *square])
        tries = (self.num_heads,) if slopes is not None else (1, self.num_heads)
        for heads in tries:  # one head, where it is broadcast, says as much as all
            length = min(longest, math.isqrt(_MAX_SCORES // heads))
            zeros = torch.zeros(heads, length, length, dtype=torch.float64)
            try:
                exact, own = self._compute(zeros), self._compute(zeros, as_the_model=True)
            except RuntimeError as error:
                if heads < self.num_heads:
                    continue
                raise _NoAttention(f"it cannot be computed for {length} tokens: {error}") from None
            if slopes is None and length < longest:
                raise _NoAttention(f"its mask for {longest} tokens is too large to look at")
            hidden = exact < _HIDDEN
            if slopes is not None:
                _check_linear(exact, hidden, slopes)
            self._check_rounding(exact.masked_fill(hidden, 0), own.masked_fill(hidden, 0))
            return _window_of(hidden)
        raise AssertionError("all heads are always tried")

    def _check_rounding(self, exact: torch.Tensor, own: torch.Tensor) -> None:
        """The model's bias must be as precise as its scores."""
        dtype = self.product.meta["val"].dtype
        error = (own.double() - exact).abs().max()
        allowed = 4 * torch.finfo(dtype).eps * exact.abs().max()
        if error > allowed:
            raise _NoAttention(
                f"its bias is rounded to less than {dtype}: by up to {float(error):.2g}, where "
                f"{dtype} rounds by {float(allowed):.2g}"
            )

    def _constants(self) -> list[fx.Node]:
        """What the function of the scores is made from besides them, in graph order."""
        wanted: set[fx.Node] = set()
        stack = [read for node in self.between for read in node.all_input_nodes]
        while stack:
            node = stack.pop()
            if node in self.data or node in wanted or not isinstance(_value(node), torch.Tensor):
                continue
            wanted.add(node)
            if node.target is not _MARKER and _name(node) not in _SHAPE_READERS:
                stack += node.all_input_nodes
        return [node for node in self.captured.graph.nodes if node in wanted]

    def _compute(self, scores: torch.Tensor, as_the_model: bool = False) -> torch.Tensor:
        """What the softmax reads if the product gives these scores: [num_heads, tokens, tokens].

        In fp64, whatever dtypes the model names; as_the_model: in those.
        """
        length = scores.shape[-1]
        symbol = self.captured.placeholder("batch", "input_ids").meta["val"].shape[0].node.expr
        values: dict[fx.Node, Any] = {}

        def number(value: Any) -> Any:
            if isinstance(value, torch.SymInt):
                return int(value.node.expr.xreplace({symbol: length}))
            return value

        def precise(value: Any) -> Any:
            if isinstance(value, torch.device):
                return torch.device("cpu")
            if as_the_model:
                return value
            if isinstance(value, torch.dtype) and value.is_floating_point:
                return torch.float64
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                return value.double()
            return value

        def given(node: fx.Node) -> Any:
            value = _value(node)
            if node in values:
                return values[node]
            if not isinstance(value, torch.Tensor):
                return number(value)
            return torch.ones([number(size) for size in value.shape], dtype=value.dtype)

        def run(node: fx.Node) -> Any:
            if node.target is _MARKER:
                window = _STAND_IN_WINDOW if node.args[2] else 0
                return _causal(length, window)[None, None]
            if node.op == "placeholder":
                return precise(self.tensor_of(self.captured.inputs[node.name]).cpu())
            args, kwargs = fx.map_arg((node.args, node.kwargs), given)
            if node is self.product:
                return self._with_scores(args, kwargs, scores)
            args, kwargs = tree_map(precise, (args, kwargs))
            return precise(node.target(*args, **kwargs))  # pyright: ignore

        if as_the_model:
            scores = scores.to(self.product.meta["val"].dtype)
        scores = scores.clone().view(*(1,) * (self.product.meta["val"].dim() - 3), *scores.shape)
        with torch.no_grad():
            for node in (*self._constants(), *self.between):
                values[node] = run(node)
        result = values[self.between[-1]]
        return result.reshape(-1, length, length)

    def _with_scores(self, args: Any, kwargs: Any, scores: torch.Tensor) -> torch.Tensor:
        """The product's result; that of baddbmm has something added to it."""
        if self.product.target is not aten.baddbmm.default:
            return scores
        return kwargs.get("beta", 1) * args[0].to(scores.dtype) + kwargs.get("alpha", 1) * scores

    # The rewrite.

    def replace(self, found: _Found, layer_idx: int) -> None:
        graph, product = self.captured.graph, self.after[-1]
        fake_mode = fake_mode_of(self.captured.placeholders())

        def call(target: Any, *args: Any) -> fx.Node:
            node = graph.call_function(target, args)
            values = fx.map_arg(args, lambda read: read.meta["val"])
            with fake_mode:
                node.meta = {**product.meta, "val": target(*values)}
            return node

        slopes: Any = ()
        if found.slopes is not None:
            slopes = (0, self._add_constant(f"alibi_slopes_{layer_idx}", found.slopes))
        with graph.inserting_before(product):
            flat = [
                call(aten.select.int, node, 0, 0) if value_of(node).dim() == 4 else node
                for node in (self.query, self.key_t, self.value)
            ]
            dtype = value_of(self.value).dtype
            flat = [
                node if value_of(node).dtype == dtype else call(aten.to.dtype, node, dtype)
                for node in flat
            ]
            query = call(aten.transpose.int, flat[0], 0, 1)  # [tokens, heads, head_dim]
            key = call(aten.permute.default, flat[1], [2, 0, 1])
            value = call(aten.transpose.int, flat[2], 0, 1)
            head = (query, key, value, None, found.scale, found.window, 0.0, None, layer_idx)
            new = call(torch.ops.fastgen.attention.default, *head, *slopes)
            if new.meta["val"].dtype != product.meta["val"].dtype:
                new = call(aten.to.dtype, new, product.meta["val"].dtype)
            new = call(aten.transpose.int, new, 0, 1)
            if product.meta["val"].dim() == 4:
                new = call(aten.unsqueeze.default, new, 0)
            new = call(aten.contiguous.default, new)  # what reads it may take it as a matrix
        product.replace_all_uses_with(new)
        for node in (*reversed(self.after), *reversed(self.between)):
            for reader in [user for user in node.users if not user.users]:
                graph.erase_node(reader)
            if node.users:
                raise _NoAttention(f"{node.name} is read by {[str(user) for user in node.users]}")
            graph.erase_node(node)

    def _add_constant(self, name: str, value: torch.Tensor) -> fx.Node:
        device = value_of(self.query).device
        self.captured.constants[name] = value.to(device)
        fake_mode = fake_mode_of(self.captured.placeholders())
        with fake_mode:
            fake = torch.empty(value.shape, dtype=value.dtype, device=device)
        return self.captured.add_input(name, InputSpec("constant", name), fake)


def _value(node: fx.Node) -> Any:
    return node.meta.get("val")


def _check_no_dropout(node: fx.Node) -> None:
    if _name(node) == "dropout" and node.args[1] and node.args[2]:
        raise _NoAttention(f"dropout of {node.args[1]}")


def _is_upcast(node: Any, dtype: torch.dtype) -> bool:
    """Whether the values of a node are those of another of this dtype, in fp32."""
    while _name(node) in ("transpose", "permute", "view", "reshape"):
        node = node.args[0]
    if _name(node) != "to" or node.meta["val"].dtype != torch.float32:
        return False
    return node.args[0].meta["val"].dtype == dtype


def _causal(length: int, window: int) -> torch.Tensor:
    """[length, length] bool: which keys a query sees."""
    visible = torch.ones(length, length, dtype=torch.bool).tril()
    return visible.triu(1 - window) if window else visible


def _understand(
    zero: torch.Tensor, other: torch.Tensor, scores: torch.Tensor
) -> tuple[float, int, torch.Tensor | None]:
    """Scale, window and slopes of a function, from its values for scores of zero and for others."""
    hidden = zero < _HIDDEN
    window = _window_of(hidden)
    if not torch.equal(hidden, other < _HIDDEN):
        raise _NoAttention("what is hidden depends on the scores")
    visible = ~hidden
    change, given = (other - zero)[visible], scores[visible]
    scale = float((change * given).sum() / (given * given).sum())
    if not (math.isfinite(scale) and scale > 0):
        raise _NoAttention(f"the scores are scaled by {scale}")
    if not torch.allclose(change, scale * given, rtol=1e-9, atol=1e-9 * scale):
        raise _NoAttention("the scores are not scaled by one number")
    steps = zero.diagonal(-1, 1, 2) - zero.diagonal(0, 1, 2)[:, 1:]  # of the key before, per query
    if window == 1:
        return scale, window, None
    slopes = -steps[:, -1]
    _check_linear(zero, hidden, slopes)
    is_flat = bool(slopes.abs().max() <= 1e-12 * max(1.0, float(zero[visible].abs().max())))
    return scale, window, None if is_flat else slopes


def _window_of(hidden: torch.Tensor) -> int:
    """The window of a causal mask, 0 if it has none. hidden: [heads, length, length]."""
    length = hidden.shape[-1]
    if not torch.equal(hidden, hidden[:1].expand_as(hidden)):
        raise _NoAttention("what is hidden differs between heads")
    seen = int((~hidden[0, -1]).sum())
    window = seen if seen < length else 0
    if seen == 0 or not torch.equal(~hidden[0], _causal(length, window)):
        raise _NoAttention("what is hidden is neither what a causal mask nor what a window hides")
    return window


def _check_linear(bias: torch.Tensor, hidden: torch.Tensor, slopes: torch.Tensor) -> None:
    """Bias must be slope * (key - query position), up to a number per query."""
    places = torch.arange(bias.shape[-1], dtype=torch.float64)
    line = slopes.double()[:, None, None] * (places[None] - places[:, None])
    own = bias - bias.diagonal(0, 1, 2)[..., None]  # relative to the query's own position
    error = (own - line).masked_fill(hidden, 0).abs().max()
    if error > 1e-6 * line.abs().max().clamp(min=1e-6):
        raise _NoAttention("a bias is added to the scores that is not ALiBi")
