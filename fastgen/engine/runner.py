"""Runs a scheduled step: batch, graph, logits. Owns the cache tensors."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from ..compiled import CompiledForward, ForwardOutput
from ..passes import Variant
from .batch import ForwardBatch, add_embeds, build_batch
from .decode_graphs import DecodeGraphs
from .kv_cache import KVCache
from .metrics import Incident
from .out_of_memory import is_out_of_memory
from .scheduler import SchedulerOutput

logger = logging.getLogger("fastgen")


class Runner:
    """A model's compiled forwards and their one KV cache on one device.

    compiled: The plain forward. variants: Others of the same model, by what they take and give;
    the smallest that does for all requests of a step runs it. graphs: Captured decode steps of the
    plain one, where there are any. note: Counts kernels that failed.

    forward_seconds: Of the last step; on a GPU until the kernels are queued, not until they ran.
    """

    def __init__(
        self,
        compiled: CompiledForward,
        kv_cache: KVCache,
        device: torch.device,
        graphs: DecodeGraphs | None = None,
        variants: Mapping[Variant, CompiledForward] | None = None,
        note: Callable[[Incident], None] = lambda incident: None,
    ) -> None:
        self.compiled, self.kv_cache, self.device = compiled, kv_cache, device
        self.graphs = graphs
        self.variants = {} if variants is None else variants
        self._note = note
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
    def run(self, output: SchedulerOutput) -> ForwardOutput:
        """Run one step; logits [rows that sample, vocab_size] in the order of `scheduled`.

        If a kernel fails, the step is repeated with its reference, which runs from then on.
        """
        while True:
            try:
                return self._run_once(output)
            except Exception as error:
                replaced = None if is_out_of_memory(error) else self._fall_back(output, error)
                if replaced is None:
                    raise
                self._note("kernel_fallbacks")
                logger.warning(
                    "%s failed and its reference runs from now on: %s: %s",
                    replaced,
                    type(error).__name__,
                    error,
                )

    def _run_once(self, output: SchedulerOutput) -> ForwardOutput:
        forward = self._forward_for(output)
        bucket = None
        if self.graphs is not None and forward is self.compiled and not output.items:
            bucket = self.graphs.bucket_for(output.num_seqs)
        batch = self._batch(output, forward, bucket)
        start = time.perf_counter()
        if self.graphs is None or bucket is None:
            result = forward.run(batch, self.kv_cache)
        else:
            result = ForwardOutput(self.graphs.run(batch)[: output.num_seqs])
        self.forward_seconds = time.perf_counter() - start
        return result

    def _fall_back(self, output: SchedulerOutput, error: Exception) -> str | None:
        """After a step has raised: as `CompiledForward.fall_back` for the forward that ran it."""
        forward = self._forward_for(output)
        return forward.fall_back(self._batch(output, forward), self.kv_cache, error)

    def _batch(
        self, output: SchedulerOutput, forward: CompiledForward, bucket: int | None = None
    ) -> ForwardBatch:
        batch = build_batch(output, self.kv_cache.block_size, self.device, bucket)
        if (like := forward.embeds_like) is not None:
            add_embeds(batch, output, like)
        return batch

    def _forward_for(self, output: SchedulerOutput) -> CompiledForward:
        if not self.variants:
            return self.compiled
        forward = smallest_covering(self.compiled, self.variants, _needs(output))
        assert forward is not None, "a request was let in without its variant"
        return forward

    def read_cache(self, block_ids: Sequence[int], length: int) -> list[tuple[torch.Tensor, ...]]:
        """A sequence's keys and values, copied: per layer two [num_kv_heads, length, head_dim]."""
        return [
            (
                self.kv_cache.read("key", layer, block_ids, length),
                self.kv_cache.read("value", layer, block_ids, length),
            )
            for layer in range(len(self.kv_cache.spec.layers))
        ]


def smallest_covering(
    plain: CompiledForward, variants: Mapping[Variant, CompiledForward], needed: Variant
) -> CompiledForward | None:
    """The forward that takes and gives what is needed, and as little else as there is."""
    found = [forward for forward in (plain, *variants.values()) if forward.variant.covers(needed)]
    return min(found, key=lambda forward: forward.variant.size, default=None)


def _needs(output: SchedulerOutput) -> Variant:
    """What a step's requests need together."""
    requests = (*output.decodes.requests, *(item.request for item in output.items))
    return Variant(
        prompt_embeds=any(item.request.has_embeds_left for item in output.items),
        hidden_states=any(request.wants_hidden_states for request in requests),
    )
