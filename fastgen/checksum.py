"""Checksums of weights: fast enough to look at every entry, all in torch, on the weights' device.

A sum is taken of 64-bit words, each times an odd factor that depends on its place (mod 2**64), so
that a changed word always changes it, and swapped ones do too but for odds of 2**-32 or less. A
sign in a word's highest bit would pass every odd factor unchanged, and two of them cancel: it is
folded into the lower half first.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch

_PAGE_BYTES, _LINE_BYTES = 4096, 64
# Words summed at once: few enough that torch does it on the calling thread alone, which so needs
# no OpenMP team beside the engine's.
_CHUNK = 1 << 14


@functools.cache
def _factors(device: torch.device) -> torch.Tensor:
    """[_CHUNK] int64, odd."""
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False):
        drawn = torch.randint(-(2**62), 2**62, (_CHUNK,), generator=generator)
        return (drawn * 2 + 1).to(device)


def words_of(tensor: torch.Tensor, whole: bool) -> list[torch.Tensor]:
    """Views of a tensor's memory that `checksums` sums one by one.

    Args:
        tensor: Any strides and dtype; gaps between its elements are looked at too.
        whole: Every byte; otherwise one cache line (64 bytes) of each page of 4 KiB.
    Returns: int64 views (uint8 if the bytes cannot be cut into words), at most _CHUNK words each.
    """
    if tensor.numel() == 0:
        return []
    span = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    flat = tensor.detach().as_strided((span,), (1,))
    size, offset = flat.element_size(), flat.storage_offset()
    in_words = (span * size) % 8 == 0 and (offset * size) % 8 == 0
    words = flat.view(torch.int64 if in_words else torch.uint8)
    page, line = (n // words.element_size() for n in (_PAGE_BYTES, _LINE_BYTES))
    if whole or words.numel() <= page:
        return list(words.split(_CHUNK))
    num_pages = (words.numel() - line) // page + 1
    return list(words.as_strided((num_pages, line), (page, 1)).split(_CHUNK // line))


@torch.no_grad()
def checksums(views: Iterable[torch.Tensor]) -> tuple[int, ...]:
    """One number for each view. On an accelerator: four kernels for each, one synchronisation."""
    sums = []
    for view in views:
        words = view.long()
        folded = (words >> 32).bitwise_xor_(words)
        folded.mul_(_factors(view.device)[: view.numel()].view(view.shape))
        sums.append(folded.sum())
    return tuple(torch.stack(sums).tolist()) if sums else ()
