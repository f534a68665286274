"""Recorded programs inside code that AOTInductor writes: one C++ function each, without Python.

A run of kernel calls (native_code.py) becomes an op with the tensors that it is given for arguments
and the memory of its results for results. What the op does is written into the compiled code as
tables, over kernels/cpu/aot_program.h. Where the kernels are is known when it runs: the graph has
one more input, a tensor of their addresses.
"""

from __future__ import annotations

import itertools
import operator
from pathlib import Path
from typing import Any

import torch
from torch import fx

from ..inductor import library_of_ops
from ..kernels.cpu import program as recorded
from ..kernels.cpu.program import Number, Program, Tables

KERNELS = "kernels"  # the input's name
_NAMESPACE = "fastgen_programs"
# A layer's attention writes two caches, among several other calls; a schema may have 64 arguments.
MAX_CALLS = 100
_MAX_DIMS = 8  # of FastgenExternal
_MAX_RESULTS = 60  # a schema may have 64
_numbers = itertools.count()
aten = torch.ops.aten


def is_expressible(program: Program) -> bool:
    """Whether the C++ tables and an op's schema can hold a program of MAX_CALLS or fewer."""
    tables = program.tables()
    return 0 < len(tables.made) <= _MAX_RESULTS and all(
        len(value.shape) <= _MAX_DIMS for value in tables.externals
    )


def replace_programs(
    graph: fx.Graph, written: set[fx.Node]
) -> tuple[dict[Any, list[str]], list[str]]:
    """Let ops stand for the programs that a graph calls, in place.

    Args:
        written: Inputs that kernels write into.
    Returns: C++ code for each op, as AOTInductor's custom_ops_to_c_shims; the kernels' names in the
        order of their addresses.
    """
    first = next(node for node in graph.nodes if node.op != "placeholder")
    shims: dict[Any, list[str]] = {}
    names: list[str] = []
    kernels: fx.Node | None = None
    for node in list(graph.nodes):
        if not isinstance(node.target, Program):
            continue
        if kernels is None:
            with graph.inserting_before(first):
                kernels = graph.placeholder(KERNELS)
        tables = node.target.tables()
        inputs = list(node.all_input_nodes)
        assert tuple(inputs) == node.args, "a program takes each tensor once"
        number = next(_numbers)
        writes = [given in written for given in inputs]
        op = _op(number, tables, writes)
        definition = _definition(number, tables, writes, names)
        shims[op] = [definition if shims else _with_header(number, tables, writes, definition)]
        with graph.inserting_before(node):
            pairs = list(zip(inputs, writes, strict=True))
            read = [given for given, is_written in pairs if not is_written]
            mutated = [given for given, is_written in pairs if is_written]
            call = graph.call_function(op, (kernels, read, *mutated))
            made = [call] if len(tables.made) == 1 else _parts(graph, call, len(tables.made))
            memories = dict(zip(tables.made, made, strict=True))
            sizes = _Sizes(graph, tables, inputs)
            for user in list(node.users):  # getitem of a result
                value = tables.results[user.args[1]]  # pyright: ignore
                layout = [[sizes.node(n) for n in part] for part in (value.shape, value.strides)]
                view = graph.call_function(
                    aten.as_strided.default, (memories[value.memory], *layout, value.offset)
                )
                user.replace_all_uses_with(view)
                graph.erase_node(user)
        graph.erase_node(node)
    return shims, names


def _parts(graph: fx.Graph, call: fx.Node, count: int) -> list[fx.Node]:
    return [graph.call_function(operator.getitem, (call, index)) for index in range(count)]


class _Sizes:
    """Numbers of a program as nodes of a graph, each made once."""

    def __init__(self, graph: fx.Graph, tables: Tables, inputs: list[fx.Node]) -> None:
        self._graph, self._tables, self._inputs = graph, tables, inputs
        self._made: dict[tuple[int, int, int], Any] = {}

    def node(self, number: int | Number) -> Any:
        if isinstance(number, int):
            return number
        key = number.constant, number.factor, number.scalar
        if key not in self._made:
            source = self._tables.sources[number.scalar - 1]
            size: Any = self._graph.call_function(
                aten.sym_size.int, (self._inputs[source.tensor], source.dim)
            )
            if number.factor != 1:
                size = self._graph.call_function(operator.mul, (size, number.factor))
            if number.constant:
                size = self._graph.call_function(operator.add, (size, number.constant))
            self._made[key] = size
        return self._made[key]


def _op(number: int, tables: Tables, writes: list[bool]) -> Any:
    """The op of a program; it has a fake and no body, which is C++.

    What it reads comes in a list: a schema may have 64 arguments, and a model has more weights.
    """
    mutated = "".join(f", Tensor(a{i}!) w{i}" for i in range(sum(writes)))
    name, results = f"program_{number}", ", ".join(["Tensor"] * len(tables.made))
    library = library_of_ops(_NAMESPACE)
    library.define(
        f"{name}(Tensor kernels, Tensor[] read{mutated}) -> ({results})",
        tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag),
    )
    dtypes = _dtypes(tables)

    def fake(kernels: torch.Tensor, read: list[torch.Tensor], *mutated: torch.Tensor) -> Any:
        rest = {False: iter(read), True: iter(mutated)}
        tensors = [next(rest[is_written]) for is_written in writes]
        scalars = [0, *(tensors[at.tensor].shape[at.dim] for at in tables.sources)]
        made = tuple(
            kernels.new_empty(recorded.evaluate(_elements(memory, dtype), scalars), dtype=dtype)
            for memory, dtype in zip(tables.made, dtypes, strict=True)
        )
        return made[0] if len(made) == 1 else made

    torch.library.register_fake(f"{_NAMESPACE}::{name}", fake, lib=library)
    return getattr(getattr(torch.ops, _NAMESPACE), name).default


def _dtypes(tables: Tables) -> list[torch.dtype]:
    of = {value.memory: value.dtype for value in tables.results}
    return [of[memory] for memory in tables.made]


def _elements(memory: Any, dtype: torch.dtype) -> Any:
    return memory.num_bytes // dtype.itemsize


def _signature(number: int, tables: Tables, num_written: int) -> str:
    arguments = ["AtenTensorHandle kernels", "const AtenTensorHandle* read", "int64_t num_read"]
    arguments += [f"AtenTensorHandle w{i}" for i in range(num_written)]
    arguments += [f"AtenTensorHandle* r{i}" for i in range(len(tables.made))]
    return f"AOTITorchError aoti_torch_cpu_program_{number}({', '.join(arguments)})"


def _with_header(number: int, tables: Tables, writes: list[bool], definition: str) -> str:
    """A definition after what all of them use; the text begins as a declaration must."""
    header = Path(recorded.__file__).with_name("aot_program.h").read_text()
    return f"{_signature(number, tables, sum(writes))};\n{header}\n{definition}"


def _definition(number: int, tables: Tables, writes: list[bool], names: list[str]) -> str:
    """A program's tables and function; kernels that are new are added to `names`."""
    for name in tables.names:
        if name not in names:
            names.append(name)
    calls = [
        f"{names.index(name)}, {first}"
        for name, first in zip(tables.names, tables.first_words, strict=True)
    ]
    constant, scalar, factor = tables.workspace
    dtypes = _dtypes(tables)
    results = [_size(_elements(m, dtype)) for m, dtype in zip(tables.made, dtypes, strict=True)]
    sources = [f"{at.tensor}, {at.dim}" for at in tables.sources] or ["0"]
    reads, mutates = itertools.count(), itertools.count()
    inputs = ", ".join(
        f"w{next(mutates)}" if is_written else f"read[{next(reads)}]" for is_written in writes
    )
    outputs = ", ".join(f"r{i}" for i in range(len(tables.made)))
    words = [f"{{{_int(c)}, {f}, {s}, {a}}}" for c, f, s, a in tables.words]
    return f"""{_signature(number, tables, sum(writes))} {{
  static const int64_t calls[] = {{{", ".join(calls)}}};
  static const FastgenWord words[] = {{{", ".join(words)}}};
  static const int64_t sources[] = {{{", ".join(sources)}}};
  static const FastgenExternal externals[] = {{{", ".join(map(_external, tables.externals))}}};
  static const FastgenSize results[] = {{{", ".join(results)}}};
  static const int32_t dtypes[] = {{{", ".join(map(_dtype, dtypes))}}};
  static const FastgenProgram program = {{{len(tables.names)}, calls, {len(words)}, words,
      {1 + len(tables.sources)}, sources, {len(tables.externals)}, externals,
      {{{constant}, {factor}, {scalar}}}, {len(tables.made)}, results, dtypes}};
  const AtenTensorHandle given[] = {{{inputs}}};
  AtenTensorHandle* const made[] = {{{outputs}}};
  return fastgen_run(program, kernels, given, made);
}}"""


def _int(value: int) -> str:
    """Also the bits of a double, whose sign may be set."""
    return "INT64_MIN" if value == -(1 << 63) else f"INT64_C({value})"


def _size(number: int | Number) -> str:
    if isinstance(number, int):
        return f"{{{number}, 0, 0}}"
    return f"{{{number.constant}, {number.factor}, {number.scalar}}}"


def _external(value: recorded.Value) -> str:
    sizes, strides = (", ".join(map(_size, part)) for part in (value.shape, value.strides))
    return f"{{{_dtype(value.dtype)}, {len(value.shape)}, {{{sizes}}}, {{{strides}}}}}"


def _dtype(dtype: torch.dtype) -> str:
    return f"aoti_torch_dtype_{str(dtype).removeprefix('torch.')}()"
