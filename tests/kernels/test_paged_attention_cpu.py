"""The C++ paged attention at each level of instructions, against dense fp64 attention."""

from __future__ import annotations

import pytest
import torch
from fastgen.kernels import CallSite, cpu
from fastgen.kernels.paged_attention import cpu_refuses
from kernel_helpers import force, settings_are_restored  # noqa: F401 - a fixture for all
from paged_steps import MIXED, Case, Sequence

pytestmark = pytest.mark.skipif(
    cpu.why_missing() is not None, reason=f"no C++ kernels here: {cpu.why_missing()}"
)


@pytest.fixture(params=["fp32", *(f"bf16-{level}" for level in cpu.ISA_LEVELS)])
def dtype(request) -> torch.dtype:
    """fp32 is the same at all levels; bf16 is not."""
    name, _, level = request.param.partition("-")
    if level:
        force(level)
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def check(case: Case) -> None:
    case.assert_accurate(case.run("cpu"))


def test_the_level_is_obeyed():
    """Weights are rounded to bf16 at all levels but the first."""
    outputs = []
    for level in ("generic", "avx512_bf16"):
        force(level)
        outputs.append(Case([Sequence(0, 100)], dtype=torch.bfloat16).run("cpu"))
    assert not torch.equal(*outputs)


@pytest.mark.parametrize("computed", [0, 70])
@pytest.mark.parametrize("new", [1, 2, 63, 100])
@pytest.mark.parametrize("heads", [(7, 1), (14, 2), (3, 3), (8, 1)], ids=str)
def test_odd_numbers_of_tokens_and_groups(dtype, heads, new, computed):
    check(Case([Sequence(computed, new)], heads=heads, head_dim=64, v_head_dim=64, dtype=dtype))


@pytest.mark.parametrize(
    "dims", [(64, 80), (80, 80), (96, 64), (128, 128), (256, 256), (40, 40), (72, 17)], ids=str
)
def test_head_dims(dtype, dims):
    check(Case(MIXED, heads=(6, 2), head_dim=dims[0], v_head_dim=dims[1], dtype=dtype))


# A long first chunk, a long chunk after a longer prefix, and single tokens beside them.
LONG = [Sequence(0, 290), Sequence(300, 230), Sequence(600, 1), Sequence(30, 1), Sequence(0, 5)]


def test_without_slots_nothing_is_stored(dtype):
    """Another layer has stored the keys and values; those that come with the call are not read."""
    case = Case(LONG, heads=(4, 2), head_dim=64, v_head_dim=64, dtype=dtype)
    check(case)
    names = ("key_cache", "value_cache")
    before = {name: case.arguments[name].clone() for name in names}
    expected = case.run("cpu")
    for name in ("key", "value"):
        case.arguments[name].fill_(float("nan"))
    case.arguments["slot_mapping"] = None
    assert torch.equal(case.run("cpu"), expected)
    for name in names:
        assert torch.equal(case.arguments[name].nan_to_num(7), before[name].nan_to_num(7))


@pytest.mark.parametrize("block_size", [16, 32, 64])
def test_long_chunks_beside_single_tokens(dtype, block_size):
    check(Case(LONG, block_size, heads=(7, 1), head_dim=64, v_head_dim=64, dtype=dtype))


@pytest.mark.parametrize("window", [1, 20, 32, 100, 256, 300, 1000])
def test_windows_smaller_and_larger_than_a_tile(dtype, window):
    settings = {"window": window}
    check(Case(LONG, heads=(4, 2), head_dim=64, v_head_dim=32, dtype=dtype, settings=settings))


@pytest.mark.parametrize("chunk", [1, 20, 32, 100, 256, 300, 1000])
def test_chunks_of_positions_smaller_and_larger_than_a_tile(dtype, chunk):
    settings = {"chunk": chunk}
    check(Case(LONG, heads=(4, 2), head_dim=64, v_head_dim=32, dtype=dtype, settings=settings))


@pytest.mark.parametrize("others", [{}, {"window": 300}, {"scale": -0.1}], ids=str)
def test_slopes_of_each_head(dtype, others):
    settings = {"alibi_slopes": torch.linspace(0.5, 0.001, 6), **others}
    check(Case(LONG, heads=(6, 2), head_dim=64, v_head_dim=32, dtype=dtype, settings=settings))


SETTINGS = [
    pytest.param({"softcap": 2.0}, id="softcap"),
    pytest.param({"softcap": 50.0, "scale": 2.0}, id="wide-softcap"),
    pytest.param({"sinks": torch.linspace(-1, 6, 4)}, id="sinks"),
    pytest.param({"sinks": torch.linspace(-1, 3, 4).bfloat16(), "window": 40}, id="bf16-sinks"),
    pytest.param({"scale": -0.2}, id="negative-scale"),
    pytest.param({"scale": 0.0}, id="zero-scale"),
    pytest.param({"scale": 1.0}, id="sharp"),
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_settings(dtype, settings):
    check(Case(LONG, heads=(4, 2), head_dim=64, v_head_dim=64, dtype=dtype, settings=settings))


@pytest.mark.parametrize("offset", [-1, 0, 1])
@pytest.mark.parametrize("length", [32, 256, 512])
def test_lengths_around_what_is_looked_at_together(dtype, length, offset):
    length += offset
    sequences = [Sequence(0, length), Sequence(length - 1, 1), Sequence(length - 9, 9)]
    check(Case(sequences, heads=(2, 1), head_dim=64, v_head_dim=64, dtype=dtype))


@pytest.mark.parametrize("settings", [{}, {"window": 150}], ids=str)
@pytest.mark.parametrize("num_threads", [2, 3, 8])
def test_slots_split_among_threads(dtype, num_threads, settings):
    """One long sequence alone: a token, a chunk after a prefix, and beside short ones."""
    torch.set_num_threads(num_threads)
    for sequences in ([Sequence(1500, 1)], [Sequence(900, 20)], [Sequence(700, 3), *MIXED]):
        check(
            Case(
                sequences, heads=(7, 1), head_dim=64, v_head_dim=48, dtype=dtype, settings=settings
            )
        )


def test_slices_of_a_merged_projection(dtype):
    case = Case(LONG, heads=(14, 2), head_dim=64, v_head_dim=64, dtype=dtype)
    merged = torch.cat([case.arguments[role] for role in ("query", "key", "value")], dim=1)
    parts = merged.split([14, 2, 2], dim=1)
    case.arguments.update(zip(("query", "key", "value"), parts, strict=True))
    check(case)


def test_transposed_queries_keys_and_values(dtype):
    case = Case(MIXED, head_dim=64, dtype=dtype)
    for role in ("query", "key", "value"):
        tensor = case.arguments[role]
        case.arguments[role] = tensor.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    check(case)


def test_empty_sequences_and_padding(dtype):
    empty = Sequence(21, 0)
    check(Case([empty, Sequence(20, 1), empty, Sequence(0, 40)], num_padding=9, dtype=dtype))


def test_no_tokens_at_all(dtype):
    assert Case([Sequence(20, 0)], dtype=dtype).run("cpu").shape[0] == 0


def test_a_query_that_sees_nothing_gives_zeros(dtype):
    case = Case([Sequence(0, 1, stored=False), Sequence(0, 3)], dtype=dtype)
    output = case.run("cpu")
    assert not output[0].any()
    assert not output.isnan().any()


def test_blocks_before_the_window_are_not_read(dtype):
    """Their table entries may be anything."""
    settings = {"window": 40}
    sequences = [Sequence(400, 1), Sequence(300, 100)]
    case = Case(sequences, head_dim=64, dtype=dtype, settings=settings)
    for index, first in enumerate((361, 261)):
        case.arguments["block_table"][index, : first // 16] = 2**30
    check(case)


def spoil_table_width(arguments):
    arguments["block_table"] = arguments["block_table"][:, :2]


def spoil_block(arguments):
    arguments["block_table"][1, 1] = arguments["key_cache"].shape[0]


def spoil_block_sign(arguments):
    arguments["block_table"][1, 1] = -1


def spoil_slot(arguments):
    arguments["slot_mapping"][2] = arguments["key_cache"].shape[0] * 16


def spoil_starts(arguments):
    arguments["query_start_loc"][-1] += 1


def spoil_block_size(arguments):
    for role in ("key_cache", "value_cache"):
        arguments[role] = arguments[role][:, :, :12].contiguous()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_block_size, "must have a multiple of 16 slots"),
        (spoil_table_width, "block table must hold each sequence"),
        (spoil_block, "must name blocks of the cache"),
        (spoil_block_sign, "must name blocks of the cache"),
        (spoil_slot, "must name slots of the cache"),
        (spoil_starts, "must count tokens of the query"),
    ],
    ids=lambda value: getattr(value, "__name__", "").removeprefix("spoil_"),
)
def test_what_would_be_read_past_its_end_is_refused(spoil, message):
    """C++ reads by address: past the end there may be anything. Nothing is written then."""
    case = Case(MIXED)
    before = case.bits("key"), case.bits("value")
    spoil(case.arguments)
    with pytest.raises(ValueError, match=message):
        case.run("cpu")
    assert torch.equal(case.bits("key"), before[0])
    assert torch.equal(case.bits("value"), before[1])


def refusal(case: Case) -> str | None:
    return cpu_refuses(CallSite(torch.device("cpu"), case.arguments))


def test_what_it_refuses():
    assert refusal(Case(MIXED)) is None
    assert refusal(Case(MIXED, block_size=8)) == "a block has 8 slots, not a multiple of 16"
    mixed = Case(MIXED)
    mixed.arguments["key"] = mixed.arguments["key"].bfloat16()
    assert refusal(mixed) == "query, key, value and cache are of several dtypes"
