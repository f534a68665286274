"""A weighted draw by blocks: as over the whole row at once."""

from __future__ import annotations

import math

import pytest
import torch

from fastgen.engine import choose
from fastgen.engine.choose import BLOCK, draw_by_weight

WIDTHS = [1, 2, 100, BLOCK - 1, BLOCK, BLOCK + 1, 8 * BLOCK, 8 * BLOCK + 1, 20_001, 151_936]
LAST_UNIFORM = math.nextafter(1.0, 0.0)


def weights_of(num_rows: int, width: int, seed: int = 0) -> torch.Tensor:
    """Softmax rows, a third of whose entries are 0."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rows, width, generator=generator) * 2
    logits[torch.rand(num_rows, width, generator=generator) < 0.3] = -math.inf
    logits[:, width // 2] = 1.0  # a row must hold something
    return torch.softmax(logits, dim=-1)


# Draws.


def check_draws(draw) -> None:
    """The drawn place is where the sum reaches its share, but for the rounding of fp32 sums."""
    for width in WIDTHS:
        weights = weights_of(64, width, seed=width)
        uniforms = torch.rand(64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        uniforms[:2] = torch.tensor([0.0, LAST_UNIFORM])
        places = draw(weights, uniforms.tolist())
        sums = weights.double().cumsum(dim=-1)
        shares = sums / sums[:, -1:]
        above = shares.gather(1, places.unsqueeze(1)).squeeze(1)
        own = (weights.double() / sums[:, -1:]).gather(1, places.unsqueeze(1)).squeeze(1)
        assert (own > 0).all(), width
        # A block's sum of BLOCK fp32 numbers is off by at most BLOCK * eps of itself.
        tolerance = BLOCK * torch.finfo(torch.float32).eps
        assert (above >= uniforms - tolerance).all(), width
        assert (above - own <= uniforms + tolerance).all(), width


def test_draws_are_where_the_sum_reaches_its_share():
    check_draws(draw_by_weight)


@pytest.mark.parametrize("width", [100, 2000, 20_001])
def test_only_weights_above_zero_are_drawn(width):
    places = torch.cat([torch.arange(100), torch.arange(width - 100, width)])
    weights = torch.zeros(200, width)
    weights[torch.arange(200), places] = 1e-30
    for uniform in (0.0, 0.5, LAST_UNIFORM):
        assert torch.equal(draw_by_weight(weights, [uniform] * 200), places)


@pytest.mark.parametrize("width", [100, 2000, 20_001])
def test_draws_do_not_depend_on_other_rows(width):
    weights = weights_of(40, width)
    uniforms = [i / 40 for i in range(40)]
    together = draw_by_weight(weights, uniforms)
    for row in range(40):
        assert draw_by_weight(weights[row : row + 1], uniforms[row : row + 1]) == together[row]


@pytest.mark.parametrize("width", [100, 8 * BLOCK, 20_001])
def test_a_row_of_nan_gives_some_place_and_spares_the_others(width):
    weights = weights_of(3, width)
    uniforms = [0.2, 0.5, 0.7]
    alone = draw_by_weight(weights, uniforms)
    weights[1] = math.nan
    places = draw_by_weight(weights, uniforms)
    assert places[[0, 2]].tolist() == alone[[0, 2]].tolist()
    assert 0 <= places[1] < width


def test_zeros_behind_change_nothing():
    weights = weights_of(200, 2 * BLOCK)
    uniforms = [i / 200 for i in range(200)]
    padded = torch.cat([weights, torch.zeros(200, 5000)], dim=1)
    assert torch.equal(draw_by_weight(padded, uniforms), draw_by_weight(weights, uniforms))


# Planted mistakes.


def repeats_the_end(weights, uniforms):
    """The places behind a short last block count as its last entry."""
    width = weights.shape[1]
    more = -width % BLOCK
    padded = torch.cat([weights, weights[:, -1:].expand(-1, more)], dim=1)
    return draw_by_weight(padded, uniforms).clamp(max=width - 1)


def is_one_off(weights, uniforms):
    return (draw_by_weight(weights, uniforms) + 1).clamp(max=weights.shape[1] - 1)


def ignores_the_number(weights, uniforms):
    return torch.argmax(weights, dim=-1)


@pytest.mark.parametrize("broken", [repeats_the_end, is_one_off, ignores_the_number])
def test_planted_draw_is_found(broken):
    with pytest.raises(AssertionError):
        check_draws(broken)


def test_planted_block_sum_is_found(monkeypatch):
    reduce_blocks = choose._reduce_blocks

    def without_the_last(values, reduce):
        return reduce_blocks(values[:, : values.shape[1] // BLOCK * BLOCK], reduce)

    monkeypatch.setattr(choose, "_reduce_blocks", without_the_last)
    with pytest.raises((AssertionError, IndexError, RuntimeError)):
        check_draws(draw_by_weight)
