"""What SamplingParams accepts, and how it refuses the rest.

Token ids outside the vocabulary are refused when a request is submitted: tests/engine.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from field_cases import HUGE, NOT_INTS, NOT_NUMBERS, cases, check_refused, value_id

from fastgen.config import (
    MIN_REPETITION_PENALTY,
    SEED_MAX,
    SamplingParams,
    check_float,
    check_int,
)
from fastgen.errors import FastgenError, InvalidRequestError
from fastgen.limits import INT32_MAX, LIMITS

MAX_OUTPUTS, MAX_LOGPROBS = LIMITS["n"].high, LIMITS["logprobs"].high
NOT_BOOLS = [0, 1, "yes", "", None, 1.0, [True]]
NOT_TOKEN_IDS = [[-1], [2**31], [2**63], [1.0], [True], ["a"], [None], [[1]], [np.int64(1)]]
NOT_LISTS = [5, 1.5, True, "ab", b"ab", {1: 2}, range(3), iter([1]), object()]

# Values and, where it is not the value itself, what the field holds then.
GOOD = {
    "n": [1, 2, MAX_OUTPUTS],
    "max_tokens": [1, 16, INT32_MAX],
    "min_tokens": [0, 1, 16],
    "temperature": [0, 0.0, -0.0, 5e-324, 0.7, 1, 2, 1e6],
    "top_k": [-1, 0, 1, 50, INT32_MAX],
    "top_p": [5e-324, 0.5, 1.0, 1],
    "min_p": [0, 0.0, 5e-324, 0.5, 1, 1.0],
    "repetition_penalty": [MIN_REPETITION_PENALTY, 0.5, 1, 1.0, 2, 1e6],
    "presence_penalty": [-2, -2.0, -0.5, 0, 1, 2.0],
    "frequency_penalty": [-2, -2.0, -0.5, 0, 1, 2.0],
    "logit_bias": [{}, {0: 0}, {5: -100.0, INT32_MAX: 100}],
    "seed": [None, 0, 1, 2**31, SEED_MAX],
    "ignore_eos": [True, False],
    "include_stop_str_in_output": [True, False],
    "skip_special_tokens": [True, False],
    "logprobs": [None, 0, 1, MAX_LOGPROBS],
    "processed_logprobs": [None, 0, 1, MAX_LOGPROBS],
    "prompt_logprobs": [None, 0, 1, MAX_LOGPROBS],
}
GOOD_LISTS = {
    "stop_token_ids": [
        ((), ()),
        ([], ()),
        ([0], (0,)),
        ([5, 5], (5, 5)),
        (frozenset([3]), (3,)),
        ((INT32_MAX,), (INT32_MAX,)),
    ],
    "allowed_token_ids": [(None, None), ([0], (0,)), ({7}, (7,)), ((INT32_MAX, 1), (INT32_MAX, 1))],
    "stop": [
        ((), ()),
        ([], ()),
        ("\n", ("\n",)),
        ("ab", ("ab",)),
        (["a", "b"], ("a", "b")),
        ({"a"}, ("a",)),
    ],
    "bad_words": [
        ((), ()),
        (["a", " b"], ("a", " b")),
        ([[1, 2], (3,)], ((1, 2), (3,))),
        ([[0, INT32_MAX], "a"], ((0, INT32_MAX), "a")),
    ],
}
BAD = {
    "n": [0, -1, MAX_OUTPUTS + 1, *HUGE, None, *NOT_INTS],
    "max_tokens": [0, -1, *HUGE, None, *NOT_INTS],
    "min_tokens": [-1, 17, *HUGE, None, *NOT_INTS],  # max_tokens is 16
    "temperature": [-1, -1e-9, 1e6 + 1, *HUGE, -(10**400), None, *NOT_NUMBERS],
    "top_k": [-2, *HUGE, None, *NOT_INTS],
    "top_p": [0, 0.0, -0.0, -0.1, 1.0000001, 2, *HUGE, None, *NOT_NUMBERS],
    "min_p": [-5e-324, -1, 1.0000001, 2, *HUGE, None, *NOT_NUMBERS],
    "repetition_penalty": [0, 0.0, 9e-7, -1, 1e6 + 1, *HUGE, None, *NOT_NUMBERS],
    "presence_penalty": [-2.0000001, 2.0000001, 3, -3, *HUGE, None, *NOT_NUMBERS],
    "frequency_penalty": [-2.0000001, 2.0000001, 3, -3, *HUGE, None, *NOT_NUMBERS],
    "logit_bias": [
        *({key: 1.0} for key in (-1, *HUGE, None, "1", True, 1.0, (1,))),
        *({1: value} for value in (-100.1, 101, *HUGE, None, "1", True, float("nan"), [1])),
        *(None, 5, "ab", [1], [(1, 2)], {1}),
    ],
    "seed": [-1, SEED_MAX + 1, 2**64, 10**400, *NOT_INTS],
    "logprobs": [-1, MAX_LOGPROBS + 1, *HUGE, *NOT_INTS],
    "processed_logprobs": [-1, MAX_LOGPROBS + 1, *HUGE, *NOT_INTS],
    "prompt_logprobs": [-1, MAX_LOGPROBS + 1, *HUGE, *NOT_INTS],
    "ignore_eos": NOT_BOOLS,
    "include_stop_str_in_output": NOT_BOOLS,
    "skip_special_tokens": NOT_BOOLS,
    "stop_token_ids": [None, *NOT_LISTS, *NOT_TOKEN_IDS],
    "allowed_token_ids": [[], (), set(), *NOT_LISTS, *NOT_TOKEN_IDS],
    "stop": [None, 5, True, b"ab", {1: 2}, "", [""], ["a", ""], [5], [None], [b"a"], [["a"]]],
}
# Its message says "bad word" or "bad_words".
BAD_WORDS = [None, *NOT_LISTS, [""], [[]], [5], [None], [b"a"], *([ids] for ids in NOT_TOKEN_IDS)]


def test_every_field_has_its_cases():
    fields = {field.name for field in dataclasses.fields(SamplingParams)}
    assert set(GOOD) | set(GOOD_LISTS) == fields
    assert set(BAD) | {"bad_words"} == fields


@pytest.mark.parametrize(("name", "value"), cases(GOOD))
def test_accepts(name, value):
    assert getattr(SamplingParams(**{name: value}), name) == value


@pytest.mark.parametrize(("name", "values"), cases(GOOD_LISTS))
def test_accepts_lists(name, values):
    given, held = values
    params = SamplingParams(**{name: given})
    assert getattr(params, name) == held
    assert dataclasses.replace(params) == params
    hash(params)


@pytest.mark.parametrize(("name", "value"), cases(BAD))
def test_refuses(name, value):
    check_refused(SamplingParams, {name: [value]}, InvalidRequestError)


@pytest.mark.parametrize("value", BAD_WORDS, ids=value_id)
def test_refuses_bad_words(value):
    with pytest.raises(InvalidRequestError, match=r"bad.word"):
        SamplingParams(bad_words=value)


def test_min_tokens_is_limited_by_max_tokens():
    assert SamplingParams(max_tokens=3, min_tokens=3).min_tokens == 3
    with pytest.raises(InvalidRequestError, match="min_tokens must be between 0 and 3, got 4"):
        SamplingParams(max_tokens=3, min_tokens=4)


def test_invalid_request_error_is_a_value_error_and_ours():
    assert issubclass(InvalidRequestError, ValueError)
    assert issubclass(InvalidRequestError, FastgenError)


def test_defaults_are_vllms():
    assert dataclasses.asdict(SamplingParams()) == {
        "n": 1,
        "max_tokens": 16,
        "min_tokens": 0,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "logit_bias": {},
        "allowed_token_ids": None,
        "bad_words": (),
        "seed": None,
        "stop": (),
        "stop_token_ids": (),
        "ignore_eos": False,
        "include_stop_str_in_output": False,
        "skip_special_tokens": True,
        "logprobs": None,
        "processed_logprobs": None,
        "prompt_logprobs": None,
    }


def test_zero_top_p_names_the_way_to_greedy():
    with pytest.raises(InvalidRequestError, match="temperature=0"):
        SamplingParams(top_p=0)


@pytest.mark.parametrize(
    ("temperature", "greedy"), [(0, True), (0.0, True), (-0.0, True), (1e-9, False), (1, False)]
)
def test_greedy(temperature, greedy):
    assert SamplingParams(temperature=temperature).greedy is greedy


def test_what_was_given_is_not_kept():
    stops, words, word, bias = [1, 2], ["a"], [3, 4], {1: 2.0}
    words.append(word)  # pyright: ignore
    params = SamplingParams(
        stop_token_ids=stops,  # pyright: ignore
        allowed_token_ids=stops,  # pyright: ignore
        bad_words=words,  # pyright: ignore
        logit_bias=bias,
        stop=words[:1],  # pyright: ignore
    )
    before = dataclasses.asdict(params)
    stops.append(-1)
    words.append("")
    word.append(-1)
    bias[-1] = float("nan")
    assert dataclasses.asdict(params) == before


def test_seed_limit_is_what_a_torch_generator_takes():
    torch.Generator().manual_seed(SEED_MAX)


# Planted mistakes.


def accepts_bools(name: str, value: object) -> None:
    if not isinstance(value, int):
        raise InvalidRequestError(name)
    check_int(name, int(value), 0, 16)


def accepts_limit_plus_one(name: str, value: object) -> None:
    check_int(name, value, 0, 17, InvalidRequestError)


def accepts_nan(name: str, value: object) -> None:
    if value != value:
        return
    check_float(name, value, -2, 2, InvalidRequestError)


@pytest.mark.parametrize(
    ("broken", "field"),
    [
        (accepts_bools, "min_tokens"),
        (accepts_limit_plus_one, "min_tokens"),
        (accepts_nan, "presence_penalty"),
    ],
    ids=["bools", "limit", "nan"],
)
def test_planted_mistake_is_found(broken, field):
    with pytest.raises(pytest.fail.Exception):
        check_refused(lambda **f: broken(*f.popitem()), {field: BAD[field]}, ValueError)
