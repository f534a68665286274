"""What a user gets back: events while a request runs, its output and metrics at the end."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class RequestMetrics:
    """Times of one finished request; a time is None if the request never got that far.

    queue_time_ms: from submit to the first step it ran in. ttft_ms: from submit to the first
    token. tpot_ms: mean time per token after the first. e2e_ms: from submit to the end.
    """

    num_prompt_tokens: int
    num_output_tokens: int
    queue_time_ms: float | None
    ttft_ms: float | None
    tpot_ms: float | None
    e2e_ms: float | None
    output_tokens_per_s: float | None
    num_preemptions: int


@dataclass(frozen=True)
class TokenEvent:
    """New tokens of one request. The last event of a stream has a finish_reason."""

    token_ids: list[int]
    text: str
    finish_reason: str | None = None
    metrics: RequestMetrics | None = None


@dataclass(frozen=True)
class RequestOutput:
    """A finished request; text is "" when the engine has no tokenizer.

    finish_reason: "stop" (an end or stop token, which is the last of token_ids), "length",
    "cancelled" or "error".
    """

    prompt_ids: list[int]
    token_ids: list[int]
    text: str
    finish_reason: str
    metrics: RequestMetrics
    error: str | None = None


@dataclass(frozen=True)
class EngineMetrics:
    """A snapshot of an engine's counters since it was created.

    cache_waste: unused slots / allocated slots, averaged over steps. cache_usage: allocated
    blocks / all blocks, now.
    """

    engine_steps: int = 0
    computed_tokens: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    finished: dict[str, int] = field(default_factory=dict)
    preemptions: int = 0
    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_free_blocks: int = 0
    cache_usage: float = 0.0
    cache_waste: float = 0.0
    forward_seconds: float = 0.0
    host_seconds: float = 0.0
