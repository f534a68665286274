"""From logits to token ids, for a whole step at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..config import SamplingParams


def sample(
    logits: torch.Tensor,
    params: Sequence[SamplingParams],
    generators: Sequence[torch.Generator | None],
) -> list[int]:
    """One token per row.

    Args:
        logits: [num_rows, vocab_size], any float dtype.
        params: One per row; greedy rows take the argmax.
        generators: One per row that is not greedy. A row's token depends on its own logits and
            generator only, not on the rows beside it.
    Returns: num_rows token ids.
    """
    tokens = torch.argmax(logits, dim=-1)
    rows = [row for row, param in enumerate(params) if not param.greedy]
    if rows:
        chosen = [params[row] for row in rows]
        probabilities = filtered_probabilities(logits[rows].float(), chosen)
        noise = torch.empty_like(probabilities)
        for row, own_noise in zip(rows, noise, strict=True):
            own_noise.exponential_(generator=generators[row])
        # argmax(p / Exp(1)) draws from p (the exponential race).
        tokens[rows] = torch.argmax(probabilities / noise, dim=-1)
    return tokens.tolist()


def filtered_probabilities(logits: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Softmax after temperature, top-k and top-p, in that order: [num_rows, vocab_size] fp32.

    A row's result does not depend on the rows beside it.
    """
    temperature = _column([param.temperature for param in params], logits.device)
    temperature = temperature.clamp(min=torch.finfo(torch.float32).tiny)
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature  # <= 0, so never +inf
    probabilities = torch.softmax(logits, dim=-1)
    filtered = [row for row, param in enumerate(params) if param.top_k or param.top_p < 1]
    if filtered:
        chosen = [params[row] for row in filtered]
        probabilities[filtered] = _top_k_top_p(logits[filtered], chosen)
    return probabilities


def _top_k_top_p(logits: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    vocab_size = logits.shape[1]
    top_k = _column([min(param.top_k or vocab_size, vocab_size) for param in params], logits.device)
    top_p = _column([param.top_p for param in params], logits.device)
    ordered, order = logits.sort(dim=-1, descending=True)
    rank = torch.arange(vocab_size, device=logits.device).unsqueeze(0)
    ordered = ordered.masked_fill(rank >= top_k, float("-inf"))
    probabilities = torch.softmax(ordered, dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    # The most likely token always stays; top_p = 1 must not lose tokens to rounding.
    dropped = (before >= top_p) & (top_p < 1) & (rank > 0)
    probabilities = torch.softmax(ordered.masked_fill(dropped, float("-inf")), dim=-1)
    return torch.empty_like(probabilities).scatter_(1, order, probabilities)


def _column(values: list[float], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, device=device).float().unsqueeze(1)
