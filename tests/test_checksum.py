"""Checksums of weights: which changes they see, in every dtype and layout."""

import pytest
import torch

from fastgen.checksum import checksums, words_of

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8, torch.bool]


def sums(tensor: torch.Tensor, whole: bool = True) -> tuple[int, ...]:
    return checksums(words_of(tensor, whole))


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(shape, generator=generator) * 8).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 3, 63, 4096, 40_001])
def test_any_single_element_counts(dtype, size):
    tensor = random(size, dtype=dtype)
    before = sums(tensor)
    assert sums(tensor.clone()) == before
    for place in {0, size // 2, size - 1}:
        changed = tensor.clone()
        changed[place] = 1 - changed[place].int() % 2
        assert (sums(changed) == before) == torch.equal(changed, tensor), place


REARRANGED = {
    "negated": torch.neg,
    "reversed": lambda tensor: tensor.flip(0),
    "rows-swapped": lambda tensor: tensor[torch.tensor([1, 0, *range(2, len(tensor))])],
    "halves-swapped": lambda tensor: torch.roll(tensor, len(tensor) // 2, 0),
}


@pytest.mark.parametrize("change", REARRANGED.values(), ids=REARRANGED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("whole", [True, False], ids=["full", "sampled"])
def test_signs_and_places_count(change, dtype, whole):
    """What a plain sum would miss: negating an even number of float64s, swapping rows."""
    tensor = random(128, 256, dtype=dtype)
    assert sums(change(tensor), whole) != sums(tensor, whole)


@pytest.mark.parametrize("pages", [1, 2, 3, 300])
@pytest.mark.parametrize("extra", [0, 1, 16, 1000])
def test_sampled_looks_at_a_line_of_every_page(pages, extra):
    tensor = random(pages * 1024 + extra)
    before = sums(tensor, whole=False)
    for page in {0, pages // 2, pages - 1}:
        changed = tensor.clone()
        changed[page * 1024 + 7] += 1
        assert sums(changed, whole=False) != before, page
    looked_at = sum(view.nbytes for view in words_of(tensor, whole=False))
    lines = pages + (extra >= 16)
    assert looked_at == (4096 if tensor.nbytes <= 4096 else 64 * lines)


LAYOUTS = {
    "transposed": lambda: random(30, 50).t(),
    "slice": lambda: random(30, 50)[3:7, 5:9],
    "strided": lambda: random(500)[1::3],
    "expanded": lambda: random(1, 5).expand(7, 5),
    "odd-offset": lambda: random(501, dtype=torch.bfloat16)[1:],
    "scalar": lambda: random(),
}


@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(make):
    tensor = make()
    before = sums(tensor)
    tensor[(-1,) * tensor.dim()] += 1
    assert sums(tensor) != before


def test_nothing_has_no_sum():
    assert sums(torch.empty(0, 4)) == ()


def test_views_copy_nothing():
    tensor = random(100, 4096)
    for whole in (True, False):
        (storage,) = {v.untyped_storage().data_ptr() for v in words_of(tensor, whole)}
        assert storage == tensor.untyped_storage().data_ptr()
