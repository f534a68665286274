"""Section `equality`: fp32 greedy tokens of tiny random models equal transformers'."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ... import Engine, EngineMetrics, RequestOutput, SamplingParams, api
from .findings import Check, Finding, checked
from .tiny_models import greedy, tiny_model

# The first few run alone, too. Together they are more than a captured size holds, and fewer than
# the next: steps are filled up, and pass several sizes as requests end.
LENGTHS = (70, 1, 33, 16, 2, 3, 5, 8, 13, 21, 34, 55, 64, 65, 17, 31, 48, 7, 40)
NUM_ALONE = 4
NUM_TOKENS = 24
CHUNK = 16  # tokens of a step where prompts are chunked
MODES: dict[str, dict[str, Any]] = {
    "captured": {},
    "enforce_eager": {"enforce_eager": True},
    "chunked": {"max_num_batched_tokens": CHUNK},
    "prefix cache": {"prefix_cache": True},
}

Rows = list[list[int]]


def run(device: str, family: str) -> Iterator[Finding]:
    torch.backends.cuda.matmul.allow_tf32 = False
    small = device == "cpu"
    lengths, num_alone, num_tokens = LENGTHS, NUM_ALONE, NUM_TOKENS
    if small:
        lengths, num_alone, num_tokens = (33, 1, 5), 1, 4
    model = tiny_model(family, device)
    found = [greedy(model, length, num_tokens) for length in lengths]
    rows, expected = [row for row, _ in found], [tokens for _, tokens in found]
    for mode, fields in MODES.items():
        if small and mode == "enforce_eager":
            continue  # nothing is captured on the CPU
        yield checked(f"{family}, {mode}", _compare, model, mode, fields, rows, expected, num_alone)
    yield Check(f"{family}, no TF32", not torch.backends.cuda.matmul.allow_tf32)


def _compare(
    model: Any, mode: str, fields: dict[str, Any], rows: Rows, expected: Rows, num_alone: int
) -> dict[str, Any]:
    """Generate alone and together. Raises: AssertionError if anything is not as it should be."""
    num_tokens = len(expected[0])
    settings = {"max_num_seqs": 32, "kv_cache_memory_bytes": 32 << 20, "prefix_cache": False}
    api.optimize(model, **{**settings, **fields})
    try:
        with Engine(model) as engine:
            params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
            for row, tokens in zip(rows[:num_alone], expected, strict=False):
                _assert_equal("alone", engine.generate([row], params), [params], [tokens])
            staggered = _staggered(num_tokens, len(rows))
            _assert_equal("together", engine.generate(rows, staggered), staggered, expected)
            details: dict[str, Any] = {"kernels": _kernels(model)}
            metrics = engine.metrics()
            if mode == "prefix cache":
                assert metrics.prefix_cache_hit_tokens > 0, "the prefix cache was not hit"
                details["prefix_cache_hit_tokens"] = metrics.prefix_cache_hit_tokens
            if model.device.type == "cuda":
                details["captured"] = _captured(metrics, mode)
    finally:
        api.restore(model)
    return details


def _staggered(num_tokens: int, count: int) -> list[SamplingParams]:
    """Every third request asks for half, so that the step shrinks on its way."""
    return [
        SamplingParams(
            max_tokens=num_tokens // 2 if index % 3 == 2 else num_tokens,
            temperature=0.0,
            ignore_eos=True,
        )
        for index in range(count)
    ]


def _assert_equal(
    how: str, outputs: list[RequestOutput], params: list[SamplingParams], expected: Rows
) -> None:
    for index, (output, own, tokens) in enumerate(zip(outputs, params, expected, strict=True)):
        assert output.error is None, f"{how}, request {index}: {output.error}"
        wanted = tokens[: own.max_tokens]
        found = output.token_ids
        assert found == wanted, f"{how}, request {index}: {found}, not {wanted}"


def _kernels(model: Any) -> dict[str, list[str]]:
    """The implementations that run each op; all are Triton's if there is no reason for another."""
    chosen = {op: list(row) for op, row in api.explain(model).report.kernels.items()}
    for op, names in chosen.items():
        assert names == ["triton"], f"{op} is run by {names}"
    return chosen


def _captured(metrics: EngineMetrics, mode: str) -> int:
    assert metrics.capture_refusal is None, metrics.capture_refusal
    captured, replayed = metrics.captured_graphs, metrics.replayed_steps
    if mode == "enforce_eager":
        assert captured == replayed == 0, "steps are captured in spite of enforce_eager"
        return 0
    assert captured >= 2, "a batch of 19 needs two sizes and more"
    assert replayed > captured
    return captured
