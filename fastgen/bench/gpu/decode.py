"""Section `decode`: attention of one token per sequence, as a share of the read bandwidth."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ...kernels.attention import attend_reference
from ...kernels.gpu.paged_attention import decode_bytes
from . import exact
from .attention_work import paged_cache, paged_run, scattered_table
from .clock import Clock, read_bandwidth
from .findings import Figure, Finding, checked, own

HEADS = ((32, 4), (32, 8))
HEAD_DIM = 128
NUM_SEQS = 64
CONTEXTS = (512, 1024, 2048, 4096, 8192)
BLOCK_SIZES = (16, 64)


def run(device: str) -> Iterator[Finding]:
    clock = Clock(device)
    read = read_bandwidth(clock, device)
    yield Figure("read_gb_per_s", read)
    contexts, num_seqs, all_heads = CONTEXTS, NUM_SEQS, HEADS
    if device == "cpu":
        contexts, num_seqs, all_heads = (64,), 2, ((4, 1),)
    for heads in all_heads:
        for block_size in BLOCK_SIZES:
            for context in contexts:
                step = _Step(heads, context, num_seqs, block_size, device)
                size = f"{heads[0]}:{heads[1]}/{block_size}/{context}"
                yield checked(f"{size} is accurate", step.check)
                yield own(size, step.measure, clock, read["best"])


class _Step:
    """Sequences of equal length, one new token each."""

    def __init__(
        self, heads: tuple[int, int], context: int, num_seqs: int, block_size: int, device: str
    ) -> None:
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        torch.manual_seed(0)
        num_heads, num_kv_heads = heads
        self.context, self.num_seqs, self.num_kv_heads = context, num_seqs, num_kv_heads
        self.query = torch.randn(num_seqs, num_heads, HEAD_DIM, device=device).to(dtype)
        shape = (num_seqs, context, num_kv_heads, HEAD_DIM)
        dense = [torch.randn(shape, device=device, dtype=dtype) for _ in range(2)]
        self.last = [tensor[-1].clone() for tensor in dense]  # keys and values of a sequence
        self.output = torch.full_like(self.query, torch.nan)
        table = scattered_table(num_seqs, context, block_size, self.query.device)
        self.run = paged_run(
            self.query,
            paged_cache(dense[0], table, block_size),
            paged_cache(dense[1], table, block_size),
            self.output,
            table,
            torch.arange(num_seqs + 1, dtype=torch.int32, device=device),
            torch.full((num_seqs,), context, dtype=torch.int32, device=device),
        )

    def check(self) -> dict[str, Any]:
        self.run()
        query, scale = self.query[-1:], HEAD_DIM**-0.5
        key, value = self.last
        return exact.accurate(
            self.output[-1:],
            attend_reference(query, key, value, scale, 0, 0.0, None),
            exact.attention(query, key, value, scale),
        )

    def measure(self, clock: Clock, read_gb_per_s: float) -> dict[str, float]:
        ms = clock.ms(clock.graphed(self.run))
        lengths = self.num_seqs * [self.context]
        size = self.query.element_size()
        moved = decode_bytes(self.num_kv_heads, HEAD_DIM, HEAD_DIM, size, lengths)
        rate = moved / ms / 1e6
        return {"gb_per_s": rate, "share": rate / read_gb_per_s, "ms": ms}
