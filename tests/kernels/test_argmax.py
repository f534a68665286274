"""`fastgen::argmax`: as torch.argmax, ties and NaN included."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_helpers import call, every_implementation, randn

ARGMAX = "fastgen::argmax"
BLOCK = 512  # of the C++ kernel
WIDTHS = [1, 2, 100, BLOCK - 1, BLOCK, BLOCK + 1, 20_001, 151_936]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@every_implementation(ARGMAX)
def test_the_first_of_the_largest(name, width, dtype):
    generator = torch.Generator().manual_seed(width)
    values = torch.randint(-3, 4, (3, width), generator=generator).to(dtype)
    first = (values == values.amax(dim=-1, keepdim=True)).int().argmax(dim=-1)
    assert torch.equal(call(ARGMAX, name, input=values), first)
    values = randn(3, width, dtype=dtype, seed=width)
    values[0, -1] = values[1, 0] = 10
    assert torch.equal(call(ARGMAX, name, input=values), torch.argmax(values, dim=-1))


@pytest.mark.parametrize("width", [100, 2 * BLOCK + 1])
@every_implementation(ARGMAX)
def test_every_place_is_found(name, width):
    places = torch.arange(width)
    values = torch.zeros(width, width, dtype=torch.bfloat16)
    values[places, places] = 1
    assert torch.equal(call(ARGMAX, name, input=values), places)


@pytest.mark.parametrize("width", [100, 20_001])
@every_implementation(ARGMAX)
def test_infinities_and_nan(name, width):
    values = torch.full((5, width), -math.inf)
    values[1, width - 1] = -1e38
    values[2, 7] = math.inf
    values[3, [50, 60]] = math.nan
    values[4, [5, 60]] = torch.tensor([math.inf, math.nan])
    assert call(ARGMAX, name, input=values).tolist() == [0, width - 1, 7, 50, 60]
    assert torch.argmax(values, dim=-1).tolist() == [0, width - 1, 7, 50, 60]


@every_implementation(ARGMAX)
def test_strided_rows(name):
    values = randn(8, 30_000)[::2, 3:25_000]
    assert torch.equal(call(ARGMAX, name, input=values), torch.argmax(values, dim=-1))


@every_implementation(ARGMAX)
def test_no_rows(name):
    assert call(ARGMAX, name, input=torch.empty(0, 7)).shape == (0,)


def test_opcheck():
    torch.library.opcheck(torch.ops.fastgen.argmax.default, (randn(3, 40),))
