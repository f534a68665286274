"""Times of GPU work by CUDA events; in a dry run on the CPU by the wall clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

_WARM_UP_S = 0.5  # of matrix products, after which a GPU's clocks are where they stay


class Clock:
    """Medians on one device, whose clocks are warm."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"
        if self.on_gpu:
            matrix = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
            start = time.perf_counter()
            while time.perf_counter() - start < _WARM_UP_S:
                for _ in range(8):
                    torch.mm(matrix, matrix)
                torch.cuda.synchronize()

    def ms(self, function: Callable[[], Any]) -> float:
        """Median milliseconds of a call; on a GPU each begins with nothing in the L2 cache."""
        if self.on_gpu:
            from triton.testing import do_bench

            found = do_bench(function, warmup=20, rep=80, return_mode="median")
            assert isinstance(found, float)
            return found
        start = time.perf_counter()  # a dry run: once will do
        function()
        return 1e3 * (time.perf_counter() - start)

    def graphed(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """What replays the launches of `function`, as the engine does for decode steps.

        Tensors it allocates are allocated once, and what it zeroes is zeroed each time.
        """
        if not self.on_gpu:
            return function
        function()  # kernels are compiled outside of the capture
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        return graph.replay


def read_bandwidth(clock: Clock, device: str) -> dict[str, float]:
    """GB/s of reading: torch's sum of a large tensor, and a copy, which reads and writes.

    "best" is the larger one, what kernels that read are measured by.
    """
    data = torch.ones((1 << 30) if clock.on_gpu else (1 << 22), device=device)  # 4 GiB, 16 MiB
    target = torch.empty_like(data)
    total = data.nbytes / 1e6 / clock.ms(data.sum)
    copy = 2 * data.nbytes / 1e6 / clock.ms(lambda: target.copy_(data))
    return {"sum": total, "copy": copy, "best": max(total, copy)}
