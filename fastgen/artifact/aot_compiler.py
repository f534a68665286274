"""A rewritten graph compiled ahead of time by AOTInductor, once for all lengths.

Weights, caches and all metadata of a batch are inputs of the program, in the graph's order, with
sizes that no code was specialised on: the archive holds no weight, and a cache is written where it
lies. Kernels stay this package's: runs of them are called without Python (aot_programs.py), single
ones that no program can hold are ops that are called by their names.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import fx

from ..compiled import choose_kernels
from ..errors import UnsupportedModelError
from ..fold_views import fold_views
from ..inductor import OPTIONS, opaque_module
from ..kernels import cpu
from ..kernels.cpu.build import instruction_sets
from ..native_code import compile_programs
from ..passes import CapturedGraph
from .aot import DESCRIPTION, FORMAT, Input, torch_version
from .aot_programs import MAX_CALLS, is_expressible, replace_programs
from .archive import write_archive


@torch.inference_mode(False)  # what is compiled in it fails outside
@torch.no_grad()
def compile_aot(graph: CapturedGraph, path: Path) -> None:
    """Compile a graph after the passes and write the program; it runs on processors like this one.

    Args:
        graph: On the CPU; its kernels are not chosen yet.
        path: The archive, `*.pt2`; replaced if it is there.
    Raises: UnsupportedModelError if the graph cannot be compiled, or not on this machine.
    """
    device = graph.output_value().device
    if device.type != "cpu":
        raise UnsupportedModelError(
            f"programs are compiled ahead of time for CPUs, this model is on {device.type}; "
            'export it with program="direct"'
        )
    if graph.deterministic:
        raise UnsupportedModelError(
            "deterministic=True: Inductor chooses sums by the shapes of the batch; "
            'export it with program="direct"'
        )
    lowered = graph.copy()
    choose_kernels(lowered)
    written = _written_inputs(lowered)
    fold_views(lowered.graph)
    programs, _ = compile_programs(lowered.graph, fewest=1, most=MAX_CALLS)
    if not all(map(is_expressible, programs)):
        raise UnsupportedModelError(
            "a run of kernels has no result, or tensors of many dimensions, which AOTInductor's "
            'code cannot call; export it with program="direct"'
        )
    module, examples = opaque_module(lowered)
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    shims, functions = replace_programs(module.graph, {inputs[index] for index in written})
    if functions:
        example: Any = examples[0]
        with example.fake_mode:
            examples.append(torch.empty(1 + len(functions), dtype=torch.int64))
    module.recompile()
    metadata = {DESCRIPTION: json.dumps(_description(lowered, functions))}
    output = next(node for node in module.graph.nodes if node.op == "output")
    if not isinstance(output.args[0], tuple):  # as AOTInductor wants it
        output.args = ((output.args[0],),)
        module.recompile()
    with tempfile.TemporaryDirectory() as folder:
        options = {
            **OPTIONS,
            "aot_inductor.package": True,
            "aot_inductor.output_path": folder,
            "aot_inductor.metadata": metadata,
            "aot_inductor.custom_ops_to_c_shims": shims,
            "aot_inductor.enable_line_tables": False,
        }
        try:
            import torch._inductor as inductor  # 1 s, for those who use it

            files: Any = inductor.aot_compile(module, tuple(examples), options=options)
        except Exception as error:
            lines = str(error).strip().splitlines()
            raise UnsupportedModelError(
                f"torch's AOTInductor cannot compile the graph ({type(error).__name__}: "
                f'{lines[0] if lines else ""}); export it with program="direct"'
            ) from error
        write_archive(files, path)


def _written_inputs(lowered: CapturedGraph) -> set[int]:
    """The numbers of the inputs that kernels write into."""
    written: set[fx.Node] = set()
    for node in lowered.graph.nodes:
        if (kernel := node.meta.get("kernel")) is None:
            continue
        schema = getattr(torch.ops.fastgen, kernel.op.removeprefix("fastgen::")).default._schema
        for argument, given in zip(schema.arguments, node.args, strict=False):
            if argument.is_write:
                fx.map_arg(given, written.add)
    return {index for index, node in enumerate(lowered.placeholders()) if node in written}


def _description(lowered: CapturedGraph, functions: Sequence[str]) -> dict[str, Any]:
    """What `load_aot` has to know before it may open the archive.

    functions: Of the library, which the code calls by their addresses.
    """
    kernels = {
        (kernel.op, kernel.name)
        for node in lowered.graph.nodes
        if (kernel := node.meta.get("kernel")) is not None and node.target is kernel.function
    }
    return {
        "format": FORMAT,
        "torch": torch_version(),
        "device": lowered.output_value().device.type,
        "isa": cpu.isa() if cpu.why_missing() is None else "none",
        "instruction_sets": sorted(instruction_sets()),
        "kernels": sorted(kernels),
        "functions": list(functions),
        "inputs": [asdict(item) for item in _inputs(lowered)],
        "num_outputs": len(lowered.outputs()),
    }


def _inputs(graph: CapturedGraph) -> list[Input]:
    found = []
    for node in graph.placeholders():
        spec, value = graph.inputs[node.name], node.meta["val"]
        shape = tuple(
            size
            if isinstance(size, int)
            else f"cache {dim}"  # all caches share them
            if spec.kind == "cache"
            else str(size)
            for dim, size in enumerate(value.shape)
        )
        fixed = all(isinstance(size, int) for size in shape)
        stride = tuple(value.stride()) if fixed and not value.is_contiguous() else None
        dtype = str(value.dtype).removeprefix("torch.")
        found.append(Input(f"{spec.kind} {spec.target}", dtype, shape, stride))
    return found
