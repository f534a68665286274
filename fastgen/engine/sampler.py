"""From logits to token ids, for a whole step at once.

A row's token depends on its own logits, history and generator only, never on the rows beside it:
rows are computed together only where each gets what it would get alone.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ..config import SamplingParams
from ..errors import FastgenError, InvalidRequestError
from ..kernels.argmax import argmax
from ..outputs import Logprob
from .choose import draw_by_weight
from .distribution import filtered_probabilities, form_of
from .logprobs import logprobs_of, processed_logprobs_of
from .request import Request

_NEVER = float("-inf")
# Entries of the rows that are filtered together on a CPU: they stay in its cache.
_CHUNK = 1 << 20
_NUM_UNIFORMS = 64  # drawn ahead, because each call of a generator costs a microsecond or two


class SamplingState:
    """What the sampler keeps of one request between steps.

    generator: None for a greedy request; a CPU's on every device, so that seeds mean the same.
    is_plain: the model's best token is all that is ever wanted. num_generated: how often each
    token was.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.generator: torch.Generator | None = None
        params = request.sampling
        if not params.greedy:
            self.generator = torch.Generator().manual_seed(request.seed)
        self._uniforms: list[float] = []  # for the tokens behind the first _num_before
        self._num_before = 0
        self._always_edits = bool(
            params.allowed_token_ids is not None
            or request.bad_words
            or params.logit_bias
            or params.repetition_penalty != 1
            or params.presence_penalty
            or params.frequency_penalty
        )
        self.is_plain = (
            params.greedy
            and params.logprobs is None
            and params.processed_logprobs is None
            and not params.min_tokens
            and not self._always_edits
        )
        self.num_generated: Counter[int] = Counter()
        self._num_counted = 0

    @property
    def params(self) -> SamplingParams:
        return self.request.sampling

    def count_tokens(self) -> None:
        """Bring num_generated up to date."""
        output = self.request.output_token_ids
        self.num_generated.update(output[self._num_counted :])
        self._num_counted = len(output)

    @functools.cached_property
    def _prompt(self) -> frozenset[int]:
        return frozenset(self.request.prompt_token_ids)

    def seen(self) -> frozenset[int]:
        """Every token of the prompt and the output."""
        return self._prompt.union(self.num_generated)

    def banned(self) -> set[int]:
        """Tokens that must not come next: ends of bad words, and end tokens before min_tokens."""
        request, output = self.request, self.request.output_token_ids
        banned = set()
        if len(output) < self.params.min_tokens:
            banned.update(request.stop_token_ids)
        for word in request.bad_words:
            begun = len(word) - 1
            if len(output) >= begun and output[len(output) - begun :] == list(word[:-1]):
                banned.add(word[-1])
        return banned

    @property
    def edits_logits(self) -> bool:
        """Whether the logits are changed before the best token can be taken."""
        return self._always_edits or len(self.request.output_token_ids) < self.params.min_tokens

    def uniform(self) -> float:
        """The generator's number for the next token, in [0, 1); a repeated step gets it again."""
        place = len(self.request.output_token_ids) - self._num_before
        if place >= len(self._uniforms):
            drawn = torch.rand(_NUM_UNIFORMS, generator=self.generator, dtype=torch.float64)
            self._num_before += len(self._uniforms)
            place -= len(self._uniforms)
            self._uniforms = drawn.tolist()
        return self._uniforms[place]


@dataclass
class Sampled:
    """One step's result, by row what not all have. errors: why a row can have no token."""

    token_ids: list[int]
    logprobs: dict[int, dict[int, Logprob]] = field(default_factory=dict)
    processed_logprobs: dict[int, dict[int, Logprob]] = field(default_factory=dict)
    errors: dict[int, FastgenError] = field(default_factory=dict)


def sample(logits: torch.Tensor, states: Sequence[SamplingState]) -> Sampled:
    """One token per row.

    Args:
        logits: [num_rows, vocab_size], any float dtype.
        states: One per row.
    """
    if all(state.is_plain for state in states):
        return _sampled(_best(logits).tolist(), states, {})
    edited = [row for row, state in enumerate(states) if state.edits_logits]
    others = sorted(set(range(len(states))).difference(edited))
    changed = logits[edited].float()
    errors: dict[int, FastgenError] = {}
    tokens = torch.zeros(len(states), dtype=torch.long, device=logits.device)
    if others:
        tokens[others] = _choose(logits, others, [states[row] for row in others])
    if edited:
        edit_logits(changed, [states[row] for row in edited])
        for row, best in zip(edited, changed.amax(dim=-1).tolist(), strict=True):
            if best == _NEVER and logits[row].amax() > _NEVER:
                errors[row] = InvalidRequestError(
                    "allowed_token_ids, bad_words and min_tokens together allow no token"
                )
        places = [place for place, row in enumerate(edited) if row not in errors]
        if places:
            rows = [edited[place] for place in places]
            tokens[rows] = _choose(changed, places, [states[row] for row in rows])
    result = _sampled(tokens.tolist(), states, errors)
    # Which of two equally likely tokens comes first may depend on how many are asked for, so only
    # rows that ask for equally many are computed together.
    by_count: dict[int, list[int]] = {}
    for row, state in enumerate(states):
        if (count := state.params.logprobs) is not None and row not in errors:
            by_count.setdefault(count, []).append(row)
    for count, rows in by_count.items():
        found = logprobs_of(logits[rows], [result.token_ids[row] for row in rows], count)
        result.logprobs.update(zip(rows, found, strict=True))
    asked = [
        row
        for row, state in enumerate(states)
        if state.params.processed_logprobs is not None and row not in errors
    ]
    if asked:
        place_of = {row: place for place, row in enumerate(edited)}
        final = [changed[place_of[row]] if row in place_of else logits[row] for row in asked]
        found = processed_logprobs_of(
            torch.stack([row.float() for row in final]),
            [result.token_ids[row] for row in asked],
            [states[row].params for row in asked],
        )
        result.processed_logprobs.update(zip(asked, found, strict=True))
    return result


def _sampled(
    token_ids: list[int], states: Sequence[SamplingState], errors: dict[int, FastgenError]
) -> Sampled:
    """What was chosen; a row whose token is negative has an error, or goes on from ~token."""
    for row, token_id in enumerate(token_ids):
        if token_id < 0:
            request = states[row].request
            token_ids[row] = ~token_id
            if request.fails_on_nan:
                errors[row] = FastgenError(
                    f"the model's logits for token {len(request.output_token_ids)} of the output "
                    "are NaN or infinite; check the weights, or load the model in a wider dtype"
                )
    return Sampled(token_ids, errors=errors)


def _best(logits: torch.Tensor) -> torch.Tensor:
    """The best token of each row; ~token, which is negative, where its logit is not finite.

    NaN and infinity are the largest of their row, so that one look tells of all its logits.
    """
    tokens = argmax(logits)
    is_finite = logits.gather(1, tokens.unsqueeze(1)).squeeze(1).isfinite()
    return torch.where(is_finite, tokens, ~tokens)


def _choose(logits: torch.Tensor, rows: list[int], states: Sequence[SamplingState]) -> torch.Tensor:
    """The best token, or one that is drawn, of some rows of the logits: [len(rows)] int64.

    ~token in a row that is not finite.
    """
    drawn = [place for place, state in enumerate(states) if state.generator is not None]
    if len(drawn) == len(rows):
        return draw(logits, rows, states)
    tokens = _best(logits)[rows]
    if drawn:
        tokens[drawn] = draw(logits, [rows[i] for i in drawn], [states[i] for i in drawn])
    return tokens


def edit_logits(logits: torch.Tensor, states: Sequence[SamplingState]) -> None:
    """Allowed and banned tokens, biases and penalties, in place on [num_rows, vocab_size] fp32."""
    for row, state in enumerate(states):
        state.count_tokens()
        if (allowed := state.params.allowed_token_ids) is not None:
            keep = torch.tensor(allowed, device=logits.device)
            kept = logits[row, keep]
            logits[row] = _NEVER
            logits[row, keep] = kept
    vocab_size = logits.shape[1]  # a model's end token may lie outside

    def banned(state: SamplingState) -> dict[int, float]:
        return {token: _NEVER for token in state.banned() if token < vocab_size}

    _scatter(logits, states, banned, torch.add)
    _scatter(logits, states, lambda state: state.params.logit_bias, torch.add)
    _scatter(logits, states, _repetitions, _repetition_penalty)
    _scatter(logits, states, _presences_and_frequencies, torch.sub)


def _scatter(
    logits: torch.Tensor,
    states: Sequence[SamplingState],
    values_of: Callable[[SamplingState], Mapping[int, float]],
    change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> None:
    """logits[row, token] = change(logits[row, token], value) for all rows' values at once."""
    rows: list[int] = []
    tokens: list[int] = []
    values: list[float] = []
    for row, state in enumerate(states):
        own = values_of(state)
        rows.extend([row] * len(own))
        tokens.extend(own.keys())
        values.extend(own.values())
    if rows:
        at = torch.tensor([rows, tokens], device=logits.device).unbind()
        given = torch.tensor(values, dtype=torch.float32, device=logits.device)
        logits[at] = change(logits[at], given)


def _repetitions(state: SamplingState) -> dict[int, float]:
    penalty = state.params.repetition_penalty
    return dict.fromkeys(state.seen(), penalty) if penalty != 1 else {}


def _repetition_penalty(logits: torch.Tensor, penalty: torch.Tensor) -> torch.Tensor:
    """Keskar et al. 2019, arXiv:1909.05858, with negative logits multiplied."""
    return torch.where(logits > 0, logits / penalty, logits * penalty)


def _presences_and_frequencies(state: SamplingState) -> dict[int, float]:
    presence, frequency = state.params.presence_penalty, state.params.frequency_penalty
    if not presence and not frequency:
        return {}
    return {token: presence + frequency * n for token, n in state.num_generated.items()}


def draw(
    logits: torch.Tensor, rows: Sequence[int], states: Sequence[SamplingState]
) -> torch.Tensor:
    """Draw a token per row, after temperature, min-p, top-k and top-p: [len(rows)] int64.

    ~token, which is negative, in a row whose probabilities are NaN: its logits are not finite.

    Args:
        logits: [num_rows, vocab_size], any float dtype. rows: Those that are drawn from.
        states: One per entry of `rows`, with a generator.
    """
    vocab_size = logits.shape[1]
    tokens = torch.empty(len(states), dtype=torch.long, device=logits.device)
    # Only rows of one form are computed together: how a sum is rounded may depend on its width.
    by_form: dict[tuple[int, bool], list[int]] = {}
    for place, state in enumerate(states):
        by_form.setdefault(form_of(state.params, vocab_size), []).append(place)
    for (width, ordered), members in by_form.items():
        step = len(members) if logits.is_cuda else max(1, _CHUNK // vocab_size)
        for start in range(0, len(members), step):
            places = members[start : start + step]
            own = [states[place] for place in places]
            probabilities, ids = filtered_probabilities(
                logits[[rows[place] for place in places]].float(),
                [state.params for state in own],
                width,
                ordered,
            )
            drawn = draw_by_weight(probabilities, [state.uniform() for state in own])
            is_nan = probabilities.gather(1, drawn.unsqueeze(1)).squeeze(1).isnan()
            if ids is not None:
                drawn = ids.gather(1, drawn.unsqueeze(1)).squeeze(1)
            tokens[places] = torch.where(is_nan, ~drawn, drawn)
    return tokens
