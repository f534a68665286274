"""Runs of kernel calls in a lowered graph become programs: one call each, without Python between.

A run begins with a recordable kernel and takes in what follows: more of them, views of their
results, and operations that do not depend on them, which come before it. It ends where something
else reads a result. Whether every kernel of a run is recorded is up to the kernel: one that meets
a layout it would have to copy stays a call of its own, and ends the run.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

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


def compile_programs(graph: fx.Graph) -> list[Program]:
    """Replace runs of kernel calls by programs, in place; returns the programs."""
    programs: list[Program] = []
    run = _Run()
    for node in list(graph.nodes):
        if node.op != "call_function":
            if node.op == "output":
                _close(graph, run, programs)
            continue
        if _record(run, node):
            run.last = node
        elif any(read in run.values for read in node.all_input_nodes) or _writes(node):
            _close(graph, run, programs)
            run = _Run()
            if _record(run, node):
                run.last = node
    return programs


def _record(run: _Run, node: fx.Node) -> bool:
    """Take a node into the run, if it is a recordable kernel or a view of what one made."""
    if node.target is operator.getitem:
        if node.args[0] not in run.values:
            return False
        run.values[node] = run.values[node.args[0]][node.args[1]]  # pyright: ignore
        return True
    if node.target is torch.as_strided:
        base, *layout = node.args
        if base not in run.values:
            return False
        try:
            sizes = [[_number(run, item) for item in part] for part in layout[:2]]  # pyright: ignore
            run.values[node] = run.values[base].as_strided(*sizes, layout[2])
        except NotRecordableError:
            return False
        return True
    if not getattr(node.target, "recordable", False):
        return False
    recorded = len(run.recorder.calls)
    try:
        arguments = fx.map_arg(node.args, lambda argument: _value(run, argument))
        with recording(run.recorder):
            run.values[node] = node.target(*arguments)  # pyright: ignore
    except NotRecordableError:
        del run.recorder.calls[recorded:]
        return False
    return True


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
    if node not in run.externals:
        run.externals[node] = run.recorder.external(meta.shape, meta.stride(), meta.dtype)
    return run.externals[node]


def _writes(node: fx.Node) -> bool:
    """Whether a node that stays outside may write into something: nothing moves across it."""
    schema = getattr(node.target, "_schema", None)
    views = (operator.getitem, torch.as_strided)
    return node.target not in views if schema is None else schema.is_mutable


def _close(graph: fx.Graph, run: _Run, programs: list[Program]) -> None:
    """Put the program of a run after its last node, and let others read its results."""
    if len(run.recorder.calls) < _FEWEST_CALLS or run.last is None:
        return
    escaping = [
        node
        for node in run.values
        if any(user not in run.values for user in node.users)
        and isinstance(run.values[node], Value)
    ]
    try:
        program = Program(run.recorder, [run.values[node] for node in escaping])
    except NotRecordableError:
        return
    with graph.inserting_after(run.last):
        call = graph.call_function(program, tuple(run.externals))
    after = call
    for index, node in enumerate(escaping):
        with graph.inserting_after(after):
            after = graph.call_function(operator.getitem, (call, index))
        after.meta = dict(node.meta)
        node.replace_all_uses_with(after, lambda user: user not in run.values)
    for node in reversed(list(run.values)):
        graph.erase_node(node)
    programs.append(program)
