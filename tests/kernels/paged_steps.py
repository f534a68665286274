"""Steps of paged attention for tests, and dense fp64 attention of each sequence by itself.

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

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
NAN_BITS = {4: torch.int32, 2: torch.int16}


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
            "chunk": 0,
            "alibi_slopes": None,
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
        if arguments["chunk"]:
            chunks = torch.arange(num_keys).div(arguments["chunk"], rounding_mode="floor")
            hidden |= chunks[num_keys - num_queries :, None] != chunks
        if arguments["alibi_slopes"] is not None:
            scores = scores - arguments["alibi_slopes"].to(dtype)[:, None, None] * distance
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
