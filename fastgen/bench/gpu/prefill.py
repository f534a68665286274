"""Section `prefill`: causal attention of prompts beside torch's and a tutorial's, in TFLOP/s."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import tutorial_attention
from .attention_work import Prompts
from .clock import Clock
from .findings import Finding, Missing, checked, measured, own

HEAD_SIZES = (64, 128)
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
FLEX_LENGTHS = (2048, 16384)  # each is compiled anew
NUM_TOKENS, WIDTH = 16384, 2048  # of all sequences; of all heads together
_BACKENDS = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "SDPA flash": SDPBackend.FLASH_ATTENTION}


def sizes(device: str) -> list[tuple[int, int]]:
    """(head size, length), a little one on the CPU."""
    if device == "cpu":
        return [(64, 64)]
    return [(head_dim, length) for head_dim in HEAD_SIZES for length in LENGTHS]


def prompts(device: str, head_dim: int, length: int) -> Prompts:
    if device == "cpu":
        return Prompts.random(2, length, 2, head_dim, torch.float32, device)
    batch, num_heads = NUM_TOKENS // length, WIDTH // head_dim
    return Prompts.random(batch, length, num_heads, head_dim, torch.bfloat16, device)


def run(device: str) -> Iterator[Finding]:
    """Per size our kernel, the tutorial's at its best, and torch's, one after another."""
    clock = Clock(device)
    for head_dim, length in sizes(device):
        work, size = prompts(device, head_dim, length), f"{head_dim}/{length}"
        ours = work.dense()
        yield checked(f"{size} is accurate", _check, work, ours)
        yield own(f"{size}/fastgen", _rate, work, clock, ours)
        yield measured(f"{size}/tutorial", _tutorial, work, clock)
        for name, backend in _BACKENDS.items():
            if device == "cpu":
                yield Missing(f"{size}/{name}", "needs CUDA")
            else:
                yield measured(f"{size}/{name}", _sdpa, work, clock, backend)


def run_flex(device: str) -> Iterator[Finding]:
    if device == "cpu":
        yield Missing("FlexAttention", "needs CUDA")
        return
    clock = Clock(device)
    for length in FLEX_LENGTHS:
        for head_dim in reversed(HEAD_SIZES):
            work = prompts(device, head_dim, length)
            yield measured(f"{head_dim}/{length}/FlexAttention", _flex, work, clock)


def _check(work: Prompts, attend: Callable[[], None]) -> dict[str, Any]:
    work.output.fill_(torch.nan)
    attend()
    return work.check_tail(work.output)


def _rate(work: Prompts, clock: Clock, attend: Callable[[], Any]) -> float:
    """TFLOP/s"""
    return work.flops / clock.ms(attend) / 1e9


def _tutorial(work: Prompts, clock: Clock) -> float:
    """The fastest of its configurations; those that need more than the card has do not count."""
    rates, errors = [], []
    for call in tutorial_attention.runs(work.query, work.key, work.value, work.output):
        try:
            _check(work, call)
            rates.append(_rate(work, clock, call))
        except Exception as error:
            errors.append(error)
    if not rates:
        raise errors[0]
    return max(rates)


def _sdpa(work: Prompts, clock: Clock, backend: SDPBackend) -> float:
    query, key, value = work.heads_first()

    def call() -> torch.Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    with sdpa_kernel(backend):
        return _rate(work, clock, call)


def _flex(work: Prompts, clock: Clock) -> float:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    query, key, value = work.heads_first()
    length = query.shape[2]
    mask = create_block_mask(
        lambda b, h, q, k: q >= k, None, None, length, length, device=query.device
    )
    attend = torch.compile(flex_attention, dynamic=False)
    return _rate(work, clock, lambda: attend(query, key, value, block_mask=mask))
