"""`fastgen::paged_attention`, each implementation, against dense fp64 attention."""

from __future__ import annotations

import pytest
import torch
from fastgen.kernels import implementations
from fastgen.kernels import paged_attention as paged_attention_op
from fastgen.kernels.paged_attention import read_cache, write_cache
from paged_steps import DTYPES, MIXED, Case, Sequence

IMPLEMENTATIONS = pytest.mark.parametrize(
    "name", ["op", *(item.name for item in implementations("fastgen::paged_attention"))]
)


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors this small only wait for each other's threads on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@DTYPES
@pytest.mark.parametrize("block_size", [16, 32, 64])
@IMPLEMENTATIONS
def test_mixed_batch_equals_dense_attention(name, block_size, dtype):
    case = Case(MIXED, block_size, dtype=dtype)
    case.assert_accurate(case.run(name))


@DTYPES
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("heads", [(7, 1), (14, 2), (3, 3)], ids=["7q1kv", "14q2kv", "3q3kv"])
@IMPLEMENTATIONS
def test_heads_and_head_dims(name, heads, head_dim, dtype):
    case = Case(MIXED, heads=heads, head_dim=head_dim, v_head_dim=head_dim, dtype=dtype)
    case.assert_accurate(case.run(name))


@DTYPES
@pytest.mark.parametrize("settings", [{}, {"window": 200}, {"softcap": 2.0}], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80])
@IMPLEMENTATIONS
def test_few_long_sequences_on_many_threads(name, head_dim, settings, dtype):
    """Their pages may be split; a short one beside them has fewer pages than there are parts."""
    torch.set_num_threads(8)
    sequences = [Sequence(699, 1), Sequence(2, 1), Sequence(511, 1)]
    case = Case(
        sequences, heads=(7, 1), head_dim=head_dim, v_head_dim=64, dtype=dtype, settings=settings
    )
    case.assert_accurate(case.run(name))


SLOPES = 2.0 ** -torch.linspace(0, 8, 14)

SETTINGS = [
    pytest.param({"window": 1}, id="window-1"),
    pytest.param({"window": 16}, id="window-of-a-block"),
    pytest.param({"window": 33}, id="window-33"),
    pytest.param({"scale": 0.7}, id="scale"),
    pytest.param({"softcap": 2.0}, id="softcap"),
    pytest.param({"sinks": torch.linspace(-1, 3, 14)}, id="sinks"),
    pytest.param(
        {"window": 9, "softcap": 5.0, "sinks": torch.linspace(-1, 3, 14)}, id="all-together"
    ),
    pytest.param({"chunk": 1}, id="chunk-1"),
    pytest.param({"chunk": 16}, id="chunk-of-a-block"),
    pytest.param({"chunk": 33}, id="chunk-33"),
    pytest.param({"chunk": 33, "window": 20}, id="chunk-window"),
    pytest.param({"alibi_slopes": SLOPES}, id="alibi"),
    pytest.param({"alibi_slopes": SLOPES, "chunk": 33, "window": 20}, id="alibi-chunk-window"),
    pytest.param(
        {"alibi_slopes": SLOPES, "softcap": 5.0, "sinks": torch.linspace(-1, 3, 14)},
        id="alibi-softcap-sinks",
    ),
]


@DTYPES
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("head_dim", [64, 80])
@IMPLEMENTATIONS
def test_settings(name, head_dim, settings, dtype):
    case = Case(MIXED, head_dim=head_dim, dtype=dtype, settings=settings)
    case.assert_accurate(case.run(name))


@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize("offset", [-1, 0, 1])
@pytest.mark.parametrize("num_blocks", [1, 2])
@IMPLEMENTATIONS
def test_exact_block_boundaries(name, num_blocks, offset, block_size):
    """Lengths one before, at and one after a boundary, as a whole prompt, a chunk and a decode."""
    length = num_blocks * block_size + offset
    case = Case([Sequence(0, length), Sequence(5, length - 5), Sequence(length - 1, 1)], block_size)
    case.assert_accurate(case.run(name))


@pytest.mark.parametrize("sequence", [(0, 1), (0, 2), (1, 1), (15, 1), (16, 1), (0, 100)], ids=str)
@IMPLEMENTATIONS
def test_one_sequence_alone(name, sequence):
    case = Case([Sequence(*sequence)])
    case.assert_accurate(case.run(name))


@IMPLEMENTATIONS
def test_padding_rows_are_zero_and_write_only_to_the_null_block(name):
    case = Case(MIXED, num_padding=5)
    before = {role: case.bits(role) for role in ("key", "value")}
    case.assert_accurate(case.run(name))
    slots = case.arguments["slot_mapping"]
    written = torch.zeros(before["key"].shape[0] * case.block_size, dtype=torch.bool)
    written[slots[slots >= 0]] = True
    for role, old in before.items():
        changed = (case.bits(role) != old).any(-1).any(1)  # [num_blocks, block_size]
        assert torch.equal(changed[1:].flatten(), written[case.block_size :])


@IMPLEMENTATIONS
def test_new_keys_and_values_are_stored_bit_for_bit(name):
    case = Case(MIXED, dtype=torch.bfloat16)
    case.run(name)
    for index, sequence in enumerate(case.sequences):
        blocks = case.arguments["block_table"][index, : -(-sequence.length // case.block_size)]
        for role, dense in (("key", case.keys), ("value", case.values)):
            stored = read_cache(case.arguments[f"{role}_cache"], blocks, sequence.length)
            assert torch.equal(stored, dense[index])


@IMPLEMENTATIONS
def test_a_repeated_step_gives_the_same_cache_and_output(name):
    case = Case(MIXED)
    first = case.run(name)
    caches = case.bits("key"), case.bits("value")
    assert torch.equal(case.run(name), first)
    assert torch.equal(case.bits("key"), caches[0])
    assert torch.equal(case.bits("value"), caches[1])


@pytest.mark.parametrize("computed", [1, 15, 16, 17, 50])
@IMPLEMENTATIONS
def test_a_query_that_is_not_stored_sees_all_stored_keys(name, computed):
    case = Case([Sequence(40, 1), Sequence(computed, 1, stored=False), Sequence(0, 9)])
    before = case.bits("key")
    case.assert_accurate(case.run(name))
    blocks = case.arguments["block_table"][1, : -(-computed // case.block_size)].long()
    assert torch.equal(case.bits("key")[blocks], before[blocks])


@pytest.mark.parametrize("empty", [Sequence(0, 0), Sequence(16, 0), Sequence(21, 0)], ids=str)
@IMPLEMENTATIONS
def test_a_sequence_without_new_tokens_has_no_rows(name, empty):
    case = Case([Sequence(20, 1), empty, Sequence(0, 18), empty])
    assert case.run(name).shape[0] == 19
    case = Case([Sequence(20, 1), empty, Sequence(0, 18), empty])
    case.assert_accurate(case.run(name))


@IMPLEMENTATIONS
def test_strided_queries_keys_and_values(name):
    """Slices of one merged projection, as merge_linears leaves them."""
    case = Case(MIXED, head_dim=48)
    query, key, value = (case.arguments[role] for role in ("query", "key", "value"))
    merged = torch.cat([query, key, value], dim=1)
    parts = merged.split([14, 2, 2], dim=1)
    assert not any(part.is_contiguous() for part in parts)
    case.arguments.update(zip(("query", "key", "value"), parts, strict=True))
    case.assert_accurate(case.run(name))


@IMPLEMENTATIONS
def test_the_result_does_not_depend_on_the_neighbours(name):
    together = Case(MIXED)
    output = together.run(name)
    for index in range(len(MIXED)):
        row = together.arguments
        start, end = together.starts[index], together.starts[index + 1]
        alone = Case(MIXED)
        alone.starts = [0, end - start]
        alone.keys, alone.values = [alone.keys[index]], [alone.values[index]]
        for role in ("query", "key", "value", "slot_mapping"):
            alone.arguments[role] = row[role][start:end]
        alone.arguments["block_table"] = row["block_table"][index : index + 1]
        alone.arguments["seq_lens"] = row["seq_lens"][index : index + 1]
        alone.arguments["query_start_loc"] = torch.tensor([0, end - start], dtype=torch.int32)
        result = alone.run(name)
        alone.assert_accurate(result)
        alone.assert_accurate(output[start:end].contiguous())


@pytest.mark.parametrize("block_size", [16, 64])
@DTYPES
def test_what_is_written_is_read(block_size, dtype):
    generator = torch.Generator().manual_seed(0)
    cache = torch.full((9, 2, block_size, 80), torch.nan, dtype=dtype)
    other = torch.full((9, 2, block_size, 48), torch.nan, dtype=dtype)
    length = 2 * block_size + 3
    keys = torch.randn((length, 2, 80), generator=generator).to(dtype)
    values = torch.randn((length, 2, 48), generator=generator).to(dtype)
    blocks = torch.tensor([7, 2, 5])
    place = torch.arange(length)
    slots = blocks[place // block_size] * block_size + place % block_size
    order = torch.randperm(length, generator=generator)
    write_cache(keys[order], values[order], cache, other, slots[order])
    assert torch.equal(read_cache(cache, blocks, length), keys)
    assert torch.equal(read_cache(other, blocks, length), values)
    assert cache[[0, 1, 3, 4, 6, 8]].isnan().all()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_heads_that_do_not_fit_are_refused(device):
    case = Case([Sequence(0, 3)])
    arguments = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in case.arguments.items()
    }
    arguments["query"] = arguments["query"][:, :13]
    with pytest.raises(ValueError, match="multiple of num_kv_heads"):
        paged_attention_op(**arguments)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="plain"),
        pytest.param(
            {"window": 4, "softcap": 2.0, "sinks": torch.zeros(2)}, id="window-softcap-sinks"
        ),
        pytest.param({"chunk": 4, "alibi_slopes": torch.ones(2)}, id="chunk-alibi"),
    ],
)
def test_opcheck(settings):
    case = Case(
        [Sequence(3, 1), Sequence(0, 5)], heads=(2, 1), head_dim=8, v_head_dim=4, settings=settings
    )
    for role in ("key", "value"):
        case.arguments[f"{role}_cache"].nan_to_num_(0.0)  # opcheck compares caches with ==
    operator = torch.ops.fastgen.paged_attention.default
    torch.library.opcheck(operator, tuple(case.arguments.values()))


def plant_longer_sequence(arguments):
    arguments["seq_lens"] += 1


def plant_swapped_blocks(arguments):
    arguments["block_table"][2, :2] = arguments["block_table"][2, :2].flip(0)


def plant_shifted_slots(arguments):
    arguments["slot_mapping"] = arguments["slot_mapping"].roll(1)


def plant_window_off_by_one(arguments):
    arguments["window"] += 1


def plant_nothing_stored(arguments):
    arguments["slot_mapping"][:] = -1


@pytest.mark.parametrize(
    "plant",
    [
        plant_longer_sequence,
        plant_swapped_blocks,
        plant_shifted_slots,
        plant_window_off_by_one,
        plant_nothing_stored,
    ],
    ids=lambda plant: plant.__name__.removeprefix("plant_"),
)
@IMPLEMENTATIONS
def test_planted_mistakes_are_seen(name, plant):
    case, wrong = (Case(MIXED, settings={"window": 20}) for _ in range(2))
    case.assert_accurate(wrong.run(name))
    wrong = Case(MIXED, settings={"window": 20})
    plant(wrong.arguments)
    with pytest.raises(AssertionError, match=r"^error|^a slot"):
        case.assert_accurate(wrong.run(name))


@pytest.mark.parametrize("name", ["triton"])
def test_factors_of_a_quantised_cache(name):
    """Small integers with a factor per KV head give what they stand for."""
    from fastgen.kernels.gpu.launch import card_of, run_all
    from fastgen.kernels.gpu.paged_attention import launches_of

    case = Case(MIXED, head_dim=64, v_head_dim=64)
    given = case.arguments
    write_cache(*(given[name] for name in ("key", "value", "key_cache", "value_cache")),
                given["slot_mapping"])  # fmt: skip
    factors = {"key": torch.tensor([0.02, 0.05]), "value": torch.tensor([0.03, 0.04])}
    stored, meant = {}, {}
    for role, factor in factors.items():
        pages = given[f"{role}_cache"]
        column = factor[None, :, None, None]
        stored[role] = (pages / column).nan_to_num(0.0).round().clamp(-127, 127).to(torch.int8)
        meant[role] = torch.where(pages.isnan(), pages, stored[role] * column)
    rest = [given[key] for key in ("block_table", "query_start_loc", "seq_lens", "scale", "window")]
    rest += [given["softcap"], given["sinks"], card_of(torch.device("cpu"))]
    results = []
    for caches, scales in ((stored, factors), (meant, {"key": None, "value": None})):
        output = torch.zeros(given["query"].shape[0], 14, 64)
        run_all(
            launches_of(
                given["query"], None, None, *caches.values(), output, *rest, *scales.values()
            )
        )
        results.append(output)
    assert results[0].abs().max() > 0.1
    torch.testing.assert_close(*results)  # as closely as torch compares fp32
