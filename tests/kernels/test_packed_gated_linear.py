"""`fastgen::packed_gated_linear`: two projections in one weight, at each level of instructions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fastgen.kernels import CallSite, packing, select
from fastgen.kernels.packed_gated_linear import packed_gated_linear_cpu
from fastgen.kernels.packing import pack
from kernel_helpers import (  # noqa: F401 - settings_are_restored is a fixture for all
    assert_accurate,
    call,
    every_implementation,
    force,
    randn,
    settings_are_restored,
)
from packed_layers import (
    BF16,
    LARGE,
    LEVELS,
    ROWS,
    exact_sums,
    guarded,
    integers,
    needs_tiles,
    surrounded,
)

GATED = "fastgen::packed_gated_linear"
pytestmark = needs_tiles
ACTIVATIONS = ("silu", "gelu_tanh")
EPILOGUE = {"silu": 1, "gelu_tanh": 2}

# [outputs, inputs]: a group holds 16 outputs, and two groups are stored together; as in
# test_packed_linear.py.
SHAPES = [(1, 32), (15, 64), (16, 96), (17, 352), (33, 896), (100, 352), (200, 1792)]
WIDE = (4864, 32)


@pytest.fixture(params=LEVELS)
def level(request) -> str:
    force(request.param)
    return request.param


@pytest.fixture(params=ACTIVATIONS)
def activation(request) -> str:
    return request.param


def exact_activation(gate: torch.Tensor, activation: str) -> torch.Tensor:
    """fp64, as the formulas have it."""
    gate = gate.double()
    if activation == "silu":
        return gate * torch.sigmoid(gate)
    inner = (2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)
    return gate * torch.sigmoid(2 * inner)


def assert_products(
    output: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str
) -> None:
    """Every element within two roundings, of the activation and of the product, and a hundredth.

    What is less than 2^-125 of the gate is not told from zero, nor is an activation or product that
    is subnormal: the conversion to bf16 flushes it.
    """
    exact = exact_activation(gate, activation) * up.double()
    unit = torch.finfo(BF16).eps / 2
    allowed = (2 * unit + unit**2) * 1.01 * exact.abs()
    tiny = torch.finfo(BF16).tiny
    allowed += (gate.double() * up.double()).abs() * 2 * tiny + (up.double().abs() + 1) * tiny
    wrong = ((output.double() - exact).abs() > allowed).nonzero()
    assert len(wrong) == 0, f"{len(wrong)} elements, the first at {wrong[0].tolist()}"


class Layer:
    """Both projections of small whole numbers: what is rounded is the activation and the product.

    The biases of gate and up differ in every element.
    """

    def __init__(self, shape: tuple[int, int], rows: int, with_bias: bool = True) -> None:
        self.outputs, width = shape
        self.input = integers(rows, width, seed=1)
        self.weight = integers(2 * self.outputs, width)
        places = torch.arange(2 * self.outputs)
        bias = torch.where(places < self.outputs, places % 7 - 3, places % 11 + 5).to(BF16)
        self.bias = bias if with_bias else None
        self.packed = pack(self.weight, "gated_tiles")

    def check(self, output: torch.Tensor, activation: str) -> None:
        both = exact_sums(self.input, self.weight, self.bias)
        assert output.shape == (len(self.input), self.outputs)
        assert_products(output, *both.split(self.outputs, dim=-1), activation)

    def run(self, activation: str) -> torch.Tensor:
        return packed_gated_linear_cpu(self.input, self.packed, self.bias, self.outputs, activation)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_output_is_the_right_product(level, activation, shape, rows):
    for with_bias in (False, True):
        layer = Layer(shape, rows, with_bias)
        layer.check(layer.run(activation), activation)


@pytest.mark.parametrize(("rows", "shape"), LARGE, ids=str)
def test_inputs_of_more_than_a_megabyte(level, activation, rows, shape):
    layer = Layer(shape, rows)
    layer.check(layer.run(activation), activation)


@pytest.mark.parametrize("rows", [1, 27, 33, 65])
def test_large_outputs_go_past_the_caches(level, activation, rows):
    layer = Layer(WIDE, rows)
    layer.check(layer.run(activation), activation)


@pytest.mark.parametrize("rows", [1, 17, 33, 100])
@pytest.mark.parametrize("shape", [(1, 32), (17, 96), (33, 64), (100, 352), (2048, 32)], ids=str)
@pytest.mark.parametrize(("offset", "gap"), [(0, 0), (0, 32), (1, 0), (16, 7)])
def test_nothing_is_written_elsewhere(level, activation, offset, gap, shape, rows):
    layer = Layer(shape, rows)
    output = guarded(
        layer.input,
        layer.packed,
        layer.bias,
        layer.outputs,
        EPILOGUE[activation],
        gap=gap,
        offset=offset,
    )
    layer.check(output, activation)


@pytest.mark.parametrize("rows", [1, 5, 33, 100])
@pytest.mark.parametrize("shape", [(1, 32), (17, 96), (100, 352)], ids=str)
def test_what_lies_around_the_input_and_the_bias_is_not_read(level, activation, shape, rows):
    layer = Layer(shape, rows)
    expected = layer.run(activation)
    layer.input = surrounded(layer.input)
    layer.bias = surrounded(layer.bias, before=1)
    assert torch.equal(layer.run(activation), expected)


@pytest.mark.parametrize("rows", [1, 32, 100])
@pytest.mark.parametrize("shape", [(17, 96), (100, 352), (200, 1792), WIDE], ids=str)
@pytest.mark.parametrize("num_threads", [2, 3, 9])
def test_threads_share_the_outputs(level, num_threads, shape, rows):
    layer = Layer(shape, rows)
    expected = layer.run("silu")
    torch.set_num_threads(num_threads)
    assert torch.equal(layer.run("silu"), expected)


@pytest.mark.parametrize("shape", [(17, 352), (200, 1792)], ids=str)
def test_a_row_has_the_same_bits_whatever_rows_are_with_it(level, activation, shape):
    outputs, width = shape
    packed = pack((randn(2 * outputs, width) / width**0.5).to(BF16), "gated_tiles")
    bias, input = randn(2 * outputs, dtype=BF16, seed=2), randn(300, width, dtype=BF16, seed=1)
    together = packed_gated_linear_cpu(input, packed, bias, outputs, activation)
    for start, stop in [(0, 1), (7, 9), (3, 8), (50, 66), (90, 107), (0, 32), (9, 42), (299, 300)]:
        some = packed_gated_linear_cpu(input[start:stop], packed, bias, outputs, activation)
        assert torch.equal(some, together[start:stop]), f"rows {start} to {stop}"


def every_number() -> torch.Tensor:
    """All finite bf16 but the subnormal ones, which the dot products take as zero."""
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(BF16)
    return numbers[numbers.isfinite() & (numbers.abs() >= torch.finfo(BF16).tiny)]


def test_the_activation_of_every_number(level, activation):
    """The weight hands the input through: its first column is the gate, its second is up."""
    gate = every_number()
    up = torch.tensor([1.0, -2.5, 0.25]).to(BF16)[torch.arange(len(gate)) % 3]
    input = torch.zeros(len(gate), 32, dtype=BF16)
    input[:, 0], input[:, 1] = gate, up
    weight = torch.zeros(2, 32, dtype=BF16)
    weight[0, 0] = weight[1, 1] = 1
    output = packed_gated_linear_cpu(input, pack(weight, "gated_tiles"), None, 1, activation)
    keep = gate.abs() < torch.finfo(BF16).max / 4  # else the product is infinite
    assert_products(output[keep], gate[keep, None], up[keep, None], activation)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("rows", [1, 4, 18, 40])
def test_what_is_not_finite_stays_in_its_row(level, activation, rows, value):
    layer = Layer((20, 96), rows)
    expected = layer.run(activation)
    for row in {0, rows // 2, rows - 1}:
        layer.input = integers(rows, 96, seed=1)
        layer.weight[:, 70] = 1  # no product of zero and infinity
        layer.packed = pack(layer.weight, "gated_tiles")
        expected = layer.run(activation)
        layer.input[row, 70] = value
        output = layer.run(activation)
        others = torch.arange(rows) != row
        assert torch.equal(output[others], expected[others])
        assert not output[row].isfinite().any()


# All implementations.


@pytest.mark.parametrize("rows", [1, 2, 63, 300])
@pytest.mark.parametrize("shape", [(48, 32), (1, 64), (33, 352), (100, 896)], ids=str)
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@every_implementation(GATED)
def test_every_implementation_is_accurate(name, activation, with_bias, shape, rows):
    outputs, width = shape
    weight = (randn(2 * outputs, width) * 2 / width**0.5).to(BF16)
    bias = randn(2 * outputs, dtype=BF16, seed=2) if with_bias else None
    input = randn(rows, width, dtype=BF16, seed=1)
    gate, up = F.linear(input, weight, bias).split(outputs, dim=-1)
    peer = (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up
    both = input.double() @ weight.double().T + (0 if bias is None else bias.double())
    exact_gate, exact_up = both.split(outputs, dim=-1)
    output = call(
        GATED,
        name,
        input=input,
        weight=pack(weight, "gated_tiles"),
        bias=bias,
        out_features=outputs,
        activation=activation,
    )
    assert_accurate(output, peer, exact_activation(exact_gate, activation) * exact_up)
    assert output.is_contiguous()


INPUTS = {
    "one-row": lambda: integers(1, 64, seed=1)[0],
    "3-d": lambda: integers(2, 3, 64, seed=1),
    "3-d-strided": lambda: integers(2, 3, 192, seed=1)[..., 64:128],
    "columns": lambda: integers(9, 192, seed=1)[:, 64:128],
    "transposed": lambda: integers(64, 9, seed=1).T,
    "transposed-dimension-of-one": lambda: integers(1, 2, 64, seed=1).transpose(0, 1),
    "no-rows": lambda: integers(0, 64),
}


@pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS)
@every_implementation(GATED)
def test_inputs_of_any_shape(name, activation, make):
    input, weight, bias = make(), integers(80, 64), integers(80, seed=3)
    packed = pack(weight, "gated_tiles")
    output = call(
        GATED,
        name,
        input=input,
        weight=packed,
        bias=bias,
        out_features=40,
        activation=activation,
    )
    assert output.shape == (*input.shape[:-1], 40)
    assert output.is_contiguous()
    flat = call(
        GATED,
        name,
        input=input.reshape(-1, 64).contiguous(),
        weight=packed,
        bias=bias,
        out_features=40,
        activation=activation,
    )
    assert torch.equal(output.view(-1, 40), flat)
    if name == "cpu" and input.numel():
        gate, up = exact_sums(input, weight, bias).split(40, dim=-1)
        assert_products(output, gate, up, activation)


def test_opcheck():
    arguments = integers(5, 64), pack(integers(80, 64), "gated_tiles"), integers(80), 40, "silu"
    torch.library.opcheck(torch.ops.fastgen.packed_gated_linear.default, arguments)


def test_another_activation_is_refused_by_its_name():
    layer = Layer((16, 32), 2)
    with pytest.raises(ValueError, match=r"one of \['silu', 'gelu_tanh'\], got 'relu'"):
        torch.ops.fastgen.packed_gated_linear(layer.input, layer.packed, None, 16, "relu")


@pytest.mark.parametrize("changed", ["input", "bias"])
def test_our_kernel_takes_bf16_alone(changed):
    layer = Layer((16, 32), 2)
    arguments = {
        "input": layer.input,
        "weight": layer.packed,
        "bias": layer.bias,
        "out_features": 16,
        "activation": "silu",
    }
    device = torch.device("cpu")
    assert select(GATED, CallSite(device, arguments)).implementation.name == "cpu"
    arguments[changed] = arguments[changed].float()
    choice = select(GATED, CallSite(device, arguments))
    assert dict(choice.refused) == {"cpu": f"{changed} is float32"}


def test_the_generic_level_reads_tiles_by_the_reference(monkeypatch):
    layer = Layer((16, 32), 2)
    monkeypatch.setattr(packing.cpu, "isa", lambda: "generic")
    arguments = {"input": layer.input, "weight": layer.packed, "bias": None}
    choice = select(GATED, CallSite(torch.device("cpu"), arguments))
    assert choice.implementation.name == "reference"
    assert dict(choice.refused) == {"cpu": "the C++ kernels have no bf16 instructions here"}
