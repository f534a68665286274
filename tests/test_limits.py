"""The table of limits: each holds at its edges, and is refused beyond, before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest

import fastgen
from fastgen import CapacityError, InvalidRequestError, SamplingParams
from fastgen.engine.admission import check_request
from fastgen.engine.request import Request
from fastgen.limits import LIMITS, markdown

ROOT = Path(__file__).parent.parent


def with_lists(name: str, length: int) -> SamplingParams:
    """Sampling in which something of that length stands."""
    match name:
        case "logit_bias":
            return SamplingParams(logit_bias=dict.fromkeys(range(length), 0.0))
        case "stop[i]":
            return SamplingParams(stop=["ok", "x" * length])
        case "bad_words[i]":
            return SamplingParams(bad_words=["ok", "x" * length])
        case "stop":
            return SamplingParams(stop=[f"{i}" for i in range(length)])
        case "stop_token_ids":
            return SamplingParams(stop_token_ids=list(range(length)))
        case "bad_words":
            return SamplingParams(bad_words=[(i,) for i in range(length)])
    raise AssertionError(f"{name} is no list")


LISTS = ("stop", "stop[i]", "stop_token_ids", "logit_bias", "bad_words", "bad_words[i]")
NUMBERS = ("max_tokens", "n", "logprobs", "processed_logprobs", "prompt_logprobs")
ELSEWHERE = ("prompt", "logit_bias[i]", "priority", "deadline_s")


def test_every_limit_is_tested_here():
    assert sorted(LIMITS) == sorted((*LISTS, *NUMBERS, *ELSEWHERE))


def test_the_readme_has_the_table():
    """`python -c "from fastgen.limits import *; print(*markdown(), sep=chr(10))"` prints it."""
    assert "\n".join(markdown()) in (ROOT / "README.md").read_text()


def test_the_table_has_a_row_for_each_limit():
    rows = list(markdown())[2:]
    assert len(rows) == len(LIMITS)
    for row, (name, limit) in zip(rows, LIMITS.items(), strict=True):
        assert name.removesuffix("[i]") in row
        assert f"| {limit.low:,} | {limit.high:,} |" in row


@pytest.mark.parametrize("name", LISTS)
def test_lengths(name):
    limit = LIMITS[name]
    for length in {int(limit.low), int(limit.high)}:
        with_lists(name, length)
    with pytest.raises(InvalidRequestError, match=f"got {int(limit.high) + 1}"):
        with_lists(name, int(limit.high) + 1)


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers(name):
    limit = LIMITS[name]
    for value in (limit.low, limit.high):
        SamplingParams(**{name: value})
    for value in (limit.low - 1, limit.high + 1):
        with pytest.raises(InvalidRequestError, match=f"{name} must be between"):
            SamplingParams(**{name: value})


@pytest.mark.parametrize("bias", [-100.0, 100.0])
def test_biases(bias):
    SamplingParams(logit_bias={0: bias})
    with pytest.raises(InvalidRequestError, match="logit_bias"):
        SamplingParams(logit_bias={0: bias * 1.01})


def test_prompts():
    def check(num_prompt, max_tokens):
        check_request(Request([1] * num_prompt, SamplingParams(max_tokens=max_tokens)), 10, 32)

    check(1, 31)
    check(31, 1)
    for num_prompt, max_tokens in ((32, 1), (1, 32), (10**6, 16)):
        with pytest.raises(CapacityError, match=r"must be <= max_model_len \(32\)"):
            check(num_prompt, max_tokens)
    with pytest.raises(InvalidRequestError, match="at least one token"):
        check(0, 1)


class Untouched:
    """An engine's core that takes no request."""

    config = fastgen.Config()

    def submit_all(self, *_, **__):
        raise AssertionError("a request reached the engine")


@pytest.mark.parametrize("name", ["priority", "deadline_s"])
def test_where_requests_are_made(name, monkeypatch):
    """At the edges a request is made, beyond it is refused before the engine sees it."""
    monkeypatch.setattr(fastgen.Engine, "__init__", lambda self, *_: None)
    monkeypatch.setattr(fastgen.Engine, "_check_queue", lambda self: None)
    monkeypatch.setattr(fastgen.Engine, "_core", lambda self: Untouched())
    monkeypatch.setattr(fastgen.Engine, "_eos_token_ids", lambda self: set())
    engine, limit = fastgen.Engine(None), LIMITS[name]
    engine.tokenizer = None
    params = SamplingParams()
    for value in (limit.low, limit.high):
        with pytest.raises(AssertionError, match="reached the engine"):
            engine.submit([1], params, **{name: value})
    for value in (limit.low - 1, limit.high + 1, float("nan"), "1", True):
        with pytest.raises(InvalidRequestError, match=name):
            engine.submit([1], params, **{name: value})
