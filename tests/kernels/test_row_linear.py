"""`fastgen::row_linear` and `row_grouped_linear`: right sums. Equal ones: test_batch_invariant."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fastgen.kernels import CallSite, select
from kernel_helpers import (  # noqa: F401 - settings_are_restored is a fixture for all
    DTYPES,
    assert_accurate,
    call,
    every_implementation,
    randn,
    settings_are_restored,
)

LINEAR, GROUPED = "fastgen::row_linear", "fastgen::row_grouped_linear"
# [outputs, inputs]: parts of a vector, of a block of outputs, and sums of several parts.
SHAPES = [(1, 1), (3, 5), (4, 16), (33, 83), (64, 896), (31, 4096)]
ROWS = (1, 3, 4, 9)


@every_implementation(LINEAR)
@DTYPES
@pytest.mark.parametrize("turned", [False, True], ids=["by input", "by output"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_are_as_accurate_as_torchs(name, dtype, shape, turned):
    weight = randn(*shape, dtype=dtype)
    weight = weight.t().contiguous().t() if turned else weight
    for rows in ROWS:
        input = randn(rows, shape[1], dtype=dtype, seed=rows)
        for bias in (None, randn(shape[0], dtype=dtype, seed=2)):
            output = call(LINEAR, name, input=input, weight=weight, bias=bias)
            wide = None if bias is None else bias.double()
            exact = F.linear(input.double(), weight.double(), wide)
            assert_accurate(output, F.linear(input, weight, bias), exact)


@every_implementation(LINEAR)
def test_strided_inputs_and_leading_dimensions(name):
    weight = randn(9, 20)
    for input in (randn(2, 3, 20), randn(3, 2, 20).transpose(0, 1), randn(20, 6).t(),
                  randn(6, 25)[:, 3:23], randn(1, 7, 20), randn(0, 20)):  # fmt: skip
        output = call(LINEAR, name, input=input, weight=weight, bias=None)
        assert output.shape == (*input.shape[:-1], 9)
        assert output.is_contiguous()
        assert torch.allclose(output, input @ weight.t(), atol=1e-5)


def test_nothing_is_read_around_the_operands():
    """NaN lies before and behind every row of input and weight."""
    around = torch.full((9, 60), float("nan"))
    input = around[1:4, 7:30].copy_(randn(3, 23))
    weight = torch.full((9, 60), float("nan"))[1:7, 5:28].copy_(randn(6, 23, seed=1))
    by_output = torch.full((60, 60), float("nan"))[3:26, 5:11].copy_(weight.t()).t()
    for given in (weight, by_output):
        output = call(LINEAR, "cpu", input=input, weight=given, bias=None)
        assert torch.allclose(output, input @ weight.t(), atol=1e-5)


@every_implementation(GROUPED)
@DTYPES
@pytest.mark.parametrize("turned", [False, True], ids=["by output", "by input"])
def test_each_row_meets_its_expert(name, dtype, turned):
    weight = randn(4, 40, 24, dtype=dtype)
    weight = weight.transpose(1, 2).contiguous().transpose(1, 2) if turned else weight
    input, offsets = randn(12, 40, dtype=dtype, seed=1), torch.tensor([3, 3, 8, 10])
    output = call(GROUPED, name, input=input, weight=weight, offsets=offsets)
    expert = torch.tensor([0] * 3 + [2] * 5 + [3] * 2)
    exact = torch.einsum("rk,rkn->rn", input[:10].double(), weight[expert].double())
    peer = torch.einsum("rk,rkn->rn", input[:10].float(), weight[expert].float()).to(dtype)
    assert_accurate(output[:10], peer, exact)
    assert not output[10:].any()


def test_opcheck():
    torch.library.opcheck(torch.ops.fastgen.row_linear.default, (randn(3, 8), randn(4, 8), None))
    arguments = (randn(3, 8), randn(2, 8, 4), torch.tensor([1, 3], dtype=torch.int32))
    torch.library.opcheck(torch.ops.fastgen.row_grouped_linear.default, arguments)


def test_batch_invariance_leaves_one_implementation():
    arguments = {"input": randn(2, 8), "weight": randn(4, 8), "bias": None}
    choice = select(LINEAR, CallSite(torch.device("cpu"), arguments, batch_invariant=True))
    assert choice.implementation.name == "cpu"
    mixed = {**arguments, "weight": randn(4, 8, dtype=torch.bfloat16)}
    with pytest.raises(ValueError, match="reference: its result depends on what else is in"):
        select(LINEAR, CallSite(torch.device("cpu"), mixed, batch_invariant=True))
