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
from ..errors import InvalidRequestError
from ..kernels.argmax import argmax
from ..outputs import Logprob
from .request import Request

_NEVER = float("-inf")


class SamplingState:
    """What the sampler keeps of one request between steps.

    generator: None for a greedy request. num_generated: how often each token was.
    """

    def __init__(self, request: Request, device: torch.device) -> None:
        self.request = request
        self.generator: torch.Generator | None = None
        if not request.sampling.greedy:
            self.generator = torch.Generator(device=device).manual_seed(request.seed)
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
        params, request = self.params, self.request
        return bool(
            params.allowed_token_ids is not None
            or request.bad_words
            or len(request.output_token_ids) < params.min_tokens
            or params.logit_bias
            or params.repetition_penalty != 1
            or params.presence_penalty
            or params.frequency_penalty
        )


@dataclass
class Sampled:
    """One step's result. errors: rows that can have no token, with the reason."""

    token_ids: list[int]
    logprobs: dict[int, dict[int, Logprob]] = field(default_factory=dict)
    errors: dict[int, InvalidRequestError] = field(default_factory=dict)


def sample(logits: torch.Tensor, states: Sequence[SamplingState]) -> Sampled:
    """One token per row.

    Args:
        logits: [num_rows, vocab_size], any float dtype.
        states: One per row.
    """
    edited = [row for row, state in enumerate(states) if state.edits_logits]
    drawn = [row for row, state in enumerate(states) if state.generator is not None]
    raw, errors = logits, {}
    if edited:
        rows = logits[edited].float()
        edit_logits(rows, [states[row] for row in edited])
        for row, best in zip(edited, rows.amax(dim=-1).tolist(), strict=True):
            if best == _NEVER:
                errors[row] = InvalidRequestError(
                    "allowed_token_ids, bad_words and min_tokens together allow no token"
                )
        logits = logits.to(torch.float32, copy=True)
        logits[edited] = rows
    tokens = argmax(logits)
    drawn = [row for row in drawn if row not in errors]
    if drawn:
        chosen = [states[row] for row in drawn]
        tokens[drawn] = draw(logits[drawn].float(), chosen)
    result = Sampled(tokens.tolist(), errors=errors)
    # Which of two equally likely tokens comes first may depend on how many are asked for, so only
    # rows that ask for equally many are computed together.
    by_count: dict[int, list[int]] = {}
    for row, state in enumerate(states):
        if (count := state.params.logprobs) is not None:
            by_count.setdefault(count, []).append(row)
    for count, rows in by_count.items():
        found = logprobs_of(raw[rows], [result.token_ids[row] for row in rows], count)
        result.logprobs.update(zip(rows, found, strict=True))
    return result


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


def draw(logits: torch.Tensor, states: Sequence[SamplingState]) -> torch.Tensor:
    """Draw a token per row, after temperature, min-p, top-k and top-p: [num_rows] int64.

    Args:
        logits: [num_rows, vocab_size] fp32. states: One per row, with a generator.
    """
    params = [state.params for state in states]
    tokens = torch.empty(len(states), dtype=torch.long, device=logits.device)
    # Only rows of one form are computed together: how a sum is rounded may depend on its width.
    by_form: dict[tuple[int, bool], list[int]] = {}
    for row, own in enumerate(params):
        by_form.setdefault(form_of(own, logits.shape[1]), []).append(row)
    for (width, ordered), rows in by_form.items():
        probabilities, ids = filtered_probabilities(
            logits[rows], [params[row] for row in rows], width, ordered
        )
        noise = torch.empty_like(probabilities)
        for row, own_noise in zip(rows, noise, strict=True):
            own_noise.exponential_(generator=states[row].generator)
        # argmax(p / Exp(1)) draws from p (the exponential race).
        best = torch.argmax(probabilities / noise, dim=-1, keepdim=True)
        tokens[rows] = (best if ids is None else ids.gather(1, best)).squeeze(1)
    return tokens


def form_of(params: SamplingParams, vocab_size: int) -> tuple[int, bool]:
    """How many tokens top-k leaves, and whether they must be put in order."""
    width = min(params.top_k, vocab_size) if params.top_k > 0 else vocab_size
    return width, width < vocab_size or params.top_p < 1


def filtered_probabilities(
    logits: torch.Tensor, params: Sequence[SamplingParams], width: int, ordered: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Softmax after temperature, min-p, top-k and top-p, in that order.

    Args:
        logits: [num_rows, vocab_size] fp32. params: One per row, all of the form (width, ordered).
    Returns: probabilities [num_rows, width] fp32, and the token ids they belong to, most likely
        first; None: those of the vocabulary as they are.
    """
    temperature = _column([param.temperature for param in params], logits.device)
    temperature = temperature.clamp(min=torch.finfo(torch.float32).tiny)
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature  # <= 0, so never +inf
    min_p = _column([param.min_p for param in params], logits.device)
    if bool(min_p.any()):
        # p >= min_p * p_max, where p_max is exp(0) over the same sum.
        logits = logits.masked_fill(logits < min_p.log(), _NEVER)
    if not ordered:
        return torch.softmax(logits, dim=-1), None
    if width < logits.shape[1]:
        logits, ids = logits.topk(width, dim=-1)
    else:
        logits, ids = logits.sort(dim=-1, descending=True)
    probabilities = torch.softmax(logits, dim=-1)
    if all(param.top_p == 1 for param in params):
        return probabilities, ids
    top_p = _column([param.top_p for param in params], logits.device)
    before = probabilities.cumsum(dim=-1) - probabilities
    dropped = (before >= top_p) & (top_p < 1)
    dropped[:, 0] = False  # the most likely token always stays
    return torch.softmax(logits.masked_fill(dropped, _NEVER), dim=-1), ids


def logprobs_of(
    logits: torch.Tensor, token_ids: Sequence[int], count: int
) -> list[dict[int, Logprob]]:
    """Per row the token's own log-probability and those of the `count` most likely tokens.

    Args:
        logits: [num_rows, vocab_size] of the model, any float dtype.
    """
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    own = logprobs.gather(1, torch.tensor(token_ids, device=logits.device).unsqueeze(1))
    ranks = (logprobs > own).sum(dim=-1) + 1
    best = logprobs.topk(min(count, logits.shape[1]), dim=-1)
    rows = []
    for token_id, logprob, rank, values, ids in zip(
        token_ids,
        own.squeeze(1).tolist(),
        ranks.tolist(),
        best.values.tolist(),
        best.indices.tolist(),
        strict=True,
    ):
        row = {token_id: Logprob(logprob, rank)}
        for place, (value, likely) in enumerate(zip(values, ids, strict=True), 1):
            row.setdefault(likely, Logprob(value, place))
        rows.append(row)
    return rows


def _column(values: list[float], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, device=device).float().unsqueeze(1)
