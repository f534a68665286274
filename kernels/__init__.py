"""Ops and their implementations: one file per op, reference body first.

Installed as `fastgen.kernels`. Hugging Face has a package named `kernels` that transformers looks
for, so this one must never be importable under that name.
"""

if __name__ != "fastgen.kernels":
    raise ImportError(f"import this package as fastgen.kernels, not as {__name__}")

from .attention import attention
from .paged_attention import paged_attention
from .registry import CallSite, Choice, Implementation, implementations, select

__all__ = [
    "CallSite",
    "Choice",
    "Implementation",
    "attention",
    "implementations",
    "paged_attention",
    "select",
]
