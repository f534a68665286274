"""From a folder that is being checked to a model that generates."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch

from .. import registry
from ..compiled import CompiledForward
from ..config import Config
from ..engine.kv_cache import free_memory_bytes
from ..errors import ArtifactError, UnsupportedModelError
from ..kernels.cpu import why_missing
from ..optimized import Graphs, OptimizedModel, timed
from ..passes import CapturedGraph, Variant
from ..passes.pack_linears import packed_bytes
from ..released import guard, unguard
from .loaded import GenerationConfig, LoadedModel
from .machine import check_machine, check_memory
from .manifest import CheckedFolder, Manifest, Progress
from .prefault import Prefault
from .program import GRAPH, PROGRAMS, read_graph
from .weights import BUFFERS, files_of, read_tensors

GENERATION_CONFIG = "generation_config.json"
# Fields of Config that were decided when the graph was made.
SETTINGS = ("deterministic", "pack", "passes_off")


def assemble(
    checked: CheckedFolder,
    weights: Path | None,
    config: Config | None,
    fields: Mapping[str, Any],
    progress: Progress,
    start: dict[str, float],
) -> LoadedModel:
    """The loaded model, ready to run.

    start: Seconds of what was done before; what is done here is added.
    Raises: as `fastgen.load`.
    """
    manifest = checked.manifest
    check_machine(manifest)
    config = _config(manifest, config, fields)
    free_bytes = free_memory_bytes(torch.device(manifest.device))
    check_memory(manifest.packed_bytes, free_bytes, manifest.device)
    prefault = Prefault(manifest.packed_bytes)
    try:
        return _assemble(checked, weights, config, prefault, free_bytes, progress, start)
    finally:
        prefault.cancel()


def _assemble(
    checked: CheckedFolder,
    weights: Path | None,
    config: Config,
    prefault: Prefault,
    free_bytes: int,
    progress: Progress,
    start: dict[str, float],
) -> LoadedModel:
    manifest = checked.manifest
    graphs = _graphs(checked, config, start)
    needed = _memory_bytes(manifest, graphs.rewritten)
    check_memory(needed, free_bytes, manifest.device)
    with timed(start, "weights compared and opened"):
        checked.wait_all(progress)
        tensors = _tensors(checked, weights, graphs.device)
        generation_config = GenerationConfig(_json(checked.wait(GENERATION_CONFIG)))
    progress("weights packed", 0, 1)
    model = LoadedModel(checked.path, manifest, tensors, generation_config)
    maker = _ArtifactMaker(graphs, checked.path, start)
    optimized = OptimizedModel(model, config, maker, prefault.take, merges_packed=False)
    try:
        if optimized.weights.released:
            guard(LoadedModel)
        registry.add(model, optimized, unguard)
    except BaseException:
        optimized.close()
        raise
    return model


class _ArtifactMaker:
    """Gives the one graph that a folder has."""

    def __init__(self, graphs: Graphs, path: Path, start: dict[str, float]) -> None:
        self._graphs: Graphs | None = graphs
        self._start = start
        self.start: dict[str, float] = {}
        self.source = f"from {path}"

    def make(self, model: Any) -> Graphs:
        if self._graphs is None:
            raise UnsupportedModelError(
                "a loaded model can take other values and no other shapes, dtypes, devices or "
                "modules: load the folder again"
            )
        graphs, self._graphs = self._graphs, None
        self.start.update(self._start)
        return graphs

    def make_variant(self, model: Any, graphs: Graphs, variant: Variant) -> NoReturn:
        raise UnsupportedModelError(f"a loaded model has no graph with {variant}")


def _config(manifest: Manifest, config: Config | None, fields: Mapping[str, Any]) -> Config:
    """The settings to run with. Raises: ArtifactError for those that the graph has fixed."""
    try:
        exported = Config(**manifest.settings)
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"its settings are none of this fastgen: {error}") from error
    wanted = (config or exported).replace(**fields)
    for name in SETTINGS:
        given, fixed = getattr(wanted, name), getattr(exported, name)
        if given != fixed:
            raise ArtifactError(
                f"{name} was {fixed!r} when the model was exported and is part of its graph; got "
                f"{given!r}: export it again"
            )
    if wanted.max_model_len is not None and wanted.max_model_len > manifest.max_model_len:
        raise ValueError(
            f"max_model_len must be <= {manifest.max_model_len} ({manifest.why_not_longer}), got "
            f"{wanted.max_model_len}; lower it"
        )
    return wanted


def _graphs(checked: CheckedFolder, config: Config, start: dict[str, float]) -> Graphs:
    manifest = checked.manifest
    if manifest.program not in PROGRAMS:
        raise ArtifactError(
            f"its program is of kind {manifest.program!r}, and this fastgen runs "
            f"{', '.join(PROGRAMS)}"
        )
    device = torch.device(manifest.device)
    with timed(start, "graph read"):
        # Compilers, graphs of CUDA and what is deterministic look at values as torch traces them.
        plain = config.codegen != "inductor" and not config.deterministic and device.type == "cpu"
        graph, report = read_graph(checked.wait(GRAPH), device, not plain)
    if device.type == "cpu":
        with timed(start, "kernels loaded"):
            why_missing()
    with timed(start, "choice of kernels"):
        program = PROGRAMS[manifest.program]
        for name in program.files:
            checked.wait(name)
        compiled = program.read(checked.path, graph, report, config.codegen)
    _check_inputs(manifest, compiled)
    wanted = config.max_model_len
    longest = manifest.max_model_len if wanted is None else wanted
    why = manifest.why_not_longer if longest == manifest.max_model_len else ""
    return Graphs(compiled, graph, device, longest, why, 0)


def _check_inputs(manifest: Manifest, compiled: CompiledForward) -> None:
    """Raise ArtifactError if the graph reads weights that the folder has not."""
    known = {name for entry in (*manifest.weights, *manifest.buffers) for name in entry.names}
    plans = {plan.name: plan.members for plan in compiled.merges}
    for spec in compiled.weight_inputs:
        if missing := set(plans.get(spec.target, (spec.target,))) - known:
            raise ArtifactError(f"{GRAPH} reads {', '.join(missing)}, which no file holds")


def _memory_bytes(manifest: Manifest, graph: CapturedGraph) -> int:
    """What the weights take besides pages of the files, which the system can take back."""
    sizes = {
        name: torch.empty(entry.shape, dtype=getattr(torch, entry.dtype), device="meta").nbytes
        for entry in (*manifest.weights, *manifest.buffers)
        for name in entry.names
    }
    read = {spec.target for spec in graph.inputs.values() if spec.kind == "merged"}
    merged = {plan.name: sum(sizes[name] for name in plan.members) for plan in graph.merges}
    held = sum(merged[name] for name in read) + max(merged.values(), default=0)
    if torch.device(manifest.device).type != "cpu":  # where nothing is mapped
        held = sum(sizes[entry.names[0]] for entry in (*manifest.weights, *manifest.buffers))
        held += max(merged.values(), default=0)
    return held + packed_bytes(graph)


def _tensors(
    checked: CheckedFolder, weights: Path | None, device: torch.device
) -> dict[str, torch.Tensor]:
    manifest = checked.manifest
    if weights is None:
        paths = [checked.wait(path.name) for path in files_of(checked.path)]
    else:
        paths = files_of(weights)
    found = read_tensors(paths, manifest.weights, device)
    if manifest.buffers:
        found.update(read_tensors([checked.wait(BUFFERS)], manifest.buffers, device))
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactError(f"{path} is no JSON: {error}") from error
    if not isinstance(data, dict):
        raise ArtifactError(f"{path} is no JSON object")
    return data
