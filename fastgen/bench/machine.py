"""What the machine itself can do, and what memory a run took."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_PROC = Path("/proc")


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


def reset_peak_rss(pid: int | str = "self") -> None:
    """Let `peak_rss_bytes` begin anew; without effect where the system cannot do that."""
    try:
        (_PROC / str(pid) / "clear_refs").write_text("5")
    except OSError:
        pass


def rss_bytes(pid: int | str = "self") -> int | None:
    """Resident set of a process now; None if nobody tells."""
    return _memory("VmRSS:", pid)


def peak_rss_bytes(pid: int | str = "self") -> int | None:
    """Largest resident set of a process since `reset_peak_rss`; None if nobody tells."""
    return _memory("VmHWM:", pid)


def _memory(field: str, pid: int | str) -> int | None:
    try:
        for line in (_PROC / str(pid) / "status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def processes_of_group(group: int) -> dict[int, float]:
    """Process ids of a process group, each with the CPU seconds that it has used so far."""
    ticks = os.sysconf("SC_CLK_TCK")
    found = {}
    for folder in _PROC.glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has just ended
        if int(fields[2]) == group:
            found[int(folder.name)] = (int(fields[11]) + int(fields[12])) / ticks
    return found
