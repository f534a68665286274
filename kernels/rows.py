"""Tensors as rows along their last dimension: how kernels walk over strided tensors."""

from __future__ import annotations

import torch


def rows_of(*tensors: torch.Tensor) -> tuple[int, int, list[tuple[int, int]]] | None:
    """Tensors of one shape as rows along the last dimension, counted by an outer and inner index.

    Returns: the sizes of the two, and for each tensor their strides in elements; None if the
        tensors lie so that this is not possible.
    """
    first = tensors[0]
    if all(tensor.is_contiguous() for tensor in tensors):  # as nearly always
        width = first.shape[-1]
        return 1, first.numel() // width if width else 0, [(0, width)] * len(tensors)
    if first.shape[-1] > 1 and any(tensor.stride(-1) != 1 for tensor in tensors):
        return None
    dims: list[tuple[int, list[int]]] = []
    for dim, size in enumerate(first.shape[:-1]):
        if isinstance(size, int) and size == 1:
            continue
        strides = [tensor.stride(dim) for tensor in tensors]
        if dims and dims[-1][1] == [size * stride for stride in strides]:
            dims[-1] = dims[-1][0] * size, strides  # it goes on where the one before it ends
        else:
            dims.append((size, strides))
    if len(dims) > 2:
        return None
    nothing = 1, [0] * len(tensors)
    (outer, outer_strides), (inner, inner_strides) = [nothing] * (2 - len(dims)) + dims
    return outer, inner, list(zip(outer_strides, inner_strides, strict=True))
