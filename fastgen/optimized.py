"""What fastgen keeps for one model: its graphs, the memory of its weights, its engine.

A model has a plain graph, and variants of it that are made when they are first asked for. They
share every weight: a variant reads the weights that the plain graph reads, in the form in which it
reads them, or it is refused.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from .compiled import CompiledForward
from .config import Config
from .engine.engine import EngineCore
from .errors import ReleasedWeightsError, UnsupportedModelError
from .explanation import Explanation
from .fingerprint import fingerprint
from .kernels.packing import huge_pages
from .live import Change, LiveWeights
from .passes import PLAIN, CapturedGraph, InputSpec, Variant
from .released import WAY_BACK
from .wrappers import replaces_inputs, unwrap, wrapper_refusal

logger = logging.getLogger("fastgen")

# Graphs kept for a model that changes to and fro, as an adapter is switched on and off.
_NUM_GRAPHS_KEPT = 4


class TransformersLoop(Exception):
    """Raised where the engine finds that transformers' own loop must run; str() is the reason."""


@dataclass
class Graphs:
    """What was made of one fingerprint of a model; holds no weights while it is set aside.

    compiled: The plain graph. rewritten: What it was made from, before kernels were chosen.
    variants: The others, which take and give all that any two of them
    do; seconds: what each took to make. refusals: Why a variant cannot be made. why_not_longer:
    What ends the longest sequence; "" if it was asked to end there.
    pack_budget_bytes: What decided which weights are packed.
    """

    compiled: CompiledForward
    rewritten: CapturedGraph
    device: torch.device
    max_model_len: int
    why_not_longer: str
    pack_budget_bytes: int
    variants: dict[Variant, CompiledForward] = field(default_factory=dict)
    seconds: dict[Variant, float] = field(default_factory=dict)
    refusals: dict[Variant, str] = field(default_factory=dict)

    def bind(self, weights: Mapping[InputSpec, torch.Tensor]) -> None:
        """Set the weights of all graphs."""
        for forward in (self.compiled, *self.variants.values()):
            forward.bind(weights)

    def unbind(self) -> None:
        """Forget the weights, so that their memory can go."""
        for forward in (self.compiled, *self.variants.values()):
            forward.unbind()

    def missing(self, variant: Variant) -> list[Variant]:
        """What has to be made for requests that need `variant`, whatever they run beside."""
        wanted = {variant} | {variant | other for other in self.variants}
        found = (PLAIN, *self.variants)
        return sorted(
            (each for each in wanted if not any(known.covers(each) for known in found)),
            key=lambda each: each.size,
        )


class Maker(Protocol):
    """Where a model's graphs come from.

    start: Seconds of what the last plain graph took. source: Where it came from.
    """

    start: dict[str, float]
    source: str

    def make(self, model: Any) -> Graphs:
        """The plain graph of the model as it is now. Raises: UnsupportedModelError, ValueError."""
        ...

    def make_variant(self, model: Any, graphs: Graphs, variant: Variant) -> CompiledForward:
        """A variant of it, over the same weights. Raises: UnsupportedModelError."""
        ...


class OptimizedModel:
    """What fastgen keeps for one live model: its graphs, its weights' memory, its engine.

    A graph belongs to a fingerprint of the model. At every entry the model is compared with it; a
    model that was edited, moved or cast is captured again, and the last few graphs are kept for
    one that changes back. Weights that changed begin a new `weight_epoch`.
    """

    def __init__(
        self,
        model: Any,
        config: Config,
        maker: Maker,
        memory: Callable[[int], torch.Tensor] = huge_pages,
        merges_packed: bool = True,
    ) -> None:
        """memory, merges_packed: As of LiveWeights."""
        self.config = config
        self.weight_epoch = 0
        self.fallbacks: Counter[str] = Counter()
        self.seconds: dict[str, float] = {}  # of what every entry does
        self.class_name = type(model).__name__
        self._maker = maker
        self.weights = LiveWeights(model, config.weight_check, memory, merges_packed)
        self._lock = threading.RLock()
        self._engine: EngineCore | None = None
        self._graphs: dict[tuple, Graphs] = {}  # the one used last is last
        self._refusal: str | None = None
        self._told_of_change = False
        self._build(model, fingerprint(model))

    def _build(self, model: Any, current: tuple) -> None:
        """Capture, rewrite and lay out the weights; a failure leaves the model as it was."""
        self._maker.start = {}
        graph = self._graphs.pop(current, None) or self._maker.make(model)
        self._attach(graph, self.config.release_weights)
        if self.weights.released:
            current = fingerprint(model)  # of released parameters from now on
        self._graphs[current] = graph
        while len(self._graphs) > _NUM_GRAPHS_KEPT:
            del self._graphs[next(iter(self._graphs))]
        self._graph, self.fingerprint = graph, current

    @torch.inference_mode(False)  # parameters must not become inference tensors
    def _attach(self, graph: Graphs, release: bool = False) -> None:
        compiled = graph.compiled
        with timed(self.start, "weights merged"):
            self.weights.attach(compiled.merges, compiled.weight_inputs)
        try:
            with timed(self.start, "weights packed"):
                graph.bind(self.weights.resolve(compiled.weight_inputs, release))
            if release and not self.weights.released:
                raise UnsupportedModelError(
                    "release_weights=True frees packed weights, and none can be freed: "
                    + "; ".join(self._reasons_kept(compiled))
                )
        except BaseException:
            self.weights.detach()
            raise

    def _reasons_kept(self, compiled: CompiledForward) -> list[str]:
        """Why weights have memory of their own, although release_weights is set."""
        report = next(item for item in compiled.report.passes if item.name == "pack_linears")
        reasons = {why for _, why in report.refused} | {
            why for _, why in self.weights.released.kept.values()
        }
        return sorted(reasons) or [f"pack_linears is {report.status} and finds no weights to pack"]

    @property
    def start(self) -> dict[str, float]:
        """Seconds of what it took to get ready."""
        return self._maker.start

    @property
    def graph_source(self) -> str:
        return self._maker.source

    @property
    def graphs(self) -> Graphs:
        """Those in use, of which the plain one has all weights."""
        return self._graph

    @property
    def compiled(self) -> CompiledForward:
        """The plain graph."""
        return self._graph.compiled

    @property
    def device(self) -> torch.device:
        return self._graph.device

    @property
    def max_model_len(self) -> int:
        return self._graph.max_model_len

    def ready(self, model: Any, variant: Variant = PLAIN) -> EngineCore:
        """The engine, after a check that the graph and the weights are still those of the model.

        Args:
            variant: What requests will need; captured here if it is asked for the first time.
        Raises: TransformersLoop if the model can no longer be captured, or not with that variant,
            ReleasedWeightsError if it was changed and its weights were released.
        """
        if (why := wrapper_refusal(model)) is not None:
            raise TransformersLoop(why)
        model = unwrap(model)
        if replaces_inputs(model):
            raise TransformersLoop("prepare_inputs_for_generation was replaced on the model")
        with self._lock:
            start = time.perf_counter()
            current = fingerprint(model)
            if current != self.fingerprint:
                self._rebuild(model, current)
            self.seconds["fingerprint at entry"] = time.perf_counter() - start
            if self._refusal is not None:
                raise TransformersLoop(self._refusal)
            self._follow_weights()
            self._make_variants(model, variant)
            return self.engine()

    def _make_variants(self, model: Any, variant: Variant) -> None:
        """Capture what requests with this variant need and the engine does not have."""
        graph, made = self._graph, []
        for each in graph.missing(variant):
            if self.weights.released:
                raise TransformersLoop(f"{each} needs a second capture of the model")
            start = time.perf_counter()
            if each not in graph.refusals:
                try:
                    forward = self._maker.make_variant(model, graph, each)
                    self.engine().check_variant(forward)
                except UnsupportedModelError as error:
                    graph.refusals[each] = str(error)
            if each in graph.refusals:
                raise TransformersLoop(f"{each} is not supported: {graph.refusals[each]}")
            made.append((forward, time.perf_counter() - start))
        for forward, seconds in made:
            graph.variants[forward.variant] = forward
            graph.seconds[forward.variant] = seconds
            self.engine().add_variant(forward)

    def _rebuild(self, model: Any, current: tuple) -> None:
        """The model became another: take the graph it had before, or capture it again."""
        if self.weights.released:
            raise ReleasedWeightsError(
                f"{self.class_name} was changed since its weights were released "
                f"(release_weights=True), and must be captured again: {WAY_BACK}; "
                "then optimize it again"
            )
        if current not in self._graphs:
            logger.info("%s was changed; capturing it again", self.class_name)
        if self._engine is not None:
            self._engine.wait_idle()  # requests end with the model they began with
        self._graph.unbind()
        self.weights.let_go()
        self.fingerprint = current
        self._refusal = "the changed model could not be captured"
        try:
            self._build(model, current)
        except UnsupportedModelError as error:
            self._refusal = f"the changed model is not supported: {error}"
            return
        self._refusal = None
        if self._engine is not None:
            self._engine.replace(self.compiled, self.device, self.max_model_len)
            self._add_variants(self._engine)
        self._begin_epoch()

    def _follow_weights(self) -> None:
        """Begin a new epoch if the weights changed; lay them out again if they moved.

        Values are read only while the engine is idle: between the steps of an optimizer no request
        runs, and between the requests of a server nobody should wait for it.
        """
        start = time.perf_counter()
        told, self._told_of_change = self._told_of_change, False
        idle = self._engine is None or self._engine.is_idle
        change = self.weights.check(look_at_values=idle)
        if change is Change.MEMORY:
            if self._engine is not None:
                self._engine.wait_idle()  # requests end with the weights they began with
            self._graph.unbind()
            self.fingerprint = ()  # if this fails, the next entry begins anew
            self._attach(self._graph)
            self.fingerprint = next(reversed(self._graphs))
        elif change is Change.NONE and told:
            self.weights.look_again()
        if told or change is not Change.NONE:
            if self.compiled.packs_weights and change is not Change.MEMORY:
                self._pack_again()
            self._begin_epoch()
        if idle:
            what = f"weight check ({self.config.weight_check})"
            self.seconds[what] = time.perf_counter() - start

    def _pack_again(self) -> None:
        """Values changed in place: the packed copies follow."""
        if self._engine is not None:
            self._engine.wait_idle()
        start = time.perf_counter()
        self._graph.bind(self.weights.resolve(self.compiled.weight_inputs))
        self.seconds["packing again"] = time.perf_counter() - start

    def _begin_epoch(self) -> None:
        self.weight_epoch += 1
        if self._engine is not None:
            self._engine.begin_epoch(self.weight_epoch)

    def weights_changed(self) -> None:
        """The next entry begins a new epoch, whatever it finds."""
        self._told_of_change = True

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer made a step: was it over these weights?"""
        if any(self.weights.holds_any(group["params"]) for group in optimizer.param_groups):
            self._told_of_change = True

    def engine(self) -> EngineCore:
        with self._lock:
            if self._engine is None or not self._engine.alive:
                self._engine = EngineCore(
                    self.compiled,
                    self.config,
                    self.device,
                    self.max_model_len,
                )
                self._engine.begin_epoch(self.weight_epoch)
                self._add_variants(self._engine)
            return self._engine

    def _add_variants(self, engine: EngineCore) -> None:
        for forward in self._graph.variants.values():
            engine.add_variant(forward)

    def release_cache(self) -> None:
        with self._lock:
            if self._engine is not None:
                self._engine.release_cache()

    def close_engine(self) -> None:
        """End the engine with all its requests; the next call makes a new one."""
        with self._lock:
            if self._engine is not None:
                self._engine.close()
                self._engine = None

    def close(self) -> None:
        """End the engine and give the parameters memory of their own."""
        with self._lock:
            self.close_engine()
            self._graph.unbind()
            self.weights.detach()

    def count_fallback(self, reason: str) -> None:
        """A generate() call goes to transformers' loop: count it, warn once per reason.

        Raises: ReleasedWeightsError if that loop would find no weights.
        """
        if self.weights.released:
            raise ReleasedWeightsError(
                f"this call of generate() needs transformers' own loop ({reason}), which needs "
                f"weights that were released (release_weights=True): {WAY_BACK}"
            )
        self.fallbacks[reason] += 1
        if self.fallbacks[reason] == 1:
            logger.warning("%s.generate() runs transformers' loop: %s", self.class_name, reason)

    def explanation(self) -> Explanation:
        with self._lock:
            metrics = self._engine.metrics() if self._engine is not None else None
        return Explanation(
            model=self.class_name,
            device=str(self.device),
            config=self.config,
            max_model_len=self.max_model_len,
            why_not_longer=self._graph.why_not_longer,
            spec=self.compiled.spec,
            report=self.compiled.report,
            weight_epoch=self.weight_epoch,
            graph_source=self.graph_source,
            variants={str(name): spent for name, spent in self._graph.seconds.items()},
            start=dict(self.start),
            seconds=dict(self.seconds),
            fallbacks=dict(self.fallbacks),
            metrics=metrics,
            released_bytes=self.weights.released.num_bytes,
            kept=dict(self.weights.released.kept),
        )


@contextlib.contextmanager
def timed(seconds: dict[str, float], what: str) -> Iterator[None]:
    """Note what the block took."""
    start = time.perf_counter()
    yield
    seconds[what] = time.perf_counter() - start
