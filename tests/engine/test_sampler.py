"""The sampler's probabilities and tokens, against a plain per-row reference.

Draws and independence: test_sampler_draws.py. Penalties, biases and bans: test_penalties.py.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from sampler_helpers import (
    GREEDY,
    PLAIN,
    check_probabilities,
    draws,
    param_id,
    probabilities_of,
    random_logits,
    state,
)

from fastgen.config import SamplingParams
from fastgen.engine.sampler import sample

PARAMS = [
    SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    for temperature, top_k, top_p, min_p in itertools.product(
        (0.3, 1.0, 2.5), (0, 1, 5, 63, 1000), (0.05, 0.5, 0.9, 1.0), (0.0, 0.02, 0.3)
    )
]


# Probabilities.


@pytest.mark.parametrize("param", PARAMS, ids=param_id)
def test_probabilities_of_equal_rows(param):
    logits = random_logits(3, 64)
    check_probabilities(probabilities_of(logits, [param] * 3), logits, [param] * 3)


def test_probabilities_of_mixed_rows():
    logits = random_logits(len(PARAMS), 64, seed=1)
    check_probabilities(probabilities_of(logits, PARAMS), logits, PARAMS)


@pytest.mark.parametrize("vocab_size", [1, 2, 63, 100])
def test_odd_vocabularies(vocab_size):
    params = [PLAIN, SamplingParams(top_k=2), SamplingParams(top_p=0.7)]
    logits = random_logits(3, vocab_size)
    check_probabilities(probabilities_of(logits, params), logits, params)


@pytest.mark.parametrize("top_k", [-1, 0, 64, 65, 2**31 - 1])
def test_top_k_of_the_whole_vocabulary_keeps_all(top_k):
    logits = random_logits(2, 64)
    actual = probabilities_of(logits, [SamplingParams(top_k=top_k)] * 2)
    assert (actual > 0).all()
    check_probabilities(actual, logits, [PLAIN] * 2)


def test_top_p_of_one_keeps_all():
    """Also beside a row that filters, and where the cumulative sum reaches 1 early by rounding."""
    logits = torch.zeros(2, 1000)
    logits[:, :3] = 15.0  # the others have about 1e-7 each
    actual = probabilities_of(logits, [PLAIN, SamplingParams(top_p=0.5)])
    assert (actual[0] > 0).all()
    assert (actual[1] > 0).sum() == 2


@pytest.mark.parametrize("top_p", [1e-6, 1e-30, 5e-324], ids=str)
def test_the_most_likely_token_always_stays(top_p):
    logits = random_logits(1, 100)
    actual = probabilities_of(logits, [SamplingParams(top_p=top_p)])
    assert actual[0, logits.argmax()] == 1.0
    assert actual.count_nonzero() == 1


def test_top_p_keeps_the_token_that_reaches_it():
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    for top_p, count in [(0.4, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.76, 3), (0.99, 4)]:
        actual = probabilities_of(logits, [SamplingParams(top_p=top_p)])
        assert actual.count_nonzero() == count, top_p


def test_top_k_keeps_exactly_k_of_equal_logits():
    actual = probabilities_of(torch.zeros(1, 100), [SamplingParams(top_k=7)])
    assert actual.count_nonzero() == 7


def test_top_p_is_of_what_top_k_left():
    """In vLLM's order: 0.6 of the best two, not of all."""
    logits = torch.tensor([[0.3, 0.2, 0.25, 0.25]]).log()
    actual = probabilities_of(logits, [SamplingParams(top_k=2, top_p=0.5)])
    assert actual.count_nonzero() == 1


def test_masked_logits_are_never_drawn():
    logits = torch.full((1, 50), -math.inf)
    logits[0, [3, 30]] = torch.tensor([1.0, 2.0])
    for param in (PLAIN, SamplingParams(top_k=10), SamplingParams(top_p=0.99)):
        assert probabilities_of(logits, [param]).nonzero()[:, 1].tolist() == [3, 30]
        drawn = draws(logits.expand(200, -1), [param] * 200, range(200))
        assert set(drawn) == {3, 30}


# min_p.


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_min_p_is_of_the_most_likely_token_after_the_temperature(temperature):
    weights = torch.tensor([[1.0, 0.5, 0.25, 0.125]])
    logits = weights.log() * temperature
    for min_p, count in [(0.6, 1), (0.3, 2), (0.2, 3), (0.1, 4), (1e-30, 4)]:
        param = SamplingParams(temperature=temperature, min_p=min_p)
        assert probabilities_of(logits, [param]).count_nonzero() == count, min_p


def test_min_p_of_one_keeps_the_most_likely_tokens():
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.999]])
    actual = probabilities_of(logits, [SamplingParams(min_p=1.0)])
    assert actual[0].nonzero().flatten().tolist() == [1, 2]


def test_top_p_is_of_what_min_p_left():
    """The first token has 0.4 of all, and 0.67 of what is left."""
    logits = torch.tensor([[0.4, 0.2, 0.1, 0.1, 0.1, 0.1]]).log()
    assert probabilities_of(logits, [SamplingParams(top_p=0.55)]).count_nonzero() == 2
    both = SamplingParams(top_p=0.55, min_p=0.4)
    assert probabilities_of(logits, [both]).count_nonzero() == 1


def test_min_p_leaves_its_neighbours_alone():
    logits = random_logits(2, 100)
    beside = probabilities_of(logits, [PLAIN, SamplingParams(min_p=0.5)])
    assert torch.equal(beside[:1], probabilities_of(logits[:1], [PLAIN]))


# Tokens.


def test_greedy_takes_the_argmax_and_needs_no_generator():
    logits = random_logits(5, 100)
    states = [state(GREEDY) for _ in range(5)]
    assert [own.generator for own in states] == [None] * 5
    assert sample(logits, states).token_ids == logits.argmax(-1).tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_any_float_dtype(dtype):
    logits = random_logits(4, 100).to(dtype)
    params = [GREEDY, SamplingParams(top_k=1), PLAIN, SamplingParams(top_p=0.5)]
    tokens = draws(logits, params, range(4))
    assert tokens == draws(logits.float(), params, range(4))
    assert tokens[:2] == logits[:2].float().argmax(-1).tolist()
    assert all(type(token) is int for token in tokens)


def test_logits_are_left_as_they_were():
    logits = random_logits(4, 100)
    before = logits.clone()
    biased = SamplingParams(logit_bias={3: 5.0}, presence_penalty=1, logprobs=2, temperature=0)
    params = [PLAIN, GREEDY, SamplingParams(top_k=3, allowed_token_ids=(1, 2)), biased]
    sample(logits, [state(own, output=[3]) for own in params])
    assert torch.equal(logits, before)


def test_top_k_one_is_greedy():
    logits = random_logits(20, 100)
    params = [SamplingParams(top_k=1, temperature=5.0)] * 20
    assert draws(logits, params, range(20)) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [1e-3, 1e-10, 1e-37, 1e-40, 1e-46, 1e-300], ids=str)
@pytest.mark.parametrize("top_k", [0, 5], ids=["all", "top5"])
def test_temperature_towards_zero_is_greedy(temperature, top_k):
    """Also where logits / temperature, or the temperature itself, leaves fp32."""
    logits = random_logits(6, 100)
    params = [SamplingParams(temperature=temperature, top_k=top_k)] * 6
    assert probabilities_of(logits, params).isfinite().all()
    assert draws(logits, params, range(6)) == logits.argmax(-1).tolist()


def test_high_temperature_is_uniform():
    logits = random_logits(1, 100)
    actual = probabilities_of(logits, [SamplingParams(temperature=1e6)])
    torch.testing.assert_close(actual, torch.full_like(actual, 0.01), rtol=1e-4, atol=0)


# Planted mistakes.


@pytest.mark.parametrize(
    ("own", "wrong"),
    [
        (SamplingParams(top_k=5), SamplingParams(top_k=6)),
        (SamplingParams(min_p=0.1), SamplingParams(min_p=0.01)),
        (SamplingParams(top_p=0.5), SamplingParams(top_p=0.8)),
    ],
    ids=["top_k", "min_p", "top_p"],
)
def test_planted_difference_in_support_is_found(own, wrong):
    logits = random_logits(1, 64, scale=1.0)
    check_probabilities(probabilities_of(logits, [own]), logits, [own])
    with pytest.raises(AssertionError, match="support"):
        check_probabilities(probabilities_of(logits, [wrong]), logits, [own])


def test_planted_temperature_is_found():
    own, wrong = SamplingParams(temperature=0.5), SamplingParams(temperature=0.5001)
    logits = random_logits(1, 64)
    with pytest.raises(AssertionError, match="row 0"):
        check_probabilities(probabilities_of(logits, [wrong]), logits, [own])
