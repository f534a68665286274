"""From a captured graph to something that runs: passes, choice of kernels, binding of weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from . import kernels
from .costs import Sizes, Step, peak_bytes
from .errors import UnsupportedModelError
from .fix_batch_shapes import call_site, fix_batch_shapes
from .fold_views import fold_views
from .inductor import compile_with_inductor
from .kernel_fallback import find_failing_kernel, use_reference
from .kernels.cpu.program import Program
from .native_code import compile_programs
from .passes import CapturedGraph, InputSpec, Report, Variant, run_passes
from .passes.insert_paged_cache import CacheSpec, cache_spec
from .passes.pack_linears import packed_bytes
from .passes.pipeline import RequiredPassError

_graph_ids = itertools.count()
_WEIGHT_KINDS = ("parameter", "buffer", "merged", "packed")


class CacheTensors(Protocol):
    """What a forward needs of a KV cache: its tensors by input name ("key:0", "value:0", ...)."""

    tensors: Mapping[str, torch.Tensor]


class CompiledProgram(Protocol):
    """A graph that was compiled before: it takes what the graph takes and gives what it gives.

    forget: Let go of the tensors of the last call.
    """

    def __call__(self, *tensors: torch.Tensor) -> Any: ...

    def forget(self) -> None: ...


class ForwardOutput(NamedTuple):
    """What a step gives.

    logits: [num_rows, vocab_size], the model's dtype, num_rows = len(logits_indices).
    hidden_states: [num_tokens, hidden_size] of each that the model's forward gives; () unless the
    graph's variant has them.
    """

    logits: torch.Tensor
    hidden_states: tuple[torch.Tensor, ...] = ()


class CompiledForward:
    """The rewritten graph, ready to run.

    codegen: "direct", the graph's own Python calling the chosen kernels, where runs of C++ kernels
    are programs, each entered once (native_code.py); "inductor", code that Inductor wrote around
    the same kernels (inductor.py); "auto" is "direct". program: What runs the graph instead: it was
    compiled from it before. lowered: The graph before that, a node per kernel.

    variant: What it takes and gives besides tokens and logits. embeds_like: Tells dtype and
    hidden_size of the embeddings that it takes, or None.

    Call `bind` with the weights before the first call and whenever they moved. graph_id is no other
    graph's in this process; binding is another number after the weights moved.
    """

    def __init__(
        self,
        graph: CapturedGraph,
        report: Report,
        codegen: str = "auto",
        program: CompiledProgram | None = None,
    ) -> None:
        self.graph_id = next(_graph_ids)
        self.variant: Variant = graph.variant
        self.spec: CacheSpec = cache_spec(graph)
        self.report = report
        self.inputs = dict(graph.inputs)
        self.merges = tuple(graph.merges)
        self.vocab_size = int(graph.output_value().shape[-1])
        self._logits_dtype = graph.output_value().dtype
        lowered = graph.copy()
        if graph.deterministic:
            report.facts["by_row"] = fix_batch_shapes(lowered)
        report.kernels = choose_kernels(lowered)
        self._is_deterministic = graph.deterministic
        self._lowered = lowered
        self._programs: list[Program | CompiledProgram] = []
        if program is not None:
            self._forward, self._programs = program, [program]
            report.facts |= {"codegen": "aot", "programs": [], "not_in_programs": {}}
        elif codegen == "inductor":
            self._forward = compile_with_inductor(lowered)
            report.facts |= {"codegen": "inductor", "programs": [], "not_in_programs": {}}
        else:
            fold_views(lowered.graph)
            self._generate_directly()
        specs = list(self.inputs.values())
        self._batch_slots = [(i, s.target) for i, s in enumerate(specs) if s.kind == "batch"]
        self._cache_slots = [(i, s.target) for i, s in enumerate(specs) if s.kind == "cache"]
        self._arguments: list[Any] = [
            graph.constants[spec.target] if spec.kind == "constant" else None for spec in specs
        ]
        self.embeds_like: torch.Tensor | None = None  # a fake tensor
        if self.variant.prompt_embeds:
            self.embeds_like = graph.placeholder("batch", "prompt_embeds").meta["val"]
        self._bound_cache: CacheTensors | None = None
        self.binding = 0

    def _generate_directly(self) -> None:
        """Have the graph's own Python call the kernels that were chosen."""
        running = self._lowered.copy()
        recorded, left = compile_programs(running.graph)
        self._programs = [*recorded]
        running.module.recompile()
        self._forward: Callable[..., Any] = running.module.forward
        programs = [program.num_calls for program in recorded]
        self.report.facts |= {"codegen": "direct", "programs": programs, "not_in_programs": left}

    @property
    def lowered(self) -> torch.fx.GraphModule:
        return self._lowered.module

    def fall_back(self, batch: Any, kv_cache: CacheTensors, error: Exception) -> str | None:
        """After `run` has raised: have the reference instead of the kernel that fails.

        Not in a deterministic graph, whose results may not come to depend on what failed.

        Args:
            batch, kv_cache: The step's, which runs again, node by node. error: What was raised.
        Returns: the kernel and its op, or None if no kernel that has a reference fails.
        """
        if self._is_deterministic or isinstance(error, ValueError):
            return None
        failing = find_failing_kernel(self.lowered, self.arguments(batch, kv_cache))
        if failing is None:
            return None
        count = use_reference(self.lowered.graph, failing)
        self.lowered.recompile()
        self._generate_directly()
        self._forget_addresses()
        rows = self.report.kernels[failing.op]
        reference = kernels.implementations(failing.op)[-1].name
        refused = dict(rows.pop(failing.name)["refused"])
        refused[failing.name] = f"it failed while running: {type(error).__name__}: {error}"
        row = rows.setdefault(reference, {"calls": 0, "refused": refused})
        row["calls"] += count
        row["refused"] |= refused
        return f"{failing.name} of {failing.op}"

    def activation_bytes(self, num_tokens: int, num_rows: int) -> int:
        """Bytes of the values that live at once in a step, by formula; kernels' own come on top.

        Raises: UnsupportedModelError if a size depends on data.
        """
        placeholders = [node for node in self.lowered.graph.nodes if node.op == "placeholder"]
        sizes = Sizes(placeholders, list(self.inputs.values()), Step(num_tokens, num_rows, ()))
        return peak_bytes(self.lowered.graph, sizes)

    def logits_bytes(self, num_rows: int) -> int:
        """Bytes of so many rows of logits."""
        return num_rows * self.vocab_size * self._logits_dtype.itemsize

    @property
    def weight_inputs(self) -> list[InputSpec]:
        return [spec for spec in self.inputs.values() if spec.kind in _WEIGHT_KINDS]

    @property
    def packs_weights(self) -> bool:
        """Whether some inputs are copies of weights, which must follow them."""
        return any(spec.kind == "packed" for spec in self.inputs.values())

    @property
    def weights(self) -> dict[InputSpec, torch.Tensor]:
        """The tensors that are bound."""
        given = zip(self.inputs.values(), self._arguments, strict=True)
        return {spec: tensor for spec, tensor in given if spec.kind in _WEIGHT_KINDS}

    def bind(self, weights: Mapping[InputSpec, torch.Tensor]) -> None:
        """Set the tensors of all weight inputs."""
        for index, spec in enumerate(self.inputs.values()):
            if spec.kind in _WEIGHT_KINDS:
                self._arguments[index] = weights[spec]
        self._forget_addresses()

    def unbind(self) -> None:
        """Forget the weights, so that their memory can go; `bind` before the next call."""
        for index, spec in enumerate(self.inputs.values()):
            if spec.kind in _WEIGHT_KINDS:
                self._arguments[index] = None
        self._forget_addresses()

    def _forget_addresses(self) -> None:
        self.binding += 1
        for program in self._programs:
            program.forget()

    def release(self) -> None:
        """Forget the cache, so that its memory can go."""
        self._forget_addresses()
        self._bound_cache = None
        for index, _ in self._cache_slots:
            self._arguments[index] = None

    def arguments(self, batch: Any, kv_cache: CacheTensors) -> list[Any]:
        """What `lowered` takes in this step, so that others can run it; as `__call__` gives it."""
        arguments = list(self._arguments)
        for index, target in self._cache_slots:
            arguments[index] = kv_cache.tensors[target]
        for index, target in self._batch_slots:
            arguments[index] = getattr(batch, target)
        return arguments

    def __call__(self, batch: Any, kv_cache: CacheTensors) -> torch.Tensor:
        """Run one step, see `run`; its logits."""
        return self.run(batch, kv_cache).logits

    def run(self, batch: Any, kv_cache: CacheTensors) -> ForwardOutput:
        """Run one step.

        Args:
            batch: A ForwardBatch (engine/batch.py). kv_cache: Its tensors are mutated.
        """
        arguments = self._arguments
        if kv_cache is not self._bound_cache:
            for index, target in self._cache_slots:
                arguments[index] = kv_cache.tensors[target]
            self._bound_cache = kv_cache
        for index, target in self._batch_slots:
            arguments[index] = getattr(batch, target)
        result = self._forward(*arguments)
        if not self.variant.hidden_states:
            return ForwardOutput(result)
        return ForwardOutput(result[0], tuple(result[1:]))


def rewrite(
    captured: CapturedGraph, passes_off: Sequence[str] = ()
) -> tuple[CapturedGraph, Report]:
    """Run the passes over a captured graph: what a CompiledForward is made from.

    Raises: ValueError for an unknown name in passes_off, UnsupportedModelError if a required pass
        refuses the graph.
    """
    try:
        graph, report = run_passes(captured, passes_off)
    except RequiredPassError as error:
        raise UnsupportedModelError(f"the graph cannot be rewritten: {error}") from error
    report.facts["num_layers"] = captured.num_layers
    report.facts["packed_bytes"] = packed_bytes(graph)
    return graph, report


def compile_graph(captured: CapturedGraph, passes_off: Sequence[str] = ()) -> CompiledForward:
    """Run the passes over a captured graph and make it callable. Raises: as `rewrite`."""
    return CompiledForward(*rewrite(captured, passes_off))


def choose_kernels(graph: CapturedGraph) -> dict[str, dict[str, Any]]:
    """Point every fastgen op at the implementation that takes its call; report which and why."""
    chosen: dict[str, dict[str, Any]] = {}
    for node in graph.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or schema is None or not schema.name.startswith("fastgen::"):
            continue
        choice = kernels.select(schema.name, call_site(node, graph.deterministic))
        node.target = choice.implementation.function
        node.meta["kernel"] = choice.implementation
        row = chosen.setdefault(schema.name, {})
        entry = row.setdefault(
            choice.implementation.name, {"calls": 0, "refused": dict(choice.refused)}
        )
        entry["calls"] += 1
    return chosen
