"""Decode steps replayed from captured graphs, one per number of sequences that is rounded up to.

A captured graph is a list of kernel launches with their addresses. So a step's tensors are copied
to where they were when it was captured, and a step of fewer sequences is filled up with rows that
store nothing and whose results nobody reads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ..compiled import CompiledForward
from .batch import BatchLayout, ForwardBatch
from .kv_cache import KVCache

logger = logging.getLogger("fastgen")


def batch_buckets(max_num_seqs: int) -> tuple[int, ...]:
    """1, 2, 4, 8, 16, then every 16 up to 128 and every 32: the sizes that are captured."""
    sizes = [1, 2, 4, 8, *range(16, 129, 16), *range(160, max_num_seqs + 32, 32)]
    return (*(size for size in sizes if size < max_num_seqs), max_num_seqs)


def table_bytes(max_num_seqs: int, table_width: int) -> int:
    """Bytes of the tensors that captured steps read their batch from."""
    numbers = BatchLayout(max_num_seqs, max_num_seqs, max_num_seqs).num_bytes
    return numbers + 4 * max_num_seqs * table_width


class Capturer(Protocol):
    """Records launches instead of running them."""

    def capture(self, run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        """What replays the launches of `run`, and where its result then is."""
        ...


class CudaCapturer:
    """torch's CUDA graphs. All share one pool of memory: only one of them runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def capture(self, run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on using the GPU meanwhile.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            output = run()
        return graph.replay, output


@dataclass
class _Captured:
    replay: Callable[[], None]
    logits: torch.Tensor


class DecodeGraphs:
    """Captured decode steps of one forward and one cache.

    buckets: Numbers of sequences that are captured, each when it is first met. num_captured,
    num_replayed: counters. refusal: Why nothing is captured any more, or None.
    """

    def __init__(
        self,
        compiled: CompiledForward,
        kv_cache: KVCache,
        device: torch.device,
        buckets: Sequence[int],
        table_width: int,
        capturer: Capturer,
    ) -> None:
        self.buckets, self.num_captured, self.num_replayed = tuple(buckets), 0, 0
        self.refusal: str | None = None
        self._compiled, self._kv_cache, self._capturer = compiled, kv_cache, capturer
        most = self.buckets[-1]
        num_bytes = BatchLayout(most, most, most).num_bytes
        self._buffer = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self._table = torch.zeros((most, table_width), dtype=torch.int32, device=device)
        self._captured: dict[int, _Captured] = {}
        self._binding = compiled.binding

    def bucket_for(self, num_seqs: int) -> int | None:
        """How many sequences a decode step is filled up to; None: it is not captured."""
        if self.refusal is not None:
            return None
        return next((size for size in self.buckets if size >= num_seqs), None)

    def run(self, batch: ForwardBatch) -> torch.Tensor:
        """A decode step of as many sequences as one of the buckets, filled up ones included.

        Returns: logits [that many, vocab_size], the caller's own.
        """
        if self._binding != self._compiled.binding:  # weights moved: the addresses are void
            self._captured.clear()
            self._binding = self._compiled.binding
        num_seqs = batch.seq_lens.shape[0]
        layout = BatchLayout(num_seqs, num_seqs, num_seqs)
        inputs = ForwardBatch.in_buffer(layout, self._buffer, self._table[:num_seqs])
        assert inputs.numbers is not None
        assert batch.numbers is not None
        inputs.numbers.copy_(batch.numbers)
        inputs.block_table[:, : batch.block_table.shape[1]].copy_(batch.block_table)
        captured = self._captured.get(num_seqs)
        if captured is None:
            # Run once as it is: kernels are compiled and libraries set up outside of the capture.
            logits = self._compiled(inputs, self._kv_cache)
            self._capture(num_seqs, inputs)
            return logits
        captured.replay()
        self.num_replayed += 1
        return captured.logits.clone()  # the next step writes there

    def _capture(self, num_seqs: int, inputs: ForwardBatch) -> None:
        try:
            replay, logits = self._capturer.capture(lambda: self._compiled(inputs, self._kv_cache))
        except RuntimeError as error:
            self.refusal = f"a step of {num_seqs} sequences could not be captured: {error}"
            logger.warning("decode steps are not captured from now on: %s", self.refusal)
            return
        self._captured[num_seqs] = _Captured(replay, logits)
        self.num_captured += 1
