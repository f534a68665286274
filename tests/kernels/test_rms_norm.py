"""`fastgen::rms_norm` and `add_rms_norm` against transformers' modules and against fp64."""

from __future__ import annotations

import pytest
import torch
from kernel_helpers import DTYPES, assert_accurate, call, every_implementation, randn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

EPS = 1e-5
NORM, ADD_NORM = "fastgen::rms_norm", "fastgen::add_rms_norm"
# (weight_offset, cast_first) of transformers' module
MODULES = pytest.mark.parametrize(
    ("module", "offset", "first"),
    [
        pytest.param(LlamaRMSNorm, 0.0, True, id="llama"),
        pytest.param(Olmo2RMSNorm, 0.0, False, id="olmo2"),
        pytest.param(Gemma2RMSNorm, 1.0, False, id="gemma2"),
    ],
)
SHAPES = pytest.mark.parametrize(
    "shape", [(1, 64), (63, 80), (1, 100, 896), (2, 3, 7, 16)], ids=str
)


def peer(module, input, weight):
    norm = module(weight.numel(), eps=EPS)
    norm.weight = torch.nn.Parameter(weight, requires_grad=False)
    return norm(input)


def norm_fp64(input, weight, offset):
    wide = input.double()
    wide = wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt()
    return wide if weight is None else wide * (weight.double() + offset)


def run(name, input, weight, offset=0.0, first=False):
    return call(
        NORM, name, input=input, weight=weight, eps=EPS, weight_offset=offset, cast_first=first
    )


def run_sum(name, input, residual, weight, offset=0.0, first=False):
    return call(
        ADD_NORM,
        name,
        input=input,
        residual=residual,
        weight=weight,
        eps=EPS,
        weight_offset=offset,
        cast_first=first,
    )


@DTYPES
@SHAPES
@MODULES
@every_implementation(NORM)
def test_norm_is_accurate(name, module, offset, first, shape, dtype):
    input, weight = randn(*shape, dtype=dtype), randn(shape[-1], dtype=dtype, seed=1)
    output, expected = run(name, input, weight, offset, first), peer(module, input, weight)
    assert_accurate(output, expected, norm_fp64(input, weight, offset))
    if name in ("op", "reference"):
        assert torch.equal(output, expected), "the reference rounds where transformers does"


@DTYPES
@SHAPES
@MODULES
@every_implementation(ADD_NORM)
def test_norm_of_a_sum_is_accurate(name, module, offset, first, shape, dtype):
    input, residual = randn(*shape, dtype=dtype), randn(*shape, dtype=dtype, seed=2)
    weight = randn(shape[-1], dtype=dtype, seed=1)
    normed, total = run_sum(name, input, residual, weight, offset, first)
    assert torch.equal(total, input + residual)
    expected = peer(module, input + residual, weight)
    assert_accurate(normed, expected, norm_fp64(input + residual, weight, offset))
    if name in ("op", "reference"):
        assert torch.equal(normed, expected)


@DTYPES
@every_implementation(NORM)
def test_without_a_weight(name, dtype):
    input = randn(63, 80, dtype=dtype)
    expected = peer(Olmo2RMSNorm, input, torch.ones(80, dtype=dtype))
    assert_accurate(run(name, input, None), expected, norm_fp64(input, None, 0.0))


def strided() -> dict[str, torch.Tensor]:
    merged = randn(1, 63, 160, dtype=torch.bfloat16)
    heads = merged[..., :80].unflatten(-1, (5, 16))
    return {
        "slice": merged[..., 32:112],
        "heads": heads,
        "heads-first": heads.transpose(1, 2),
        "every-second": merged[..., ::2],
        "one-row": merged[:, :1, :80],
    }


@pytest.mark.parametrize("layout", strided())
@every_implementation(NORM)
def test_strided_inputs_equal_contiguous_ones(name, layout):
    input = strided()[layout]
    weight = randn(input.shape[-1], dtype=input.dtype)
    output = run(name, input, weight, first=True)
    assert torch.equal(output, run(name, input.contiguous(), weight, first=True))
    like = torch.empty_like(input)
    long = [dim for dim, size in enumerate(input.shape) if size > 1]
    assert [output.stride(dim) for dim in long] == [like.stride(dim) for dim in long]


@every_implementation(NORM)
def test_large_and_zero_rows(name):
    """The square of a large fp16 number is none: the mean is taken in fp32."""
    input = torch.zeros(2, 64, dtype=torch.float16)
    input[0] = 6e4
    output = run(name, input, None)
    assert torch.equal(output[1], torch.zeros(64, dtype=torch.float16))
    assert torch.equal(output[0], torch.ones(64, dtype=torch.float16))


@every_implementation(ADD_NORM)
def test_results_are_new_and_inputs_stay(name):
    input, residual, weight = randn(5, 16), randn(5, 16, seed=1), randn(16, seed=2)
    before = [tensor.clone() for tensor in (input, residual, weight)]
    results = [*run_sum(name, input, residual, weight), run("op", input, None)]
    assert len({tensor.data_ptr() for tensor in (*results, input, residual, weight)}) == 6
    for tensor, old in zip((input, residual, weight), before, strict=True):
        assert torch.equal(tensor, old)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"weight": torch.ones(4, 8)}, "weight must be", id="two-dims"),
        pytest.param({"weight": torch.ones(4)}, "weight must be", id="width"),
        pytest.param({"weight": torch.ones(8).half()}, "weight must be", id="dtype"),
        pytest.param({"offset": 1.0, "first": True}, "cast_first must be False", id="offset"),
        pytest.param({"weight": None, "offset": 1.0}, "needs a weight", id="offset-of-nothing"),
        pytest.param({"residual": torch.ones(1, 8)}, "one shape and dtype", id="residual-shape"),
        pytest.param({"residual": torch.ones(4, 8).half()}, "one shape", id="residual-dtype"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message, device):
    given = {"weight": torch.ones(8), "residual": torch.ones(4, 8), "offset": 0.0, "first": False}
    given = {
        key: value.to(device) if isinstance(value, torch.Tensor) else value
        for key, value in {**given, **arguments}.items()
    }
    input, residual = torch.ones(4, 8, device=device), given.pop("residual")
    with pytest.raises(ValueError, match=message):
        run_sum("op", input, residual, **given)
    if "residual" not in arguments:
        with pytest.raises(ValueError, match=message):
            run("op", input, **given)


@pytest.mark.parametrize("layout", strided())
def test_opcheck(layout):
    input = strided()[layout]
    weight = randn(input.shape[-1], dtype=input.dtype)
    for settings in ((None, EPS, 0.0, False), (weight, EPS, 0.0, True), (weight, EPS, 1.0, False)):
        torch.library.opcheck(torch.ops.fastgen.rms_norm.default, (input, *settings))
    torch.library.opcheck(
        torch.ops.fastgen.add_rms_norm.default, (input, input * 2, weight, EPS, 0.0, True)
    )


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param({"offset": 0.0}, id="offset-dropped"),
        pytest.param({"input": randn(63, 80).roll(1, -1)}, id="other-input"),
        pytest.param({"weight": None, "offset": 0.0}, id="weight-dropped"),
    ],
)
def test_planted_mistakes_are_seen(wrong):
    right = {"input": randn(63, 80), "weight": randn(80, seed=1), "offset": 1.0}
    expected = peer(Gemma2RMSNorm, right["input"], right["weight"])
    with pytest.raises(AssertionError, match="error"):
        assert_accurate(run("op", **{**right, **wrong}), expected, norm_fp64(**right))
