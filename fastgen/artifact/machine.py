"""What a folder needs of the machine, the versions and the memory, and whether it is there."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .._version import __version__
from ..errors import ArtifactError
from ..kernels import cpu
from ..passes import InputSpec
from .manifest import Manifest

# What packed weights need of a processor, each by the layouts of kernels/packing.py.
_ISA_OF_LAYOUT = {"tiles": "avx512_bf16", "gated_tiles": "avx512_bf16", "onednn": "onednn_bf16"}
ANY_ISA = "any"


def isa_of(inputs: Iterable[InputSpec]) -> str:
    """What a graph with these inputs needs: ANY_ISA, "avx512_bf16", "onednn_bf16", or both by +."""
    needed = {_ISA_OF_LAYOUT[spec.layout] for spec in inputs if spec.layout is not None}
    return "+".join(sorted(needed)) or ANY_ISA


def minor_version(version: str) -> str:
    """major.minor of a version."""
    return ".".join(version.split("+")[0].split(".")[:2])


def check_machine(manifest: Manifest) -> None:
    """Raise ArtifactError unless the program can run here."""
    if manifest.fastgen != __version__:
        raise ArtifactError(
            f"it was exported by fastgen {manifest.fastgen}, and this is {__version__}, whose ops "
            "may be others: export it again"
        )
    if minor_version(manifest.torch) != minor_version(torch.__version__):
        raise ArtifactError(
            f"it was exported with torch {manifest.torch}, and this is {torch.__version__}, whose "
            "ops may be others: export it again"
        )
    _check_device(manifest.device)
    for isa in manifest.isa.split("+"):
        if (why := _why_not(isa)) is not None:
            raise ArtifactError(
                f"its weights are packed for a processor with {isa}, and {why}: export it here, or "
                "optimize the model with pack=False before"
            )


def _check_device(name: str) -> None:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ArtifactError(f"its device {name!r} is unknown to torch") from error
    if device.type == "cpu":
        return
    module = getattr(torch, device.type, None)
    if module is None or not module.is_available() or (device.index or 0) >= module.device_count():
        raise ArtifactError(
            f"it was exported on {name}, and there is no such device here: export it on this "
            "machine's"
        )


def _why_not(isa: str) -> str | None:
    match isa:
        case "any":
            return None
        case "avx512_bf16":
            if (why := cpu.why_missing()) is not None:
                return why
            return "there are no such instructions here" if cpu.isa() == "generic" else None
        case "onednn_bf16":
            has_it = torch.backends.mkldnn.is_available()
            has_it = has_it and torch.ops.mkldnn._is_mkldnn_bf16_supported()
            return None if has_it else "oneDNN has none here"
    return "this fastgen does not know what that is"


def check_memory(needed_bytes: int, free_bytes: int, device: str) -> None:
    """Raise ArtifactError unless so much memory is free."""
    if needed_bytes > free_bytes:
        raise ArtifactError(
            f"its weights take {needed_bytes / 2**20:.0f} MiB of memory on {device} as they are "
            f"merged and packed, and {free_bytes / 2**20:.0f} MiB are free"
        )
