"""Section `generate`: whole models with random weights, from start-up to many requests."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch

from ... import Engine, SamplingParams, api
from ...cli.models import random_model
from ..engines import run_continuous_batching, run_one_by_one
from ..startup import measure_here
from ..workloads import Workload, mixed_workload
from .clock import Clock, read_bandwidth
from .decode_step import check_decode_step
from .findings import Finding, Missing, checked, measured, own

NUM_REQUESTS = 256
NUM_SEEDED = NUM_REQUESTS // 4  # of them, for transformers' generate_batch
PROMPT, NUM_TOKENS = 128, 128  # of a single request
ROUNDS = 3
# Of a dry run: everything but the kind of model.
_LITTLE = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 64,
}


def warm_start(device: str, shape: str) -> Iterator[Finding]:
    """In a fresh process whose caches are those of an earlier one."""
    model = _model(device, shape)
    yield own(f"{shape}/warm start", _start, model)


def one_request(device: str, shape: str) -> Iterator[Finding]:
    """A cold start and a single request."""
    model = _model(device, shape)
    yield own(f"{shape}/cold start", _start, model)
    yield from _batch_1(device, shape, model)


def serve(device: str, shape: str) -> Iterator[Finding]:
    """A cold start, a single request, many requests beside transformers, and what a step does."""
    model = _model(device, shape)
    yield own(f"{shape}/cold start", _start, model)
    yield from _batch_1(device, shape, model)
    small = device == "cpu"
    # Others each time, or the prefix cache would hold their prompts.
    first, *rounds = (
        mixed_workload(3 if small else NUM_REQUESTS, model.vocab_size, 16 if small else 1024, seed)
        for seed in range(1 + ROUNDS)
    )
    if small:
        rounds = rounds[:1]
    with Engine(model) as engine:
        yield own(f"{shape}/mixed, first time", _serve, engine, first)
        yield own(f"{shape}/mixed, 1", _serve, engine, rounds[0])
        yield own(f"{shape}/graphs", _graphs, engine)
        if small:
            yield Missing(f"{shape}/decode step", "needs CUDA")
        else:
            yield checked(
                f"{shape}, a decode step waits and copies once", check_decode_step, engine
            )
    yield measured(f"{shape}/transformers one by one", _one_by_one, model, first)
    for number, workload in enumerate(rounds[1:], 2):
        with Engine(model) as engine:
            engine.generate([[1, 2, 3]], _length(2))
            _serve(engine, first)  # captures
            yield own(f"{shape}/mixed, {number}", _serve, engine, workload)
    if small:
        yield Missing(f"{shape}/transformers generate_batch", "needs CUDA")
    else:  # last, for it may hang
        yield measured(f"{shape}/transformers generate_batch", _generate_batch, model, first)


def static_cache(device: str, shape: str) -> Iterator[Finding]:
    """transformers with its static cache, for which it compiles the forward: a single request."""
    name = f"{shape}/transformers static cache"
    if device == "cpu":
        yield Missing(name, "needs CUDA")
        return
    yield measured(name, _static_cache, _model(device, shape))


def _model(device: str, shape: str) -> Any:
    model = random_model(shape, "bfloat16" if device == "cuda" else "float32", device,
                         **(_LITTLE if device == "cpu" else {}))  # fmt: skip
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def _length(num_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)


def _start(model: Any) -> dict[str, Any]:
    """Seconds from a model in memory to its first token, and the parts of them that were timed."""
    found = measure_here("fastgen", model)
    optimized = api.require(model)
    return {
        **asdict(found),
        "total_s": found.total_s,
        "parts_s": dict(optimized.start),
        "graph": optimized.graph_source,
    }


def _batch_1(device: str, shape: str, model: Any) -> Iterator[Finding]:
    clock = Clock(device)
    yield own(f"{shape}/batch 1", _single, model, device, clock)


def _single(model: Any, device: str, clock: Clock) -> dict[str, float]:
    """Milliseconds per token of one request, and what reading the weights alone would take."""
    read = read_bandwidth(clock, device)["best"]
    small = device == "cpu"
    length, num_tokens = (8, 4) if small else (PROMPT, NUM_TOKENS)
    prompts = [[1 + (7 * i + 13 * seed) % 200 for i in range(length)] for seed in range(1 + ROUNDS)]
    with Engine(model) as engine:
        engine.generate(prompts[:1], _length(num_tokens))
        before = engine.metrics()
        outputs = [engine.generate([row], _length(num_tokens))[0] for row in prompts[1:]]
        after = engine.metrics()
    assert all(output.error is None for output in outputs), outputs[0].error
    ms = statistics.median(output.metrics.tpot_ms or 0.0 for output in outputs)
    floor = read_bytes(model) / read / 1e6
    steps = after.engine_steps - before.engine_steps
    host = after.host_seconds - before.host_seconds
    forward = after.forward_seconds - before.forward_seconds
    return {
        "ms_per_token": ms,
        "floor_ms": floor,
        "share_of_floor": floor / ms,
        "read_gb_per_s": read,
        "host_ms_per_step": 1e3 * (host + forward) / steps,
        "queueing_ms_per_step": 1e3 * forward / steps,
    }


def read_bytes(model: Any) -> int:
    """Weights that a step of one token reads: of the embedding one row, unless it is the head."""
    embedding = model.get_input_embeddings().weight
    total = sum(parameter.nbytes for parameter in model.parameters())
    tied = model.get_output_embeddings().weight is embedding
    return total if tied else total - embedding.nbytes


def _serve(engine: Engine, workload: Workload) -> dict[str, float]:
    before = engine.metrics()
    start = time.perf_counter()
    outputs = engine.generate(
        [prompt for prompt, _ in workload.requests],
        [_length(length) for _, length in workload.requests],
    )
    seconds = time.perf_counter() - start
    after = engine.metrics()
    errors = [output.error for output in outputs if output.error is not None]
    assert not errors, errors[0]
    made = sum(len(output.token_ids) for output in outputs)
    assert made == workload.output_tokens, f"{made} tokens, not {workload.output_tokens}"
    steps = after.engine_steps - before.engine_steps
    busy = after.host_seconds + after.forward_seconds - before.host_seconds - before.forward_seconds
    return {
        "tokens_per_s": made / seconds,
        "seconds": seconds,
        "steps": steps,
        "host_ms_per_step": 1e3 * busy / steps,
    }


def _graphs(engine: Engine) -> dict[str, Any]:
    metrics = engine.metrics()
    return {
        "captured": metrics.captured_graphs,
        "replayed": metrics.replayed_steps,
        "refusal": metrics.capture_refusal,
    }


def _one_by_one(model: Any, workload: Workload) -> dict[str, float]:
    api.restore(model)
    model.generate(torch.tensor([[1, 2, 3]], device=model.device), max_new_tokens=4)
    found = run_one_by_one(model, workload)
    return {"tokens_per_s": found.tokens_per_s, "seconds": found.seconds}


def _generate_batch(model: Any, workload: Workload) -> dict[str, float]:
    if api.lookup(model) is not None:
        api.restore(model)
    part = workload.part(NUM_SEEDED)
    run_continuous_batching(model, workload.part(8))
    found = run_continuous_batching(model, part)
    return {"tokens_per_s": found.tokens_per_s, "seconds": found.seconds}


def _static_cache(model: Any) -> dict[str, float]:
    """Tokens behind the first few, so that the prompt does not count."""
    ids = torch.arange(1, 1 + PROMPT, device=model.device)[None]

    def seconds(num_tokens: int) -> float:
        start = time.perf_counter()
        model.generate(
            ids,
            max_new_tokens=num_tokens,
            do_sample=False,
            cache_implementation="static",
        )
        torch.cuda.synchronize()
        return time.perf_counter() - start

    first = seconds(NUM_TOKENS)  # the longest first: later caches are as large, and compiled for
    short, long = 16, NUM_TOKENS
    times = [(seconds(long) - seconds(short)) / (long - short) for _ in range(ROUNDS)]
    return {"ms_per_token": 1e3 * statistics.median(times), "first_run_s": first}
