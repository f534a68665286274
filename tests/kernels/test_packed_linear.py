"""`fastgen::packed_linear`: our own kernel at each level of instructions, and the others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fastgen.kernels import CallSite, packing, select
from fastgen.kernels.packed_linear import packed_linear_cpu
from fastgen.kernels.packing import pack, why_not_packed
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

LINEAR = "fastgen::packed_linear"
PACKED = why_not_packed(torch.empty(1, 32, dtype=BF16))
needs_packing = pytest.mark.skipif(PACKED is not None, reason=f"nothing is packed here: {PACKED}")

# [outputs, inputs]: one group and step, parts of groups, odd numbers of groups, more steps than are
# multiplied at once (352, 1024), and a weight of which 300 rows meet a part at a time (1792).
SHAPES = [(1, 32), (16, 64), (31, 96), (32, 352), (33, 896), (100, 1024), (400, 1792)]
# From 256 KiB of output on, whole cache lines are written past the caches.
WIDE = (9728, 32)


@pytest.fixture(params=LEVELS)
def level(request) -> str:
    force(request.param)
    return request.param


def layer(shape: tuple[int, int], with_bias: bool = True):
    """Weight, bias and packed weight, with outputs about as large as the bias."""
    weight = (randn(*shape) / shape[1] ** 0.5).to(BF16)
    return weight, randn(shape[0], dtype=BF16, seed=2) if with_bias else None, pack(weight)


# Exact sums: where each number goes.


@needs_tiles
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", [*SHAPES, WIDE], ids=str)
def test_every_output_is_the_right_sum(level, shape, rows):
    input, weight = integers(rows, shape[1], seed=1), integers(*shape)
    bias = torch.arange(shape[0]).remainder(97).sub(48).to(BF16)
    packed = pack(weight)
    for given in (None, bias):
        output = packed_linear_cpu(input, packed, given, shape[0])
        assert torch.equal(output, exact_sums(input, weight, given))


@needs_tiles
@pytest.mark.parametrize(("rows", "shape"), LARGE, ids=str)
def test_inputs_of_more_than_a_megabyte(level, rows, shape):
    input, weight, bias = integers(rows, shape[1], seed=1), integers(*shape), integers(shape[0])
    output = guarded(input, pack(weight), bias, shape[0])
    assert torch.equal(output, exact_sums(input, weight, bias))


@needs_tiles
@pytest.mark.parametrize("rows", [1, 17, 33, 100])
@pytest.mark.parametrize("shape", [(1, 32), (33, 96), (100, 352), (4100, 32)], ids=str)
@pytest.mark.parametrize(("offset", "gap"), [(0, 0), (0, 32), (1, 0), (16, 7)])
def test_nothing_is_written_elsewhere(level, offset, gap, shape, rows):
    input, weight, bias = integers(rows, shape[1], seed=1), integers(*shape), integers(shape[0])
    output = guarded(input, pack(weight), bias, shape[0], offset=offset, gap=gap)
    assert torch.equal(output, exact_sums(input, weight, bias))


@needs_tiles
@pytest.mark.parametrize("offset", [0, 2, 16])
@pytest.mark.parametrize("gap", [0, 16, 32])
def test_large_outputs_wherever_they_lie(level, gap, offset):
    """Only where every row begins with a cache line can they go past the caches."""
    input, weight = integers(65, 32, seed=1), integers(2048, 32)
    output = guarded(input, pack(weight), None, 2048, gap=gap, offset=offset)
    assert output.nbytes >= 256 << 10
    assert torch.equal(output, exact_sums(input, weight, None))


@needs_tiles
@pytest.mark.parametrize("rows", [1, 5, 31, 33, 100])
@pytest.mark.parametrize("shape", [(1, 32), (33, 96), (100, 352)], ids=str)
def test_what_lies_around_the_input_and_the_bias_is_not_read(level, shape, rows):
    input, weight = integers(rows, shape[1], seed=1), integers(*shape)
    around, bias = surrounded(input), surrounded(integers(shape[0]), before=1)
    output = packed_linear_cpu(around, pack(weight), bias, shape[0])
    assert torch.equal(output, exact_sums(input, weight, bias))


AT_THE_END_OF_MEMORY = """
import ctypes, mmap
import torch
from fastgen.kernels import cpu
from fastgen.kernels.packing import pack
from kernel_helpers import force
from packed_layers import LARGE, LEVELS

torch.set_num_threads(1)
mprotect = ctypes.CDLL(None).mprotect
kept = []

def at_the_end(tensor):
    "The same numbers, and after the last one a page that nobody may read."
    size = -(-tensor.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    kept.append(memory)
    copy = torch.frombuffer(memory, dtype=tensor.dtype)[size // 2 - tensor.numel() : size // 2]
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert mprotect(ctypes.c_void_p(start + size), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    return copy.view(tensor.shape).copy_(tensor)

linear = cpu.function("linear", "pipppiiiibb")
highest = cpu.library().highest_isa()
for level in LEVELS[:highest]:
    force(level)
    small = [(1, (1, 32)), (5, (33, 96)), (18, (17, 32)), (45, (100, 64))]
    for rows, (outputs, width) in [*small, *LARGE]:
        for layout, epilogue in (("tiles", 0), ("gated_tiles", 1)):
            outs = outputs * (2 if epilogue else 1)
            weight = at_the_end(pack(torch.ones(outs, width, dtype=torch.bfloat16), layout))
            tensors = [torch.ones(rows, width), torch.ones(outs), torch.ones(rows, outputs)]
            input, bias, output = (at_the_end(tensor.bfloat16()) for tensor in tensors)
            linear(
                input.data_ptr(), width, weight.data_ptr(), bias.data_ptr(), output.data_ptr(),
                outputs, rows, outputs, width, epilogue, 1,
            )
print("reached")
"""


@needs_tiles
def test_nothing_past_the_end_is_touched():
    """Behind the last element of each tensor lies a page that faults."""
    here = str(Path(__file__).parent)
    result = subprocess.run(
        [sys.executable, "-c", AT_THE_END_OF_MEMORY],
        env={**os.environ, "PYTHONPATH": here},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.stdout.strip() == "reached", f"{result.returncode}: {result.stderr[-400:]}"


@needs_tiles
@pytest.mark.parametrize("rows", [1, 32, 100])
@pytest.mark.parametrize("shape", [(31, 96), (100, 352), (400, 1792), WIDE], ids=str)
@pytest.mark.parametrize("num_threads", [2, 3, 9])
def test_threads_share_the_outputs(level, num_threads, shape, rows):
    torch.set_num_threads(num_threads)
    input, weight = integers(rows, shape[1], seed=1), integers(*shape)
    output = packed_linear_cpu(input, pack(weight), None, shape[0])
    assert torch.equal(output, exact_sums(input, weight, None))


# Rounding.


@needs_tiles
@pytest.mark.parametrize("rows", [1, 4, 17, 33, 300])
@pytest.mark.parametrize("shape", [*SHAPES, (4864, 64)], ids=str)
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
def test_it_is_accurate_at_every_level(level, with_bias, shape, rows):
    weight, bias, packed = layer(shape, with_bias)
    input = randn(rows, shape[1], dtype=BF16, seed=1)
    exact = input.double() @ weight.double().T + (0 if bias is None else bias.double())
    output = packed_linear_cpu(input, packed, bias, shape[0])
    assert_accurate(output, F.linear(input, weight, bias), exact)


@needs_tiles
@pytest.mark.parametrize("shape", [(33, 352), (100, 1024), (400, 1792)], ids=str)
def test_a_row_has_the_same_bits_whatever_rows_are_with_it(level, shape):
    _, bias, packed = layer(shape)
    input = randn(300, shape[1], dtype=BF16, seed=1)
    together = packed_linear_cpu(input, packed, bias, shape[0])
    for start, stop in [(0, 1), (7, 9), (3, 8), (50, 66), (90, 107), (0, 32), (9, 42), (299, 300)]:
        some = packed_linear_cpu(input[start:stop], packed, bias, shape[0])
        assert torch.equal(some, together[start:stop]), f"rows {start} to {stop}"


@needs_tiles
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("rows", [1, 4, 7, 18, 40])
def test_what_is_not_finite_stays_in_its_row(level, rows, value):
    weight, bias, packed = layer((40, 96))
    input = randn(rows, 96, dtype=BF16, seed=1)
    expected = packed_linear_cpu(input, packed, bias, 40)
    for row in {0, rows // 2, rows - 1}:
        spoilt = input.clone()
        spoilt[row, 70] = value
        output = packed_linear_cpu(spoilt, packed, bias, 40)
        others = torch.arange(rows) != row
        assert torch.equal(output[others], expected[others])
        plain = F.linear(spoilt[row], weight, bias)
        assert not output[row].isfinite().any()
        assert torch.equal(output[row].isnan(), plain.isnan())
        assert torch.equal(output[row].isposinf(), plain.isposinf())


# Shapes and strides of the input.


def input_of_ones() -> torch.Tensor:
    """[2, 1, 64], whose dimension of one element has a stride of its own."""
    return integers(1, 2, 64, seed=1).transpose(0, 1)


INPUTS = {
    "one-row": lambda: integers(1, 64, seed=1)[0],
    "3-d": lambda: integers(2, 3, 64, seed=1),
    "4-d": lambda: integers(2, 1, 3, 64, seed=1),
    "3-d-strided": lambda: integers(2, 3, 192, seed=1)[..., 64:128],
    "columns": lambda: integers(9, 192, seed=1)[:, 64:128],
    "every-second-row": lambda: integers(9, 64, seed=1)[::2],
    "transposed": lambda: integers(64, 9, seed=1).T,
    "transposed-dimension-of-one": input_of_ones,
    "one-row-repeated": lambda: integers(1, 64, seed=1).expand(5, 64),
    "no-rows": lambda: integers(0, 64),
    "no-rows-3-d": lambda: integers(2, 0, 64),
}


@needs_packing
@pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS)
@every_implementation(LINEAR)
def test_inputs_of_any_shape(name, make):
    weight, input = integers(40, 64), make()
    packed, bias = pack(weight), integers(40, seed=3)
    if name == "onednn" and input.numel() == 0:
        pytest.skip("oneDNN takes no input without rows")
    output = call(LINEAR, name, input=input, weight=packed, bias=bias, out_features=40)
    assert output.shape == (*input.shape[:-1], 40)
    assert output.is_contiguous()
    if output.numel():
        assert torch.equal(output, exact_sums(input, weight, bias))


@needs_tiles
def test_a_strided_bias():
    weight, input, bias = integers(40, 64), integers(5, 64, seed=1), integers(80, seed=2)[::2]
    output = packed_linear_cpu(input, pack(weight), bias, 40)
    assert torch.equal(output, exact_sums(input, weight, bias))


# All implementations.


@needs_packing
@pytest.mark.parametrize("rows", [1, 2, 63, 300])
@pytest.mark.parametrize("shape", [(64, 48), (100, 33), (1, 7), (1, 32), (257, 896)], ids=str)
@pytest.mark.parametrize("layout", ["tiles", "onednn"])
@every_implementation(LINEAR)
def test_every_implementation_is_accurate(name, layout, shape, rows):
    weight = (randn(*shape) / shape[1] ** 0.5).to(BF16)
    if layout == "tiles" and (why := packing.why_not_tiles(weight)) is not None:
        pytest.skip(why)
    packed, bias = pack(weight, layout), randn(shape[0], dtype=BF16, seed=2)
    input = randn(rows, shape[1], dtype=BF16, seed=1)
    exact = input.double() @ weight.double().T + bias.double()
    output = call(LINEAR, name, input=input, weight=packed, bias=bias, out_features=shape[0])
    assert_accurate(output, F.linear(input, weight, bias), exact)


@needs_tiles
def test_opcheck():
    arguments = integers(5, 64), pack(integers(40, 64)), integers(40), 40
    torch.library.opcheck(torch.ops.fastgen.packed_linear.default, arguments)


def site(**changes) -> CallSite:
    arguments = {
        "input": torch.empty(5, 64, dtype=BF16),
        "weight": torch.empty(packing.packed_shape(torch.Size((40, 64)), "tiles"), dtype=BF16),
        "bias": None,
        "out_features": 40,
    }
    return CallSite(torch.device("cpu"), {**arguments, **changes})


@needs_tiles
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"input": torch.empty(5, 64)}, "input is float32"),
        ({"bias": torch.empty(40)}, "bias is float32"),
        ({"weight": torch.empty(40, 64, dtype=BF16)}, "the weight has oneDNN's layout"),
    ],
    ids=["input", "bias", "layout"],
)
def test_what_our_kernel_refuses(changes, reason):
    assert select(LINEAR, site()).implementation.name == "cpu"
    refused = dict(select(LINEAR, site(**changes)).refused)
    assert refused["cpu"] == reason


@needs_tiles
def test_the_generic_level_reads_tiles_by_the_reference(monkeypatch):
    monkeypatch.setattr(packing.cpu, "isa", lambda: "generic")
    choice = select(LINEAR, site())
    assert choice.implementation.name == "reference"
    assert dict(choice.refused) == {
        "cpu": "the C++ kernels have no bf16 instructions here",
        "onednn": "the weight has our own layout",
    }
