"""optimize, restore, explain, release_cache: the only place where the parts are assembled."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import Counter
from typing import Any, TypeVar

import torch

from .capture import capture, check_model
from .compiled import CompiledForward, compile_graph
from .config import Config
from .engine.engine import EngineCore
from .errors import NotOptimizedError, UnsupportedModelError
from .explanation import Explanation
from .generate import TransformersLoop, patch, unpatch
from .live import LiveWeights, fingerprint
from .versions import warn_of_untested_versions

logger = logging.getLogger("fastgen")

Model = TypeVar("Model")

# Which models are optimised. Weak on both sides: an OptimizedModel does not hold its model.
_optimized: weakref.WeakKeyDictionary[Any, OptimizedModel] = weakref.WeakKeyDictionary()
_registry_lock = threading.RLock()


class OptimizedModel:
    """What fastgen keeps for one live model: its graph, its weights' memory, its engine.

    The graph belongs to a fingerprint of the model. At every entry the model is compared with it;
    a model that was edited, moved or cast is captured again.
    """

    def __init__(self, model: Any, config: Config) -> None:
        self.config = config
        self.fallbacks: Counter[str] = Counter()
        self.seconds: dict[str, float] = {}
        self.class_name = type(model).__name__
        self._lock = threading.RLock()
        self._engine: EngineCore | None = None
        self._refusal: str | None = None
        self._build(model)

    def _build(self, model: Any) -> None:
        """Capture, rewrite and lay out the weights; a failure leaves the model as it was."""
        max_model_len = self._max_model_len(model)
        current = fingerprint(model)
        start = time.perf_counter()
        captured = capture(model)
        self.seconds["capture"] = time.perf_counter() - start
        start = time.perf_counter()
        compiled = compile_graph(captured, self.config.passes_off)
        self.seconds["passes"] = time.perf_counter() - start
        start = time.perf_counter()
        weights = LiveWeights(model, compiled.merges)
        self._attach(weights, compiled)
        self.seconds["weights"] = time.perf_counter() - start
        self.compiled: CompiledForward = compiled
        self.weights = weights
        self.device: torch.device = next(model.parameters()).device
        self.fingerprint = current
        self.max_model_len = max_model_len

    @staticmethod
    @torch.inference_mode(False)  # parameters must not become inference tensors
    def _attach(weights: LiveWeights, compiled: CompiledForward) -> None:
        weights.attach()
        try:
            compiled.bind(weights.resolve(compiled.weight_inputs))
        except BaseException:
            weights.detach()
            raise

    def _max_model_len(self, model: Any) -> int:
        limit: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        wanted = self.config.max_model_len
        if wanted is None:
            if limit is None:
                raise UnsupportedModelError(
                    f"{self.class_name} does not say how long it may get; set max_model_len"
                )
            return limit
        if limit is not None and wanted > limit:
            raise ValueError(
                f"max_model_len must be <= {limit} (the model's limit), got {wanted}; lower it"
            )
        return wanted

    def ready(self, model: Any) -> EngineCore:
        """The engine, after a check that the graph and the weights are still those of the model.

        Raises: TransformersLoop if the model can no longer be captured.
        """
        with self._lock:
            start = time.perf_counter()
            if fingerprint(model) != self.fingerprint:
                self._rebuild(model)
            elif self._refusal is None and not self.weights.current():
                self._rebind()
            self.seconds["last check at entry"] = time.perf_counter() - start
            if self._refusal is not None:
                raise TransformersLoop(self._refusal)
            return self.engine()

    def _rebuild(self, model: Any) -> None:
        logger.info("%s was changed; capturing it again", self.class_name)
        if self._engine is not None:
            self._engine.wait_idle()
        self.weights.detach()
        self.fingerprint = fingerprint(model)
        self._refusal = "the changed model could not be captured"
        try:
            self._build(model)
        except UnsupportedModelError as error:
            self._refusal = f"the changed model is not supported: {error}"
            return
        self._refusal = None
        if self._engine is not None:
            self._engine.replace(self.compiled, self.device, self.max_model_len)

    def _rebind(self) -> None:
        """Parameters were replaced by others of the same shape: take theirs."""
        if self._engine is not None:
            self._engine.wait_idle()  # requests end with the weights they began with
        self.weights.detach()
        self._attach(self.weights, self.compiled)

    def engine(self) -> EngineCore:
        with self._lock:
            if self._engine is None or not self._engine.alive:
                self._engine = EngineCore(
                    self.compiled,
                    self.config,
                    self.device,
                    self.max_model_len,
                )
            return self._engine

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
            self.compiled.unbind()
            self.weights.detach()

    def count_fallback(self, reason: str) -> None:
        """A generate() call goes to transformers' loop: count it, warn once per reason."""
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
            spec=self.compiled.spec,
            report=self.compiled.report,
            seconds=dict(self.seconds),
            fallbacks=dict(self.fallbacks),
            metrics=metrics,
        )


def optimize(model: Model, config: Config | None = None, **fields: Any) -> Model:
    """Make `model.generate()` run on fastgen, in place.

    The model stays the user's own: its forward, backward, state_dict and parameters are as
    before; the memory of merged parameters moves. Optimising again is a no-op.

    Args:
        model: A transformers causal LM in memory, on one device.
        config: A Config; **fields change single fields of it.
    Returns: the same model.
    Raises: UnsupportedModelError (the model is left untouched), ValueError or TypeError for a
        bad field, or for other settings than those the model was optimised with.
    """
    warn_of_untested_versions()
    config = (config or Config()).replace(**fields)
    with _registry_lock:
        existing = lookup(model)
        if existing is not None:
            if existing.config != config:
                raise ValueError(
                    "the model is optimised with other settings "
                    f"({existing.config}); call fastgen.restore(model) first"
                )
            return model
        check_model(model)
        cls = type(model)
        optimized = OptimizedModel(model, config)
        try:
            patch(cls, lookup)
        except BaseException:
            optimized.close()
            raise
        _optimized[model] = optimized
        weakref.finalize(model, _unpatch_if_unused, cls)
    logger.info(
        "optimised %s in %.1f s: %s",
        optimized.class_name,
        sum(optimized.seconds.values()),
        ", ".join(f"{p.name} {p.matches}" for p in optimized.compiled.report.passes),
    )
    return model


def lookup(model: Any) -> OptimizedModel | None:
    """What fastgen keeps for this very object, or None."""
    try:
        return _optimized.get(model)
    except TypeError:  # not an object that can be referenced weakly
        return None


def require(model: Any) -> OptimizedModel:
    """Like `lookup`; raises NotOptimizedError."""
    optimized = lookup(model)
    if optimized is None:
        raise NotOptimizedError(
            f"this {type(model).__name__} is not optimised; call fastgen.optimize(model) first"
        )
    return optimized


def restore(model: Model) -> Model:
    """Undo `optimize`: requests end, parameters get memory of their own, generate is HF's again.

    Returns: the same model, bit-equal in logits and state_dict.
    Raises: NotOptimizedError.
    """
    with _registry_lock:
        require(model).close()
        del _optimized[model]
        _unpatch_if_unused(type(model))
    return model


def _unpatch_if_unused(cls: type) -> None:
    # Also called by the garbage collector, in any thread and whatever it holds: never wait there.
    # A patch that stays finds no model and does nothing.
    if _registry_lock.acquire(blocking=False):
        try:
            if not any(type(model) is cls for model in list(_optimized.keys())):
                unpatch(cls)
        finally:
            _registry_lock.release()


def explain(model: Any) -> Explanation:
    """What was rewritten, what was refused and why, what runs where; print it, or `.to_json()`.

    Raises: NotOptimizedError.
    """
    return require(model).explanation()


def release_cache(model: Any) -> None:
    """Give the memory of the KV cache back; the next call takes a new one.

    Raises: NotOptimizedError; FastgenError while requests are running.
    """
    require(model).release_cache()
