"""The largest entry and a weighted draw by blocks: as over the whole row at once."""

from __future__ import annotations

import math

import pytest
import torch

from fastgen.engine import choose
from fastgen.engine.choose import BLOCK, draw_by_weight, largest

WIDTHS = [1, 2, 100, BLOCK - 1, BLOCK, BLOCK + 1, 8 * BLOCK, 8 * BLOCK + 1, 20_001, 151_936]
LAST_UNIFORM = math.nextafter(1.0, 0.0)


def weights_of(num_rows: int, width: int, seed: int = 0) -> torch.Tensor:
    """Softmax rows, a third of whose entries are 0."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rows, width, generator=generator) * 2
    logits[torch.rand(num_rows, width, generator=generator) < 0.3] = -math.inf
    logits[:, width // 2] = 1.0  # a row must hold something
    return torch.softmax(logits, dim=-1)


# The largest.


def check_largest(largest) -> None:
    for width in WIDTHS:
        generator = torch.Generator().manual_seed(width)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            # Few different values: the first of many equal ones is asked for.
            values = torch.randint(-3, 4, (3, width), generator=generator).to(dtype)
            first = (values == values.amax(dim=-1, keepdim=True)).int().argmax(dim=-1)
            assert torch.equal(largest(values), first), (width, dtype)
            values = torch.randn(3, width, generator=generator).to(dtype)
            values[0, -1] = values[1, 0] = 10
            assert torch.equal(largest(values), torch.argmax(values, dim=-1)), (width, dtype)


def test_largest_is_the_first_of_the_largest():
    check_largest(largest)


@pytest.mark.parametrize("width", [100, 8 * BLOCK + 1])
def test_every_place_is_found(width):
    places = torch.arange(width)
    values = torch.zeros(width, width, dtype=torch.bfloat16)
    values[places, places] = 1
    assert torch.equal(largest(values), places)


@pytest.mark.parametrize("width", [100, 20_001])
def test_infinities_and_nan(width):
    values = torch.full((4, width), -math.inf)
    values[1, width - 1] = -1e38
    values[2, 7] = math.inf
    values[3, [50, 60]] = math.nan
    assert largest(values).tolist() == [0, width - 1, 7, 50]
    assert torch.argmax(values, dim=-1).tolist() == [0, width - 1, 7, 50]


def test_strided_rows():
    values = torch.randn(8, 30_000)[::2, 3:25_000]
    assert torch.equal(largest(values), torch.argmax(values, dim=-1))


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


def takes_the_last(values):
    return values.shape[1] - 1 - torch.argmax(values.flip(1), dim=-1)


def forgets_the_last_block(values):
    whole = max(1, values.shape[1] // BLOCK * BLOCK)
    return torch.argmax(values[:, :whole], dim=-1)


@pytest.mark.parametrize("broken", [takes_the_last, forgets_the_last_block])
def test_planted_largest_is_found(broken):
    with pytest.raises(AssertionError):
        check_largest(broken)


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
    with pytest.raises(AssertionError):
        check_largest(largest)
    with pytest.raises((AssertionError, IndexError, RuntimeError)):
        check_draws(draw_by_weight)
