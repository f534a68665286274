"""One entry per row of a wide matrix, drawn by its weight.

Blocks of a row are looked at first, and then one block: a pass over the vocabulary that only
reduces is several times faster than one that keeps track of places.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

BLOCK = 512


def draw_by_weight(weights: torch.Tensor, uniforms: Sequence[float]) -> torch.Tensor:
    """The first place of each row where the sum so far exceeds uniform * (sum of the row).

    Zeros behind a row's weights change nothing, if they begin at a multiple of BLOCK.

    Args:
        weights: [num_rows, width] fp32, >= 0, not all 0. uniforms: One per row, in [0, 1).
    Returns: [num_rows] int64; the weight there is not 0.
    """
    targets = torch.tensor(uniforms, dtype=torch.float64, device=weights.device).unsqueeze(1)
    width = weights.shape[1]
    if width <= BLOCK:
        sums = weights.cumsum(dim=-1, dtype=torch.float64)
        return _first_above(sums, targets * sums[:, -1:]).squeeze(1)
    sums = _reduce_blocks(weights, torch.sum).cumsum(dim=-1, dtype=torch.float64)
    targets = targets * sums[:, -1:]
    block = _first_above(sums, targets)
    before = torch.where(block > 0, sums.gather(1, (block - 1).clamp(min=0)), 0.0)
    places = block * BLOCK + torch.arange(BLOCK, device=weights.device)
    inside = weights.gather(1, places.clamp(max=width - 1)).masked_fill_(places >= width, 0)
    place = _first_above(inside.cumsum(dim=-1, dtype=torch.float64), targets - before)
    return (block * BLOCK + place).clamp_(max=width - 1).squeeze(1)


def _first_above(sums: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """[num_rows, 1]; a target that rounding has pushed to the end is below the end.

    A row of NaN gives its last place: it must not fail the rows beside it.
    """
    end = torch.nextafter(sums[:, -1:], torch.zeros_like(targets))
    places = torch.searchsorted(sums, torch.minimum(targets, end), right=True)
    return places.clamp_(max=sums.shape[1] - 1)


def _reduce_blocks(values: torch.Tensor, reduce) -> torch.Tensor:
    """[num_rows, width] -> [num_rows, ceil(width / BLOCK)]."""
    whole = values.shape[1] // BLOCK * BLOCK
    blocks = reduce(values[:, :whole].unflatten(1, (-1, BLOCK)), dim=-1)
    if whole == values.shape[1]:
        return blocks
    return torch.cat([blocks, reduce(values[:, whole:], dim=-1, keepdim=True)], dim=1)
