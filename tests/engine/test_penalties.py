"""What changes logits: penalties, biases, bans, and the filters, against transformers' processors
and against a plain reference of one row in Python floats."""

from __future__ import annotations

import math
import random

import pytest
import torch
from engine_helpers import (  # noqa: F401 - the fixtures are used by name
    TokenTokenizer,
    engine_fixture,
    expected_fixture,
    greedy,
    model_fixture,
    within,
)
from sampler_helpers import PLAIN, probabilities_of, random_logits, state
from tiny_models import VOCAB
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import fastgen
from fastgen import InvalidRequestError, SamplingParams
from fastgen.engine.sampler import SamplingState, edit_logits, sample

NEVER = -math.inf


def edited(logits: torch.Tensor, states: list[SamplingState]) -> torch.Tensor:
    result = logits.clone()
    edit_logits(result, states)
    return result


def reference(logits: list[float], own: SamplingState) -> list[float]:
    """One row, token by token, in the documented order."""
    params, request = own.params, own.request
    output, result = request.output_token_ids, list(logits)
    for token in range(len(result)):
        if params.allowed_token_ids is not None and token not in params.allowed_token_ids:
            result[token] = NEVER
        for word in request.bad_words:
            if (*output[len(output) - len(word) + 1 :], token) == word:
                result[token] = NEVER
        if len(output) < params.min_tokens and token in request.stop_token_ids:
            result[token] = NEVER
        result[token] += params.logit_bias.get(token, 0.0)
        if token in request.prompt_token_ids or token in output:
            factor = params.repetition_penalty
            result[token] = result[token] / factor if result[token] > 0 else result[token] * factor
        count = output.count(token)
        result[token] -= params.frequency_penalty * count + params.presence_penalty * (count > 0)
    return result


def random_state(rng: random.Random, vocab_size: int) -> SamplingState:
    tokens = range(vocab_size)
    history = rng.choices(tokens, k=rng.randint(0, 12))
    params = SamplingParams(
        repetition_penalty=rng.choice([1.0, 0.5, 1.7]),
        presence_penalty=rng.choice([0.0, -2.0, 0.7]),
        frequency_penalty=rng.choice([0.0, 0.3, -1.1]),
        logit_bias={t: rng.uniform(-100, 100) for t in rng.sample(tokens, rng.randint(0, 3))},
        allowed_token_ids=tuple(rng.sample(tokens, 9)) if rng.random() < 0.4 else None,
        min_tokens=rng.choice([0, 5, 16]),
    )
    return state(
        params,
        prompt=rng.choices(tokens, k=rng.randint(1, 9)),
        output=history,
        stop_token_ids=frozenset(rng.sample(tokens, 3)),
        bad_words=tuple(
            (*history[len(history) - rng.randint(0, 2) :], rng.choice(tokens))
            for _ in range(rng.randint(0, 3))
        ),
    )


@pytest.mark.parametrize("vocab_size", [20, 63])
def test_rows_equal_the_reference(vocab_size):
    """Up to one fp32 rounding for each of the five changes of a logit, of the largest value."""
    rng = random.Random(vocab_size)
    states = [random_state(rng, vocab_size) for _ in range(150)]
    logits = random_logits(len(states), vocab_size)
    actual = edited(logits, states)
    for row, own in enumerate(states):
        expected = torch.tensor(reference(logits[row].tolist(), own), dtype=torch.float64)
        assert torch.equal(actual[row].isinf(), expected.isinf())
        finite = expected.isfinite()
        largest = 100 + logits[row].abs().max().item() * 1.7 + 30
        error = (actual[row].double() - expected)[finite].abs()
        assert (error <= 5 * torch.finfo(torch.float32).eps * largest).all()


def test_nothing_asked_for_is_nothing_edited():
    assert not state(PLAIN, output=[1, 2], stop_token_ids=frozenset([3])).edits_logits


@pytest.mark.parametrize("penalty", [0.5, 1.3, 2.0])
def test_repetition_penalty_is_transformers(penalty):
    logits = random_logits(1, 100)
    own = state(SamplingParams(repetition_penalty=penalty), prompt=[5, 6, 6], output=[7, 5, 90])
    ids = torch.tensor([[5, 6, 6, 7, 5, 90]])
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
    assert torch.equal(edited(logits, [own]), expected)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.9])
@pytest.mark.parametrize(
    ("fields", "warper"),
    [
        ({"min_p": 0.05}, MinPLogitsWarper(0.05)),
        ({"min_p": 1.0}, MinPLogitsWarper(1.0)),
        ({"top_k": 1}, TopKLogitsWarper(1)),
        ({"top_k": 17}, TopKLogitsWarper(17)),
        ({"top_k": 200}, TopKLogitsWarper(200)),
        ({"top_p": 0.1}, TopPLogitsWarper(0.1)),
        ({"top_p": 0.93}, TopPLogitsWarper(0.93)),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if type(value) is dict else "",
)
def test_filters_are_transformers(temperature, fields, warper):
    """Same support; probabilities within what two ways to a softmax differ by."""
    logits = random_logits(20, 100, seed=3)
    chain = LogitsProcessorList([TemperatureLogitsWarper(temperature), warper])
    expected = torch.softmax(chain(torch.zeros(20, 1).long(), logits.clone()), dim=-1)
    params = SamplingParams(temperature=temperature, **fields)
    actual = probabilities_of(logits, [params] * 20)
    assert torch.equal(actual > 0, expected > 0)
    largest = (logits.abs().max() / temperature).item()
    bound = (8 * largest + 32) * torch.finfo(torch.float32).eps
    torch.testing.assert_close(actual, expected, rtol=bound, atol=0)


# One rule at a time.


def test_presence_and_frequency_count_generated_tokens_only():
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    actual = edited(torch.zeros(1, 6), [state(params, prompt=[1, 2], output=[2, 3, 3])])
    assert actual.tolist() == [[0, 0, -0.75, -1.0, 0, 0]]


def test_counts_grow_with_the_output():
    own = state(SamplingParams(frequency_penalty=1.0), output=[2])
    assert edited(torch.zeros(1, 4), [own]).tolist() == [[0, 0, -1, 0]]
    own.request.output_token_ids.extend([2, 3])
    assert edited(torch.zeros(1, 4), [own]).tolist() == [[0, 0, -2, -1]]
    assert edited(torch.zeros(1, 4), [own]).tolist() == [[0, 0, -2, -1]], "counted once"


def test_bias_comes_before_the_repetition_penalty():
    params = SamplingParams(logit_bias={1: 3.0}, repetition_penalty=2.0)
    actual = edited(torch.tensor([[0.0, -1.0]]), [state(params, prompt=[1])])
    assert actual.tolist() == [[0.0, 1.0]]


def test_bias_does_not_lift_a_ban():
    params = SamplingParams(logit_bias={1: 100.0, 2: 100.0, 3: 100.0}, allowed_token_ids=(0, 2, 3))
    own = state(params, bad_words=((2,),))
    assert edited(torch.zeros(1, 4), [own]).tolist() == [[0, NEVER, NEVER, 100]]


@pytest.mark.parametrize(
    ("output", "banned"),
    [([], {9}), ([5], {9, 6}), ([5, 6], {9, 7}), ([6, 5], {9, 6}), ([5, 6, 7], {9})],
    ids=str,
)
def test_bad_words_ban_the_last_token_of_what_was_begun(output, banned):
    own = state(PLAIN, prompt=[5, 6], output=output, bad_words=((5, 6), (5, 6, 7), (9,)))
    assert own.banned() == banned, "tokens of the prompt do not count"


def test_min_tokens_ban_end_tokens_until_then():
    params = SamplingParams(min_tokens=2)
    for output, banned in [([], {3, 4}), ([1], {3, 4}), ([1, 1], set()), ([1, 1, 1], set())]:
        assert state(params, output=output, stop_token_ids=frozenset([3, 4])).banned() == banned


def test_end_token_outside_the_vocabulary_is_left_alone():
    own = state(SamplingParams(min_tokens=2, temperature=0), stop_token_ids=frozenset([3, 99]))
    assert sample(torch.tensor([[0.0, 1.0, 2.0, 3.0]]), [own]).token_ids == [2]


@pytest.mark.parametrize("penalty", [1e-6, 1e6])
@pytest.mark.parametrize("temperature", [0.0, 1e-6, 1.0])
def test_extreme_penalties_stay_in_fp32(penalty, temperature):
    params = SamplingParams(
        repetition_penalty=penalty, temperature=temperature, allowed_token_ids=(1, 2)
    )
    logits = torch.tensor([[9.0, 60000.0, -60000.0, 1.0]])
    own = state(params, prompt=[0, 1, 2, 3])
    assert not edited(logits, [own]).isnan().any()
    assert sample(logits, [own]).token_ids == [1]


def test_row_that_can_have_no_token_is_named_and_alone():
    nothing = SamplingParams(allowed_token_ids=(1,), temperature=0.0)
    logits = random_logits(4, 10)
    states = [state(PLAIN, 1), state(nothing, bad_words=((1,),)), state(PLAIN, 2)]
    states.append(SamplingState(state(SamplingParams(allowed_token_ids=(4,))).request))
    sampled = sample(logits, states)
    assert list(sampled.errors) == [1]
    assert "allow no token" in str(sampled.errors[1])
    assert sampled.token_ids[3] == 4
    alone = [
        sample(logits[[row]], [state(PLAIN, seed)]).token_ids for row, seed in [(0, 1), (2, 2)]
    ]
    assert [[sampled.token_ids[0]], [sampled.token_ids[2]]] == alone


# Through the engine.


def run(engine, row: list[int], **fields) -> fastgen.RequestOutput:
    fields = {"max_tokens": 8, "temperature": 0.0, **fields}
    (output,) = within(engine.generate, [row], SamplingParams(**fields))
    return output


def test_engine_bans_what_it_would_have_generated(engine, expected):
    row, tokens = expected[0][0], expected[1][0]
    assert run(engine, row).token_ids == tokens[:8]
    banned = run(engine, row, bad_words=[tokens[2:4]]).token_ids
    assert banned[:3] == tokens[:3]
    assert banned[3] != tokens[3]
    assert run(engine, row, bad_words=[[*row[-1:], tokens[0]]]).token_ids == tokens[:8]
    assert tokens[0] not in run(engine, row, bad_words=[tokens[:1]]).token_ids


@pytest.mark.parametrize("word", ["{}", " {}"], ids=["plain", "with-space"])
def test_engine_bans_strings(model, engine, expected, word):
    """A string is banned as it is and after a space, whether or not it was given with one."""
    row, tokens = expected[0][0], expected[1][0]

    class WithSpaces(TokenTokenizer):
        def __call__(self, text: str, add_special_tokens: bool = True):
            assert not add_special_tokens

            class Encoded:
                input_ids = [2 if c == " " else ord(c) - 0x100 for c in text]

            return Encoded

    engine = fastgen.Engine(model, WithSpaces())
    text = TokenTokenizer().decode([tokens[0]])
    output = run(engine, row, bad_words=[word.format(text)], max_tokens=30)
    assert tokens[0] not in output.token_ids
    request = engine.submit(row, SamplingParams(max_tokens=1, bad_words=[word.format(text)]))
    assert request.bad_words == ((tokens[0],), (2, tokens[0]))
    within(engine.result, request)


def test_engine_needs_a_tokenizer_for_bad_words_and_stops(engine, expected):
    for fields in ({"bad_words": ["a"]}, {"stop": "a"}):
        with pytest.raises(InvalidRequestError, match=r"needs? a tokenizer"):
            run(engine, expected[0][0], **fields)


def test_engine_allowed_tokens_and_biases(engine, expected):
    row, tokens = expected[0][0], expected[1][0]
    assert set(run(engine, row, allowed_token_ids=[7, 8]).token_ids) <= {7, 8}
    assert run(engine, row, logit_bias={11: 100}).token_ids == [11] * 8
    assert tokens[0] not in run(engine, row, logit_bias={tokens[0]: -100}).token_ids


def test_engine_min_tokens_and_ignore_eos(engine, expected, monkeypatch):
    row, tokens = expected[0][0], expected[1][0]
    monkeypatch.setattr(engine.model.generation_config, "eos_token_id", [tokens[0], 10**9])
    assert run(engine, row).token_ids == tokens[:1]
    later = run(engine, row, min_tokens=5)
    assert tokens[0] not in later.token_ids[:5]
    assert run(engine, row, ignore_eos=True).token_ids == tokens[:8]


@pytest.mark.parametrize("token_id", [VOCAB, VOCAB + 1, 2**31 - 1])
@pytest.mark.parametrize(
    "fields",
    [
        lambda t: {"allowed_token_ids": [1, t]},
        lambda t: {"logit_bias": {t: 1.0}},
        lambda t: {"stop_token_ids": [t]},
        lambda t: {"bad_words": [[1, t]]},
    ],
    ids=["allowed_token_ids", "logit_bias", "stop_token_ids", "bad_words"],
)
def test_token_ids_outside_the_vocabulary_are_refused(engine, expected, fields, token_id):
    fields = fields(token_id)
    (name,) = fields
    with pytest.raises(InvalidRequestError, match=rf"{name} must be between 0 and {VOCAB - 1}"):
        run(engine, expected[0][0], **fields)
    with pytest.raises(InvalidRequestError, match=name):
        engine.submit(expected[0][0], SamplingParams(**fields))


def test_request_that_can_have_no_token_ends_alone(engine, expected):
    rows, tokens = expected
    nothing = SamplingParams(max_tokens=8, allowed_token_ids=[5], bad_words=[[5, 5]], logprobs=1)
    good, bad, other = within(engine.generate, rows[:3], [greedy(8), nothing, greedy(8)])
    assert (good.token_ids, other.token_ids) == (tokens[0][:8], tokens[2][:8])
    assert (bad.token_ids, bad.finish_reason) == ([5], "error")
    assert len(bad.logprobs) == 1
    assert "allow no token" in bad.error


# Planted mistakes.


def test_planted_count_of_the_prompt_is_found():
    params = SamplingParams(presence_penalty=1.0)
    logits = random_logits(1, 20)
    own = state(params, prompt=[4], output=[5])
    expected = reference(logits[0].tolist(), own)
    assert edited(logits, [own])[0].tolist() == pytest.approx(expected)
    wrong = state(params, prompt=[4], output=[4, 5])
    assert edited(logits, [wrong])[0].tolist() != pytest.approx(expected)
