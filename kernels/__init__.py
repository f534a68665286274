"""Ops and their implementations: one file per op, reference body first.

Installed as `fastgen.kernels`, never as `kernels`, which is the name of a package of Hugging
Face's. Where Python runs in the repository's root it finds this folder under that name all the
same, and transformers probes for it: there it is an empty module that looks uninstalled.
"""

if __name__ == "fastgen.kernels":
    from .attention import attention
    from .gated_activation import gelu_mul, silu_mul
    from .grouped_mm import grouped_mm
    from .latent_attention import latent_attention
    from .packed_gated_linear import packed_gated_linear
    from .packed_linear import packed_linear
    from .paged_attention import paged_attention
    from .paged_latent_attention import paged_latent_attention
    from .registry import (
        CallSite,
        Choice,
        Implementation,
        NoImplementationError,
        implementations,
        select,
    )
    from .rms_norm import add_rms_norm, rms_norm
    from .rope import rope
    from .rope_store_kv import rope_store_kv
    from .row_linear import row_grouped_linear, row_linear

    __all__ = [
        "CallSite",
        "Choice",
        "Implementation",
        "NoImplementationError",
        "add_rms_norm",
        "attention",
        "gelu_mul",
        "grouped_mm",
        "implementations",
        "latent_attention",
        "packed_gated_linear",
        "packed_linear",
        "paged_attention",
        "paged_latent_attention",
        "rms_norm",
        "rope",
        "rope_store_kv",
        "row_grouped_linear",
        "row_linear",
        "select",
        "silu_mul",
    ]
else:
    __path__ = []  # no submodule is found: a second copy would register the ops again
    __file__ = None  # pyright: ignore  # what transformers takes for "not an installed package"

    def __getattr__(name: str):
        raise AttributeError(f"import this package as fastgen.kernels, not as {__name__} ({name})")
