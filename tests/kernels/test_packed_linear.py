"""`fastgen::packed_linear`, and packing itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fastgen.kernels.packed_linear import pack, unpack, why_not_packed
from kernel_helpers import assert_accurate, call, every_implementation, randn

LINEAR = "fastgen::packed_linear"
needs_packing = pytest.mark.skipif(
    (reason := why_not_packed(torch.empty(1, 1, dtype=torch.bfloat16))) is not None,
    reason=f"weights are not packed here: {reason}",
)


@needs_packing
@pytest.mark.parametrize("rows", [1, 2, 63, 100, 300])
@pytest.mark.parametrize("shape", [(64, 48), (100, 33), (1, 7), (257, 896)], ids=str)
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@every_implementation(LINEAR)
def test_packed_linear_is_accurate(name, with_bias, shape, rows):
    weight, bias = randn(*shape, dtype=torch.bfloat16), randn(shape[0], dtype=torch.bfloat16)
    given = bias if with_bias else None
    input = randn(rows, shape[1], dtype=torch.bfloat16, seed=1)
    exact = input.double() @ weight.double().T + (bias.double() if with_bias else 0)
    output = call(LINEAR, name, input=input, weight=pack(weight), bias=given)
    assert_accurate(output, F.linear(input, weight, given), exact)
    assert output.is_contiguous()


@needs_packing
@every_implementation(LINEAR)
def test_any_leading_dimensions(name):
    weight = pack(randn(40, 64, dtype=torch.bfloat16))
    input = randn(2, 3, 64, dtype=torch.bfloat16)
    output = call(LINEAR, name, input=input, weight=weight, bias=None)
    flat = call(LINEAR, name, input=input.view(6, 64), weight=weight, bias=None)
    assert output.shape == (2, 3, 40)
    assert torch.equal(output.view(6, 40), flat)


@needs_packing
@every_implementation(LINEAR)
def test_no_rows(name):
    """As the head of a step that only computes a part of a prompt."""
    weight = pack(randn(40, 64, dtype=torch.bfloat16))
    input = randn(1, 0, 64, dtype=torch.bfloat16)
    assert call(LINEAR, name, input=input, weight=weight, bias=None).shape == (1, 0, 40)


@needs_packing
@every_implementation(LINEAR)
def test_a_strided_input(name):
    weight = pack(randn(40, 64, dtype=torch.bfloat16))
    input = randn(9, 3 * 64, dtype=torch.bfloat16)[:, 64:128]
    output = call(LINEAR, name, input=input, weight=weight, bias=None)
    expected = call(LINEAR, name, input=input.contiguous(), weight=weight, bias=None)
    assert torch.equal(output, expected)


@needs_packing
@pytest.mark.parametrize("shape", [(64, 48), (100, 33), (1, 7), (257, 896)], ids=str)
def test_unpacking_gives_the_weight_back_bit_for_bit(shape):
    weight = randn(*shape, dtype=torch.bfloat16)
    assert torch.equal(unpack(pack(weight)), weight)


@needs_packing
def test_a_packed_weight_is_a_copy():
    weight = torch.nn.Parameter(randn(64, 48, dtype=torch.bfloat16))
    packed, before = pack(weight), weight.detach().clone()
    with torch.no_grad():
        weight.zero_()
    assert torch.equal(unpack(packed), before)
    assert not packed.requires_grad


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (torch.empty(2, 2), "the weight is float32"),
        (torch.empty(2, 2, dtype=torch.float16), "the weight is float16"),
        (torch.empty(2, 2, dtype=torch.bfloat16, device="meta"), "the weight is on meta"),
    ],
    ids=["fp32", "fp16", "meta"],
)
def test_what_is_not_packed(weight, reason):
    assert why_not_packed(weight) == reason


def test_opcheck_with_a_plain_weight():
    """A weight that is not packed is taken as it is, by the op itself."""
    arguments = randn(5, 16), randn(8, 16, seed=1), randn(8, seed=2)
    torch.library.opcheck(torch.ops.fastgen.packed_linear.default, arguments)
