"""The parity gate of bench: the same tokens in fp32, logits as good as transformers' otherwise."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .. import Engine, SamplingParams, api
from ..reference import Reference

NUM_REQUESTS = 4
NEW_TOKENS = 24
CHUNK = 128  # token budget of the gate's engine: longer prompts are computed in chunks

Requests = list[tuple[list[int], int]]


@dataclass(frozen=True)
class Parity:
    """What was compared, and whether it holds.

    logits_error and transformers_logits_error: largest difference of the first step's logits in
    the measured dtype from transformers' in fp32 (in fp64, if fp32 is measured). The first may be
    twice the second, plus one rounding of the largest logit, which is what two orders of the same
    sums differ by.
    """

    fp32_equal: bool
    fp32_requests: int
    fp32_tokens: int
    chunked_requests: int
    logits_error: float
    transformers_logits_error: float
    logits_tolerance: float
    equal_token_share: float

    @property
    def passed(self) -> bool:
        return self.fp32_equal and self.logits_error <= self.logits_tolerance

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


def check_parity(model: Any, requests: Requests) -> Parity:
    """Compare fastgen with transformers on a few of these requests, the longest prompt included.

    Args:
        model: Not optimised; it is left so.
    """
    by_length = sorted(requests, key=lambda request: len(request[0]))
    chosen = [by_length[-1], *by_length[: NUM_REQUESTS - 1]]
    while len(chosen) < NUM_REQUESTS:  # a workload of one request: prefixes of its prompt too
        chosen.append((chosen[0][0][: len(chosen[0][0]) // (len(chosen) + 1)], chosen[0][1]))
    prompts = [prompt for prompt, _ in chosen]
    lengths = [min(length, NEW_TOKENS) for _, length in chosen]

    exact = copy.deepcopy(model).float()
    expected = Reference(exact).tokens(prompts, lengths)
    found = _engine_tokens(exact, prompts, lengths)
    if model.dtype == torch.float32:
        exact = exact.double()
    _, truth = Reference(exact).generate(prompts[0], 1)
    del exact

    reference = Reference(model)
    own_tokens = reference.tokens(prompts, lengths)
    _, own_logits = reference.generate(prompts[0], 1)
    tokens = _engine_tokens(model, prompts, lengths)
    api.optimize(model)
    try:
        logits = _first_logits(model, prompts[0])
    finally:
        api.restore(model)
    equal = sum(
        a == b
        for ours, theirs in zip(tokens, own_tokens, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    )
    own_error = (own_logits - truth).abs().max().item()
    rounding = torch.finfo(model.dtype).eps * truth.abs().max().item()
    return Parity(
        fp32_equal=found == expected,
        fp32_requests=len(prompts),
        fp32_tokens=sum(map(len, expected)),
        chunked_requests=sum(len(prompt) > CHUNK for prompt in prompts),
        logits_error=(logits - truth).abs().max().item(),
        transformers_logits_error=own_error,
        logits_tolerance=2 * (own_error + rounding),
        equal_token_share=equal / sum(lengths),
    )


def _engine_tokens(model: Any, prompts: list[list[int]], lengths: list[int]) -> list:
    """All prompts at once, in chunks."""
    params = [SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True) for n in lengths]
    api.optimize(model, max_num_batched_tokens=CHUNK)
    try:
        with Engine(model) as engine:
            return [output.token_ids for output in engine.generate(prompts, params)]
    finally:
        api.restore(model)


def _first_logits(model: Any, prompt: list[int]) -> torch.Tensor:
    """[1, vocab_size] fp32 logits after the prompt, through generate()."""
    ids = torch.tensor([prompt], device=model.device)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=1,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.logits[0]
