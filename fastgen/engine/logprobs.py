"""Log-probabilities of tokens: raw ones of the model, and processed ones they were drawn by."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..config import SamplingParams
from ..outputs import Logprob
from .distribution import filtered_probabilities, form_of


def logprobs_of(
    logits: torch.Tensor, token_ids: Sequence[int], count: int
) -> list[dict[int, Logprob]]:
    """Per row the token's own log-probability and those of the `count` most likely tokens.

    Args:
        logits: [num_rows, vocab_size] of the model, any float dtype.
    """
    return _most_likely(torch.log_softmax(logits.float(), dim=-1), token_ids, count)


def processed_logprobs_of(
    logits: torch.Tensor, token_ids: Sequence[int], params: Sequence[SamplingParams]
) -> list[dict[int, Logprob]]:
    """The same under the distribution that each row's token was drawn from.

    A greedy row is drawn from nothing: its logits are taken as they are after the penalties.

    Args:
        logits: [num_rows, vocab_size] fp32 after biases, bans and penalties. params: One per row;
            `processed_logprobs` of them says how many most likely tokens come along.
    """
    rows: list[dict[int, Logprob]] = []
    for row, (token_id, param) in enumerate(zip(token_ids, params, strict=True)):
        one = logits[row : row + 1].float()
        if param.greedy:
            logprobs = torch.log_softmax(one, dim=-1)
        else:
            width, ordered = form_of(param, logits.shape[1])
            probabilities, ids = filtered_probabilities(one.clone(), [param], width, ordered)
            if ids is not None:
                probabilities = torch.zeros_like(one).scatter_(1, ids, probabilities)
            logprobs = probabilities.log()
        assert param.processed_logprobs is not None
        (found,) = _most_likely(logprobs, [token_id], param.processed_logprobs)
        rows.append(found)
    return rows


def _most_likely(
    logprobs: torch.Tensor, token_ids: Sequence[int], count: int
) -> list[dict[int, Logprob]]:
    """Of [num_rows, vocab_size] log-probabilities; a token that cannot be drawn is left out."""
    own = logprobs.gather(1, torch.tensor(token_ids, device=logprobs.device).unsqueeze(1))
    ranks = (logprobs > own).sum(dim=-1) + 1
    best = logprobs.topk(min(count, logprobs.shape[1]), dim=-1)
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
            if value > float("-inf"):
                row.setdefault(likely, Logprob(value, place))
        rows.append(row)
    return rows
