"""Rewritten graphs as JSON, and back.

Reading makes nodes out of data and runs nothing: ops are looked up by name among torch's, other
functions in a list below, and every name must be a plain identifier, because torch.fx writes them
into code.
"""

from __future__ import annotations

import base64
import json
import keyword
import operator
from dataclasses import asdict
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

from .passes import CapturedGraph, InputSpec, MergePlan, PassReport, Report
from .passes.graph import module_of, remember_module
from .value_forms import ValueForm, ValueForms

FORMAT = 2
_MAX_CONSTANT_BYTES = 1 << 16

# Python functions that torch.export leaves in a graph, all of them on sizes, and getitem.
_FUNCTIONS = {
    f"operator.{name}": getattr(operator, name)
    for name in ("getitem", "add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "pow",
                 "eq", "ne", "lt", "le", "gt", "ge", "and_", "or_")
}  # fmt: skip
_FUNCTIONS |= {"torch.sym_max": torch.sym_max, "torch.sym_min": torch.sym_min}
_FUNCTIONS |= {"torch.sym_not": torch.sym_not, "torch.sym_float": torch.sym_float}
_FUNCTION_NAMES = {function: name for name, function in _FUNCTIONS.items()}
# Values of torch's own that are arguments of ops, by their text: "torch.float32", ...
_TORCH_VALUES: dict[str, Any] = {
    str(value): value
    for value in vars(torch).values()
    if isinstance(value, torch.dtype | torch.layout | torch.memory_format)
}


class NotCacheableError(Exception):
    """The graph of this model cannot be kept on disk; str() is the reason."""


# Writing. Anything without a case raises NotCacheableError.


def written(graph: CapturedGraph, report: Report) -> dict[str, Any]:
    """A graph and its report as JSON. Raises: NotCacheableError for what cannot be written."""
    if any(item.status == "rolled back" for item in report.passes):
        raise NotCacheableError("a pass failed and was rolled back")
    if not graph.keeps_sequences_apart:
        raise NotCacheableError("with these weights the check of the graph says nothing")
    values = _ValueTable()
    nodes = []
    for node in graph.graph.nodes:
        row: dict[str, Any] = {"op": node.op, "name": node.name}
        if node.op == "call_function":
            row["target"] = _target_name(node.target)
            row["kwargs"] = _argument(dict(node.kwargs))
        elif node.op not in ("placeholder", "output"):
            raise NotCacheableError(f"the graph has a {node.op} node, {node.name}")
        if node.op != "placeholder":
            row["args"] = _argument(tuple(node.args))
        if "val" in node.meta:
            row["value"] = values.add(node.meta["val"], node.name)
        if (module := module_of(node)) is not None:
            row["module"] = module
        nodes.append(row)
    used = [spec.target for spec in graph.inputs.values() if spec.kind == "constant"]
    return {
        "format": FORMAT,
        "nodes": nodes,
        "values": values.rows,
        "inputs": [[spec.kind, spec.target, spec.layout] for spec in graph.inputs.values()],
        "constants": {name: _constant(name, graph.constants[name]) for name in used},
        "num_layers": graph.num_layers,
        "deterministic": graph.deterministic,
        "merges": [[plan.name, list(plan.members)] for plan in graph.merges],
        "passes": [asdict(item) for item in report.passes],
        "facts": report.facts,
    }


def _target_name(target: Any) -> str:
    if isinstance(target, OpOverload):
        return f"{target.namespace}::{target._opname}.{target._overloadname}"
    if target in _FUNCTION_NAMES:
        return _FUNCTION_NAMES[target]
    raise NotCacheableError(f"the graph calls {target}, which is no op")


def _argument(value: Any) -> Any:
    """JSON for an argument of a node: scalars as they are, all else as [kind, content]."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, fx.Node):
        return ["node", value.name]
    if isinstance(value, tuple | list):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return [kind, [_argument(item) for item in value]]
    if isinstance(value, dict):
        return ["dict", {str(key): _argument(item) for key, item in value.items()}]
    if isinstance(value, slice):
        return ["slice", [_argument(item) for item in (value.start, value.stop, value.step)]]
    if isinstance(value, torch.device):
        return ["device", str(value)]
    if str(value) in _TORCH_VALUES:
        return ["torch", str(value)]
    raise NotCacheableError(f"an argument in the graph is a {type(value).__name__}")


def _constant(name: str, tensor: torch.Tensor) -> list[Any]:
    if type(tensor) is not torch.Tensor or tensor.nbytes > _MAX_CONSTANT_BYTES:
        raise NotCacheableError(f"the constant {name} takes {tensor.nbytes} bytes")
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    form = [list(tensor.shape), str(tensor.dtype), str(tensor.device)]
    return [*form, base64.b64encode(content).decode()]


class _ValueTable:
    """The different values of the graph's nodes as JSON, each once.

    A symbolic size is written as a list of what it was in the example.
    """

    def __init__(self) -> None:
        self.rows: list[Any] = []
        self._places: dict[str, int] = {}

    def add(self, value: Any, where: str) -> int:
        row = self._row(value, where)
        text = json.dumps(row)
        if text not in self._places:
            self._places[text] = len(self.rows)
            self.rows.append(row)
        return self._places[text]

    def _row(self, value: Any, where: str) -> Any:
        if value is None or type(value) in (bool, int, float):
            return ["scalar", value]
        if isinstance(value, torch.SymInt):
            return ["size", self._size(value, where)]
        if isinstance(value, FakeTensor | ValueForm):
            shape = [self._size(size, where) for size in value.shape]
            strides = [self._size(stride, where) for stride in value.stride()]
            return ["tensor", shape, strides, str(value.dtype), str(value.device)]
        if isinstance(value, tuple | list):
            return ["tuple", [self._row(item, where) for item in value]]
        raise NotCacheableError(f"the value of {where} is a {type(value).__name__}")

    def _size(self, size: int | torch.SymInt, where: str) -> Any:
        if isinstance(size, int):
            return size
        if not size.node.has_hint():
            raise NotCacheableError(f"a size of {where} depends on the values of a tensor")
        return [int(size.node.hint)]


# Reading.


def graph_from(
    data: dict[str, Any], device: torch.device, traceable: bool = True
) -> tuple[CapturedGraph, Report]:
    """What `written` wrote.

    traceable: Whether its values are fake tensors, which passes and compilers need.
    Raises: an error of some kind for anything unexpected.
    """
    if data["format"] != FORMAT:
        raise ValueError(f"format {data['format']}, {FORMAT} is read")
    values = _stand_ins(data["values"], _Traceable() if traceable else ValueForms())
    graph, nodes = fx.Graph(), {}
    for row in data["nodes"]:
        node = _add_node(graph, row, nodes)
        nodes[row["name"]] = node
        if "value" in row:
            node.meta["val"] = values[row["value"]]
        if "module" in row:
            remember_module(node, row["module"])
    module = fx.GraphModule({}, graph)
    graph.lint()
    placeholders = [node.name for node in graph.nodes if node.op == "placeholder"]
    specs = [InputSpec(*spec) for spec in data["inputs"]]
    captured = CapturedGraph(
        module=module,
        inputs=dict(zip(placeholders, specs, strict=True)),
        num_layers=data["num_layers"],
        deterministic=data["deterministic"],
        keeps_sequences_apart=True,  # else it would not have been written
        constants={name: _tensor(row) for name, row in data["constants"].items()},
        merges=[MergePlan(name, tuple(members)) for name, members in data["merges"]],
    )
    if captured.output_value().device != device:
        raise ValueError(f"the graph is for {captured.output_value().device}")
    passes = [
        PassReport(**{**row, "refused": [(where, why) for where, why in row["refused"]]})
        for row in data["passes"]
    ]
    return captured, Report(passes=passes, facts=data["facts"])


def _add_node(graph: fx.Graph, row: dict[str, Any], nodes: dict[str, fx.Node]) -> fx.Node:
    name = row["name"]
    if not name.isidentifier() or keyword.iskeyword(name):
        raise ValueError(f"{name!r} is no name of a node")
    match row["op"]:
        case "placeholder":
            return graph.placeholder(name)
        case "output":
            return graph.output(_value_of(row["args"], nodes)[0])
        case "call_function":
            arguments = _value_of(row["args"], nodes), _value_of(row["kwargs"], nodes)
            return graph.create_node("call_function", _target(row["target"]), *arguments, name=name)
    raise ValueError(f"{row['op']!r} is no kind of node")


def _target(name: str) -> Any:
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    namespace, _, rest = name.partition("::")
    op, _, overload = rest.rpartition(".")
    found = getattr(getattr(getattr(torch.ops, namespace), op), overload)
    if not isinstance(found, OpOverload):
        raise ValueError(f"{name!r} is no op")
    return found


def _value_of(argument: Any, nodes: dict[str, fx.Node]) -> Any:
    if not isinstance(argument, list):
        return argument
    kind, content = argument
    match kind:
        case "node":
            return nodes[content]
        case "tuple":
            return tuple(_value_of(item, nodes) for item in content)
        case "list":
            return [_value_of(item, nodes) for item in content]
        case "dict":
            if not all(key.isidentifier() for key in content):
                raise ValueError(f"{list(content)} are no names of arguments")
            return {key: _value_of(item, nodes) for key, item in content.items()}
        case "slice":
            return slice(*(_value_of(item, nodes) for item in content))
        case "device":
            return torch.device(content)
        case "torch":
            return _TORCH_VALUES[content]
    raise ValueError(f"{kind!r} is no kind of argument")


def _tensor(row: list[Any]) -> torch.Tensor:
    shape, dtype, device, content = row
    raw = torch.tensor(list(base64.b64decode(content)), dtype=torch.uint8)
    return raw.view(_TORCH_VALUES[dtype]).reshape(shape).to(device)


class _Traceable:
    """Values as a trace would have left them: fake tensors, symbolic sizes with their example.

    Sizes that were equal in the example share a symbol.
    """

    def __init__(self) -> None:
        self._mode = FakeTensorMode(shape_env=ShapeEnv())
        self._sizes: dict[int, Any] = {}

    def size(self, example: int) -> Any:
        if example not in self._sizes:
            dynamic = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
            tensor = torch.empty(example, device="meta")
            symbolic = self._mode.from_tensor(tensor, symbolic_context=dynamic, static_shapes=False)
            self._sizes[example] = symbolic.shape[0]
        return self._sizes[example]

    def tensor(self, shape: Any, strides: Any, dtype: torch.dtype, device: str) -> torch.Tensor:
        with self._mode:
            return torch.empty_strided(shape, strides, dtype=dtype, device=device)


def _stand_ins(rows: list[Any], forms: _Traceable | ValueForms) -> list[Any]:
    def size(written: Any) -> Any:
        return written if isinstance(written, int) else forms.size(*written)

    def value(row: list[Any]) -> Any:
        match row:
            case ["scalar", scalar]:
                return scalar
            case ["size", written]:
                return size(written)
            case ["tensor", shape, strides, dtype, device]:
                form = [size(item) for item in shape], [size(item) for item in strides]
                return forms.tensor(*form, _TORCH_VALUES[dtype], device)
            case ["tuple", items]:
                return tuple(map(value, items))
        raise ValueError(f"{row!r} is no kind of value")

    return [value(row) for row in rows]
