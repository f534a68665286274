"""Layouts of a linear weight that a GEMM reads as they are.

A plain weight is brought into the GEMM's layout at every call; for a few rows that costs more than
the products. `pack` does it once; `unpack` gives the plain weight back, bit for bit.

    "tiles"        our own (cpu/linear.cpp): [groups, steps, 2, 16, 16, 2], groups of 32 outputs,
                   steps of 32 inputs, two tiles of 16 pairs of inputs by 16 outputs
    "gated_tiles"  the same for a gate and an up projection, one above the other: a group holds
                   16 outputs of the one and the same 16 of the other
    "onednn"       oneDNN's, opaque, for processors and widths that ours does not take
"""

from __future__ import annotations

import ctypes
import math
from typing import Literal

import torch

from . import cpu

Layout = Literal["tiles", "gated_tiles", "onednn"]

_OUTPUTS, _INPUTS = 32, 32  # of a group, of a step
_TILES = (2, 16, 16, 2)
# How many rows oneDNN's layout is chosen for; on AMX what is best for many is best for few, too.
_ROWS = 256
_HUGE_PAGE_BYTES = 2 << 20
_MADV_HUGEPAGE = 14


def why_not_tiles(weight: torch.Tensor) -> str | None:
    """Why a bf16 weight on the CPU cannot have our own layout, or None."""
    if (why := cpu.why_missing()) is not None:
        return why
    if cpu.isa() == "generic":
        return "the C++ kernels have no bf16 instructions here"
    if weight.shape[1] % _INPUTS:
        return f"the weight has {weight.shape[1]} inputs, not a multiple of {_INPUTS}"
    return None


def why_not_packed(weight: torch.Tensor) -> str | None:
    """Why a weight (it may be a fake tensor) cannot be packed, or None."""
    if weight.device.type != "cpu":
        return f"the weight is on {weight.device.type}"
    if weight.dtype != torch.bfloat16:
        return f"the weight is {str(weight.dtype).removeprefix('torch.')}"
    if (why := why_not_tiles(weight)) is None:
        return None
    if not torch.backends.mkldnn.is_available():
        return f"{why}, and this torch was built without oneDNN"
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return f"{why}, and oneDNN has no bf16 instructions that it uses"
    return None


def layout_of(weight: torch.Tensor) -> Layout:
    """The layout for a weight that can be packed."""
    return "tiles" if why_not_tiles(weight) is None else "onednn"


def packed_shape(shape: torch.Size, layout: Layout) -> tuple[int, ...]:
    """The packed tensor's shape for a weight [out_features, in_features]."""
    rows, width = shape
    match layout:
        case "onednn":
            return rows, width
        case "tiles":
            return -(-rows // _OUTPUTS), width // _INPUTS, *_TILES
        case "gated_tiles":
            return -(-rows // 2 // (_OUTPUTS // 2)), width // _INPUTS, *_TILES


def packed_bytes(shape: torch.Size, layout: Layout) -> int:
    return 2 * math.prod(packed_shape(shape, layout))


@torch.inference_mode(False)
@torch.no_grad()
def pack(
    weight: torch.Tensor, layout: Layout | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """A packed copy of a weight.

    Args:
        weight: [out_features, in_features] bf16 on the CPU. layout: Default: the best one for it.
        out: What to write it to (of `packed_shape`); oneDNN's layout takes memory of its own.
    Raises: ValueError for a weight that cannot have the layout, or an `out` that is not it.
    """
    plain = weight.detach()
    why = why_not_packed(plain)
    layout = layout or layout_of(plain)
    if why is None and layout != "onednn":
        why = why_not_tiles(plain)
    if why is None and layout == "gated_tiles" and plain.shape[0] % 2:
        why = f"it has {plain.shape[0]} rows, which are no two halves"
    if why is not None:
        raise ValueError(f"a weight {list(plain.shape)} cannot be packed as {layout}: {why}")
    if layout == "onednn":
        return torch.ops.mkldnn._reorder_linear_weight(plain, _ROWS)
    plain = plain if plain.stride(1) == 1 else plain.contiguous()
    shape = packed_shape(plain.shape, layout)
    if out is None:
        out = torch.empty(shape, dtype=plain.dtype)
    elif out.shape != shape or out.dtype != plain.dtype or not out.is_contiguous():
        raise ValueError(
            f"out must be {list(shape)} bf16, contiguous, got {list(out.shape)} {out.dtype}"
        )
    cpu.function("pack_weight", "pipiibb")(
        plain.data_ptr(),
        plain.stride(0),
        out.data_ptr(),
        *plain.shape,
        layout == "gated_tiles",
        torch.get_num_threads(),
    )
    return out


@torch.inference_mode(False)
@torch.no_grad()
def unpack(packed: torch.Tensor, layout: Layout, out_features: int) -> torch.Tensor:
    """The plain weight [out_features, in_features].

    Raises: ValueError for a packed weight of another number of outputs.
    """
    if layout == "onednn":
        return packed.to_dense()
    width = packed.shape[1] * _INPUTS
    shape = packed_shape(torch.Size((out_features, width)), layout)
    if packed.shape != shape:
        raise ValueError(
            f"{out_features} outputs in {layout} are {list(shape)}, got {list(packed.shape)}"
        )
    plain = torch.empty((out_features, width), dtype=packed.dtype)
    cpu.function("unpack_weight", "ppiibb")(
        packed.data_ptr(),
        plain.data_ptr(),
        out_features,
        width,
        layout == "gated_tiles",
        torch.get_num_threads(),
    )
    return plain


def huge_pages(num_bytes: int) -> torch.Tensor:
    """Uninitialised memory [num_bytes] uint8, in huge pages where the system grants them.

    A weight that is read from one end to the other takes 5 to 15 % less time from them.
    """
    memory = torch.empty(num_bytes + _HUGE_PAGE_BYTES, dtype=torch.uint8)
    start = -memory.data_ptr() % _HUGE_PAGE_BYTES
    memory = memory[start : start + num_bytes]
    whole = num_bytes // _HUGE_PAGE_BYTES * _HUGE_PAGE_BYTES
    if whole and (madvise := getattr(ctypes.CDLL(None), "madvise", None)) is not None:
        madvise(  # advice: whether it is taken does not matter
            ctypes.c_void_p(memory.data_ptr()), ctypes.c_size_t(whole), _MADV_HUGEPAGE
        )
    return memory
