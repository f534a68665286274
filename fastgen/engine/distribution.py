"""What a token is drawn from: probabilities after temperature, min-p, top-k and top-p."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..config import SamplingParams

# A nucleus is looked for among so many tokens before the whole vocabulary is sorted.
NUCLEUS = 1024


def form_of(params: SamplingParams, vocab_size: int) -> tuple[int, bool]:
    """How many tokens top-k leaves, and whether they must be put in order."""
    width = min(params.top_k, vocab_size) if params.top_k > 0 else vocab_size
    return width, width < vocab_size or params.top_p < 1


def filtered_probabilities(
    logits: torch.Tensor, params: Sequence[SamplingParams], width: int, ordered: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Softmax after temperature, min-p, top-k and top-p, in that order.

    Args:
        logits: [num_rows, vocab_size] fp32, overwritten. params: One per row, all of the form
            (width, ordered).
    Returns: probabilities [num_rows, n] fp32, n <= width, and the token ids they belong to, most
        likely first; None: those of the vocabulary as they are. Tokens that are left out have 0.
    """
    temperature = _column([param.temperature for param in params], logits.device)
    temperature = temperature.clamp(min=torch.finfo(torch.float32).tiny)
    logits -= logits.amax(dim=-1, keepdim=True)
    logits /= temperature  # <= 0, so never +inf
    if any(param.min_p for param in params):
        # p >= min_p * p_max, where p_max is exp(0) over the same sum.
        min_p = _column([param.min_p for param in params], logits.device)
        logits.masked_fill_(logits < min_p.log(), float("-inf"))
    if not ordered:
        return torch.softmax(logits, dim=-1), None
    top_p = _column([param.top_p for param in params], logits.device)
    if width < logits.shape[1]:
        logits, ids = logits.topk(width, dim=-1)
        probabilities = torch.softmax(logits, dim=-1)
    else:
        probabilities, ids = _most_likely(torch.softmax(logits, dim=-1), top_p)
    if all(param.top_p == 1 for param in params):
        return probabilities, ids
    reached = probabilities.cumsum(dim=-1)
    dropped = torch.zeros_like(probabilities, dtype=torch.bool)  # never the most likely token
    dropped[:, 1:] = (reached[:, :-1] >= top_p) & (top_p < 1)
    kept = reached.masked_fill(dropped, 0).amax(dim=-1, keepdim=True)
    kept.masked_fill_(top_p == 1, 1.0)
    return probabilities.masked_fill_(dropped, 0).div_(kept), ids


def _most_likely(
    probabilities: torch.Tensor, top_p: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities in order and their token ids, as many as any row needs to reach its top_p.

    A row that needs no more than NUCLEUS has zeros behind them.
    """
    if probabilities.shape[1] <= NUCLEUS:
        return probabilities.sort(dim=-1, descending=True)
    best, ids = probabilities.topk(NUCLEUS, dim=-1)
    flat = (best.cumsum(dim=-1)[:, -1] < top_p.squeeze(1)).nonzero().squeeze(1)
    if not len(flat):
        return best, ids
    all_best, all_ids = torch.zeros_like(probabilities), torch.zeros_like(probabilities).long()
    all_best[:, :NUCLEUS], all_ids[:, :NUCLEUS] = best, ids
    all_best[flat], all_ids[flat] = probabilities[flat].sort(dim=-1, descending=True)
    return all_best, all_ids


def _column(values: list[float], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, device=device).float().unsqueeze(1)
