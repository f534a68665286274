"""deterministic=True: a token's logits are equal to the last bit whatever else is in the batch.

Every step's logits are noted under the tokens they follow. Each of many ways to run the same
requests (alone, beside others, in chunks, over cached prefixes, preempted) must give them again.
"""

import random

import pytest
import torch
from fastgen.engine.runner import Runner
from fastgen.kernels.cpu import why_missing
from tiny_models import prompts, tiny_model

import fastgen
from fastgen import Config, SamplingParams, UnsupportedModelError

needs_kernels = pytest.mark.skipif(why_missing() is not None, reason=str(why_missing()))
pytestmark = [needs_kernels, pytest.mark.usefixtures("graphs_of_the_session")]

F32, BF16 = torch.float32, torch.bfloat16
FAMILIES = ("llama", "qwen2", "gemma2", "gpt_oss", "mixtral")
# One longer than the 256 slots that attention sums at a time.
LENGTHS = (1, 2, 5, 16, 17, 33, 70, 290)


class Ledger:
    """The logits that followed each sequence of tokens. differences: how many were others later."""

    def __init__(self) -> None:
        self.rows: dict[tuple[int, ...], torch.Tensor] = {}
        self.times_met_again = self.differences = 0

    def note(self, tokens: tuple[int, ...], logits: torch.Tensor) -> None:
        if (known := self.rows.get(tokens)) is None:
            self.rows[tokens] = logits.clone()
            return
        self.times_met_again += 1
        self.differences += not torch.equal(known, logits)

    def note_step(self, output, logits: torch.Tensor) -> None:
        """Rows are in the order of the step: decodes, then items."""
        rows = iter(logits)
        for request, length in zip(output.decodes.requests, output.decodes.seq_lens, strict=True):
            self.note(tuple(request.token_ids(0, int(length))), next(rows))
        for item in output.items:
            end = item.start if item.query else item.start + item.num_tokens
            for last in range(end - item.num_logits + 1, end + 1):
                self.note(tuple(item.request.token_ids(0, last)), next(rows))
        assert next(rows, None) is None


@pytest.fixture
def ledger(monkeypatch):
    ledger, run = Ledger(), Runner.run

    def noted(self, output):
        logits = run(self, output)
        ledger.note_step(output, logits)
        return logits

    monkeypatch.setattr(Runner, "run", noted)
    return ledger


def requests(seed: int = 0) -> list[tuple[list[int], SamplingParams]]:
    """Greedy and sampled ones; two with a common prefix, one whose whole prompt is scored."""
    rows = prompts(*LENGTHS, seed=seed)
    rows.append(rows[5][:20] + rows[4])
    ways = [{"temperature": 0.0}, {"temperature": 0.9, "top_p": 0.9}]
    params = [
        SamplingParams(max_tokens=6, seed=place, ignore_eos=True, **ways[place % 2])
        for place in range(len(rows))
    ]
    params[3] = SamplingParams(max_tokens=2, temperature=0.0, prompt_logprobs=0, ignore_eos=True)
    return list(zip(rows, params, strict=True))


def run(model, work, order=None, **fields) -> dict[int, list[int]]:
    """All requests at once, in an order; output tokens by place in `work`."""
    order = range(len(work)) if order is None else order
    with fastgen.Engine(model, **{"deterministic": True, **fields}) as engine:
        outputs = engine.generate(*map(list, zip(*[work[i] for i in order], strict=True)))
        run.metrics = engine.metrics()
    fastgen.restore(model)
    return {place: output.token_ids for place, output in zip(order, outputs, strict=True)}


def run_in_many_ways(model, work, ledger, shuffles: int = 2, **fields) -> None:
    """Each way gives the tokens of the first; the ledger compares logits."""
    first = run(model, work, **fields)
    shuffle = random.Random(0).sample
    ways = [
        {"max_num_batched_tokens": 7, "max_num_seqs": 3},
        {"max_num_batched_tokens": 64, "prefix_cache": False},
        {"max_num_seqs": 1},
    ]
    for way in ways:
        assert run(model, work, **way, **fields) == first, way
    for _ in range(shuffles):
        part = shuffle(range(len(work)), random.Random(len(ledger.rows)).randint(2, len(work)))
        made = run(model, work, part, max_num_batched_tokens=40, **fields)
        assert made == {place: first[place] for place in part}
    copies = work + work + work  # 27 at once, two thirds of them on cached prefixes
    made = run(model, copies, shuffle(range(len(copies)), len(copies)), **fields)
    assert made == {place: first[place % len(work)] for place in range(len(copies))}
    assert run.metrics.prefix_cache_hit_tokens


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_equal_whatever_runs_beside(family, dtype, ledger):
    model = tiny_model(family, dtype=dtype)
    run_in_many_ways(model, requests(), ledger)
    assert ledger.times_met_again > 400
    assert ledger.differences == 0
