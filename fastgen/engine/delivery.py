"""What becomes of a step's results: hidden states and logits go to those who wait for them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ..compiled import ForwardOutput
from .logprobs import logprobs_of
from .request import Request
from .sampler import SamplingState, sample
from .scheduler import ScheduledRequest, SchedulerOutput


@dataclass
class Delivered:
    """The tokens that the sampler chose, and what it could not choose.

    num_logits: Requests that got logits, sampled here or by their group. errors: Of `requests`, by
    place. seconds: Of the sampler.
    """

    num_logits: int
    requests: list[Request] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    errors: Mapping[int, Exception] = field(default_factory=dict)
    seconds: float = 0.0


def deliver(
    output: SchedulerOutput, result: ForwardOutput, states: Mapping[int, SamplingState]
) -> Delivered:
    """Hand each request's logits to its lockstep group or to the sampler.

    states: Of the requests that are sampled, by request id. The log-probabilities are added to the
    requests; their tokens are not.
    """
    if result.hidden_states:
        _deliver_hidden_states(output, result.hidden_states)
    logits = result.logits
    rows: list[int] = []
    requests: list[Request] = []
    for row, request in enumerate(output.decodes.requests):
        if request.group is None:
            rows.append(row)
            requests.append(request)
        else:
            request.group.offer(request, logits[row])
    end = num_logits = len(output.decodes)
    for item in output.items:
        start, end = end, end + item.num_logits
        if item.all_logits:
            _note_prompt_logprobs(item, logits[start:end])
        if not item.samples:
            continue
        num_logits += 1
        if item.request.group is not None:
            item.request.group.offer(item.request, logits[end - 1])
        else:
            rows.append(end - 1)
            requests.append(item.request)
    if not rows:
        return Delivered(num_logits)
    before = time.perf_counter()
    own_states = [states[request.request_id] for request in requests]
    sampled = sample(logits if len(rows) == len(logits) else logits[rows], own_states)
    seconds = time.perf_counter() - before
    for row, logprobs in sampled.logprobs.items():
        if row not in sampled.errors:
            requests[row].logprobs.append(logprobs)
    for row, logprobs in sampled.processed_logprobs.items():
        requests[row].processed_logprobs.append(logprobs)
    return Delivered(num_logits, requests, sampled.token_ids, sampled.errors, seconds)


def _note_prompt_logprobs(item: ScheduledRequest, logits: torch.Tensor) -> None:
    """Row i of the logits says how likely token start + i + 1 was."""
    request, prompt = item.request, item.request.prompt_token_ids
    known = request.prompt_logprobs
    assert known is not None
    if not known:
        known.append(None)  # nothing comes before the first token
    # After a preemption some are known already.
    first, last = len(known), min(item.start + item.num_tokens, len(prompt) - 1)
    if first <= last:
        targets = prompt[first : last + 1]
        rows = logits[first - item.start - 1 : last - item.start]
        known.extend(logprobs_of(rows, targets, request.sampling.prompt_logprobs or 0))


def _deliver_hidden_states(output: SchedulerOutput, states: Sequence[torch.Tensor]) -> None:
    """Hand hidden states to the groups that want them, before the logits that follow them."""
    place = 0
    for item in output.scheduled:
        request = item.request
        if request.wants_hidden_states and request.group is not None:
            request.group.note_hidden_states(request, item.start, states, place, item.num_tokens)
        place += item.num_tokens
