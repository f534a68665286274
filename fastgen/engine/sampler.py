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
    """Softmax after temperature, top-k and top-p, in that order: [num_rows, vocab_size] fp32."""

    def column(values: list[float], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=logits.device).unsqueeze(1)

    vocab_size = logits.shape[1]
    logits = logits / column([param.temperature for param in params], torch.float32)
    if all(not param.top_k and param.top_p == 1 for param in params):
        return torch.softmax(logits, dim=-1)
    top_k = column([param.top_k or vocab_size for param in params], torch.long)
    top_p = column([param.top_p for param in params], torch.float32)
    ordered, order = logits.sort(dim=-1, descending=True)
    rank = torch.arange(vocab_size, device=logits.device).unsqueeze(0)
    ordered = ordered.masked_fill(rank >= top_k, float("-inf"))
    probabilities = torch.softmax(ordered, dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    # The most likely token always stays; top_p = 1 must not lose tokens to rounding.
    dropped = (before >= top_p) & (top_p < 1) & (rank > 0)
    probabilities = torch.softmax(ordered.masked_fill(dropped, float("-inf")), dim=-1)
    return torch.empty_like(probabilities).scatter_(1, order, probabilities)
