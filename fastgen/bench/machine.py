"""What the machine itself can do, and what memory a run took."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def measure_machine(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Read bandwidth in GB/s and GEMM rate in TFLOP/s, best of several tries."""

    def best(function: Callable[[], Any], tries: int) -> float:
        times = []
        for _ in range(tries):
            start = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return min(times)

    data = torch.ones(1 << 27, dtype=torch.float32, device=device)  # 512 MiB
    read = best(data.sum, 5)
    left = torch.randn(2048, 2048, device=device).to(dtype)
    gemm = best(lambda: left @ left, 5)
    return {
        "read_gb_per_s": data.nbytes / read / 1e9,
        "gemm_tflop_per_s": 2 * 2048**3 / gemm / 1e12,
    }


def reset_peak_rss() -> None:
    """Let `peak_rss_bytes` begin anew; without effect where the system cannot do that."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        pass


def peak_rss_bytes() -> int | None:
    """Largest resident set of this process since `reset_peak_rss`; None if nobody tells."""
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
