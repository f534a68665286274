"""Which models are optimised, and what can be asked of every one of them, live or loaded."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from .errors import NotOptimizedError
from .explanation import Explanation
from .optimized import OptimizedModel
from .wrappers import unwrap

# Held while a model becomes optimised, or is no longer.
lock = threading.RLock()
# Weak on both sides: an OptimizedModel does not hold its model.
_optimized: weakref.WeakKeyDictionary[Any, OptimizedModel] = weakref.WeakKeyDictionary()
# What undoes the changes to a class when no model of it is optimised any more.
_undo: dict[type, Callable[[type], None]] = {}
# Watches all optimizers while a model is optimised.
_step_hook: RemovableHandle | None = None


def add(model: Any, optimized: OptimizedModel, undo: Callable[[type], None]) -> None:
    """Note that a model is optimised, until `remove` or the end of the model's life.

    undo: Takes what was changed on the model's class away, when it is the last of its class.
    """
    global _step_hook
    with lock:
        _optimized[model] = optimized
        _undo[type(model)] = undo
        weakref.finalize(model, _clean_up, type(model))
        if _step_hook is None:
            _step_hook = register_optimizer_step_post_hook(_after_step)


def remove(model: Any) -> None:
    """Forget a model that is optimised no longer."""
    with lock:
        del _optimized[model]
        _clean_up(type(model))


def lookup(model: Any) -> OptimizedModel | None:
    """What fastgen keeps for this very object, or for the model in this PEFT wrapper, or None."""
    try:
        return _optimized.get(model) or _optimized.get(unwrap(model))
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


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for optimized in list(_optimized.values()):
        optimized.after_step(optimizer)


def _clean_up(cls: type) -> None:
    """A model of this class is optimised no longer: take away what no other model needs."""
    global _step_hook
    # Also called by the garbage collector, in any thread and whatever it holds: never wait there.
    # A patch or a hook that stays finds no model and does nothing.
    if lock.acquire(blocking=False):
        try:
            models = list(_optimized.keys())
            if not any(type(model) is cls for model in models) and cls in _undo:
                _undo.pop(cls)(cls)
            if not models and _step_hook is not None:
                _step_hook.remove()
                _step_hook = None
        finally:
            lock.release()


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


def weights_changed(model: Any) -> None:
    """Say that weights were changed in place; the next call computes with nothing of the old ones.

    Needed with `weight_check="manual"`, and for changes that its other settings cannot see.

    Raises: NotOptimizedError.
    """
    require(model).weights_changed()
