"""optimize and restore, with what else is asked of a live model: where its parts are assembled."""

from __future__ import annotations

import logging
from typing import Any, TypeVar

from . import registry
from .capture import check_model
from .config import Config
from .errors import UnsupportedModelError
from .generate import patch, unpatch
from .graphs import GraphMaker
from .optimized import OptimizedModel
from .registry import explain, lookup, release_cache, require, weights_changed
from .released import guard, unguard
from .versions import warn_of_untested_versions
from .wrappers import unwrap, wrapper_refusal

__all__ = [
    "explain",
    "lookup",
    "optimize",
    "release_cache",
    "require",
    "restore",
    "weights_changed",
]

logger = logging.getLogger("fastgen")

Model = TypeVar("Model")


def optimize(model: Model, config: Config | None = None, **fields: Any) -> Model:
    """Make `model.generate()` run on fastgen, in place.

    The model stays the user's own: its forward, backward, state_dict and parameters are as
    before; the memory of merged parameters moves. Optimising again is a no-op.

    Args:
        model: A transformers causal LM in memory, on one device, or a PEFT model around one.
        config: A Config; **fields change single fields of it.
    Returns: the same model.
    Raises: UnsupportedModelError (the model is left untouched), ValueError or TypeError for a
        bad field, or for other settings than those the model was optimised with.
    """
    warn_of_untested_versions()
    config = (config or Config()).replace(**fields)
    with registry.lock:
        existing = lookup(model)
        if existing is not None:
            if existing.config != config:
                raise ValueError(
                    "the model is optimised with other settings "
                    f"({existing.config}); call fastgen.restore(model) first"
                )
            return model
        if (why := wrapper_refusal(model)) is not None:
            raise UnsupportedModelError(f"{why}, which transformers' loop alone can do")
        inner = unwrap(model)
        check_model(inner)
        cls = type(inner)
        optimized = OptimizedModel(inner, config, GraphMaker(config, cls.__name__))
        try:
            patch(cls, lookup)
            if optimized.weights.released:
                guard(cls)
        except BaseException:
            optimized.close()
            raise
        registry.add(inner, optimized, _unpatch)
    logger.info(
        "optimised %s in %.1f s: %s",
        optimized.class_name,
        sum(optimized.start.values()),
        ", ".join(f"{p.name} {p.matches}" for p in optimized.compiled.report.passes),
    )
    return model


def restore(model: Model) -> Model:
    """Undo `optimize`: requests end, parameters get memory of their own, generate is HF's again.

    Returns: the same model, bit-equal in logits and state_dict.
    Raises: NotOptimizedError.
    """
    with registry.lock:
        require(model).close()
        registry.remove(unwrap(model))
    return model


def _unpatch(cls: type) -> None:
    unpatch(cls)
    unguard(cls)
