"""Runs a scheduled step: batch, graph, logits. Owns the cache tensors."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from ..compiled import CompiledForward
from .batch import build_batch
from .decode_graphs import DecodeGraphs
from .kv_cache import KVCache
from .scheduler import SchedulerOutput


class Runner:
    """The compiled forward and its KV cache on one device.

    graphs: Captured decode steps, where there are any. forward_seconds: Of the last step; on a GPU
    until the kernels are queued, not until they ran.
    """

    def __init__(
        self,
        compiled: CompiledForward,
        kv_cache: KVCache,
        device: torch.device,
        graphs: DecodeGraphs | None = None,
    ) -> None:
        self.compiled, self.kv_cache, self.device = compiled, kv_cache, device
        self.graphs = graphs
        self.forward_seconds = 0.0

    @torch.inference_mode()
    def prepare_blocks(self, output: SchedulerOutput, poison: bool) -> None:
        """Copy the blocks that a step wants to have copied; `poison` fills freed ones with NaN."""
        if output.block_copies:
            self.kv_cache.copy_blocks(output.block_copies)
        if poison:
            targets = {target for _, target in output.block_copies}
            self.kv_cache.poison([b for b in output.freed_blocks if b not in targets])

    @torch.inference_mode()
    def run(self, output: SchedulerOutput) -> torch.Tensor:
        """Run one step; logits [rows that sample, vocab_size] in the order of `scheduled`."""
        bucket = None
        if self.graphs is not None and not output.items:
            bucket = self.graphs.bucket_for(output.num_seqs)
        batch = build_batch(output, self.kv_cache.block_size, self.device, bucket)
        start = time.perf_counter()
        if self.graphs is None or bucket is None:
            logits = self.compiled(batch, self.kv_cache)
        else:
            logits = self.graphs.run(batch)[: output.num_seqs]
        self.forward_seconds = time.perf_counter() - start
        return logits

    def read_cache(self, block_ids: Sequence[int], length: int) -> list[tuple[torch.Tensor, ...]]:
        """A sequence's keys and values, copied: per layer two [num_kv_heads, length, head_dim]."""
        return [
            (
                self.kv_cache.read("key", layer, block_ids, length),
                self.kv_cache.read("value", layer, block_ids, length),
            )
            for layer in range(len(self.kv_cache.spec.layers))
        ]
