"""top_p over a large vocabulary: what a sort of all of it gives, and no row depends on another."""

from __future__ import annotations

import pytest
import torch
from sampler_helpers import check_probabilities, draws, random_logits, state

from fastgen.config import SamplingParams
from fastgen.engine import distribution, sampler
from fastgen.engine.distribution import NUCLEUS, filtered_probabilities
from fastgen.engine.sampler import sample

VOCAB_SIZE = 5000
# The standard deviation of the logits decides how many tokens a nucleus holds.
SCALES = {"peaked": 6.0, "flat": 0.3}


def rows_of(scale: float, num_rows: int = 6) -> torch.Tensor:
    return random_logits(num_rows, VOCAB_SIZE, seed=4, scale=scale)


def nucleus(logits: torch.Tensor, params: list[SamplingParams]) -> torch.Tensor:
    """[num_rows, vocab_size] probabilities in the vocabulary's order."""
    found, ids = filtered_probabilities(logits.clone(), params, VOCAB_SIZE, True)
    assert ids is not None
    result = torch.zeros_like(logits)
    for row in range(len(logits)):
        kept = found[row] > 0
        result[row, ids[row, kept]] = found[row, kept]
    return result


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.9])
def test_a_nucleus_is_that_of_the_reference(scale, top_p):
    logits = rows_of(scale)
    params = [SamplingParams(top_p=top_p)] * len(logits)
    check_probabilities(nucleus(logits, params), logits, params)


def test_the_rows_are_what_they_are_for():
    params = [SamplingParams(top_p=0.9)] * 6
    sizes = {
        name: nucleus(rows_of(scale), params).count_nonzero(dim=1) for name, scale in SCALES.items()
    }
    assert (sizes["peaked"] < NUCLEUS).all()
    assert (sizes["flat"] > NUCLEUS).all()


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999999])
def test_equal_to_a_sort_of_the_whole_vocabulary(monkeypatch, scale, top_p):
    logits = rows_of(scale)
    params = [SamplingParams(top_p=top_p)] * len(logits)
    found = nucleus(logits, params)
    drawn = draws(logits, params, range(6))
    monkeypatch.setattr(distribution, "NUCLEUS", VOCAB_SIZE)
    sorted_all = nucleus(logits, params)
    assert torch.equal(found > 0, sorted_all > 0)
    assert torch.equal(found, sorted_all)
    assert drawn == draws(logits, params, range(6))


def check_mixed(sample) -> None:
    """A row that finds its nucleus among the best draws the same beside one that does not."""
    logits = torch.cat([rows_of(scale) for scale in SCALES.values()])
    params = [SamplingParams(top_p=0.9 if row % 2 else 0.6) for row in range(len(logits))]

    def states(rows) -> list:
        return [state(params[row], row) for row in rows]

    for _ in range(5):
        rows = range(len(logits))
        together = sample(logits, states(rows)).token_ids
        alone = [sample(logits[row : row + 1], states([row])).token_ids[0] for row in rows]
        assert together == alone
        logits = logits.roll(1, dims=1)


def test_rows_do_not_depend_on_each_other():
    check_mixed(sample)


@pytest.mark.parametrize("chunk", [1, 3 * VOCAB_SIZE])
def test_how_many_rows_are_filtered_together_changes_nothing(monkeypatch, chunk):
    logits = torch.cat([rows_of(scale) for scale in SCALES.values()])
    params = [SamplingParams(top_p=p, top_k=k) for p in (0.9, 1.0) for k in (0, 0, 20)] * 2
    before = draws(logits, params, range(12))
    monkeypatch.setattr(sampler, "_CHUNK", chunk)
    assert draws(logits, params, range(12)) == before


def test_planted_nucleus_that_is_too_small_is_found(monkeypatch):
    """The best tokens are taken although they do not reach top_p."""

    def best_only(probabilities, top_p):
        return probabilities.topk(64, dim=-1)

    monkeypatch.setattr(distribution, "_most_likely", best_only)
    logits = rows_of(SCALES["flat"])
    params = [SamplingParams(top_p=0.9)] * len(logits)
    with pytest.raises(AssertionError):
        check_probabilities(nucleus(logits, params), logits, params)
