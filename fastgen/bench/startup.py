"""Start-up, measured in fresh processes: from a model in memory to its first token."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch

from .fresh import run_fresh
from .machine import peak_rss_bytes, reset_peak_rss

ENGINES = ("fastgen", "transformers")
PROMPT = list(range(1, 33))


@dataclass(frozen=True)
class Startup:
    """One engine in one fresh process, times in seconds.

    prepare: `optimize` and the engine; first_token: of a prompt of 32 tokens; second_token: the
    same again with another prompt, when everything is warm. load: from files to a model in memory,
    where that is measured, too. parts: Of the start, as `explain` tells them.
    """

    engine: str
    prepare_s: float
    first_token_s: float
    second_token_s: float
    peak_rss_bytes: int | None
    load_s: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def total_s(self) -> float:
        return self.load_s + self.prepare_s + self.first_token_s


def measure_here(engine: str, model: Any) -> Startup:
    """Run in the fresh process, whose model is in memory and whose libraries are imported."""
    reset_peak_rss()
    start = time.perf_counter()
    if engine == "fastgen":
        from .. import api

        api.optimize(model)
    prepared = time.perf_counter()
    times = []
    for shift in (0, 100):
        ids = torch.tensor([[token + shift for token in PROMPT]], device=model.device)
        before = time.perf_counter()
        model.generate(ids, max_new_tokens=1, do_sample=False)
        times.append(time.perf_counter() - before)
    return Startup(engine, prepared - start, times[0], times[1], peak_rss_bytes())


def measure_fresh(engine: str, arguments: list[str]) -> Startup:
    """One engine in a fresh process. Raises: ValueError with the child's own words if it fails."""
    return Startup(**run_fresh(f"the start-up of {engine}", [*arguments, "--child", engine]))
