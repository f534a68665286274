"""Packing: every layout gives the weight back bit for bit, and what has no layout says why."""

from __future__ import annotations

import pytest
import torch
from fastgen.kernels import packing
from fastgen.kernels.packing import (
    huge_pages,
    layout_of,
    pack,
    packed_bytes,
    packed_shape,
    unpack,
    why_not_packed,
    why_not_tiles,
)

BF16 = torch.bfloat16
TILES = why_not_tiles(torch.empty(1, 32, dtype=BF16))
needs_tiles = pytest.mark.skipif(TILES is not None, reason=f"no layout of our own here: {TILES}")
ONEDNN = None if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "oneDNN has no bf16 here"
needs_onednn = pytest.mark.skipif(ONEDNN is not None, reason=str(ONEDNN))
LAYOUTS = [
    pytest.param("tiles", marks=needs_tiles),
    pytest.param("gated_tiles", marks=needs_tiles),
    pytest.param("onednn", marks=needs_onednn),
]
WIDTHS = (32, 64, 896)


def any_bits(*shape: int, seed: int = 0) -> torch.Tensor:
    """Every pattern of bits: infinities, subnormal numbers and NaNs of every payload, too."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**15), 2**15, shape, generator=generator).to(torch.int16).view(BF16)


def assert_same_bits(one: torch.Tensor, other: torch.Tensor) -> None:
    assert one.dtype == other.dtype == BF16
    assert torch.equal(one.contiguous().view(torch.int16), other.contiguous().view(torch.int16))


def rows_of(layout: str, out_features: int) -> int:
    return 2 * out_features if layout == "gated_tiles" else out_features


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("out_features", [1, 15, 16, 17, 31, 32, 33, 100])
def test_unpacking_gives_the_weight_back_bit_for_bit(layout, out_features, width):
    weight = any_bits(rows_of(layout, out_features), width)
    packed = pack(weight, layout)
    assert packed.shape == packed_shape(weight.shape, layout)
    if layout != "onednn":
        assert packed.nbytes == packed_bytes(weight.shape, layout)
    assert_same_bits(unpack(packed, layout, weight.shape[0]), weight)


@needs_onednn
@pytest.mark.parametrize("shape", [(64, 48), (33, 7), (1, 1)], ids=str)
def test_widths_that_only_onednn_takes(shape):
    weight = any_bits(*shape)
    assert layout_of(weight) == "onednn"
    assert_same_bits(unpack(pack(weight), "onednn", shape[0]), weight)


def tiles_of(parts: torch.Tensor) -> torch.Tensor:
    """[groups, 2, 16 outputs, width] in the order the layout is described in."""
    groups, _, _, width = parts.shape
    return parts.view(groups, 2, 16, width // 32, 16, 2).permute(0, 3, 1, 4, 2, 5)


def padded(weight: torch.Tensor, rows: int) -> torch.Tensor:
    nothing = weight.new_zeros(-weight.shape[0] % rows, weight.shape[1])
    return torch.cat([weight, nothing]).view(-1, rows, weight.shape[1])


@needs_tiles
@pytest.mark.parametrize("out_features", [1, 16, 17, 33, 100])
@pytest.mark.parametrize("width", WIDTHS)
def test_where_every_number_lies(out_features, width):
    """Numbers of outputs that do not exist are zero: whatever memory it was written to."""
    weight = any_bits(out_features, width)
    expected = tiles_of(padded(weight, 32).unflatten(1, (2, 16)))
    dirty = torch.full(packed_shape(weight.shape, "tiles"), float("nan"), dtype=BF16)
    assert_same_bits(pack(weight, "tiles", dirty), expected)

    up = any_bits(out_features, width, seed=1)
    expected = tiles_of(torch.stack([padded(weight, 16), padded(up, 16)], dim=1))
    both = torch.cat([weight, up])
    dirty = torch.full(packed_shape(both.shape, "gated_tiles"), float("nan"), dtype=BF16)
    assert_same_bits(pack(both, "gated_tiles", dirty), expected)


STRIDED = {
    "transposed": lambda: any_bits(96, 34).T,
    "columns": lambda: any_bits(34, 160)[:, 32:128],
    "every-second-row": lambda: any_bits(68, 96)[::2],
    "every-second-column": lambda: any_bits(34, 192)[:, ::2],
    "one-row-repeated": lambda: any_bits(1, 96).expand(34, 96),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("make", STRIDED.values(), ids=STRIDED)
def test_strided_weights(layout, make):
    weight = make()
    assert not weight.is_contiguous()
    assert_same_bits(unpack(pack(weight, layout), layout, 34), weight)


@needs_tiles
@pytest.mark.parametrize("layout", ["tiles", "gated_tiles"])
@pytest.mark.parametrize("num_threads", [2, 3])
def test_several_threads_pack_the_same(layout, num_threads):
    weight, threads = any_bits(334, 96), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = pack(weight, layout)
        torch.set_num_threads(num_threads)
        assert_same_bits(pack(weight, layout), expected)
        assert_same_bits(unpack(expected, layout, 334), weight)
    finally:
        torch.set_num_threads(threads)


@needs_tiles
@pytest.mark.parametrize("layout", ["tiles", "gated_tiles"])
def test_memory_that_is_given_is_written_to_its_end_and_no_further(layout):
    weight = any_bits(66, 64)
    shape = packed_shape(weight.shape, layout)
    size = packed_bytes(weight.shape, layout) // 2
    memory = torch.full((size + 64,), 7.0, dtype=BF16)
    out = memory[32 : 32 + size].view(shape)
    assert pack(weight, layout, out) is out
    assert_same_bits(unpack(out, layout, 66), weight)
    assert (memory[:32] == 7).all()
    assert (memory[-32:] == 7).all()
    again = any_bits(66, 64, seed=1)
    pack(again, layout, out)
    assert_same_bits(unpack(out, layout, 66), again)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_packed_weight_is_a_copy_that_needs_no_gradient(layout):
    weight = torch.nn.Parameter(torch.ones(64, 96, dtype=BF16))
    with torch.inference_mode():
        packed = pack(weight, layout)
    with torch.no_grad():
        weight.zero_()
    assert (unpack(packed, layout, 64) == 1).all()
    assert not packed.requires_grad
    assert not packed.is_inference()


# What cannot be packed.


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (torch.empty(2, 32), "the weight is float32"),
        (torch.empty(2, 32, dtype=torch.float16), "the weight is float16"),
        (torch.empty(2, 32, dtype=BF16, device="meta"), "the weight is on meta"),
    ],
    ids=["fp32", "fp16", "meta"],
)
def test_what_is_not_packed(weight, reason):
    assert why_not_packed(weight) == reason
    with pytest.raises(ValueError, match=f"cannot be packed as .*: {reason}"):
        pack(weight)


@needs_tiles
@pytest.mark.parametrize("layout", ["tiles", "gated_tiles"])
def test_a_layout_of_our_own_needs_whole_steps(layout):
    weight = torch.empty(4, 48, dtype=BF16)
    assert why_not_tiles(weight) == "the weight has 48 inputs, not a multiple of 32"
    with pytest.raises(ValueError, match=rf"\[4, 48\] cannot be packed as {layout}: .* 48 inputs"):
        pack(weight, layout)


@needs_tiles
def test_an_odd_number_of_rows_has_no_halves():
    with pytest.raises(ValueError, match="it has 33 rows, which are no two halves"):
        pack(torch.empty(33, 64, dtype=BF16), "gated_tiles")


@needs_tiles
@pytest.mark.parametrize(
    "out",
    [
        torch.empty(1, 3, 2, 16, 16, 2, dtype=BF16),
        torch.empty(2, 3, 2, 16, 16, 2),
        torch.empty(2, 3, 2, 16, 16, 4, dtype=BF16)[..., ::2],
    ],
    ids=["shape", "dtype", "strided"],
)
def test_memory_that_does_not_fit_is_refused(out):
    with pytest.raises(ValueError, match=r"out must be \[2, 3, 2, 16, 16, 2\] bf16, contiguous"):
        pack(torch.empty(33, 96, dtype=BF16), "tiles", out)


@needs_tiles
def test_another_number_of_outputs_is_refused():
    """It would be read past the end of the packed weight."""
    packed = pack(any_bits(64, 32), "tiles")
    with pytest.raises(ValueError, match=r"65 outputs in tiles are \[3, 1, .* got \[2, 1, "):
        unpack(packed, "tiles", 65)


def test_without_our_kernels_onednn_packs(monkeypatch):
    weight = torch.empty(4, 32, dtype=BF16)
    monkeypatch.setattr(packing.cpu, "why_missing", lambda: "no compiler")
    assert why_not_tiles(weight) == "no compiler"
    assert layout_of(weight) == "onednn"
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert why_not_packed(weight) == "no compiler, and this torch was built without oneDNN"


@needs_tiles
def test_the_generic_level_has_no_layout_of_its_own(monkeypatch):
    monkeypatch.setattr(packing.cpu, "isa", lambda: "generic")
    reason = "the C++ kernels have no bf16 instructions here"
    assert why_not_tiles(torch.empty(4, 32, dtype=BF16)) == reason


@pytest.mark.parametrize("num_bytes", [0, 1, 100, (2 << 20) - 1, 2 << 20, (5 << 20) + 3])
def test_huge_pages_are_memory_that_begins_at_one(num_bytes):
    memory = huge_pages(num_bytes)
    assert (memory.shape, memory.dtype) == ((num_bytes,), torch.uint8)
    assert memory.numel() == 0 or memory.data_ptr() % (2 << 20) == 0
    assert (memory.fill_(3) == 3).all()
