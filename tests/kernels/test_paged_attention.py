"""`fastgen::paged_attention` against dense fp64 attention of each sequence by itself.

Every cache starts as NaN, the null block included, and holds numbers only where a sequence has
computed tokens; table entries that are not needed point at pages of anybody. A kernel that reads
what it must not read shows NaN.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from fastgen.kernels import CallSite, implementations
from fastgen.kernels import paged_attention as paged_attention_op
from fastgen.kernels.paged_attention import read_cache, write_cache

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
IMPLEMENTATIONS = pytest.mark.parametrize(
    "name", ["op", *(item.name for item in implementations("fastgen::paged_attention"))]
)
NAN_BITS = {4: torch.int32, 2: torch.int16}


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors this small only wait for each other's threads on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class Sequence:
    """computed tokens are in the cache already, new ones come with this step."""

    computed: int
    new: int
    stored: bool = True  # False: the one new token is asked and not stored, slot -1

    @property
    def length(self) -> int:
        return self.computed + (self.new if self.stored else 0)


@dataclass
class Case:
    """A step, its arguments, and the dense keys and values of each of its sequences."""

    sequences: list[Sequence]
    block_size: int = 16
    heads: tuple[int, int] = (14, 2)
    head_dim: int = 80
    v_head_dim: int = 48
    dtype: torch.dtype = torch.float32
    num_padding: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        num_heads, num_kv_heads = self.heads
        widths = [-(-sequence.length // self.block_size) for sequence in self.sequences]
        num_blocks = 1 + sum(widths) + 3  # the null block, the used ones, three of nobody
        scattered = 1 + torch.randperm(num_blocks - 1, generator=self.generator)
        owned = scattered[: sum(widths)].split(widths)
        table = torch.randint(num_blocks, (len(widths), max(widths) + 2), generator=self.generator)
        for row, blocks in enumerate(owned):
            table[row, : len(blocks)] = blocks
        num_tokens = sum(sequence.new for sequence in self.sequences) + self.num_padding
        query = self.random(num_tokens, num_heads, self.head_dim)
        key = self.random(num_tokens, num_kv_heads, self.head_dim)
        value = self.random(num_tokens, num_kv_heads, self.v_head_dim)
        shape = (num_blocks, num_kv_heads, self.block_size)
        key_cache = torch.full((*shape, self.head_dim), torch.nan, dtype=self.dtype)
        value_cache = torch.full((*shape, self.v_head_dim), torch.nan, dtype=self.dtype)
        slots = torch.full((num_tokens,), -1)
        self.keys, self.values, starts = [], [], [0]
        for sequence, blocks in zip(self.sequences, owned, strict=True):
            start, end = starts[-1], starts[-1] + sequence.new
            place = torch.arange(sequence.length)
            own = blocks[place // self.block_size] * self.block_size + place % self.block_size
            old = slice(0, sequence.computed)
            keys = self.random(sequence.length, num_kv_heads, self.head_dim)
            values = self.random(sequence.length, num_kv_heads, self.v_head_dim)
            for cache, dense in ((key_cache, keys), (value_cache, values)):
                for slot, row in zip(own[old].tolist(), dense[old], strict=True):
                    cache[slot // self.block_size, :, slot % self.block_size] = row
            if sequence.stored:
                keys[sequence.computed :], values[sequence.computed :] = (
                    key[start:end],
                    value[start:end],
                )
                slots[start:end] = own[sequence.computed :]
            self.keys.append(keys)
            self.values.append(values)
            starts.append(end)
        self.starts = starts
        self.arguments = {
            "query": query,
            "key": key,
            "value": value,
            "key_cache": key_cache,
            "value_cache": value_cache,
            "slot_mapping": slots,
            "block_table": table.int(),
            "query_start_loc": torch.tensor(starts, dtype=torch.int32),
            "seq_lens": torch.tensor([s.length for s in self.sequences], dtype=torch.int32),
            "scale": self.head_dim**-0.5,
            "window": 0,
            "softcap": 0.0,
            "sinks": None,
            **self.settings,
        }

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def run(self, name: str) -> torch.Tensor:
        """Run the op itself ("op") or one implementation; skip what it refuses."""
        if name == "op":
            return paged_attention_op(**self.arguments)
        known = implementations("fastgen::paged_attention")
        chosen = next(item for item in known if item.name == name)
        why = chosen.refuses(CallSite(torch.device("cpu"), self.arguments))
        if why is not None:
            pytest.skip(f"{name} refuses: {why}")
        return chosen.function(**self.arguments)

    def assert_accurate(self, output: torch.Tensor) -> None:
        """Error against fp64 <= 2 x (error of the rounded fp32 formula + eps x max), everywhere."""
        assert output.shape == (*self.arguments["query"].shape[:2], self.v_head_dim)
        assert output.dtype == self.dtype
        assert output.is_contiguous()
        assert not output.isnan().any(), "a slot that holds nothing was read"
        assert not output[self.starts[-1] :].any(), "rows of padding must be zero"
        exact, plain = (
            torch.cat([self.dense(index, dtype) for index in range(len(self.starts) - 1)])
            for dtype in (torch.float64, torch.float32)
        )
        peer = (plain.to(self.dtype).double() - exact).abs().max()
        allowed = 2 * (peer + torch.finfo(self.dtype).eps * exact.abs().max())
        errors = (output[: self.starts[-1]].double() - exact).abs().amax((1, 2))  # [num_tokens]
        assert errors.max() <= allowed, f"error {errors.max():.2e}, allowed {allowed:.2e}: {errors}"

    def dense(self, index: int, dtype: torch.dtype) -> torch.Tensor:
        """Attention of sequence `index`'s new queries over its keys, without any cache."""
        arguments = self.arguments
        query = arguments["query"][self.starts[index] : self.starts[index + 1]].to(dtype)
        groups = torch.arange(self.heads[0]) // (self.heads[0] // self.heads[1])
        key, value = (dense[index].to(dtype)[:, groups] for dense in (self.keys, self.values))
        scores = torch.einsum("qhd,khd->hqk", query, key) * arguments["scale"]
        if arguments["softcap"]:
            scores = torch.tanh(scores / arguments["softcap"]) * arguments["softcap"]
        num_queries, num_keys = query.shape[0], key.shape[0]
        distance = torch.arange(num_keys - num_queries, num_keys)[:, None] - torch.arange(num_keys)
        hidden = (distance < 0) | (distance >= (arguments["window"] or num_keys))
        weights = scores.masked_fill(hidden, -torch.inf).exp()
        total = weights.sum(-1, keepdim=True)
        if arguments["sinks"] is not None:
            total = total + arguments["sinks"].to(dtype).exp()[:, None, None]
        return torch.einsum("hqk,khd->qhd", weights / total, value)

    def bits(self, role: str) -> torch.Tensor:
        """A cache as integers, so that NaN equals itself."""
        cache = self.arguments[f"{role}_cache"]
        return cache.view(NAN_BITS[cache.itemsize]).clone()


# Two chunks of prompts (a first and a second one), three decoding rows of different lengths.
MIXED = [Sequence(0, 37), Sequence(50, 1), Sequence(21, 20), Sequence(3, 1), Sequence(90, 1)]


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


def test_a_table_that_is_too_short_is_refused():
    """Pages are read by their address: past the end of the table there may be anything."""
    case = Case([Sequence(15, 1)])
    case.arguments["seq_lens"] += case.arguments["block_table"].shape[1] * 16
    with pytest.raises(ValueError, match="block table must hold each sequence"):
        case.run("cpu")


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
