"""How many blocks a pool has: what can be needed, at most what the memory allows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..compiled import CompiledForward
from ..config import Config
from ..errors import CapacityError
from .decode_graphs import batch_buckets, table_bytes
from .kv_cache import block_bytes, free_memory_bytes


@dataclass(frozen=True)
class PoolSize:
    """The size of one model's pool, and of what is captured over it.

    fills_gpu: The pool may fill a GPU as gpu_memory_utilization says.
    """

    compiled: CompiledForward
    config: Config
    device: torch.device
    max_model_len: int
    fills_gpu: bool

    @property
    def longest_table(self) -> int:
        """Blocks of the longest sequence."""
        return -(-self.max_model_len // self.config.block_size)

    @property
    def buckets(self) -> tuple[int, ...]:
        """Numbers of sequences whose decode steps are captured."""
        eager = self.device.type != "cuda" or self.config.enforce_eager
        return () if eager else batch_buckets(self.config.max_num_seqs)

    def num_blocks(self) -> int:
        """Of a new pool, the null block among them, with the memory that is free now.

        Raises: CapacityError if a GPU has no memory for any.
        """
        per_block = block_bytes(self.compiled.spec, self.config.block_size)
        allowed = self.config.kv_cache_memory_bytes
        if allowed is None and self.device.type == "cuda" and self.fills_gpu:
            allowed = self._gpu_plan().cache
        elif allowed is None:
            allowed = free_memory_bytes(self.device) // 2
        needed = self.config.max_num_seqs * self.longest_table + 1
        return max(2, min(needed, allowed // per_block))

    def _gpu_plan(self) -> MemoryPlan:
        return plan_memory(
            GpuMemory.of(self.device),
            self.compiled,
            self.config.gpu_memory_utilization,
            self.config.max_num_batched_tokens,
            self.buckets,
            self.longest_table,
        )


@dataclass(frozen=True)
class GpuMemory:
    """Bytes of a GPU: all of it, and what nobody uses now."""

    total_bytes: int
    free_bytes: int

    @classmethod
    def of(cls, device: torch.device) -> GpuMemory:
        free, total = torch.cuda.mem_get_info(device)
        # What torch keeps and nobody uses is free, too.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return cls(total, free + kept)


@dataclass(frozen=True)
class MemoryPlan:
    """What the free memory is for. All in bytes.

    left_alone: of the free memory, for others. activations: of the largest step. captures: of
    captured decode steps, which share one pool: the largest one's values, the logits of each, and
    the tensors they read. cache: the rest.
    """

    left_alone: int
    activations: int
    captures: int
    cache: int


def plan_memory(
    memory: GpuMemory,
    compiled: CompiledForward,
    utilization: float,
    max_num_batched_tokens: int,
    buckets: Sequence[int],
    table_width: int,
) -> MemoryPlan:
    """Divide what is free.

    Args:
        utilization: Share of all memory that may be in use in the end, by whomever.
        buckets: Numbers of sequences whose decode steps are captured, () for none.
        table_width: Blocks of the longest sequence.
    Raises: CapacityError if nothing is left for the cache.
    """
    left_alone = int(memory.total_bytes * (1 - utilization))
    most_rows = min(max_num_batched_tokens, max(buckets, default=1))
    activations = compiled.activation_bytes(max_num_batched_tokens, most_rows)
    captures = 0
    if buckets:
        largest = max(buckets)
        captures = compiled.activation_bytes(largest, largest)
        captures += sum(compiled.logits_bytes(size) for size in buckets)
        captures += table_bytes(largest, table_width)
    cache = memory.free_bytes - left_alone - activations - captures
    if cache <= 0:
        raise CapacityError(
            f"gpu_memory_utilization={utilization} leaves no memory for the KV cache: of "
            f"{memory.free_bytes} free bytes {left_alone} are left alone, a step needs "
            f"{activations} and captured steps {captures}; raise it, lower "
            "max_num_batched_tokens, or set enforce_eager=True"
        )
    return MemoryPlan(left_alone, activations, captures, cache)
