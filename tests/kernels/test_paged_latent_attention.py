"""`fastgen::paged_latent_attention`, each implementation, against dense fp64 attention."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from fastgen.kernels import CallSite, implementations, latent_attention
from fastgen.kernels import paged_latent_attention as paged_latent_attention_op
from fastgen.kernels.paged_attention import read_cache
from kernel_helpers import DTYPES, assert_accurate, settings_are_restored  # noqa: F401
from paged_steps import MIXED, NAN_BITS, Sequence

_module = importlib.import_module("fastgen.kernels.paged_latent_attention")  # its name is the op's
OP = "fastgen::paged_latent_attention"
IMPLEMENTATIONS = pytest.mark.parametrize(
    "name", ["op", *(item.name for item in implementations(OP))]
)


@dataclass(frozen=True)
class Sizes:
    """Of an attention: heads, and the widths of a head's parts and of what they are made from."""

    heads: int = 4
    rank: int = 16
    nope: int = 8
    rope: int = 8
    v: int = 12


DEEPSEEK_V2_LITE = Sizes(16, 512, 128, 64, 128)


@dataclass
class Case:
    """A step over a cache of NaN, and the latents of each of its sequences."""

    sequences: list[Sequence]
    sizes: Sizes = field(default_factory=Sizes)
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    num_padding: int = 0
    window: int = 0

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)
        sizes, size = self.sizes, self.block_size
        counts = [-(-sequence.length // size) for sequence in self.sequences]
        num_blocks = 1 + sum(counts) + 3
        scattered = 1 + torch.randperm(num_blocks - 1, generator=self.generator)
        owned = scattered[: sum(counts)].split(counts)
        table = torch.randint(num_blocks, (len(counts), max(counts) + 2), generator=self.generator)
        num_tokens = sum(sequence.new for sequence in self.sequences) + self.num_padding
        width = sizes.rank + sizes.rope
        new = self.random(num_tokens, width)
        cache = torch.full((num_blocks, 1, size, width), torch.nan, dtype=self.dtype)
        slots = torch.full((num_tokens,), -1)
        self.stored, self.starts = [], [0]
        for row, (sequence, blocks) in enumerate(zip(self.sequences, owned, strict=True)):
            table[row, : len(blocks)] = blocks
            start, end = self.starts[-1], self.starts[-1] + sequence.new
            place = torch.arange(sequence.length)
            own = blocks[place // size] * size + place % size
            latents = self.random(sequence.length, width)
            old = own[: sequence.computed]
            cache[old // size, 0, old % size] = latents[: sequence.computed]
            if sequence.stored:
                latents[sequence.computed :] = new[start:end]
                slots[start:end] = own[sequence.computed :]
            self.stored.append(latents)
            self.starts.append(end)
        features = sizes.heads * (sizes.nope + sizes.v)
        weight = self.random(features, sizes.rank) * sizes.rank**-0.5
        self.arguments: dict[str, Any] = {
            "query": self.random(num_tokens, sizes.heads, sizes.nope + sizes.rope),
            "latent": new[:, : sizes.rank],
            "k_rope": new[:, sizes.rank :],
            "weight": weight.to(self.dtype),
            "cache": cache,
            "slot_mapping": slots,
            "block_table": table.int(),
            "query_start_loc": torch.tensor(self.starts, dtype=torch.int32),
            "seq_lens": torch.tensor([s.length for s in self.sequences], dtype=torch.int32),
            "scale": (sizes.nope + sizes.rope) ** -0.5,
            "window": self.window,
        }

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def run(self, name: str) -> torch.Tensor:
        """Run the op itself ("op") or one implementation; skip what it refuses."""
        if name == "op":
            return paged_latent_attention_op(**self.arguments)
        chosen = next(item for item in implementations(OP) if item.name == name)
        why = chosen.refuses(CallSite(torch.device("cpu"), self.arguments))
        if why is not None:
            pytest.skip(f"{name} refuses: {why}")
        return chosen.function(**self.arguments)

    def assert_accurate(self, output: torch.Tensor) -> None:
        """Next to keys and values that are expanded in the dtype, as a model does."""
        assert output.is_contiguous()
        assert not output.isnan().any(), "a slot that holds nothing was read"
        assert not output[self.starts[-1] :].any(), "rows of padding must be zero"
        exact, peer = (
            torch.cat([self.dense(index, dtype) for index in range(len(self.sequences))])
            for dtype in (torch.float64, self.dtype)
        )
        assert_accurate(output[: self.starts[-1]], peer, exact)

    def dense(self, index: int, dtype: torch.dtype) -> torch.Tensor:
        """Attention of a sequence's new queries, keys and values rounded to `dtype`, no cache."""
        sizes, arguments = self.sizes, self.arguments
        query = arguments["query"][self.starts[index] : self.starts[index + 1]]
        latent, k_rope = self.stored[index].to(dtype).split([sizes.rank, sizes.rope], dim=-1)
        heads = (latent @ arguments["weight"].to(dtype).T).unflatten(-1, (sizes.heads, -1))
        key = torch.cat([heads[..., : sizes.nope], k_rope[:, None].expand(-1, sizes.heads, -1)], -1)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        query, key, value = (x.to(wide) for x in (query, key, heads[..., sizes.nope :]))
        num_queries, num_keys = query.shape[0], key.shape[0]
        scores = torch.einsum("qhd,khd->hqk", query, key) * arguments["scale"]
        distance = torch.arange(num_keys - num_queries, num_keys)[:, None] - torch.arange(num_keys)
        hidden = (distance < 0) | (distance >= (arguments["window"] or num_keys))
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, value).to(dtype)

    def bits(self) -> torch.Tensor:
        """The cache as integers, so that NaN equals itself."""
        cache = self.arguments["cache"]
        return cache.view(NAN_BITS[cache.itemsize]).clone()


# Prompts that are expanded, whole and by a chunk; single tokens and two, which are not.
STEP = [*MIXED, Sequence(60, 2)]


@DTYPES
@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize(
    "sequences",
    [STEP, [Sequence(50, 1), Sequence(3, 1), Sequence(90, 2)], [Sequence(0, 40), Sequence(9, 30)]],
    ids=["mixed", "absorbed", "expanded"],
)
@IMPLEMENTATIONS
def test_a_step_equals_dense_attention(name, sequences, block_size, dtype):
    case = Case(sequences, block_size=block_size, dtype=dtype)
    case.assert_accurate(case.run(name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@IMPLEMENTATIONS
def test_the_sizes_of_a_real_model(name, dtype):
    case = Case([Sequence(100, 1), Sequence(0, 50), Sequence(40, 3)], DEEPSEEK_V2_LITE, dtype=dtype)
    case.assert_accurate(case.run(name))


@pytest.mark.parametrize(
    "sizes", [Sizes(1, 8, 4, 2, 4), Sizes(7, 40, 24, 8, 10), Sizes(3, 63, 5, 7, 9)], ids=str
)
@IMPLEMENTATIONS
def test_odd_sizes(name, sizes):
    case = Case(STEP, sizes)
    case.assert_accurate(case.run(name))


@pytest.mark.parametrize("window", [1, 16, 33])
@IMPLEMENTATIONS
def test_a_window(name, window):
    case = Case(STEP, window=window)
    case.assert_accurate(case.run(name))


@pytest.mark.parametrize("offset", [-1, 0, 1])
@pytest.mark.parametrize("num_blocks", [1, 2])
@IMPLEMENTATIONS
def test_exact_block_boundaries(name, num_blocks, offset):
    length = num_blocks * 16 + offset
    case = Case([Sequence(0, length), Sequence(5, length - 5), Sequence(length - 1, 1)])
    case.assert_accurate(case.run(name))


@IMPLEMENTATIONS
def test_few_heads_at_a_time(name, monkeypatch):
    """Expanded keys and values of all heads at once could be larger than the cache."""
    monkeypatch.setattr(_module, "_MAX_EXPANDED", 41 * 28 * 3)
    case = Case(STEP)
    case.assert_accurate(case.run(name))


@IMPLEMENTATIONS
def test_padding_rows_are_zero_and_write_only_to_the_null_block(name):
    for sequences in (STEP, [Sequence(50, 1), Sequence(3, 1)]):
        case = Case(sequences, num_padding=5)
        before = case.bits()
        case.assert_accurate(case.run(name))
        slots = case.arguments["slot_mapping"]
        written = torch.zeros(before.shape[0] * case.block_size, dtype=torch.bool)
        written[slots[slots >= 0]] = True
        changed = (case.bits() != before).any(-1).any(1)
        assert torch.equal(changed[1:].flatten(), written[case.block_size :])


@IMPLEMENTATIONS
def test_new_latents_are_stored_bit_for_bit(name):
    case = Case(STEP, dtype=torch.bfloat16)
    case.run(name)
    for index, sequence in enumerate(case.sequences):
        blocks = case.arguments["block_table"][index, : -(-sequence.length // case.block_size)]
        stored = read_cache(case.arguments["cache"], blocks, sequence.length)[:, 0]
        assert torch.equal(stored, case.stored[index])


@IMPLEMENTATIONS
def test_a_repeated_step_gives_the_same_cache_and_output(name):
    case = Case(STEP)
    first, cache = case.run(name), case.bits()
    assert torch.equal(case.run(name), first)
    assert torch.equal(case.bits(), cache)


@IMPLEMENTATIONS
def test_a_query_that_is_not_stored_sees_all_stored_latents(name):
    case = Case([Sequence(40, 1), Sequence(17, 1, stored=False), Sequence(0, 9)])
    case.assert_accurate(case.run(name))


@IMPLEMENTATIONS
def test_a_sequence_without_new_tokens_has_no_rows(name):
    case = Case([Sequence(20, 1), Sequence(16, 0), Sequence(0, 18), Sequence(0, 0)])
    case.assert_accurate(case.run(name))


def test_what_is_cheaper():
    """By hand for deepseek-v2-lite: a token alone is absorbed, a prompt expanded."""
    pays = _module.absorb_pays
    sizes = (512, 64, 128, 128)
    assert pays(1, 1000, *sizes)
    assert pays(32, 1000, *sizes)
    assert not pays(1000, 1000, *sizes)
    assert not pays(512, 4000, *sizes)
    # 2 of 4 keys, rank 1, widths 1: 2 x 2 + 7 x 4 products against 4 x 2 + 7 x 3
    assert not pays(2, 4, 1, 1, 1, 1)


def test_without_pages_it_is_the_same_attention():
    case = Case([Sequence(0, 33)])
    given = case.arguments
    names = ("query", "latent", "k_rope", "weight", "scale", "window")
    output = latent_attention(*(given[name] for name in names), 0)
    case.assert_accurate(output)
    torch.library.opcheck(
        torch.ops.fastgen.latent_attention.default, (*(given[name] for name in names), 0)
    )


def test_opcheck():
    case = Case([Sequence(3, 1), Sequence(0, 5)])
    case.arguments["cache"].nan_to_num_(0.0)  # opcheck compares caches with ==
    operator = torch.ops.fastgen.paged_latent_attention.default
    torch.library.opcheck(operator, tuple(case.arguments.values()))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_weight_that_does_not_fit_is_refused(device):
    case = Case([Sequence(0, 3)])
    arguments = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in case.arguments.items()
    }
    for wrong in (arguments["weight"][:-1], arguments["weight"][:, 1:], arguments["weight"][:32]):
        with pytest.raises(ValueError, match="weight must be"):
            paged_latent_attention_op(**{**arguments, "weight": wrong})


def plant_longer_sequence(arguments):
    arguments["seq_lens"] += 1


def plant_shifted_slots(arguments):
    arguments["slot_mapping"] = arguments["slot_mapping"].roll(1)


def plant_swapped_parts_of_the_weight(arguments):
    arguments["weight"] = arguments["weight"].unflatten(0, (4, -1)).flip(1).flatten(0, 1)


def plant_window_off_by_one(arguments):
    arguments["window"] += 1


@pytest.mark.parametrize(
    "plant",
    [
        plant_longer_sequence,
        plant_shifted_slots,
        plant_swapped_parts_of_the_weight,
        plant_window_off_by_one,
    ],
    ids=lambda plant: plant.__name__.removeprefix("plant_"),
)
@IMPLEMENTATIONS
def test_planted_mistakes_are_seen(name, plant):
    case, wrong = Case(STEP, window=20), Case(STEP, window=20)
    case.assert_accurate(wrong.run(name))
    wrong = Case(STEP, window=20)
    plant(wrong.arguments)
    with pytest.raises(AssertionError, match=r"^error|^a slot"):
        case.assert_accurate(wrong.run(name))
