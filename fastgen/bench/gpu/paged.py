"""Section `paged`: what attention of prompts pays for reading keys and values through pages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .attention_work import Prompts
from .clock import Clock
from .findings import Finding, checked, own
from .prefill import prompts, sizes

BLOCK_SIZES = (16, 32, 64)


def run(device: str) -> Iterator[Finding]:
    """Per size and block size the rate through pages as a share of the dense kernel's."""
    clock = Clock(device)
    for head_dim, length in sizes(device):
        work = prompts(device, head_dim, length)
        dense = clock.ms(clock.graphed(work.dense()))
        for block_size in BLOCK_SIZES:
            size = f"{head_dim}/{length}/{block_size}"
            yield checked(f"{size} is accurate", _check, work, block_size)
            yield own(size, _against, dense, work, block_size, clock)


def _check(work: Prompts, block_size: int) -> dict[str, Any]:
    work.output.fill_(torch.nan)
    work.paged(block_size)()
    return work.check_tail(work.output)


def _against(dense_ms: float, work: Prompts, block_size: int, clock: Clock) -> dict[str, float]:
    paged_ms = clock.ms(clock.graphed(work.paged(block_size)))
    return {"ratio": dense_ms / paged_ms, "dense_ms": dense_ms, "paged_ms": paged_ms}
