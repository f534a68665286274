"""The engines that take turns on a workload: fastgen, and three ways to use transformers."""

from __future__ import annotations

import contextlib
import logging
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .. import Engine, SamplingParams, api
from .machine import peak_rss_bytes, reset_peak_rss
from .workloads import Workload

DETERMINISTIC = "fastgen, deterministic"
SLOW_PART = 8  # requests that the slowest peer runs of a workload; it is marked so


@dataclass(frozen=True)
class Measurement:
    """One engine on one workload in one round. Times of a request are means over the workload.

    all_ttft_ms: in the order of the requests, where they run one after the other.
    """

    engine: str
    seconds: float
    output_tokens: int
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    all_ttft_ms: list[float] | None = None
    steps: int | None = None
    computed_tokens: int | None = None
    cache_waste: float | None = None
    prefix_hit_rate: float | None = None
    peak_rss_bytes: int | None = None

    @property
    def tokens_per_s(self) -> float:
        return self.output_tokens / self.seconds


def run_fastgen(
    model: Any, workload: Workload, block_size: int, deterministic: bool = False
) -> Measurement:
    """A fresh engine, warmed up by one tiny request; the prefix cache is empty."""
    api.optimize(model, block_size=block_size, deterministic=deterministic)
    try:
        with Engine(model) as engine:
            engine.generate([[1, 2, 3]], SamplingParams(max_tokens=2, temperature=0.0))
            before = engine.metrics()
            prompts = [prompt for prompt, _ in workload.requests]
            params = [
                SamplingParams(max_tokens=length, temperature=0.0, ignore_eos=True)
                for _, length in workload.requests
            ]
            start = time.perf_counter()
            if workload.sequential:
                pairs = zip(prompts, params, strict=True)
                outputs = [engine.generate([prompt], own)[0] for prompt, own in pairs]
            else:
                outputs = engine.generate(prompts, params)
            seconds = time.perf_counter() - start
            after = engine.metrics()
    finally:
        api.restore(model)
    ttft = [output.metrics.ttft_ms for output in outputs if output.metrics.ttft_ms is not None]
    tpot = [output.metrics.tpot_ms for output in outputs if output.metrics.tpot_ms is not None]
    return Measurement(
        DETERMINISTIC if deterministic else "fastgen",
        seconds,
        sum(len(output.token_ids) for output in outputs),
        statistics.mean(ttft),
        statistics.mean(tpot) if tpot else None,
        ttft if workload.sequential else None,
        after.engine_steps - before.engine_steps,
        after.computed_tokens - before.computed_tokens,
        after.cache_waste,
        after.prefix_cache_hit_rate,
    )


def run_one_by_one(model: Any, workload: Workload) -> Measurement:
    """transformers' generate, one request after the other."""
    part = workload.part(SLOW_PART)
    name = "transformers, one by one"
    if part is not workload:
        name += f" ({SLOW_PART} of {len(workload.requests)} requests)"
    seconds = []
    for prompt, length in part.requests:
        ids = torch.tensor([prompt], device=model.device)
        start = time.perf_counter()
        model.generate(ids, max_new_tokens=length, do_sample=False)
        seconds.append(time.perf_counter() - start)
    one_token = all(length == 1 for _, length in part.requests)
    ttft = [each * 1e3 for each in seconds] if one_token else None
    return Measurement(
        name,
        sum(seconds),
        part.output_tokens,
        ttft_ms=statistics.mean(ttft) if ttft else None,
        all_ttft_ms=ttft,
    )


def run_static_batch(model: Any, workload: Workload) -> Measurement:
    """transformers' generate, all requests in one left-padded batch that runs to the longest."""
    longest = max(len(prompt) for prompt, _ in workload.requests)
    pads = [longest - len(prompt) for prompt, _ in workload.requests]
    ids = [[0] * pad + prompt for pad, (prompt, _) in zip(pads, workload.requests, strict=True)]
    mask = [[0] * pad + [1] * (longest - pad) for pad in pads]
    start = time.perf_counter()
    model.generate(
        torch.tensor(ids, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        max_new_tokens=max(length for _, length in workload.requests),
        do_sample=False,
    )
    name = f"transformers, one static batch of {len(workload.requests)}"
    return Measurement(name, time.perf_counter() - start, workload.output_tokens)


def run_continuous_batching(model: Any, workload: Workload) -> Measurement:
    """transformers' own continuous batching, what `generate_batch` runs, with a length per request.

    Setting it up is not timed, as it is not for fastgen.
    """
    from transformers import ContinuousBatchingConfig, GenerationConfig

    tokens = sum(len(prompt) + length for prompt, length in workload.requests)
    page = 256
    settings = ContinuousBatchingConfig(
        page_size=page,
        num_blocks=tokens // page + len(workload.requests) + 1,
        max_batch_tokens=2048,
    )
    sampling = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    attention = model.config._attn_implementation
    try:
        with (
            _quiet(),
            model.continuous_batching_context_manager(
                generation_config=sampling, continuous_batching_config=settings
            ) as manager,
        ):
            start = time.perf_counter()
            for prompt, length in workload.requests:
                manager.add_request(prompt, max_new_tokens=length, eos_token_id=-1)
            made, pending = 0, len(workload.requests)
            while pending:
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    made, pending = made + len(result.generated_tokens), pending - 1
                elif result is None and not manager.is_running():
                    raise RuntimeError("transformers' continuous batching stopped")
            seconds = time.perf_counter() - start
    finally:
        model.set_attn_implementation(attention)
    assert made == workload.output_tokens, (made, workload.output_tokens)
    return Measurement("transformers, continuous batching", seconds, made)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers warns of settings that suit a GPU."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def engines_for(
    model: Any,
    workload: Workload,
    block_size: int,
    transformers: bool,
    deterministic: bool = False,
) -> list[Callable[[], Measurement]]:
    """The engines of this process that can run a workload; transformers sees the model restored.

    deterministic: Measure what fastgen's deterministic=True costs, too.
    """
    engines: list[Callable[[], Measurement]] = [lambda: run_fastgen(model, workload, block_size)]
    if deterministic:
        engines.append(lambda: run_fastgen(model, workload, block_size, deterministic=True))
    if transformers:
        engines.append(lambda: run_one_by_one(model, workload))
        if not workload.sequential:
            if len(workload.requests) > 1:
                engines.append(lambda: run_static_batch(model, workload))
            engines.append(lambda: run_continuous_batching(model, workload))
    return engines


def measure(
    engines: list[Callable[[], Measurement]],
    rounds: int,
    peers: Sequence[Callable[[], Measurement | None]] = (),
) -> list[Measurement]:
    """All engines in turn, round by round, with the peak of memory that each one took.

    Args:
        peers: Of other processes, which tell their own memory; None from one that has failed.
    """
    measurements = []
    for _ in range(rounds):
        for engine in engines:
            reset_peak_rss()
            result = engine()
            measurements.append(replace(result, peak_rss_bytes=peak_rss_bytes()))
        measurements += [result for peer in peers if (result := peer()) is not None]
    return measurements
