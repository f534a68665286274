"""The product of rows in groups with the weight of each group."""

from __future__ import annotations

import pytest
import torch
from fastgen.kernels import grouped_mm, select
from fastgen.kernels.registry import CallSite


def example(dtype=torch.float32, sizes=(3, 0, 5, 1), extra: int = 2):
    torch.manual_seed(0)
    offsets = torch.tensor(sizes).cumsum(0).int()
    rows = int(offsets[-1]) + extra
    input = torch.randn(rows, 63, dtype=dtype)
    weight = torch.randn(len(sizes), 100, 63, dtype=dtype).transpose(1, 2)  # strided
    return input, weight, offsets


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_each_group_by_its_weight(dtype):
    input, weight, offsets = example(dtype)
    output, start = grouped_mm(input, weight, offsets), 0
    for expert, end in enumerate(offsets.tolist()):
        assert torch.equal(output[start:end], input[start:end] @ weight[expert])
        start = end
    assert not output[start:].any()
    assert (output.dtype, output.is_contiguous()) == (dtype, True)


def test_it_is_what_transformers_does():
    moe = pytest.importorskip("transformers.integrations.moe")
    given = example()
    assert torch.equal(grouped_mm(*given), moe._grouped_mm_fallback(*given))


def test_the_op_is_well_formed():
    torch.library.opcheck(torch.ops.fastgen.grouped_mm.default, example())


def test_the_reference_runs_it():
    given = dict(zip(("input", "weight", "offsets"), example(), strict=True))
    choice = select("fastgen::grouped_mm", CallSite(torch.device("cpu"), given))
    assert choice.implementation.name == "reference"
