"""What a user gets back: events while a request runs, its output and metrics at the end."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class RequestMetrics:
    """Times of one finished request; a time is None if the request never got that far.

    num_cached_tokens: prompt tokens found in the prefix cache. queue_time_ms: from submit to the
    first step it ran in. ttft_ms: from submit to the first
    token. tpot_ms: mean time per token after the first. e2e_ms: from submit to the end.
    """

    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    queue_time_ms: float | None
    ttft_ms: float | None
    tpot_ms: float | None
    e2e_ms: float | None
    output_tokens_per_s: float | None
    num_preemptions: int


@dataclass(frozen=True)
class Logprob:
    """A token's log-probability: raw, under the model itself, before any sampling parameter, or
    processed, under what the token was drawn from.

    rank: 1 for the most likely token.
    """

    logprob: float
    rank: int


@dataclass(frozen=True)
class TokenEvent:
    """New tokens or text of one output of a request; its last event has a finish_reason.

    index: which of the request's n outputs. logprobs (raw) and processed_logprobs: one dict per
    token if they were asked for, the token itself first. text: what is certain by now; bytes of an
    unfinished character and the possible beginning of a stop string are held back. stop_reason: as
    in `Completion`.
    """

    token_ids: list[int]
    text: str
    finish_reason: str | None = None
    metrics: RequestMetrics | None = None
    index: int = 0
    logprobs: list[dict[int, Logprob]] | None = None
    processed_logprobs: list[dict[int, Logprob]] | None = None
    stop_reason: int | str | None = None


@dataclass(frozen=True)
class Completion:
    """One of a request's n outputs; text is "" when the engine has no tokenizer.

    finish_reason: "stop" (an end or stop token, which is the last of token_ids, or a stop string),
    "length", "cancelled" or "error". stop_reason: the stop token or string that was asked for and
    met; None for the model's own end token. logprobs (raw) and processed_logprobs: one dict per
    token (the token itself and the most likely ones) if they were asked for. error: what went
    wrong.
    """

    index: int
    token_ids: list[int]
    text: str
    finish_reason: str
    metrics: RequestMetrics
    stop_reason: int | str | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    processed_logprobs: list[dict[int, Logprob]] | None = None
    error: str | None = None


@dataclass(frozen=True)
class RequestOutput:
    """A finished request: its prompt and its n outputs.

    What belongs to an output can be read from the request itself when n is 1, or for the first.
    prompt_logprobs: one entry per prompt token if they were asked for, None for the first.
    """

    prompt_ids: list[int]
    outputs: list[Completion]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None

    @property
    def token_ids(self) -> list[int]:
        return self.outputs[0].token_ids

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def finish_reason(self) -> str:
        return self.outputs[0].finish_reason

    @property
    def stop_reason(self) -> int | str | None:
        return self.outputs[0].stop_reason

    @property
    def logprobs(self) -> list[dict[int, Logprob]] | None:
        return self.outputs[0].logprobs

    @property
    def processed_logprobs(self) -> list[dict[int, Logprob]] | None:
        return self.outputs[0].processed_logprobs

    @property
    def metrics(self) -> RequestMetrics:
        return self.outputs[0].metrics

    @property
    def error(self) -> str | None:
        return self.outputs[0].error


@dataclass(frozen=True)
class EngineMetrics:
    """A snapshot of an engine's counters since it was created.

    cache_waste: unused slots / allocated slots, averaged over steps. cache_usage: allocated
    blocks / all blocks, now. prefix_tokens: tokens of the requests that were let in;
    prefix_cache_hit_tokens: those of them that the prefix cache held. forks: rows of a beam search
    that went on from another row's blocks; block_copies: blocks that were copied for them.
    num_cached_blocks: blocks whose content can be found, now. forward_seconds: in the model.
    sampling_seconds: from logits to token ids. host_seconds: the rest of the steps.
    first_step_seconds: of the first step, 0 before it. captured_graphs: sizes of decode steps that
    are captured as CUDA graphs, now; replayed_steps: of engine_steps those that were replayed with
    them; capture_refusal: why decode steps are no longer captured, None if they are or never were.
    """

    engine_steps: int = 0
    computed_tokens: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    finished: dict[str, int] = field(default_factory=dict)
    preemptions: int = 0
    prefix_tokens: int = 0
    prefix_cache_hit_tokens: int = 0
    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_free_blocks: int = 0
    num_cached_blocks: int = 0
    cache_usage: float = 0.0
    cache_waste: float = 0.0
    forks: int = 0
    block_copies: int = 0
    forward_seconds: float = 0.0
    sampling_seconds: float = 0.0
    host_seconds: float = 0.0
    first_step_seconds: float = 0.0
    captured_graphs: int = 0
    replayed_steps: int = 0
    capture_refusal: str | None = None

    @property
    def prefix_cache_hit_rate(self) -> float:
        """Tokens found in the prefix cache / tokens of the requests that were let in."""
        return self.prefix_cache_hit_tokens / self.prefix_tokens if self.prefix_tokens else 0.0
