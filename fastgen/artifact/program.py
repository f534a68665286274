"""How the rewritten graph of a folder is run: one entry per kind of program.

Every folder has graph.json, which says what goes in, what comes out and what the KV cache is. A
kind may write more beside it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..compiled import CompiledForward
from ..errors import ArtifactError
from ..graph_json import NotCacheableError, graph_from, written
from ..passes import CapturedGraph, Report

GRAPH = "graph.json"
COMPILED = "model.pt2"


@dataclass(frozen=True)
class ProgramKind:
    """What becomes of a rewritten graph.

    files: What `write` puts into the folder, besides graph.json. read: Makes the graph callable,
    once these have been compared with the manifest; its last argument is a Config's codegen.
    """

    files: tuple[str, ...]
    write: Callable[[Path, CapturedGraph], None]
    read: Callable[[Path, CapturedGraph, Report, str], CompiledForward]


def _write_nothing(folder: Path, graph: CapturedGraph) -> None:
    pass


def _run_directly(
    folder: Path, graph: CapturedGraph, report: Report, codegen: str
) -> CompiledForward:
    """Kernels are chosen for this machine, and nothing is compiled but their own library."""
    return CompiledForward(graph, report, codegen)


def _compile(folder: Path, graph: CapturedGraph) -> None:
    from .aot_compiler import compile_aot  # with torch's compiler

    compile_aot(graph, folder / COMPILED)


def _run_compiled(
    folder: Path, graph: CapturedGraph, report: Report, codegen: str
) -> CompiledForward:
    from .aot import load_aot

    program = load_aot(folder / COMPILED, graph.output_value().device)
    program.check_inputs(graph)
    return CompiledForward(graph, report, program=program)


PROGRAMS: dict[str, ProgramKind] = {
    "direct": ProgramKind((), _write_nothing, _run_directly),
    "aot": ProgramKind((COMPILED,), _compile, _run_compiled),
}
DEFAULT = "direct"
# Whose ops are there without another package.
_NAMESPACES = ("aten", "prims", "fastgen")


def write_graph(folder: Path, graph: CapturedGraph, report: Report) -> None:
    """Raises: ArtifactError for a graph that JSON cannot hold."""
    for node in graph.graph.nodes:
        if getattr(node.target, "namespace", "aten") not in _NAMESPACES:
            raise ArtifactError(
                f"the graph calls {node.target}, an op that fastgen.load would not know"
            )
    try:
        text = json.dumps(written(graph, report))
    except NotCacheableError as error:
        raise ArtifactError(f"the graph cannot be exported: {error}") from error
    (folder / GRAPH).write_text(text)


def read_graph(path: Path, device: torch.device, traceable: bool) -> tuple[CapturedGraph, Report]:
    """traceable: As of graph_json. Raises: ArtifactError if it is no graph for the device."""
    try:
        return graph_from(json.loads(path.read_text(encoding="utf-8")), device, traceable)
    except Exception as error:  # whatever is wrong with it
        raise ArtifactError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
