"""One sequence on its way through the engine. No torch here: ids, counts, blocks and times."""

from __future__ import annotations

import enum
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..config import SamplingParams
from ..outputs import Logprob, RequestMetrics
from .one_shot import OneShot
from .token_reader import News

_request_ids = itertools.count()


class TokenChooser(Protocol):
    """Who chooses a request's tokens in place of the engine's sampler (see lockstep.py)."""

    def offer(self, request: Request, logits: Any) -> None:
        """Take the logits [vocab_size] of the request's next token."""
        ...

    def note_hidden_states(
        self, request: Request, start: int, states: Sequence[Any], place: int, num_tokens: int
    ) -> None:
        """Take the hidden states of tokens [start, start + num_tokens) of a request.

        They are in rows [place, place + num_tokens) of each of `states`.
        """
        ...

    def fail(self, error: BaseException) -> None:
        """Hear that one of its requests has ended by an error."""
        ...


class StopText(Protocol):
    """Who finds stop strings in a request's text (see text.py)."""

    matched: str | None

    def push(self, token_id: int, last: bool = False) -> bool:
        """Whether the text up to this token, the last one perhaps, holds a stop string."""
        ...


class RequestStatus(enum.Enum):
    """Where a request is in its life; `TRANSITIONS` says what may follow what.

    NEW: not queued yet. WAITING: queued, never let in. RUNNING: has a row and blocks. PREEMPTED:
    lost both, keeps its tokens and waits again. FINISHED: over, for one of `FINISH_REASONS`.
    """

    NEW = "new"
    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


TRANSITIONS = {
    RequestStatus.NEW: {RequestStatus.WAITING, RequestStatus.FINISHED},
    RequestStatus.WAITING: {RequestStatus.RUNNING, RequestStatus.FINISHED},
    RequestStatus.RUNNING: {RequestStatus.PREEMPTED, RequestStatus.FINISHED},
    RequestStatus.PREEMPTED: {RequestStatus.RUNNING, RequestStatus.FINISHED},
    RequestStatus.FINISHED: set(),
}

# An end or stop token or string; max_tokens; the caller; its deadline; what went wrong.
FINISH_REASONS = ("stop", "length", "cancelled", "deadline", "error")


@dataclass(eq=False)
class Request:
    """A prompt and what is generated for it.

    There are no phases: the scheduler lets num_computed_tokens (keys and values in the cache)
    catch up with num_tokens (prompt and output). A request that has caught up is sampled, or, in
    a lockstep group, waits for its token.

    Attributes:
        prompt_token_ids: Not empty, unless query_token_id is set.
        stop_token_ids: Ids that end the request, the model's end tokens included.
        query_token_id: A last prompt token that is asked but not stored: transformers computes
            the first new token of a right-padded row from a padding token that nobody attends to.
        first_output_position: Position of the first generated token; prompts start at 0.
        group, row: Who chooses this request's tokens, and its row there; None: the sampler.
        stop_text: Finds stop strings; None: there are none.
        bad_words: Token sequences that must not be generated.
        siblings: All requests of one prompt of which several outputs are wanted, in order, this
            one among them; they share `news`. index: This one's place. Empty if it is alone.
        priority: Lower is served earlier; the rows of a group have the same. deadline: When it
            ends, done or not; this and all its times are told by the scheduler's clock.
        cache_salt: Only requests of the same salt share blocks.
        prompt_logprobs: Per prompt token so far, None for the first; None: not wanted.
        seed: Of the request's own generator; set when it is submitted.
        prompt_embeds: [len(prompt_token_ids), hidden_size], on the model's device, what stands in
            the place of the prompt tokens' own embeddings; such a request shares no blocks. Its
            prompt_token_ids only count.
        fails_on_nan: It ends by an error where its logits are not finite; else greedy decoding goes
            on with what argmax says of them, as transformers does.
        wants_hidden_states: Its group hears the hidden states of every token.
        news: Tells of each new token and of the end.
        done: Set when the request has ended.
        service_key: Its fixed place in the order of service; given by the scheduler.
        admission_order: Its place among all that were let in; given by the scheduler.
        cache_root: What its block digests begin with; None: it shares no blocks.
        last_is_cached: All tokens were found in the cache, and the last one must be asked.
        needs_fork: Nothing of it runs until it is forked from another request of its group.
        shares_last_block: Its last block is not full and others held it when it was forked: who
            writes first may have to copy it.
    """

    prompt_token_ids: list[int]
    sampling: SamplingParams
    stop_token_ids: frozenset[int] = frozenset()
    query_token_id: int | None = None
    query_position: int = 0
    first_output_position: int | None = None
    group: TokenChooser | None = None
    row: int = 0
    stop_text: StopText | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    siblings: tuple[Request, ...] = ()
    index: int = 0
    cache_salt: str | None = None
    priority: int = 0
    deadline: float | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    seed: int = 0
    prompt_embeds: Any = None
    wants_hidden_states: bool = False
    fails_on_nan: bool = True

    request_id: int = field(default_factory=lambda: next(_request_ids))
    service_key: tuple[float, int] = (0.0, -1)
    admission_order: int = -1
    output_token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    processed_logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    num_computed_tokens: int = 0
    block_ids: list[int] = field(default_factory=list)
    cache_root: bytes | None = None
    block_digests: list[bytes] = field(default_factory=list)
    num_published_blocks: int = 0
    num_cached_tokens: int = 0
    last_is_cached: bool = False
    needs_fork: bool = False
    shares_last_block: bool = False
    status: RequestStatus = field(default=RequestStatus.NEW, init=False)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: BaseException | None = None
    query_done: bool = False
    num_preemptions: int = 0
    news: News = field(default_factory=News)
    done: OneShot = field(default_factory=OneShot)
    arrival_time: float = field(default_factory=time.perf_counter)
    scheduled_time: float | None = None
    first_token_time: float | None = None
    finish_time: float | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def max_num_tokens(self) -> int:
        """Tokens in the cache at the end; the last generated token is never computed."""
        return len(self.prompt_token_ids) + self.sampling.max_tokens - 1

    @property
    def outputs(self) -> tuple[Request, ...]:
        """All requests of its prompt."""
        return self.siblings or (self,)

    @property
    def needs_query(self) -> bool:
        """Whether the unstored query token must run before the first token can be sampled."""
        return self.query_token_id is not None and not self.query_done and not self.output_token_ids

    @property
    def needs_prompt_logits(self) -> bool:
        """Whether logprobs of prompt tokens are wanted and not all known."""
        known = self.prompt_logprobs
        return known is not None and len(known) < len(self.prompt_token_ids)

    @property
    def has_embeds_left(self) -> bool:
        """Whether some of the tokens that run next are embeddings."""
        return self.prompt_embeds is not None and self.num_computed_tokens < len(
            self.prompt_token_ids
        )

    def token_ids(self, start: int, end: int) -> list[int]:
        """Prompt and output ids [start, end)."""
        num_prompt = len(self.prompt_token_ids)
        if start >= num_prompt:
            return self.output_token_ids[start - num_prompt : end - num_prompt]
        if end <= num_prompt:
            return self.prompt_token_ids[start:end]
        return self.prompt_token_ids[start:] + self.output_token_ids[: end - num_prompt]

    def positions(self, start: int, end: int) -> range | list[int]:
        """Positions of the tokens [start, end)."""
        num_prompt = len(self.prompt_token_ids)
        if self.first_output_position in (None, num_prompt) or end <= num_prompt:
            return range(start, end)
        offset = self.first_output_position - num_prompt  # pyright: ignore
        return [i if i < num_prompt else i + offset for i in range(start, end)]

    def move_to(self, status: RequestStatus) -> None:
        """Change the status; nothing else does."""
        assert status in TRANSITIONS[self.status], (
            f"request {self.request_id} went from {self.status.value} to {status.value}"
        )
        self.status = status

    def end(
        self, reason: str, error: BaseException | None = None, *, at: float | None = None
    ) -> None:
        """Note that the request is over; its owner has taken its blocks back.

        reason: One of FINISH_REASONS. at: When, if not by the clock of this process.
        """
        assert reason in FINISH_REASONS, f"{reason!r} is no reason to end"
        self.move_to(RequestStatus.FINISHED)
        self.finish_reason, self.error = reason, error
        self.finish_time = time.perf_counter() if at is None else at

    def metrics(self) -> RequestMetrics:
        def ms(end: float | None) -> float | None:
            return None if end is None else (end - self.arrival_time) * 1e3

        num_output = len(self.output_token_ids)
        ttft, e2e = ms(self.first_token_time), ms(self.finish_time)
        tpot = None
        if ttft is not None and e2e is not None and num_output > 1:
            tpot = (e2e - ttft) / (num_output - 1)
        return RequestMetrics(
            num_prompt_tokens=len(self.prompt_token_ids),
            num_output_tokens=num_output,
            num_cached_tokens=self.num_cached_tokens,
            queue_time_ms=ms(self.scheduled_time),
            ttft_ms=ttft,
            tpot_ms=tpot,
            e2e_ms=e2e,
            output_tokens_per_s=num_output / e2e * 1e3 if e2e else None,
            num_preemptions=self.num_preemptions,
        )
