"""fastgen.export: a model becomes a folder that fastgen.load runs without its code."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .._version import __version__
from ..config import Config
from ..errors import ArtifactError, UnsupportedModelError
from ..explanation import Explanation
from ..optimized import Graphs, TransformersLoop, timed
from ..passes import CapturedGraph
from ..registry import lookup
from ..wrappers import unwrap, wrapper_refusal
from .assemble import GENERATION_CONFIG, SETTINGS
from .loaded import TOKENIZER, GenerationConfig, LoadedModel
from .machine import isa_of
from .manifest import FORMAT, MANIFEST, Manifest, Progress, file_entry
from .program import DEFAULT, PROGRAMS, write_graph
from .weights import BUFFERS, entry_of, weights_of, write_tensors, write_weights

EXPLANATION = "explain.json"
FORMATS = ("artifact", "graph")


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote and took: bytes by file, seconds by what was done."""

    path: Path
    file_bytes: dict[str, int]
    seconds: dict[str, float]

    @property
    def total_bytes(self) -> int:
        return sum(self.file_bytes.values())

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.total_bytes / 2**20:.1f} MiB"]
        lines += [f"  {size / 2**20:10.2f} MiB  {name}" for name, size in self.file_bytes.items()]
        took = ", ".join(f"{what} {seconds:.2f} s" for what, seconds in self.seconds.items())
        return "\n".join([*lines, f"  {took}"])


def export(
    model: Any,
    path: str | os.PathLike,
    *,
    format: str = "artifact",
    program: str = DEFAULT,
    tokenizer: Any = None,
    progress: Progress | None = None,
) -> ExportReport:
    """Write a model, rewritten, with its paged cache, into a folder for `fastgen.load`.

    The weights are those of now, under the names of the model's state_dict, in safetensors. The
    settings are those that the model is optimised with, or the defaults; the model stays as it is.

    Args:
        model: A transformers causal LM, optimised or not, a PEFT model around one, or a loaded one.
        path: A folder that does not exist yet, or is empty.
        format: "artifact", this folder; or "graph", one file `*.pt2` for `torch.export.load`, with
            nothing of fastgen's in it and nothing compiled, for other compilers (interop.py).
        program: How it will run: "direct", by this package's kernels, chosen when it is loaded; or
            "aot", compiled now by AOTInductor, for this version of torch and processors like this.
        tokenizer: Exported too, so that text can be given to the loaded model.
        progress: Told what is being done, and how much of how much.
    Returns: sizes and times; print it.
    Raises: UnsupportedModelError as `fastgen.optimize`, ArtifactError for what cannot be written,
        OSError.
    """
    if format not in FORMATS:
        raise ArtifactError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if program not in PROGRAMS:
        raise ArtifactError(f"program must be one of {', '.join(PROGRAMS)}, got {program!r}")
    target, tell = Path(path), progress or (lambda *_: None)
    if format == "graph" and (target.suffix != ".pt2" or target.exists()):
        raise ArtifactError(f"{target} must be a new file *.pt2 for format='graph'")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ArtifactError(f"{target} must be new or an empty folder; remove it or choose another")
    target.parent.mkdir(parents=True, exist_ok=True)
    if format == "graph":
        return _export_graph(model, target, tell)
    seconds: dict[str, float] = {}
    tell("graph", 0, 1)
    with timed(seconds, "graph"):
        source = _source(model)
    folder = target.parent / f".{target.name}.{uuid.uuid4().hex}"
    folder.mkdir()
    try:
        manifest = _write(folder, source, program, tokenizer, seconds, tell)
        os.replace(folder, target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    sizes = {name: entry.bytes for name, entry in manifest.files.items()}
    return ExportReport(target, {**sizes, MANIFEST: (target / MANIFEST).stat().st_size}, seconds)


def _export_graph(model: Any, target: Path, tell: Progress) -> ExportReport:
    if (why := wrapper_refusal(model)) is not None:
        raise UnsupportedModelError(f"{why}, which no graph can do")
    inner, optimized = unwrap(model), lookup(model)
    if isinstance(inner, LoadedModel):
        raise ArtifactError("format='graph' is made of a model's own code; export the live model")
    if optimized is not None and optimized.weights.released:
        raise ArtifactError(
            "format='graph' needs the weights that were released; fastgen.restore the model first"
        )
    from .interop import export_graph, graph_and_weights

    seconds: dict[str, float] = {}
    passes_off = () if optimized is None else optimized.config.passes_off
    tell("graph", 0, 1)
    with timed(seconds, "graph"):
        graph, weights = graph_and_weights(inner, passes_off)
    tell("program", 0, 1)
    with timed(seconds, "program"):
        export_graph(graph, weights, target)
    return ExportReport(target, {target.name: target.stat().st_size}, seconds)


@dataclass(frozen=True)
class _Source:
    """A model, and the graph that is made of it. name: The class it first was."""

    model: Any
    name: str
    config: Config
    graphs: Graphs
    graph_source: str


def _source(model: Any) -> _Source:
    if (why := wrapper_refusal(model)) is not None:
        raise UnsupportedModelError(f"{why}, which transformers' loop alone can do")
    optimized, inner = lookup(model), unwrap(model)
    if optimized is not None:
        try:
            optimized.ready(model)  # its graph is that of the model as it is now
        except TransformersLoop as reason:
            raise UnsupportedModelError(f"the model cannot be exported: {reason}") from None
        name = inner.manifest.model if isinstance(inner, LoadedModel) else optimized.class_name
        return _Source(inner, name, optimized.config, optimized.graphs, optimized.graph_source)
    from ..capture import check_model  # all that captures, of which a loaded model needs nothing
    from ..graphs import GraphMaker

    config, name = Config(), type(inner).__name__
    check_model(inner)
    maker = GraphMaker(config, name)
    return _Source(inner, name, config, maker.make(inner), maker.source)


def _write(
    folder: Path,
    source: _Source,
    program: str,
    tokenizer: Any,
    seconds: dict[str, float],
    tell: Progress,
) -> Manifest:
    graphs, model = source.graphs, source.model
    with timed(seconds, "program"):
        write_graph(folder, graphs.rewritten, graphs.compiled.report)
        PROGRAMS[program].write(folder, graphs.rewritten)
    found = weights_of(model)
    weights = {name: tensor for name, (_, tensor) in found.items()}
    buffers = _buffers(source, {name for entry, _ in found.values() for name in entry.names})
    total, done = sum(tensor.nbytes for tensor in weights.values()), 0

    def written(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        tell("weights", done, total)

    tell("weights", 0, total)
    with timed(seconds, "weights"):
        write_weights(folder, weights, written)
        if buffers:
            write_tensors(folder / BUFFERS, buffers)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder / TOKENIZER)
    _write_json(folder / GENERATION_CONFIG, _generation_fields(model))
    explanation = _explanation(source).to_json()
    (folder / EXPLANATION).write_text(explanation + "\n")
    with timed(seconds, "hashes"):
        files = {}
        for file in sorted(each for each in folder.rglob("*") if each.is_file()):
            files[file.relative_to(folder).as_posix()] = file_entry(file)
            tell("hashes", len(files), len(files))
    layers = json.loads(explanation)["cache"]["layers"]
    compiled = graphs.compiled
    manifest = Manifest(
        format=FORMAT,
        fastgen=__version__,
        torch=str(torch.__version__),
        model=source.name,
        program=program,
        device=str(graphs.device),
        isa=isa_of(compiled.weight_inputs),
        vocab_size=compiled.vocab_size,
        max_model_len=graphs.max_model_len,
        why_not_longer=graphs.why_not_longer,
        settings={name: getattr(source.config, name) for name in SETTINGS},
        cache=tuple(layers),
        packed_bytes=_packed_bytes(graphs.rewritten),
        weights=tuple(entry for entry, _ in found.values()),
        buffers=tuple(entry_of(tensor, "buffer", [name]) for name, tensor in buffers.items()),
        files=files,
    )
    (folder / MANIFEST).write_text(manifest.to_text(), encoding="utf-8")
    return manifest


def _packed_bytes(graph: CapturedGraph) -> int:
    return sum(
        node.meta["val"].nbytes
        for node in graph.placeholders()
        if graph.inputs[node.name].layout not in (None, "onednn")
    )


def _buffers(source: _Source, saved: set[str]) -> dict[str, torch.Tensor]:
    """What the graph reads and a state_dict does not hold: buffers that are not persistent."""
    return {
        spec.target: source.model.get_buffer(spec.target)
        for spec in source.graphs.compiled.weight_inputs
        if spec.kind == "buffer" and spec.target not in saved
    }


def _generation_fields(model: Any) -> dict[str, Any]:
    """The fields of a model's generation config that are set."""
    config = model.generation_config
    fields = vars(config) if isinstance(config, GenerationConfig) else config.to_dict()
    return {
        name: value
        for name, value in fields.items()
        if value is not None and not name.startswith("_")
    }


def _write_json(path: Path, data: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n")
    except TypeError as error:
        raise ArtifactError(f"{path.name} cannot be written: {error}") from error


def _explanation(source: _Source) -> Explanation:
    graphs = source.graphs
    return Explanation(
        model=source.name,
        device=str(graphs.device),
        config=source.config,
        max_model_len=graphs.max_model_len,
        why_not_longer=graphs.why_not_longer,
        spec=graphs.compiled.spec,
        report=graphs.compiled.report,
        weight_epoch=0,
        graph_source=source.graph_source,
        variants={},
        start={},
        seconds={},
        fallbacks={},
        metrics=None,
        released_bytes=0,
        kept={},
    )
