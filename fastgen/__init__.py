"""One line, `fastgen.optimize(model)`, and a Hugging Face causal LM generates many times faster."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .api import optimize, restore
    from .artifact.export import export
    from .artifact.load import load
    from .async_engine import AsyncEngine
    from .config import Config, SamplingParams
    from .errors import (
        ArtifactError,
        CapacityError,
        EngineClosedError,
        FastgenError,
        InvalidRequestError,
        NotOptimizedError,
        QueueFullError,
        ReleasedWeightsError,
        RequestFailedError,
        UnsupportedModelError,
    )
    from .frontend import Engine
    from .outputs import (
        Completion,
        EngineMetrics,
        Logprob,
        RequestMetrics,
        RequestOutput,
        TokenEvent,
    )
    from .planning import Plan, plan
    from .registry import explain, release_cache, weights_changed
    from .verification import verify
    from .verification_report import Verification

# Where each public name lives; imported at first use, so that `import fastgen` costs nothing.
_HOMES = {
    "api": ("optimize", "restore"),
    "artifact.export": ("export",),
    "artifact.load": ("load",),
    "async_engine": ("AsyncEngine",),
    "config": ("Config", "SamplingParams"),
    "errors": (
        "ArtifactError",
        "CapacityError",
        "EngineClosedError",
        "FastgenError",
        "InvalidRequestError",
        "NotOptimizedError",
        "QueueFullError",
        "ReleasedWeightsError",
        "RequestFailedError",
        "UnsupportedModelError",
    ),
    "frontend": ("Engine",),
    "outputs": (
        "Completion",
        "EngineMetrics",
        "Logprob",
        "RequestMetrics",
        "RequestOutput",
        "TokenEvent",
    ),
    "planning": ("Plan", "plan"),
    "registry": ("explain", "release_cache", "weights_changed"),
    "verification": ("verify",),
    "verification_report": ("Verification",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [  # noqa: RUF022 - in the order of a reader's interest
    "optimize",
    "restore",
    "explain",
    "release_cache",
    "weights_changed",
    "plan",
    "verify",
    "export",
    "load",
    "Engine",
    "AsyncEngine",
    "Config",
    "SamplingParams",
    "RequestOutput",
    "Completion",
    "Logprob",
    "TokenEvent",
    "RequestMetrics",
    "EngineMetrics",
    "Plan",
    "Verification",
    "FastgenError",
    "UnsupportedModelError",
    "NotOptimizedError",
    "ReleasedWeightsError",
    "ArtifactError",
    "InvalidRequestError",
    "CapacityError",
    "QueueFullError",
    "RequestFailedError",
    "EngineClosedError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'fastgen' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})
