"""The requests that engines are measured on, made from a seed."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from ..config import SamplingParams
from ..engine.block_pool import BlockPool
from ..engine.request import Request
from ..engine.scheduler import Scheduler


@dataclass(frozen=True)
class Workload:
    """Requests as (prompt ids, number of output tokens); `sequential`: each waits for the last."""

    name: str
    requests: list[tuple[list[int], int]]
    sequential: bool = False

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt) for prompt, _ in self.requests)

    @property
    def output_tokens(self) -> int:
        return sum(length for _, length in self.requests)

    def part(self, count: int) -> Workload:
        """A seeded choice of `count` requests, for engines that would take too long."""
        if len(self.requests) <= count:
            return self
        chosen = random.Random(1).sample(self.requests, count)
        return Workload(self.name, chosen, self.sequential)


def _single(draw: random.Random, vocab_size: int, max_len: int) -> Workload:
    """One request of 128 + 128 tokens."""
    length = min(128, max_len // 2)
    return Workload("single", [(_prompt(draw, vocab_size, length), length)])


def _mixed(draw: random.Random, vocab_size: int, max_len: int, count: int = 32) -> Workload:
    """`count` requests, log-normal prompts (median 110) and outputs (median 72)."""

    def log_normal(median: float, low: int, high: int) -> int:
        length = int(min(high, max(low, draw.lognormvariate(0, 0.9) * median)))
        return min(length, max_len // 2)

    requests = []
    for _ in range(count):
        prompt = _prompt(draw, vocab_size, log_normal(110, 16, 512))
        requests.append((prompt, log_normal(72, 16, 256)))
    return Workload("mixed", requests)


def _prefix(draw: random.Random, vocab_size: int, max_len: int) -> Workload:
    """16 requests that begin with the same 512 tokens, 16 of their own, 32 tokens each."""
    common = _prompt(draw, vocab_size, min(512, max_len // 2))
    own, length = min(16, max_len // 4), min(32, max_len // 4)
    requests = [(common + _prompt(draw, vocab_size, own), length) for _ in range(16)]
    return Workload("prefix", requests)


def _prefill(draw: random.Random, vocab_size: int, max_len: int) -> Workload:
    """Prompts of 1024 and of 2048 tokens, one after the other, one token each."""
    lengths = [min(length, max_len - 1) for length in (1024, 2048)]
    return Workload("prefill", [(_prompt(draw, vocab_size, n), 1) for n in lengths], True)


def mixed_workload(count: int, vocab_size: int, max_len: int, seed: int) -> Workload:
    """The workload "mixed" with so many requests."""
    return _mixed(random.Random(seed), vocab_size, max_len, count)


WORKLOADS: dict[str, Callable[[random.Random, int, int], Workload]] = {
    "single": _single,
    "mixed": _mixed,
    "prefix": _prefix,
    "prefill": _prefill,
}


def make_workload(name: str, vocab_size: int, max_len: int, seed: int) -> Workload:
    """A workload of WORKLOADS; lengths beyond the model's limit are cut so that all fit."""
    return WORKLOADS[name](random.Random(seed), vocab_size, max_len)


def _prompt(draw: random.Random, vocab_size: int, length: int) -> list[int]:
    return [draw.randrange(vocab_size) for _ in range(length)]


def block_waste(workload: Workload) -> dict[str, float]:
    """Cache waste of a workload by block size; the scheduler alone decides it."""
    waste = {}
    for block_size in (16, 32, 64):
        scheduler = Scheduler(
            BlockPool(1 << 16), block_size=block_size, max_num_seqs=256, max_num_batched_tokens=2048
        )
        for prompt, length in workload.requests:
            params = SamplingParams(max_tokens=length, temperature=0.0)
            scheduler.add(Request(list(prompt), params))
        while (output := scheduler.schedule()).scheduled:
            scheduler.advance(output)
            for item in output.scheduled:
                if item.samples:
                    scheduler.append_token(item.request, 0)
        waste[str(block_size)] = scheduler.stats.cache_waste
    return waste
