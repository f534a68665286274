"""Runs of kernel calls in a lowered graph become programs: one call each, without Python between.

A run begins with a recordable kernel and takes in what follows: more of them, views of their
results, and operations that do not depend on them, which come before it. It ends where something
else reads a result. Whether every kernel of a run is recorded is up to the kernel: one that meets
a layout it would have to copy stays a call of its own, and ends the run.
"""

from __future__ import annotations

import operator
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from .kernels.cpu import recording
from .kernels.cpu.program import NotRecordableError, Program, Recorder, Value

# A shorter run is not worth the addresses that are looked up for it.
_FEWEST_CALLS = 4


@dataclass
class _Run:
    """Kernel calls that are being collected, and the values they made."""

    recorder: Recorder = field(default_factory=Recorder)
    values: dict[fx.Node, Any] = field(default_factory=dict)
    externals: dict[fx.Node, Value] = field(default_factory=dict)
    last: fx.Node | None = None


def compile_programs(
    graph: fx.Graph, fewest: int = _FEWEST_CALLS, most: int = sys.maxsize
) -> tuple[list[Program], dict[str, int]]:
    """Replace runs of kernel calls by programs, in place.

    fewest, most: Calls that a program must have, and may have.

    Returns: the programs, and how many recordable calls are in none of them, by kernel and reason.
    """
    programs: list[Program] = []
    left: Counter[str] = Counter()
    run = _Run()
    for node in list(graph.nodes):
        if node.op == "output" or len(run.recorder.calls) >= most:
            _close(graph, run, programs, left, fewest)
            run = _Run()
        if node.op != "call_function" or node in run.values or _record(run, node) is None:
            continue
        # What it reads may be made by the run, or be written by it: nothing says which are.
        if _writes(node) or any(
            read in run.values or read in run.externals for read in node.all_input_nodes
        ):
            _close(graph, run, programs, left, fewest)
            run = _Run()
            why = _record(run, node)
            if why is not None and _is_recordable(node):
                left[f"{_name(node)}: {why}"] += 1
    return programs, dict(left)


def _is_recordable(node: fx.Node) -> bool:
    return getattr(node.target, "recordable", False)


def _name(node: fx.Node) -> str:
    return getattr(node.target, "__name__", str(node.target))


def _record(run: _Run, node: fx.Node) -> str | None:
    """Take a node into the run, if it is a recordable kernel or a view of what one made.

    Returns: None, or why it is not taken; then the run is as it was.
    """
    num_externals = len(run.externals)
    try:
        with run.recorder.attempt():
            run.values[node] = _recorded(run, node)
    except NotRecordableError as error:
        for given in list(run.externals)[num_externals:]:
            del run.externals[given]
        return str(error)
    run.last = node
    for user in node.users:  # the parts of a tuple come along, wherever they are taken out of it
        if user.target is operator.getitem and isinstance(run.values[node], tuple):
            run.values[user] = run.values[node][user.args[1]]
    return None


def _recorded(run: _Run, node: fx.Node) -> Any:
    """What a node makes of the run's values, its kernels recorded. Raises: NotRecordableError."""
    if node.target is torch.as_strided and node.args[0] in run.values:
        base, size, stride, offset = node.args
        layout = [[_number(run, item) for item in part] for part in (size, stride)]  # pyright: ignore
        return run.values[base].as_strided(*layout, offset)  # pyright: ignore
    if not _is_recordable(node):
        raise NotRecordableError("it is no recordable kernel")
    arguments, named = fx.map_arg((node.args, node.kwargs), lambda given: _value(run, given))
    with recording(run.recorder):
        return node.target(*arguments, **named)  # pyright: ignore


def _number(run: _Run, item: Any) -> Any:
    return run.recorder.known(str(item.meta["val"])) if isinstance(item, fx.Node) else item


def _value(run: _Run, node: fx.Node) -> Any:
    """A node's value: one that the run made, a size, or a tensor that is given to it."""
    if node in run.values:
        return run.values[node]
    meta = node.meta["val"]
    if isinstance(meta, torch.SymInt):
        return run.recorder.known(str(meta))
    if not isinstance(meta, torch.Tensor):
        raise NotRecordableError(f"{node.name} is no tensor")
    if free_unbacked_symbols(meta):
        raise NotRecordableError(f"the size of {node.name} depends on values")
    if node not in run.externals:
        strides = None if meta.is_contiguous() else meta.stride()
        run.externals[node] = run.recorder.external(meta.shape, strides, meta.dtype)
    return run.externals[node]


def _writes(node: fx.Node) -> bool:
    """Whether a node that stays outside may write into something: nothing moves across it."""
    schema = getattr(node.target, "_schema", None)
    views = (operator.getitem, torch.as_strided)
    return node.target not in views if schema is None else schema.is_mutable


def _close(
    graph: fx.Graph, run: _Run, programs: list[Program], left: Counter[str], fewest: int
) -> None:
    """Put the program of a run after its last node, and let others read its results."""
    escaping = [
        node
        for node in run.values
        if any(user not in run.values for user in node.users)
        and isinstance(run.values[node], Value)
    ]
    try:
        if len(run.recorder.calls) < fewest or run.last is None:
            raise NotRecordableError(f"fewer than {fewest} kernels follow each other")
        program = Program(run.recorder, [run.values[node] for node in escaping])
    except NotRecordableError as error:
        left.update(f"{_name(node)}: {error}" for node in run.values if _is_recordable(node))
        return
    with graph.inserting_after(run.last):
        call = graph.call_function(program, tuple(run.externals))
    after = call
    for index, node in enumerate(escaping):
        with graph.inserting_after(after):
            after = graph.call_function(operator.getitem, (call, index))
        after.meta = dict(node.meta)
        node.replace_all_uses_with(after, lambda user: user not in run.values)
    for node in [node for node in reversed(graph.nodes) if node in run.values]:
        graph.erase_node(node)
    programs.append(program)
