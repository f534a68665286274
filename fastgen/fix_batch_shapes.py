"""What deterministic=True makes of a graph: a token's bits depend on nothing else in the batch.

Each operation is one of these, or the model is refused by the name of the operation:

    exact           it moves numbers, or rounds each result once, and so is right to the last bit
                    whatever code runs it
    a linear layer  becomes `fastgen::row_linear` or `fastgen::row_grouped_linear`
    a fastgen op    runs in an implementation that says it is batch invariant
    by row          anything else that is known to work on rows runs once for each, always on the
                    same shape and layout: torch computes the last elements of a vector, or those
                    where a thread's share ends, with other code than the rest. Where it does not,
                    for rows of whole vectors and too few of them to be shared, some run at once
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from . import kernels
from .errors import UnsupportedModelError
from .passes import CapturedGraph, InputSpec

aten = torch.ops.aten
_ROW_LINEAR = torch.ops.fastgen.row_linear.default
_ROW_GROUPED_LINEAR = torch.ops.fastgen.row_grouped_linear.default

# By name, whatever the overload; `_` at the end is the same op in place.
_MOVES = (
    "alias", "arange", "as_strided", "broadcast_to", "cat", "chunk", "clone", "constant_pad_nd",
    "contiguous", "copy", "detach", "dropout", "embedding", "empty", "empty_like", "expand",
    "expand_as", "flatten", "flip", "full", "full_like", "gather", "index", "index_put",
    "index_select", "lift_fresh_copy", "masked_fill", "narrow", "new_empty", "new_full",
    "new_ones", "new_zeros", "ones", "ones_like", "pad", "permute", "repeat", "reshape", "roll",
    "select", "slice", "split", "split_with_sizes", "squeeze", "stack", "t", "to", "_to_copy",
    "transpose", "tril", "triu", "type_as", "unbind", "unflatten", "unsqueeze", "view",
    "view_as", "view_as_complex", "view_as_real", "where", "zeros", "zeros_like",
)  # fmt: skip
# IEEE arithmetic with one rounding, comparisons, and choices among numbers. histc counts.
_ROUNDED_ONCE = (
    "abs", "add", "amax", "amin", "argmax", "argmin", "argsort", "clamp", "clamp_max",
    "clamp_min", "div", "eq", "ge", "gt", "histc", "isfinite", "isinf", "isnan", "le",
    "logical_and", "logical_not", "logical_or", "lt", "max", "maximum", "min", "minimum", "mul",
    "multiply", "ne", "neg", "relu", "rsub", "sort", "sub", "topk",
)  # fmt: skip
_EXACT = frozenset(_MOVES + _ROUNDED_ONCE)
# Of them what chooses among the numbers of a dimension, and what takes the last if none is named.
_CHOICES = ("amax", "amin", "argmax", "argmin", "argsort", "max", "min", "sort", "topk")
_CHOICES_OF_THE_LAST = ("argsort", "sort", "topk")
# Known to treat rows apart, besides all pointwise ops: reductions and products of each.
_OF_ROWS = (
    "addmm", "baddbmm", "bmm", "cumsum", "layer_norm", "linalg_vector_norm", "linear",
    "log_softmax", "logsumexp", "matmul", "mean", "mm", "polar", "prod", "rms_norm", "softmax",
    "_softmax", "std", "sum", "var",
)  # fmt: skip
# Of them what torch computes by a loop over rows, each by the same code, along the last dimension.
_LOOPS_OVER_ROWS = ("layer_norm", "mean", "softmax", "_softmax", "sum")
# Elements that torch's loops take at once, at most, and fewer than which threads never share.
_VECTOR, _SHARED = 64, 1 << 15
# Products of experts, for which row_grouped_linear stands in.
_GROUPED = ("aten::_grouped_mm", "fastgen::grouped_mm")
_FASTGEN_OF_ROWS = (
    "fastgen::rms_norm",
    "fastgen::add_rms_norm",
    "fastgen::rope",
    "fastgen::silu_mul",
    "fastgen::gelu_mul",
    "fastgen::row_linear",
)


class ByRow:
    """An op that runs once for each row of its arguments, or for each few.

    Args:
        function: What runs. name: Of its op. rows: The dimension that counts rows, by the place of
            each argument that has one. results: The same of each result. order: How the dimensions
            of the only result lie in memory, None: contiguous, as all of several. at_once: How many
            rows may run together.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        name: str,
        rows: dict[int | str, int],
        results: Sequence[int],
        order: Sequence[int] | None,
        at_once: int = 1,
    ) -> None:
        self.__name__ = f"{name.replace('::', '_')}_by_row"
        self._function, self._rows, self._results, self._order = function, rows, results, order
        self.at_once = at_once

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        place, dim = next(iter(self._rows.items()))
        first = args[place] if isinstance(place, int) else kwargs[place]
        count = first.shape[dim]
        if count == 0:
            return self._function(*args, **kwargs)
        made = [
            self._function(
                *[self._part(place, value, row) for place, value in enumerate(args)],
                **{name: self._part(name, value, row) for name, value in kwargs.items()},
            )
            for row in range(0, count, self.at_once)
        ]
        if isinstance(made[0], tuple | list):
            columns = zip(*made, strict=True)
            return tuple(
                torch.cat(parts, dim) for parts, dim in zip(columns, self._results, strict=True)
            )
        result = torch.cat(made, self._results[0])
        if self._order is None:
            return result
        back = sorted(range(result.dim()), key=self._order.__getitem__)
        return result.permute(*self._order).contiguous().permute(*back)

    def _part(self, place: int | str, value: Any, row: int) -> Any:
        if place not in self._rows:
            return value
        dim = self._rows[place]
        part = value.narrow(dim, row, min(self.at_once, value.shape[dim] - row))
        return part.clone(memory_format=torch.contiguous_format)  # the same layout and alignment


def fix_batch_shapes(graph: CapturedGraph) -> dict[str, int]:
    """Make a graph that is about to be lowered batch invariant, in place.

    Returns: how many calls of which op run by row.
    Raises: UnsupportedModelError naming every op for which that is not known to be possible.
    """
    by_row: dict[str, int] = {}
    refused: dict[str, str] = {}
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or _is_exact(node):
            continue
        op = _op(node)
        try:
            if not _has_kernel(node) and not _became_row_linear(graph.graph, node):
                node.target = _by_row(node)
                by_row[op] = by_row.get(op, 0) + 1
        except ValueError as error:
            refused[op] = str(error)
    if refused:
        reasons = "; ".join(f"{op}: {why}" for op, why in refused.items())
        raise UnsupportedModelError(
            "deterministic=True needs every operation to give a token the same bits whatever else "
            f"is in the batch, and these are not known to: {reasons}"
        )
    graph.module.recompile()
    return by_row


def computations(graph: fx.Graph, inputs: Mapping[str, InputSpec]) -> list[tuple[Any, ...]]:
    """What a lowered graph computes besides moving numbers, in order: code, settings and weights.

    Two graphs of one model for which it is the same give a token the same bits.
    """
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    specs = dict(zip(placeholders, inputs.values(), strict=True))

    def described(node: fx.Node) -> Any:
        spec = specs.get(node)
        return spec if spec is not None and spec.kind != "batch" else "a value"

    return [
        (_code(node), *fx.map_arg((node.args, node.kwargs), described))
        for node in graph.nodes
        if node.op == "call_function"
        and _tensors(node.meta["val"])
        and _op(node).removeprefix("aten::").removesuffix("_") not in ("getitem", *_MOVES)
    ]


def _code(node: fx.Node) -> str:
    kernel = node.meta.get("kernel")
    return f"{kernel.op} by {kernel.name}" if kernel is not None else _op(node)


def _op(node: fx.Node) -> str:
    """ "aten::cos", "fastgen::rope", or the name of a Python function."""
    schema = getattr(node.target, "_schema", None)
    return schema.name if schema is not None else getattr(node.target, "__name__", str(node.target))


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, tuple | list):
        return [tensor for item in value for tensor in _tensors(item)]
    return [value] if isinstance(value, torch.Tensor) else []


def _varying(value: torch.Tensor) -> list[int]:
    """The dimensions whose size is not the same in every step."""
    return [
        dim
        for dim, size in enumerate(value.shape)
        if isinstance(size, torch.SymInt) and not size.node.expr.is_number
    ]


def _is_exact(node: fx.Node) -> bool:
    """Whether no code for this op can give other bits than any other."""
    given = [tensor for read in node.all_input_nodes for tensor in _tensors(read.meta.get("val"))]
    made = _tensors(node.meta.get("val"))
    op = _op(node)
    if not isinstance(node.target, torch._ops.OpOverload):
        return op == "getitem" or not given  # arithmetic of sizes
    if not made:
        return op in ("aten::sym_size", "aten::sym_stride") or "assert" in op or not given
    if op.startswith("fastgen::"):
        return False
    is_complex = any(tensor.is_complex() for tensor in given + made)
    if not is_complex and not any(tensor.is_floating_point() for tensor in given + made):
        return True
    if not any(_varying(tensor) for tensor in given):
        return True
    name = op.removeprefix("aten::").removesuffix("_")
    if is_complex and name not in _MOVES:  # whose products are sums
        return False
    if name in ("add", "sub", "rsub"):  # a factor's product may or may not be rounded before
        return _argument(node, "alpha") in (None, 1)
    if name == "index_put":  # what falls on one place is added in any order
        return not _argument(node, "accumulate")
    if name in _CHOICES and _works_across_rows(node, name):
        return False
    if name == "div":
        return _argument(node, "rounding_mode") is None
    if name == "dropout":
        return not _argument(node, "train")
    if name == "repeat_interleave":  # each as often as the next
        return isinstance(_argument(node, "repeats"), int)
    if name == "scatter":  # of several numbers for one place it is open which comes last
        one = _argument(node, "value") is not None or _scatters_to_different_places(node)
        return one and _argument(node, "reduce") is None
    return op.startswith("aten::") and name in _EXACT


def _works_across_rows(node: fx.Node, name: str) -> bool:
    """Whether an op that chooses among numbers may do so among those of several rows."""
    if _argument(node, "other") is not None:  # the larger of two, element by element
        return False
    dim = _argument(node, "dim")
    value = node.args[0].meta["val"]  # pyright: ignore
    if dim is None and name in _CHOICES_OF_THE_LAST:
        dim = -1
    dims = dim if isinstance(dim, list | tuple) else [dim]
    return not dims or any(d is None or d % value.dim() in _varying(value) for d in dims)


def _scatters_to_different_places(node: fx.Node) -> bool:
    """Whether the places are those of a row's largest numbers, each within its row."""
    index: Any = _argument(node, "index")
    if index.op != "call_function" or _op(index) != "getitem" or index.args[1] != 1:
        return False
    chosen, num_dims = index.args[0], index.meta["val"].dim()
    if _op(chosen) not in ("aten::topk", "aten::sort"):
        return False
    dim = _argument(chosen, "dim")
    dim = num_dims - 1 if dim is None else dim % num_dims
    return dim == _argument(node, "dim") % num_dims and dim not in _varying(index.meta["val"])


def _argument(node: fx.Node, name: str) -> Any:
    """An argument as it was given, or None."""
    names = [argument.name for argument in node.target._schema.arguments]  # pyright: ignore
    if name in node.kwargs:
        return node.kwargs[name]
    place = names.index(name) if name in names else len(node.args)
    return node.args[place] if place < len(node.args) else None


def _became_row_linear(graph: fx.Graph, node: fx.Node) -> bool:
    """Put our op in the place of a product with a weight, if it can be.

    Raises: ValueError if it has no kernel where nothing else will do.
    """
    op = _op(node)
    names = {
        "aten::linear": ("input", "weight", "bias"),
        "aten::mm": ("self", "mat2", ""),
        "aten::matmul": ("self", "other", ""),
    }
    if op in _GROUPED:
        if node.kwargs or any(given is not None for given in node.args[3:]) or len(node.args) < 3:
            return False
        target, args = _ROW_GROUPED_LINEAR, node.args[:3]
    elif op == "aten::addmm" and not node.kwargs:
        bias, input, weight = node.args  # pyright: ignore
        if bias.meta["val"].dim() != 1:  # pyright: ignore
            return False
        target, args = _ROW_LINEAR, (input, weight, bias)
    elif op in names:
        target, args = _ROW_LINEAR, tuple(_argument(node, name) for name in names[op])
    else:
        return False
    weight, result = args[1].meta["val"], node.meta["val"]  # pyright: ignore
    if weight.dim() != 2 + (target is _ROW_GROUPED_LINEAR) or _varying(weight):
        return False
    if not result.is_contiguous() or result.dtype != weight.dtype:
        return False
    added: list[fx.Node] = []
    with graph.inserting_before(node):
        if op in ("aten::addmm", "aten::mm", "aten::matmul"):
            turned = graph.call_function(aten.t.default, (args[1],))
            turned.meta = {**node.meta, "val": weight.t()}
            args = (args[0], turned, args[2])
            added.append(turned)
        linear = graph.call_function(target, args)
    linear.meta = dict(node.meta)
    added.append(linear)
    if (why := _without_kernel(linear)) is not None:
        for unused in reversed(added):
            graph.erase_node(unused)
        if op in _GROUPED:
            raise ValueError(why)
        return False
    node.replace_all_uses_with(linear)
    graph.erase_node(node)
    return True


def _has_kernel(node: fx.Node) -> bool:
    """Whether a fastgen op is batch invariant as it is.

    Raises: ValueError with the reason if it is not, and does not work on rows either.
    """
    op = _op(node)
    if not op.startswith("fastgen::") or op in _GROUPED:
        return False
    why = _without_kernel(node)
    if why is not None and op not in _FASTGEN_OF_ROWS:
        raise ValueError(why)
    return why is None


def _without_kernel(node: fx.Node) -> str | None:
    """Why no implementation of a fastgen op is batch invariant here, or None."""
    try:
        kernels.select(_op(node), call_site(node, batch_invariant=True))
    except kernels.NoImplementationError as error:
        return str(error)
    return None


def call_site(node: fx.Node, batch_invariant: bool) -> kernels.CallSite:
    """What is known of a node of a fastgen op when its implementation is chosen."""
    schema = node.target._schema.arguments  # pyright: ignore
    given = {argument.name: argument.default_value for argument in schema}
    given.update(zip((argument.name for argument in schema), node.args, strict=False))
    given.update(node.kwargs)
    values: Any = fx.map_arg(given, lambda argument: argument.meta["val"])
    return kernels.CallSite(_tensors(node.meta["val"])[0].device, values, batch_invariant)


def _by_row(node: fx.Node) -> ByRow:
    """What runs an op row by row. Raises: ValueError with the reason why it cannot be told how."""
    op, target = _op(node), node.target
    name = op.split("::")[-1]
    known = name in _OF_ROWS if op.startswith("aten::") else op in _FASTGEN_OF_ROWS
    if not known and torch.Tag.pointwise not in getattr(target, "tags", ()):
        raise ValueError("it may mix rows")
    if target._schema.is_mutable:  # pyright: ignore
        raise ValueError("it writes into its arguments")
    made = _tensors(node.meta["val"])
    results = [_varying(tensor) for tensor in made]
    if any(len(dims) != 1 for dims in results):
        raise ValueError("its result has not exactly one dimension that counts rows")
    count = made[0].shape[results[0][0]]
    rows: dict[int | str, int] = {}
    for place, value in (*enumerate(node.args), *node.kwargs.items()):
        if isinstance(value, list | tuple) and any(isinstance(item, fx.Node) for item in value):
            raise ValueError("it takes a list of tensors")
        if not isinstance(value, fx.Node):
            continue
        tensor = value.meta["val"]
        if not isinstance(tensor, torch.Tensor):
            raise ValueError("it takes a size")
        dims = _varying(tensor)
        if dims:
            if len(dims) > 1 or str(tensor.shape[dims[0]]) != str(count):
                raise ValueError("an argument has other rows than its result")
            rows[place] = dims[0]
            _check_dim(node, tensor.dim(), dims[0])
    order = None
    if len(made) == 1 and not made[0].is_contiguous():
        strides = [getattr(getattr(s, "node", None), "hint", s) for s in made[0].stride()]
        order = sorted(range(made[0].dim()), key=lambda dim: -strides[dim])
    run = target
    if op.startswith("fastgen::"):
        run = kernels.implementations(op)[-1].function  # the reference
    first_of_results = [dims[0] for dims in results]
    return ByRow(run, op, rows, first_of_results, order, _at_once(node, rows))  # pyright: ignore


def _at_once(node: fx.Node, rows: Mapping[int | str, int]) -> int:
    """How many rows one call may take without any of them being computed by other code."""
    op, made = _op(node), _tensors(node.meta["val"])
    read = [argument.meta["val"] for argument in node.all_input_nodes]
    shapes = {tuple(map(str, tensor.shape)) for tensor in read + made}
    row_dim, value = rows.get(0), read[0]
    if row_dim is None or not op.startswith("aten::"):
        return 1
    width = math.prod(size for dim, size in enumerate(value.shape) if dim != row_dim)
    if torch.Tag.pointwise in node.target.tags:  # pyright: ignore
        alike = len(shapes) == 1 and width % _VECTOR == 0
    else:
        alike = op.removeprefix("aten::") in _LOOPS_OVER_ROWS and _is_of_the_last(node, value.dim())
    return max(1, (_SHARED - 1) // max(1, int(width))) if alike else 1


def _is_of_the_last(node: fx.Node, num_dims: int) -> bool:
    """Whether an op works along the last dimension alone."""
    if _op(node) == "aten::layer_norm":
        return len(_argument(node, "normalized_shape")) == 1
    dim = _argument(node, "dim")
    dims = dim if isinstance(dim, list | tuple) else [dim]
    return [d is not None and d % num_dims for d in dims] == [num_dims - 1]


def _check_dim(node: fx.Node, num_dims: int, row_dim: int) -> None:
    dims = _argument(node, "dim") if _op(node).startswith("aten::") else None
    for dim in dims if isinstance(dims, list | tuple) else () if dims is None else (dims,):
        if dim % num_dims == row_dim:
            raise ValueError("it works across rows")
