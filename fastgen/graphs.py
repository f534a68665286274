"""The graphs of a live model are made: captured or found on disk, rewritten, and made callable."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import fx

from . import graph_cache
from .capture import capture, check_model, longest_sequence, why_not_longer
from .compiled import CompiledForward, rewrite
from .config import Config
from .engine.kv_cache import free_memory_bytes
from .errors import UnsupportedModelError
from .fix_batch_shapes import computations
from .graph_key import NotCacheableError, graph_key
from .kernels.cpu import MissingLibraryError, why_missing
from .kernels.cpu.build import cache_dir
from .optimized import Graphs, timed
from .passes import PLAIN, CapturedGraph, Report, Variant

# Room for packed copies beyond this, in eighths of the weights, changes nothing.
_AMPLE_EIGHTHS = 16


def check_deterministic(device: torch.device) -> None:
    """Raise UnsupportedModelError unless deterministic=True can be had on a device."""
    if device.type != "cpu":
        raise UnsupportedModelError(
            f"deterministic=True is for models on the CPU, this one is on {device.type}, where "
            "products and attention choose their order of summation by the batch; move the model "
            "or leave deterministic off"
        )


class GraphMaker:
    """Makes the graphs of one model under one configuration.

    start: Seconds of what the last plain graph took. source: Where it came from.
    """

    def __init__(self, config: Config, class_name: str) -> None:
        self.config, self.class_name = config, class_name
        self.start: dict[str, float] = {}
        self.source = ""

    def make(self, model: Any) -> Graphs:
        """The plain graph. Raises: UnsupportedModelError, ValueError for a max_model_len."""
        max_model_len = self._max_model_len(model)
        device = next(model.parameters()).device
        if self.config.deterministic:
            check_deterministic(device)
        if device.type == "cpu":
            self._load_kernels()
        budget = self._pack_budget_bytes(model, device)
        graph, report, self.source = self._rewritten(model, PLAIN, budget, self.start)
        codegen = self.config.codegen
        with timed(self.start, "Inductor" if codegen == "inductor" else "choice of kernels"):
            compiled = CompiledForward(graph, report, codegen)
        ends = max_model_len == longest_sequence(model)
        why = why_not_longer(model) if ends else ""
        return Graphs(compiled, graph, device, max_model_len, why, budget)

    def make_variant(self, model: Any, graphs: Graphs, variant: Variant) -> CompiledForward:
        """A variant of the plain graph, over the same weights.

        Raises: UnsupportedModelError if the model has none, or one that needs more than that.
        """
        graph, report, _ = self._rewritten(model, variant, graphs.pack_budget_bytes, {})
        forward = CompiledForward(graph, report, self.config.codegen)
        if (why := _difference(graphs.compiled, forward)) is not None:
            raise UnsupportedModelError(f"with {variant} {why}")
        if self.config.deterministic and not _computes_the_same(graphs.compiled, forward):
            raise UnsupportedModelError(
                f"deterministic=True: the graph with {variant} computes otherwise, and requests "
                "beside such ones would run through it"
            )
        forward.bind(graphs.compiled.weights)
        return forward

    def _rewritten(
        self, model: Any, variant: Variant, budget: int, seconds: dict[str, float]
    ) -> tuple[CapturedGraph, Report, str]:
        """The rewritten graph, from the disk or traced; its report; where it came from."""
        if not self.config.graph_cache:
            graph, report = self._traced(model, variant, budget, seconds)
            return graph, report, "traced; graph_cache is off"
        check_model(model)
        key, why = None, ""
        try:
            with timed(seconds, "key of the graph"):
                config = self.config
                key = graph_key(model, config.passes_off, budget, variant, config.deterministic)
            with timed(seconds, "graph from cache"):
                found = graph_cache.load(key, next(model.parameters()).device)
            if found is not None:
                return *found, "from the graph cache"
            del seconds["graph from cache"]
        except NotCacheableError as error:
            why = str(error)
        graph, report = self._traced(model, variant, budget, seconds)
        if key is not None:
            try:
                with timed(seconds, "graph written"):
                    graph_cache.store(key, graph, report)
            except (NotCacheableError, OSError) as error:
                why = str(error)
        return graph, report, f"traced, not cached: {why}" if why else "traced, and cached"

    def _traced(
        self, model: Any, variant: Variant, budget: int, seconds: dict[str, float]
    ) -> tuple[CapturedGraph, Report]:
        with timed(seconds, "capture"):
            captured = capture(model, variant)
        seconds["capture"] -= captured.check_seconds
        seconds["packing check"] = captured.check_seconds
        captured.pack_budget_bytes = budget
        captured.deterministic = self.config.deterministic
        with timed(seconds, "passes"):
            return rewrite(captured, self.config.passes_off)

    def _load_kernels(self) -> None:
        before = _built_libraries()
        with timed(self.start, "kernels loaded"):
            why_missing()
        if _built_libraries() != before:
            self.start["kernels compiled"] = self.start.pop("kernels loaded")

    def _pack_budget_bytes(self, model: Any, device: torch.device) -> int:
        """What packed copies may take, in eighths of the weights: the same on every start."""
        match self.config.pack:
            case "auto" if not self.config.release_weights:  # which makes the room it takes
                eighth = sum(parameter.nbytes for parameter in model.parameters()) // 8 or 1
                return min(free_memory_bytes(device) // 4 // eighth, _AMPLE_EIGHTHS) * eighth
            case False:
                return 0
        return sys.maxsize

    def _max_model_len(self, model: Any) -> int:
        limit = longest_sequence(model)
        wanted = self.config.max_model_len
        if wanted is None:
            if limit is None:
                raise UnsupportedModelError(
                    f"{self.class_name} does not say how long it may get; set max_model_len"
                )
            return limit
        if limit is not None and wanted > limit:
            raise ValueError(
                f"max_model_len must be <= {limit} ({why_not_longer(model)}), got {wanted}; "
                "lower it"
            )
        return wanted


def _difference(plain: CompiledForward, variant: CompiledForward) -> str | None:
    """Why a variant cannot stand beside the plain graph, or None.

    A weight in a form that the plain graph does not read would be a second copy, and one that
    nobody watches. Token ids that the plain graph reads more than once, with embeddings per layer
    for one, would be missing where embeddings stand in the place of the first reader only.
    """
    if variant.spec != plain.spec:
        return "the graph needs another KV cache"
    if others := set(variant.weight_inputs) - set(plain.weight_inputs):
        listed = ", ".join(sorted(f"{spec.kind} {spec.target}" for spec in others))
        return f"the graph reads weights that it does not read otherwise: {listed}"
    if variant.variant.prompt_embeds and _readers_of_ids(variant) != _readers_of_ids(plain):
        return (
            f"token ids are read by {_readers_of_ids(variant)}, and otherwise by "
            f"{_readers_of_ids(plain)}: the model does more with them than embed them"
        )
    return None


def _computes_the_same(plain: CompiledForward, variant: CompiledForward) -> bool:
    """Whether they give a token the same bits."""
    first, second = (
        computations(forward.lowered.graph, forward.inputs) for forward in (plain, variant)
    )
    return first == second


def _readers_of_ids(forward: CompiledForward) -> list[str]:
    """What reads the token ids, or a view of them."""
    pairs = zip(forward.lowered.graph.nodes, forward.inputs.values(), strict=False)
    ids = next(node for node, spec in pairs if (spec.kind, spec.target) == ("batch", "input_ids"))
    readers: list[str] = []
    waiting: list[fx.Node] = [ids]
    while waiting:
        for user in waiting.pop().users:
            if _is_view(user):
                waiting.append(user)
            elif isinstance(user.meta["val"], torch.Tensor):  # else it is their number
                readers.append(str(user.target))
    return sorted(readers)


def _is_view(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(result.alias_info is not None for result in schema.returns)


def _built_libraries() -> set[str]:
    """The compiled kernels on this machine's disk."""
    try:
        return {path.name for path in cache_dir().glob("kernels-*.so")}
    except (MissingLibraryError, OSError):
        return set()
