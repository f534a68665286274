"""`fastgen::silu_mul` and `gelu_mul` against what models write and against fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kernel_helpers import DTYPES, assert_accurate, call, every_implementation, randn

SILU, GELU = "fastgen::silu_mul", "fastgen::gelu_mul"
SHAPES = pytest.mark.parametrize("shape", [(1, 64), (63, 80), (1, 100, 4864)], ids=str)
TANH = pytest.mark.parametrize("tanh", [False, True], ids=["erf", "tanh"])


def silu_fp64(gate, up):
    gate = gate.double()
    return gate / (1 + torch.exp(-gate)) * up.double()


def gelu_fp64(gate, up, tanh):
    gate = gate.double()
    if tanh:
        inner = (2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)
        return 0.5 * gate * (1 + torch.tanh(inner)) * up.double()
    return 0.5 * gate * (1 + torch.erf(gate / 2**0.5)) * up.double()


@DTYPES
@SHAPES
@every_implementation(SILU)
def test_silu_mul_is_accurate(name, shape, dtype):
    gate, up = randn(*shape, dtype=dtype) * 3, randn(*shape, dtype=dtype, seed=1)
    output, expected = call(SILU, name, gate=gate, up=up), F.silu(gate) * up
    assert_accurate(output, expected, silu_fp64(gate, up))
    if name in ("op", "reference"):
        assert torch.equal(output, expected)


@DTYPES
@SHAPES
@TANH
@every_implementation(GELU)
def test_gelu_mul_is_accurate(name, tanh, shape, dtype):
    gate, up = randn(*shape, dtype=dtype) * 3, randn(*shape, dtype=dtype, seed=1)
    output = call(GELU, name, gate=gate, up=up, tanh=tanh)
    expected = F.gelu(gate, approximate="tanh" if tanh else "none") * up
    assert_accurate(output, expected, gelu_fp64(gate, up, tanh))
    if name in ("op", "reference"):
        assert torch.equal(output, expected)


def strided() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    merged = randn(1, 63, 160, dtype=torch.bfloat16)
    gate, up = merged.chunk(2, dim=-1)
    return {
        "halves": (gate, up),
        "neighbours": (merged[..., ::2], merged[..., 1::2]),
        "transposed": (gate.transpose(1, 2), up.transpose(1, 2)),
        "one-row": (gate[:, :1], up[:, :1]),
    }


@pytest.mark.parametrize("layout", strided())
@every_implementation(SILU)
def test_strided_silu_mul(name, layout):
    gate, up = strided()[layout]
    output = call(SILU, name, gate=gate, up=up)
    assert output.is_contiguous()
    assert torch.equal(output, call(SILU, name, gate=gate.contiguous(), up=up.contiguous()))


@pytest.mark.parametrize("layout", strided())
@every_implementation(GELU)
def test_strided_gelu_mul(name, layout):
    gate, up = strided()[layout]
    output = call(GELU, name, gate=gate, up=up, tanh=True)
    assert output.is_contiguous()
    again = call(GELU, name, gate=gate.contiguous(), up=up.contiguous(), tanh=True)
    assert torch.equal(output, again)


@every_implementation(SILU)
def test_large_gates_give_no_nan(name):
    gate = torch.tensor([[-1e4, -80.0, 0.0, 80.0, 6e4]], dtype=torch.float16)
    output = call(SILU, name, gate=gate, up=torch.ones_like(gate))
    assert torch.equal(output, torch.tensor([[0.0, 0.0, 0.0, 80.0, 6e4]], dtype=torch.float16))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    "up", [torch.ones(4, 1), torch.ones(4, 8).half()], ids=["broadcast", "dtypes"]
)
def test_what_does_not_fit_is_refused(up, device):
    gate, up = torch.ones(4, 8, device=device), up.to(device)
    with pytest.raises(ValueError, match="one shape and dtype"):
        call(SILU, "op", gate=gate, up=up)
    with pytest.raises(ValueError, match="one shape and dtype"):
        call(GELU, "op", gate=gate, up=up, tanh=False)


@pytest.mark.parametrize("layout", strided())
def test_opcheck(layout):
    gate, up = strided()[layout]
    torch.library.opcheck(torch.ops.fastgen.silu_mul.default, (gate, up))
    torch.library.opcheck(torch.ops.fastgen.gelu_mul.default, (gate, up, True))


def test_planted_mistakes_are_seen():
    gate, up = randn(63, 80), randn(63, 80, seed=1)
    swapped = call(SILU, "op", gate=up, up=gate)
    with pytest.raises(AssertionError, match="error"):
        assert_accurate(swapped, F.silu(gate) * up, silu_fp64(gate, up))
    for tanh in (False, True):
        wrong = call(GELU, "op", gate=gate, up=up, tanh=not tanh)
        peer = call(GELU, "op", gate=gate, up=up, tanh=tanh)
        with pytest.raises(AssertionError, match="error"):
            assert_accurate(wrong, peer, gelu_fp64(gate, up, tanh))
