"""What the sampler draws: its distribution, and that no row depends on another."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from sampler_helpers import (
    GREEDY,
    PLAIN,
    draws,
    param_id,
    probabilities_of,
    random_logits,
    reference_probabilities,
    state,
)

from fastgen.config import SamplingParams
from fastgen.engine.request import Request
from fastgen.engine.sampler import SamplingState, sample

PARAMS = [
    *(
        SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        for temperature, top_k, top_p, min_p in itertools.product(
            (0.3, 2.5), (0, 5, 63), (0.5, 1.0), (0.0, 0.1)
        )
    ),
    *(SamplingParams(logprobs=count, temperature=t) for count in (0, 1, 5) for t in (0.0, 1.0)),
    *[SamplingParams(repetition_penalty=2, presence_penalty=2, temperature=0.0)] * 4,
    *[SamplingParams(frequency_penalty=2, temperature=0.0)] * 4,
    SamplingParams(logit_bias={3: 2.0, 60: -100.0}, min_tokens=16, stop_token_ids=(5,)),
    SamplingParams(allowed_token_ids=(1, 2, 3, 40)),
    GREEDY,
    PLAIN,
]


# Independence.


def states_of(rows) -> list[SamplingState]:
    """A state per row number, with a history of its own."""
    return [
        state(
            PARAMS[row],
            row,
            output=[row * i % 64 for i in range(12)],
            stop_token_ids=frozenset(range(row % 9)),
        )
        for row in rows
    ]


def check_independence(sample) -> None:
    """The same tokens alone, together, in another order and beside other neighbours."""
    num_rows = len(PARAMS)
    logits = random_logits(num_rows, 64, seed=2)
    logits[:, 10:14] = logits[:, 9:10]  # ties
    alone = [sample(logits[i : i + 1], states_of([i])) for i in range(num_rows)]
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(3)).tolist()
    for rows in (list(range(num_rows)), order, order[:7], order[7:20], [order[0], order[-1]]):
        together = sample(logits[rows], states_of(rows))
        assert together.token_ids == [alone[i].token_ids[0] for i in rows]
        assert together.logprobs == {
            place: alone[i].logprobs[0] for place, i in enumerate(rows) if alone[i].logprobs
        }
        assert together.errors == {}


def test_rows_do_not_depend_on_each_other():
    check_independence(sample)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_logprobs_of_ties_do_not_depend_on_what_others_ask_for(dtype):
    logits = torch.zeros(3, 1000, dtype=dtype)
    logits[:, 500:] = 1
    counts = [1, 20, 300]
    states = [state(SamplingParams(temperature=0, logprobs=count)) for count in counts]
    together = sample(logits, states)
    for row, own in enumerate(states):
        assert sample(logits[row : row + 1], [own]).logprobs[0] == together.logprobs[row]
        assert len(together.logprobs[row]) in (counts[row], counts[row] + 1)


def test_a_generator_goes_on_as_it_does_alone():
    """After a step beside others the generator stands where it stands after a step alone."""
    logits = random_logits(3, 100)
    params = [PLAIN, SamplingParams(top_k=5), SamplingParams(top_p=0.5)]
    together = [state(own, row) for row, own in enumerate(params)]
    sample(logits, together)
    for row, own in enumerate(params):
        alone = state(own, row)
        sample(logits[row : row + 1], [alone])
        assert torch.equal(together[row].generator.get_state(), alone.generator.get_state())


def test_greedy_rows_use_no_randomness():
    default = torch.get_rng_state()
    sample(random_logits(2, 100), [state(GREEDY), state(PLAIN)])
    assert torch.equal(torch.get_rng_state(), default), "torch's own generator was used"


def test_probabilities_are_bit_equal_beside_a_filtering_row():
    """A row without top-k and top-p must not notice that its neighbour has them."""
    logits = random_logits(50, 1000)
    alone = probabilities_of(logits, [PLAIN] * 50)
    beside = probabilities_of(
        torch.cat([logits, logits[:1]]), [*[PLAIN] * 50, SamplingParams(top_k=5)]
    )
    assert torch.equal(beside[:50], alone)


def test_ties_are_broken_the_same_beside_a_filtering_row():
    """Logits made so that a rounding error decides which token is drawn."""
    vocab_size, changed = 1000, []
    for seed in range(30):
        uniform = state(PLAIN, seed).uniform()
        probabilities = torch.full((1, vocab_size), (1 - uniform) / (vocab_size - 1))
        probabilities[0, 0] = uniform  # the first token's share ends where the draw falls
        logits = probabilities.log()
        (alone,) = draws(logits, [PLAIN], [seed])
        assert alone <= 1
        beside = draws(logits.expand(2, -1), [PLAIN, SamplingParams(top_p=0.5)], [seed, seed])[0]
        changed += [seed] if beside != alone else []
    assert not changed, "seeds whose token depends on the neighbour"


def numbers(own, times_each=1):
    """A request's numbers of 200 tokens, each asked for so many times."""
    drawn = []
    for token_id in range(200):
        (number,) = {own.uniform() for _ in range(times_each)}
        drawn.append(number)
        own.request.output_token_ids.append(token_id)
    return drawn


def test_a_seed_draws_the_same_wherever_its_numbers_run_out():
    """Numbers are drawn ahead: a long run is what one number at a time gives."""
    drawn = numbers(state(PLAIN, 5))
    assert len(set(drawn)) == 200
    assert all(0 <= number < 1 for number in drawn)
    assert numbers(state(PLAIN, 5), times_each=3) == drawn, "a repeated step gets others"


# Distribution.


def total_variation_bound(num_draws: int, num_tokens: int, failure: float = 1e-9) -> float:
    """What the empirical distribution's total variation exceeds with probability `failure`.

    Its mean is at most sqrt(num_tokens / num_draws) / 2 (Cauchy-Schwarz), and one draw moves it by
    at most 1 / num_draws (McDiarmid).
    """
    return 0.5 * math.sqrt(num_tokens / num_draws) + math.sqrt(
        math.log(1 / failure) / (2 * num_draws)
    )


def tokens_of(logits: torch.Tensor, states: list[SamplingState]) -> list[int]:
    return sample(logits, states).token_ids


def empirical_distance(draw, param: SamplingParams, num_draws: int = 20_000) -> float:
    """Total variation between draws of a few generators, one after the other, and the reference."""
    logits = random_logits(1, 12, seed=5, scale=1.0)
    states, drawn = [state(param, seed) for seed in range(20)], []
    for _ in range(num_draws // len(states)):
        token_ids = draw(logits.expand(len(states), -1), states)
        drawn += token_ids
        for own, token_id in zip(states, token_ids, strict=True):
            own.request.output_token_ids.append(token_id)
    counts = torch.bincount(torch.tensor(drawn), minlength=12).double()
    expected = reference_probabilities(logits[0], param)
    assert (counts[expected == 0] == 0).all()
    return 0.5 * (counts / num_draws - expected).abs().sum().item()


@pytest.mark.parametrize(
    "param",
    [
        PLAIN,
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=2.0, top_k=4),
        SamplingParams(top_p=0.6),
        SamplingParams(temperature=1.5, top_k=8, top_p=0.8),
        SamplingParams(temperature=2.0, min_p=0.3),
    ],
    ids=param_id,
)
def test_draws_follow_the_probabilities(param):
    assert empirical_distance(tokens_of, param) < total_variation_bound(20_000, 12)


def test_seeds_give_independent_draws():
    """One draw from each of many generators with neighbouring seeds is a fair sample too."""
    logits = random_logits(1, 12, seed=5, scale=1.0)
    drawn = draws(logits.expand(5000, -1), [PLAIN] * 5000, range(5000))
    counts = torch.bincount(torch.tensor(drawn), minlength=12).double()
    distance = 0.5 * (counts / 5000 - reference_probabilities(logits[0], PLAIN)).abs().sum()
    assert distance < total_variation_bound(5000, 12)


# Planted mistakes.


def draws_from_one_generator(logits, states):
    """Planted: the first row's generator draws the noise of all rows."""
    for own in states:
        own.generator = own.generator and states[0].generator
    return sample(logits, states)


def counts_of_the_first(logits, states):
    """Planted: every row is penalised for the first row's tokens."""
    for own in states:
        own.request.output_token_ids = states[0].request.output_token_ids
    return sample(logits, states)


@pytest.mark.parametrize("broken", [draws_from_one_generator, counts_of_the_first])
def test_planted_dependence_is_found(broken):
    with pytest.raises(AssertionError):
        check_independence(broken)


def uses_gaussian_noise(logits, states):
    probabilities = probabilities_of(logits.float(), [own.params for own in states])
    noise = torch.stack(
        [torch.randn(logits.shape[1], generator=own.generator).abs() for own in states]
    )
    return (probabilities / noise).argmax(-1).tolist()


def forgets_temperature(logits, states):
    forgetful = SamplingState(Request([1], PLAIN))
    return sample(logits, [forgetful] * len(states)).token_ids


@pytest.mark.parametrize("broken", [uses_gaussian_noise, forgets_temperature])
def test_planted_bias_is_found(broken):
    distance = empirical_distance(broken, SamplingParams(temperature=0.5))
    assert distance > total_variation_bound(20_000, 12)
