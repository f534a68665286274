"""What one decode step does beside its kernels: copies between host and GPU, and waits."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from ... import Engine, SamplingParams

_SEQS = 8
_SHORT, _LONG = 8, 40  # tokens; the difference is decode steps and nothing else
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
# Of profiling itself, over all steps.
_SLACK = 2 / (_LONG - _SHORT)


def check_decode_step(engine: Engine) -> dict[str, Any]:
    """Count events of a step of captured decodes; the engine is warm.

    Raises: AssertionError if a step copies to the host or from it, or waits, more than once: its
        batch goes there in one copy, and its tokens come back in one.
    """
    _profiled(engine, _SHORT, seed=0)
    short, long = (_profiled(engine, num, seed) for seed, num in ((1, _SHORT), (2, _LONG)))
    per_step = {
        name: (long[name] - short[name]) / (_LONG - _SHORT)
        for name in ("Memcpy HtoD", "Memcpy DtoH", *_WAITS)
    }
    assert long["Memcpy DtoH"] > 0, "the profiler saw no tokens come back"
    waits = sum(per_step[name] for name in _WAITS)
    for what, count in (
        ("copies to the GPU", per_step["Memcpy HtoD"]),
        ("copies to the host", per_step["Memcpy DtoH"]),
        ("waits", waits),
    ):
        assert count <= 1 + _SLACK, f"{count:.2f} {what} per decode step: {per_step}"
    return {"per_step": per_step}


def _profiled(engine: Engine, num_tokens: int, seed: int) -> Counter[str]:
    """Events by the first words of their names, of whatever thread."""
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(1, 200, (_SEQS, 16), generator=generator).tolist()
    params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        engine.generate(prompts, params)
        torch.cuda.synchronize()
    found: Counter[str] = Counter()
    for event in profile.events() or ():
        found[" ".join(event.name.split()[:2])] += 1
    return found
