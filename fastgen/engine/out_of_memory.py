"""What a step does that finds no memory: it is undone, and smaller ones follow."""

from __future__ import annotations

import torch

# What torch's CPU allocator says of itself; its error has no class of its own.
_CPU_ALLOCATOR = "DefaultCPUAllocator"
_STEPS_BEFORE_GROWTH = 64


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was asked for and there was none."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and _CPU_ALLOCATOR in str(error)
    )


class TokenBudget:
    """How many tokens a step may have: `most`, but fewer for a while after one found no memory."""

    def __init__(self, most: int) -> None:
        self.most = self.tokens = most
        self._num_steps = 0  # that ran since it last changed

    def shrink(self, num_tokens: int) -> bool:
        """A step of so many tokens found no memory; False if no smaller one can be tried."""
        self._num_steps = 0
        if num_tokens <= 1:
            return False
        self.tokens = num_tokens // 2
        return True

    def ran(self) -> None:
        """A step ran."""
        if self.tokens < self.most:
            self._num_steps += 1
            if self._num_steps == _STEPS_BEFORE_GROWTH:
                self._num_steps = 0
                self.tokens = min(self.most, 2 * self.tokens)
