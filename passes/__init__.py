"""Rewrites of a captured graph: one file per pass. Installed as `fastgen.passes`."""

if __name__ != "fastgen.passes":
    raise ImportError(f"import this package as fastgen.passes, not as {__name__}")

from .. import kernels as _kernels  # noqa: F401 - registers the ops that the passes name
from .graph import (
    BATCH_INPUTS,
    EMBEDS_INPUTS,
    PLAIN,
    CapturedGraph,
    InputSpec,
    MergePlan,
    Variant,
)
from .insert_paged_cache import CacheSpec, LayerCache
from .pipeline import PASSES, run_passes
from .report import PassReport, Report

__all__ = [
    "BATCH_INPUTS",
    "EMBEDS_INPUTS",
    "PASSES",
    "PLAIN",
    "CacheSpec",
    "CapturedGraph",
    "InputSpec",
    "LayerCache",
    "MergePlan",
    "PassReport",
    "Report",
    "Variant",
    "run_passes",
]
