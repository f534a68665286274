"""`fastgen::rope` against transformers' functions and against rotations by complex numbers."""

from __future__ import annotations

import pytest
import torch
from kernel_helpers import DTYPES, assert_accurate, call, every_implementation, randn
from transformers.models.cohere2.modeling_cohere2 import rotate_half as rotate_neighbours
from transformers.models.llama.modeling_llama import rotate_half

OP = "fastgen::rope"
LAYOUTS = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])


def tables(num_tokens, rotary_dim, interleaved, dtype=torch.float32):
    """(angles per pair [num_tokens, rotary_dim / 2], cos, sin)."""
    inverse = 10000.0 ** -torch.arange(0, 1, 2 / rotary_dim)
    angles = (torch.arange(num_tokens) + 5.0)[:, None] * inverse
    every = angles.repeat_interleave(2, -1) if interleaved else angles.repeat(1, 2)
    return angles, every.cos().to(dtype), every.sin().to(dtype)


def rotate_fp64(heads, cos, sin, interleaved):
    """Pairs as complex numbers, times cos + i sin."""
    rotary_dim = cos.shape[-1]
    wide = heads.double()[..., :rotary_dim]
    cos, sin = cos.double().unsqueeze(1), sin.double().unsqueeze(1)
    if interleaved:
        number = torch.complex(wide[..., ::2], wide[..., 1::2])
        number = number * torch.complex(cos[..., ::2], sin[..., ::2])
        rotated = torch.stack((number.real, number.imag), -1).flatten(-2)
    else:
        half = rotary_dim // 2
        number = torch.complex(wide[..., :half], wide[..., half:])
        number = number * torch.complex(cos[..., :half], sin[..., :half])
        rotated = torch.cat((number.real, number.imag), -1)
    return torch.cat((rotated, heads[..., rotary_dim:].double()), -1)


def peer(heads, cos, sin, interleaved):
    """transformers' rotation, in its layout."""
    turn = rotate_neighbours if interleaved else rotate_half
    heads_first, rotary_dim = heads.transpose(0, 1), cos.shape[-1]
    rotary, rest = heads_first[..., :rotary_dim], heads_first[..., rotary_dim:]
    rotated = (rotary * cos + turn(rotary) * sin).to(heads.dtype)
    return torch.cat((rotated, rest), -1).transpose(0, 1)


def run(name, query, key, cos, sin, interleaved):
    return call(OP, name, query=query, key=key, cos=cos, sin=sin, interleaved=interleaved)


@DTYPES
@LAYOUTS
@pytest.mark.parametrize("num_tokens", [1, 63, 100])
@pytest.mark.parametrize(
    ("heads", "head_dim", "rotary_dim"),
    [((7, 1), 64, 64), ((14, 2), 80, 80), ((4, 4), 80, 32), ((3, 1), 16, 2)],
    ids=str,
)
@pytest.mark.parametrize("wide_tables", [False, True], ids=["tables", "fp32-tables"])
@every_implementation(OP)
def test_it_is_accurate(
    name, wide_tables, heads, head_dim, rotary_dim, num_tokens, interleaved, dtype
):
    query, key = (randn(num_tokens, number, head_dim, dtype=dtype) for number in heads)
    table_dtype = torch.float32 if wide_tables else dtype
    _, cos, sin = tables(num_tokens, rotary_dim, interleaved, table_dtype)
    results = run(name, query, key, cos, sin, interleaved)
    for output, given in zip(results, (query, key), strict=True):
        expected = peer(given, cos, sin, interleaved)
        assert_accurate(output, expected, rotate_fp64(given, cos, sin, interleaved))
        assert output.is_contiguous()
        if name in ("op", "reference"):
            assert torch.equal(output, expected), "rounded where transformers rounds"


@LAYOUTS
@every_implementation(OP)
def test_it_turns_each_pair_by_its_angle(name, interleaved):
    """Against the angles themselves: norms stay, and 5 + 1 is one more turn than 5."""
    angles, cos, sin = tables(2, 8, interleaved)
    query = torch.zeros(2, 1, 8)
    pairs = query.view(2, 4, 2) if interleaved else query.view(2, 2, 4).transpose(1, 2)
    pairs[..., 0] = 1.0
    output, _ = run(name, query, query, cos, sin, interleaved)
    turned = output.view(2, 4, 2) if interleaved else output.view(2, 2, 4).transpose(1, 2)
    expected = torch.stack((angles.cos(), angles.sin()), -1)
    assert torch.equal(turned, expected)


@LAYOUTS
@every_implementation(OP)
def test_strided_inputs_equal_contiguous_ones(name, interleaved):
    """Slices of one merged projection, heads before tokens, tables that are views."""
    merged = randn(63, 18, 80, dtype=torch.bfloat16)
    query, key = merged[:, :14], merged.transpose(0, 1).contiguous().transpose(0, 1)[:, 14:16]
    _, cos, sin = tables(63, 64, interleaved, torch.bfloat16)
    cos = torch.cat((cos, cos), -1)[:, :64]
    results = run(name, query, key, cos, sin, interleaved)
    copies = (tensor.contiguous() for tensor in (query, key, cos, sin))
    for output, again in zip(results, run(name, *copies, interleaved), strict=True):
        assert torch.equal(output, again)
        assert output.is_contiguous()


@every_implementation(OP)
def test_results_are_new_and_inputs_stay(name):
    query, key = randn(5, 4, 16), randn(5, 2, 16)
    _, cos, sin = tables(5, 8, False)
    before = [tensor.clone() for tensor in (query, key, cos, sin)]
    results = run(name, query, key, cos, sin, False)
    assert len({tensor.data_ptr() for tensor in (*results, query, key)}) == 4
    for tensor, old in zip((query, key, cos, sin), before, strict=True):
        assert torch.equal(tensor, old)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"cos": torch.ones(1, 5, 16)}, "num_tokens, rotary_dim", id="three-dims"),
        pytest.param({"sin": torch.ones(5, 8)}, "num_tokens, rotary_dim", id="tables-differ"),
        pytest.param({"key": torch.ones(4, 2, 16)}, "num_tokens, rotary_dim", id="tokens"),
        pytest.param(
            {"cos": torch.ones(5, 18), "sin": torch.ones(5, 18)}, "at most head_dim", id="too-wide"
        ),
        pytest.param({"cos": torch.ones(5, 7), "sin": torch.ones(5, 7)}, "even", id="odd"),
        pytest.param({"key": torch.ones(5, 2, 16).half()}, "one dtype", id="dtypes"),
        pytest.param({"cos": torch.ones(5, 16).half()}, "one dtype", id="dtypes-of-tables"),
    ],
)
def test_what_does_not_fit_is_refused(change, message, device):
    given = {
        "query": torch.ones(5, 4, 16),
        "key": torch.ones(5, 2, 16),
        "cos": torch.ones(5, 16),
        "sin": torch.ones(5, 16),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        run("op", **{name: tensor.to(device) for name, tensor in given.items()}, interleaved=False)


@LAYOUTS
@pytest.mark.parametrize("rotary_dim", [16, 8])
def test_opcheck(rotary_dim, interleaved):
    merged = randn(5, 6, 16, dtype=torch.bfloat16)
    _, cos, sin = tables(5, rotary_dim, interleaved, torch.bfloat16)
    arguments = (merged[:, :4], merged[:, 4:], cos, sin, interleaved)
    torch.library.opcheck(torch.ops.fastgen.rope.default, arguments)


@pytest.mark.parametrize("wrong", ["other-layout", "other-way", "next-token"])
def test_planted_mistakes_are_seen(wrong):
    query, key = randn(63, 7, 64), randn(63, 1, 64)
    _, cos, sin = tables(63, 64, False)
    given = {
        "other-layout": (cos, sin, True),
        "other-way": (cos, -sin, False),
        "next-token": (cos.roll(1, 0), sin.roll(1, 0), False),
    }[wrong]
    for output, heads in zip(run("op", query, key, *given), (query, key), strict=True):
        with pytest.raises(AssertionError, match="error"):
            assert_accurate(
                output, peer(heads, cos, sin, False), rotate_fp64(heads, cos, sin, False)
            )
