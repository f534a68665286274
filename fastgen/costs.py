"""What the ops of a rewritten graph compute and read, by formula from their shapes.

    product    [M, K] x [K, N]: 2 M N K FLOPs. Streams the second operand (the weight) once; reads
               [M, K] and writes [M, N]. Of experts' weights [E, K, N] at most M of E are streamed.
    attention  a query at position p sees s(p) = min(p + 1, window) keys, or p + 1 without a window,
               where p is counted from the start of its chunk, if there are chunks:
               2 (head_dim + v_head_dim) FLOPs per query head and key seen (softmax not counted).
               Streams the keys and values that any query of the sequence sees, once per KV head,
               n + window - 1 at most for n queries; reads queries and new keys and values, writes
               the output and the new keys and values.
    latent attention  the cheaper of two ways per sequence: n queries and the keys they see, m,
               go through the weight once each, m of them to expand it or n to absorb it, and a
               pair of the two costs head_dim + v_head_dim or 2 rank + rope products per head.
               Streams the weight and the latents that any query of the sequence sees.

Sizes are symbols of the capture and get their values from a `Step`. These are floors: an
implementation may read more than once.
Source: Williams et al. 2009, doi:10.1145/1498765.1498785 (roofline).
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .errors import UnsupportedModelError
from .passes import InputSpec
from .passes.graph import memory_of

GATED = "fastgen::packed_gated_linear"
ATTENTION = "fastgen::paged_attention"
LATENT = "fastgen::paged_latent_attention"
_WINDOW_ARGUMENT, _CHUNK_ARGUMENT = 10, 13  # of both, and of paged_attention
# Products of each row with the weight of its expert.
_GROUPED = (
    "aten::_grouped_mm",
    "fastgen::grouped_mm",
    "fastgen::row_grouped_linear",
)

# Products, and where their two operands stand among the arguments.
_PRODUCTS = {
    "aten::linear": (0, 1),
    "fastgen::packed_linear": (0, 1),
    "fastgen::row_linear": (0, 1),
    GATED: (0, 1),
    "aten::mm": (0, 1),
    "aten::matmul": (0, 1),
    "aten::bmm": (0, 1),
    "aten::addmm": (1, 2),
    "aten::baddbmm": (1, 2),
    **dict.fromkeys(_GROUPED, (0, 1)),
}
# Ops that read a matrix without a product: rows of it, or element by element.
_READERS = ("aten::embedding", "aten::index", "aten::index_select", "aten::mul", "aten::add")


@dataclass(frozen=True)
class Step:
    """What one step computes: tokens, rows of logits, and (new tokens, length) per sequence.

    A sequence's length is what attention sees, this step's tokens included.
    """

    num_tokens: int
    num_rows: int
    sequences: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Cost:
    """streamed_bytes: weights, or keys and values. activation_bytes: operands and results."""

    flops: int = 0
    streamed_bytes: int = 0
    activation_bytes: int = 0

    @property
    def bytes(self) -> int:
        return self.streamed_bytes + self.activation_bytes

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops,
            self.streamed_bytes + other.streamed_bytes,
            self.activation_bytes + other.activation_bytes,
        )

    def floor_s(self, read_gb_per_s: float, tflop_per_s: float) -> float:
        """Seconds that streaming, or computing, needs at least, whichever is more."""
        return max(self._limits_s(read_gb_per_s, tflop_per_s))

    def bound_by(self, read_gb_per_s: float, tflop_per_s: float) -> str:
        reading, computing = self._limits_s(read_gb_per_s, tflop_per_s)
        return "compute" if computing > reading else "bandwidth"

    def _limits_s(self, read_gb_per_s: float, tflop_per_s: float) -> tuple[float, float]:
        return self.streamed_bytes / read_gb_per_s / 1e9, self.flops / tflop_per_s / 1e12


class Sizes:
    """The sizes of a graph's values in one step."""

    def __init__(
        self, placeholders: Sequence[fx.Node], specs: Sequence[InputSpec], step: Step
    ) -> None:
        """placeholders: of the graph, with fake values; specs: what they stand for, in order."""
        self.step = step
        self._values: dict[Any, int] = {}
        known = {"input_ids": step.num_tokens, "logits_indices": step.num_rows}
        for node, spec in zip(placeholders, specs, strict=True):
            if spec.kind == "batch" and spec.target in known:
                self._values[node.meta["val"].shape[0].node.expr] = known[spec.target]

    def size(self, size: int | torch.SymInt) -> int:
        """The value of a size. Raises: UnsupportedModelError if it depends on data."""
        if isinstance(size, int):
            return size
        expression = size.node.expr
        if expression not in self._values:
            value = expression.xreplace(self._values)
            if value.free_symbols:
                raise UnsupportedModelError(
                    f"a size of the graph ({expression}) depends on more than the numbers of "
                    "tokens and rows, so that what it costs cannot be told"
                )
            self._values[expression] = int(value)
        return self._values[expression]

    def shape(self, node: Any) -> tuple[int, ...]:
        return tuple(self.size(size) for size in node.meta["val"].shape)

    def nbytes(self, node: Any) -> int:
        count = node.meta["val"].dtype.itemsize
        for size in self.shape(node):
            count *= size
        return count


def op_name(node: fx.Node, implementations: Mapping[Any, str]) -> str:
    """ "aten::linear", "fastgen::rope", ...; implementations: kernel function -> name of its op."""
    if node.target in implementations:
        return implementations[node.target]
    schema = getattr(node.target, "_schema", None)
    return schema.name if schema is not None else getattr(node.target, "__name__", str(node.target))


def kind_of(op: str) -> str:
    """ "GEMM", "attention" or "other"."""
    if op in (ATTENTION, LATENT):
        return "attention"
    return "GEMM" if op in _PRODUCTS else "other"


def node_cost(op: str, node: fx.Node, sizes: Sizes) -> Cost:
    """Of a product or an attention; nothing for other ops."""
    if op == ATTENTION:
        return _attention_cost(node, sizes)
    if op == LATENT:
        return _latent_attention_cost(node, sizes)
    if op not in _PRODUCTS:
        return Cost()
    left, right = (node.args[index] for index in _PRODUCTS[op])
    rows_and_inner = sizes.shape(left)
    results = 1
    for size in sizes.shape(node):
        results *= size
    if not results:  # of no rows: nothing is read
        return Cost()
    streamed = sizes.nbytes(right)
    if op in _GROUPED:
        num_experts = sizes.shape(right)[0]
        streamed = streamed // num_experts * min(num_experts, rows_and_inner[0])
    products = 2 * results if op == GATED else results  # gate and up of each result
    return Cost(
        2 * products * rows_and_inner[-1], streamed, sizes.nbytes(left) + sizes.nbytes(node)
    )


def may_read_matrix(op: str) -> bool:
    """Whether what this op does with a matrix is known: a product, or nothing that is counted."""
    return op in _PRODUCTS or op in _READERS or op == LATENT


def product_weight(op: str, node: fx.Node) -> fx.Node | None:
    """The second operand of a product, or what latents are multiplied with."""
    if op == LATENT:
        return node.args[3]  # pyright: ignore
    return node.args[_PRODUCTS[op][1]] if op in _PRODUCTS else None  # pyright: ignore


def _attention_cost(node: fx.Node, sizes: Sizes) -> Cost:
    query, key, value = node.args[:3]
    window: int = node.args[_WINDOW_ARGUMENT]  # pyright: ignore
    chunk: int = next(iter(node.args[_CHUNK_ARGUMENT:]), 0)  # pyright: ignore
    _, num_heads, head_dim = sizes.shape(query)
    _, num_kv_heads, v_head_dim = sizes.shape(value)
    width = head_dim + v_head_dim
    seen = sum(num_seen(new, length, window, chunk) for new, length in sizes.step.sequences)
    kept = sum(num_keys(new, length, window, chunk) for new, length in sizes.step.sequences)
    itemsize = key.meta["val"].dtype.itemsize  # pyright: ignore
    stored = sizes.nbytes(key) + sizes.nbytes(value)
    return Cost(
        flops=2 * seen * num_heads * width,
        streamed_bytes=kept * num_kv_heads * width * itemsize,
        activation_bytes=sizes.nbytes(query) + sizes.nbytes(node) + 2 * stored,
    )


def _latent_attention_cost(node: fx.Node, sizes: Sizes) -> Cost:
    query, latent, k_rope, weight = node.args[:4]
    window: int = node.args[_WINDOW_ARGUMENT]  # pyright: ignore
    (_, num_heads, head_dim), (_, _, v_head_dim) = sizes.shape(query), sizes.shape(node)
    (_, rank), (_, rope) = sizes.shape(latent), sizes.shape(k_rope)
    elements = num_heads * (head_dim - rope + v_head_dim) * rank
    products = kept = 0
    for new, length in sizes.step.sequences:
        pairs, keys = num_seen(new, length, window), num_keys(new, length, window)
        expanded = keys * elements + pairs * num_heads * (head_dim + v_head_dim)
        absorbed = new * elements + pairs * num_heads * (2 * rank + rope)
        products += min(expanded, absorbed)
        kept += keys
    itemsize = latent.meta["val"].dtype.itemsize  # pyright: ignore
    stored = sizes.nbytes(latent) + sizes.nbytes(k_rope)
    return Cost(
        flops=2 * products,
        streamed_bytes=kept * (rank + rope) * itemsize + sizes.nbytes(weight),
        activation_bytes=sizes.nbytes(query) + sizes.nbytes(node) + 2 * stored,
    )


def num_seen(new: int, length: int, window: int, chunk: int = 0) -> int:
    """Pairs of a query and a key it sees, for the last `new` tokens of a sequence; window 0: all.

    The sum of min(j, window) over j = length - new + 1 .. length; with chunks, that of each.
    """
    if chunk:
        first = length - new
        starts = range(first // chunk * chunk, length, chunk)
        ends = [min(start + chunk, length) for start in starts]
        pairs = zip(starts, ends, strict=True)
        return sum(num_seen(end - max(start, first), end - start, window) for start, end in pairs)
    if not window:
        return new * (length - new) + new * (new + 1) // 2
    first = length - new + 1
    whole = max(0, min(length, window) - first + 1)  # queries that see every earlier token
    return whole * (2 * first + whole - 1) // 2 + window * (new - whole)


def num_keys(new: int, length: int, window: int, chunk: int = 0) -> int:
    """Keys that any of the last `new` tokens of a sequence sees."""
    seen = min(length, new + window - 1) if window else length
    return min(seen, length - (length - new) // chunk * chunk) if chunk else seen


def peak_bytes(graph: fx.Graph, sizes: Sizes) -> int:
    """Most bytes of values that are alive at once; inputs of the graph are not counted.

    The graph's Python drops a value after its last use; views keep their memory alive.
    """
    inputs = {memory_of(node) for node in graph.nodes if node.op == "placeholder"}
    first: dict[int, tuple[int, int]] = {}  # memory -> where it begins, bytes
    last: dict[int, int] = {}  # memory -> index of the node that uses it last
    for index, node in enumerate(graph.nodes):
        for storage in _storages(node):
            if storage._cdata not in inputs and storage._cdata not in first:
                first[storage._cdata] = index, sizes.size(storage.nbytes())
        for used in (node, *node.all_input_nodes):
            last.update({storage._cdata: index for storage in _storages(used)})
    change: Counter[int] = Counter()
    for memory, (index, nbytes) in first.items():
        change[index] += nbytes
        change[last[memory] + 1] -= nbytes
    return max(itertools.accumulate(change[index] for index in sorted(change)))


def _storages(node: fx.Node) -> list[torch.UntypedStorage]:
    """The memory of a node's value, be it a tensor or several."""
    value = node.meta.get("val")
    values = value if isinstance(value, tuple | list) else (value,)
    return [tensor.untyped_storage() for tensor in values if isinstance(tensor, torch.Tensor)]
