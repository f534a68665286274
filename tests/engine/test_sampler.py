"""The sampler, against a plain per-row reference, and its distribution and independence."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fastgen.config import SamplingParams
from fastgen.engine.sampler import filtered_probabilities, sample

GREEDY = SamplingParams(temperature=0.0)
PLAIN = SamplingParams()
PARAMS = [
    SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    for temperature, top_k, top_p in itertools.product(
        (0.3, 1.0, 2.5), (0, 1, 5, 63, 64, 1000), (0.05, 0.5, 0.9, 1.0)
    )
]


def param_id(param: SamplingParams) -> str:
    return f"t{param.temperature}-k{param.top_k}-p{param.top_p}"


def random_logits(num_rows: int, vocab_size: int, seed: int = 0, scale: float = 3.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, vocab_size, generator=generator) * scale


def generators(seeds) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def reference_probabilities(logits: torch.Tensor, param: SamplingParams) -> torch.Tensor:
    """One row in fp64: temperature, the k largest, then the fewest that reach top_p."""
    scaled = [value / param.temperature for value in logits.double().tolist()]
    order = sorted(range(len(scaled)), key=lambda i: -scaled[i])
    kept = order[: param.top_k] if param.top_k else order
    highest = scaled[order[0]]
    weights = {i: math.exp(scaled[i] - highest) for i in kept}
    total, reached, nucleus = sum(weights.values()), 0.0, []
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


# Probabilities.


@pytest.mark.parametrize("param", PARAMS, ids=param_id)
def test_probabilities_of_one_row(param):
    logits = random_logits(3, 64)
    check_probabilities(filtered_probabilities(logits, [param] * 3), logits, [param] * 3)


def test_probabilities_of_mixed_rows():
    logits = random_logits(len(PARAMS), 64, seed=1)
    check_probabilities(filtered_probabilities(logits, PARAMS), logits, PARAMS)


@pytest.mark.parametrize("vocab_size", [1, 2, 63, 100])
def test_odd_vocabularies(vocab_size):
    params = [PLAIN, SamplingParams(top_k=2), SamplingParams(top_p=0.7)]
    logits = random_logits(3, vocab_size)
    check_probabilities(filtered_probabilities(logits, params), logits, params)


@pytest.mark.parametrize("top_k", [0, 64, 65, 2**31 - 1])
def test_top_k_of_the_whole_vocabulary_keeps_all(top_k):
    logits = random_logits(2, 64)
    actual = filtered_probabilities(logits, [SamplingParams(top_k=top_k)] * 2)
    assert (actual > 0).all()
    check_probabilities(actual, logits, [PLAIN] * 2)


def test_top_p_of_one_keeps_all():
    """Also beside a row that filters, and where the cumulative sum reaches 1 early by rounding."""
    logits = torch.zeros(2, 1000)
    logits[:, :3] = 15.0  # the others have about 1e-7 each
    actual = filtered_probabilities(logits, [PLAIN, SamplingParams(top_p=0.5)])
    assert (actual[0] > 0).all()
    assert (actual[1] > 0).sum() == 2


@pytest.mark.parametrize("top_p", [1e-6, 1e-30, 5e-324], ids=str)
def test_the_most_likely_token_always_stays(top_p):
    logits = random_logits(1, 100)
    actual = filtered_probabilities(logits, [SamplingParams(top_p=top_p)])
    assert actual[0, logits.argmax()] == 1.0
    assert actual.count_nonzero() == 1


def test_top_p_keeps_the_token_that_reaches_it():
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    for top_p, count in [(0.4, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.76, 3), (0.99, 4)]:
        actual = filtered_probabilities(logits, [SamplingParams(top_p=top_p)])
        assert actual.count_nonzero() == count, top_p


def test_top_k_keeps_exactly_k_of_equal_logits():
    actual = filtered_probabilities(torch.zeros(1, 100), [SamplingParams(top_k=7)])
    assert actual.count_nonzero() == 7


def test_top_p_is_of_what_top_k_left():
    """In vLLM's order: 0.6 of the best two, not of all."""
    logits = torch.tensor([[0.3, 0.2, 0.25, 0.25]]).log()
    actual = filtered_probabilities(logits, [SamplingParams(top_k=2, top_p=0.5)])
    assert actual.count_nonzero() == 1


def test_masked_logits_are_never_drawn():
    logits = torch.full((1, 50), -math.inf)
    logits[0, [3, 30]] = torch.tensor([1.0, 2.0])
    for param in (PLAIN, SamplingParams(top_k=10), SamplingParams(top_p=0.99)):
        assert filtered_probabilities(logits, [param]).nonzero()[:, 1].tolist() == [3, 30]
        drawn = sample(logits.expand(200, -1), [param] * 200, generators(range(200)))
        assert set(drawn) == {3, 30}


# Tokens.


def test_greedy_takes_the_argmax_and_needs_no_generator():
    logits = random_logits(5, 100)
    assert sample(logits, [GREEDY] * 5, [None] * 5) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_any_float_dtype(dtype):
    logits = random_logits(4, 100).to(dtype)
    params = [GREEDY, SamplingParams(top_k=1), PLAIN, SamplingParams(top_p=0.5)]
    own = generators(range(4))
    tokens = sample(logits, params, own)
    assert tokens == sample(logits.float(), params, generators(range(4)))
    assert tokens[:2] == logits[:2].float().argmax(-1).tolist()
    assert all(type(token) is int for token in tokens)


def test_logits_are_left_as_they_were():
    logits = random_logits(4, 100)
    before = logits.clone()
    sample(logits, [PLAIN, GREEDY, SamplingParams(top_k=3), PLAIN], generators(range(4)))
    assert torch.equal(logits, before)


def test_top_k_one_is_greedy():
    logits = random_logits(20, 100)
    params = [SamplingParams(top_k=1, temperature=5.0)] * 20
    assert sample(logits, params, generators(range(20))) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [1e-3, 1e-10, 1e-37, 1e-40, 1e-46, 1e-300], ids=str)
@pytest.mark.parametrize("top_k", [0, 5], ids=["all", "top5"])
def test_temperature_towards_zero_is_greedy(temperature, top_k):
    """Also where logits / temperature, or the temperature itself, leaves fp32."""
    logits = random_logits(6, 100)
    params = [SamplingParams(temperature=temperature, top_k=top_k)] * 6
    assert filtered_probabilities(logits, params).isfinite().all()
    assert sample(logits, params, generators(range(6))) == logits.argmax(-1).tolist()


def test_high_temperature_is_uniform():
    logits = random_logits(1, 100)
    actual = filtered_probabilities(logits, [SamplingParams(temperature=1e6)])
    torch.testing.assert_close(actual, torch.full_like(actual, 0.01), rtol=1e-4, atol=0)


# Independence.


def check_independence(draw) -> None:
    """The same tokens alone, together, in another order and beside other neighbours."""
    params = [*PARAMS, GREEDY, PLAIN]
    num_rows = len(params)
    logits = random_logits(num_rows, 64, seed=2)
    alone = [draw(logits[i : i + 1], [params[i]], generators([i]))[0] for i in range(num_rows)]
    assert draw(logits, params, generators(range(num_rows))) == alone
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(3)).tolist()
    shuffled = draw(logits[order], [params[i] for i in order], generators(order))
    assert shuffled == [alone[i] for i in order]
    for part in (order[:7], order[7:30], [order[0], order[-1]]):
        some = draw(logits[part], [params[i] for i in part], generators(part))
        assert some == [alone[i] for i in part]


def test_rows_do_not_depend_on_each_other():
    check_independence(sample)


def test_a_generator_goes_on_as_it_does_alone():
    """After a step beside others the generator stands where it stands after a step alone."""
    logits = random_logits(3, 100)
    params = [PLAIN, SamplingParams(top_k=5), SamplingParams(top_p=0.5)]
    together, alone = generators(range(3)), generators(range(3))
    sample(logits, params, together)
    for row in range(3):
        sample(logits[row : row + 1], [params[row]], [alone[row]])
        assert torch.equal(together[row].get_state(), alone[row].get_state())


def test_greedy_rows_use_no_randomness():
    (generator,) = generators([0])
    before = generator.get_state()
    default = torch.get_rng_state()
    sample(random_logits(2, 100), [GREEDY, PLAIN], [generator, *generators([1])])
    assert torch.equal(generator.get_state(), before)
    assert torch.equal(torch.get_rng_state(), default), "torch's own generator was used"


def test_probabilities_are_bit_equal_beside_a_filtering_row():
    """A row without top-k and top-p must not notice that its neighbour has them."""
    logits = random_logits(50, 1000)
    alone = filtered_probabilities(logits, [PLAIN] * 50)
    beside = filtered_probabilities(
        torch.cat([logits, logits[:1]]), [*[PLAIN] * 50, SamplingParams(top_k=5)]
    )
    assert torch.equal(beside[:50], alone)


def test_ties_are_broken_the_same_beside_a_filtering_row():
    """Logits made so that many tokens win the race by a rounding error only."""
    vocab_size, changed = 1000, []
    for seed in range(30):
        noise = torch.empty(vocab_size).exponential_(generator=generators([seed])[0])
        logits = noise.log().unsqueeze(0)
        (alone,) = sample(logits, [PLAIN], generators([seed]))
        beside = sample(
            logits.expand(2, -1), [PLAIN, SamplingParams(top_p=0.5)], generators([seed, seed])
        )[0]
        changed += [seed] if beside != alone else []
    assert not changed, "seeds whose token depends on the neighbour"


# Distribution.


def total_variation_bound(num_draws: int, num_tokens: int, failure: float = 1e-9) -> float:
    """What the empirical distribution's total variation exceeds with probability `failure`.

    Its mean is at most sqrt(num_tokens / num_draws) / 2 (Cauchy-Schwarz), and one draw moves it by
    at most 1 / num_draws (McDiarmid).
    """
    return 0.5 * math.sqrt(num_tokens / num_draws) + math.sqrt(
        math.log(1 / failure) / (2 * num_draws)
    )


def empirical_distance(draw, param: SamplingParams, num_draws: int = 20_000) -> float:
    """Total variation between draws (one generator each, or one for all) and the reference."""
    logits = random_logits(1, 12, seed=5, scale=1.0)
    (generator,) = generators([7])
    drawn = draw(logits.expand(num_draws, -1), [param] * num_draws, [generator] * num_draws)
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
    ],
    ids=param_id,
)
def test_draws_follow_the_probabilities(param):
    assert empirical_distance(sample, param) < total_variation_bound(20_000, 12)


def test_seeds_give_independent_draws():
    """One draw from each of many generators with neighbouring seeds is a fair sample too."""
    logits = random_logits(1, 12, seed=5, scale=1.0)
    drawn = sample(logits.expand(5000, -1), [PLAIN] * 5000, generators(range(5000)))
    counts = torch.bincount(torch.tensor(drawn), minlength=12).double()
    distance = 0.5 * (counts / 5000 - reference_probabilities(logits[0], PLAIN)).abs().sum()
    assert distance < total_variation_bound(5000, 12)


# Planted mistakes.


def draws_from_one_generator(logits, params, own):
    """Planted: the first row's generator draws the noise of all rows."""
    return sample(logits, params, [own[0]] * len(own))


def test_planted_dependence_is_found():
    with pytest.raises(AssertionError):
        check_independence(draws_from_one_generator)


def uses_gaussian_noise(logits, params, own):
    probabilities = filtered_probabilities(logits.float(), params)
    noise = torch.stack([torch.randn(logits.shape[1], generator=g).abs() for g in own])
    return (probabilities / noise).argmax(-1).tolist()


def forgets_temperature(logits, params, own):
    return sample(logits, [SamplingParams(top_k=p.top_k, top_p=p.top_p) for p in params], own)


@pytest.mark.parametrize("broken", [uses_gaussian_noise, forgets_temperature])
def test_planted_bias_is_found(broken):
    distance = empirical_distance(broken, SamplingParams(temperature=0.5))
    assert distance > total_variation_bound(20_000, 12)


def test_planted_off_by_one_in_top_k_is_found():
    logits, params = random_logits(1, 64), [SamplingParams(top_k=5)]
    wrong = filtered_probabilities(logits, [SamplingParams(top_k=6)])
    with pytest.raises(AssertionError, match="support"):
        check_probabilities(wrong, logits, params)
