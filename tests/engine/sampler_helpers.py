"""What the sampler's tests share: states, logits, and a plain reference of one row in fp64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fastgen.config import SamplingParams
from fastgen.engine.distribution import filtered_probabilities, form_of
from fastgen.engine.request import Request
from fastgen.engine.sampler import SamplingState, sample

GREEDY = SamplingParams(temperature=0.0)
PLAIN = SamplingParams()


def state(
    params: SamplingParams = PLAIN,
    seed: int = 0,
    prompt: Sequence[int] = (1,),
    output: Sequence[int] = (),
    **fields,
) -> SamplingState:
    """A request with this history, and a generator of its own."""
    request = Request(list(prompt), params, seed=seed, **fields)
    request.output_token_ids = list(output)
    return SamplingState(request)


def draws(logits: torch.Tensor, params: Sequence[SamplingParams], seeds) -> list[int]:
    """A token per row, each from a new generator."""
    states = [state(own, seed) for own, seed in zip(params, seeds, strict=True)]
    return sample(logits, states).token_ids


def random_logits(num_rows: int, vocab_size: int, seed: int = 0, scale: float = 3.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, vocab_size, generator=generator) * scale


def probabilities_of(logits: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """[num_rows, vocab_size]: rows of one form together, in the vocabulary's order."""
    result = torch.zeros_like(logits)
    forms = [form_of(own, logits.shape[1]) for own in params]
    for form in set(forms):
        rows = [row for row, own in enumerate(forms) if own == form]
        found, ids = filtered_probabilities(logits[rows], [params[row] for row in rows], *form)
        result[rows] = found if ids is None else result[rows].scatter(1, ids, found)
    return result


def reference_probabilities(logits: torch.Tensor, param: SamplingParams) -> torch.Tensor:
    """One row in fp64: temperature, min_p, the k largest, then the fewest that reach top_p."""
    scaled = [value / param.temperature for value in logits.double().tolist()]
    order = sorted(range(len(scaled)), key=lambda i: -scaled[i])
    highest = scaled[order[0]]
    weights = {i: math.exp(scaled[i] - highest) for i in order}
    kept = [i for i in order if weights[i] >= param.min_p]  # the highest has 1
    kept = kept[: param.top_k] if param.top_k > 0 else kept
    total, reached, nucleus = sum(weights[i] for i in kept), 0.0, []
    for i in kept:
        nucleus.append(i)
        reached += weights[i] / total
        if reached >= param.top_p and param.top_p < 1:
            break
    total = sum(weights[i] for i in nucleus)
    probabilities = torch.zeros(len(scaled), dtype=torch.float64)
    for i in nucleus:
        probabilities[i] = weights[i] / total
    return probabilities


def check_probabilities(actual: torch.Tensor, logits: torch.Tensor, params) -> None:
    """Same support, and an fp32 softmax's distance from fp64.

    The exponent z = logit / temperature - max carries a relative rounding error of a few eps, so
    that p is off by |z| * p * eps and a few eps more from exp, the sum and the division.
    """
    eps = torch.finfo(torch.float32).eps
    for row, param in enumerate(params):
        expected = reference_probabilities(logits[row], param)
        assert torch.equal(actual[row] > 0, expected > 0), f"support of row {row}: {param}"
        largest = (logits[row].abs().max() / param.temperature).item()
        bound = (4 * largest + 16) * eps * expected
        assert ((actual[row].double() - expected).abs() <= bound).all(), f"row {row}: {param}"


def param_id(param: SamplingParams) -> str:
    return f"t{param.temperature}-k{param.top_k}-p{param.top_p}-m{param.min_p}"
