"""What an engine refuses: before anything runs, and the next good request works."""

from __future__ import annotations

import pytest
import torch
from engine_helpers import (  # noqa: F401 - the fixtures are used by name
    BLOCK_BYTES,
    GREEDY,
    engine_fixture,
    expected_fixture,
    greedy,
    make_engine_fixture,
    model_fixture,
    within,
)
from tiny_models import VOCAB, prompts, tiny_model

import fastgen
from fastgen import CapacityError, InvalidRequestError

BAD_PROMPTS = {
    "empty": [],
    "negative": [1, -1],
    "vocab": [1, VOCAB],
    "int64": [2**63],
    "bool": [True],
    "float": [1.0],
    "none": [None],
    "nested": [[1]],
    "number": 5,
    "bytes": b"ab",
    "missing": None,
    "text-without-tokenizer": "ab",
    "chat-without-tokenizer": [{"role": "user", "content": "ab"}],
    "float-tensor": torch.tensor([1.0]),
}


@pytest.mark.parametrize("call", ["submit", "generate", "generate-the-second"])
@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_bad_prompts_are_refused(engine, expected, name, call):
    rows, tokens = expected
    bad = BAD_PROMPTS[name]
    steps = engine.metrics().engine_steps
    calls = {
        "submit": lambda: engine.submit(bad, greedy(3)),
        "generate": lambda: engine.generate([bad], greedy(3)),
        "generate-the-second": lambda: engine.generate([rows[0], bad], greedy(3)),
    }
    with pytest.raises(InvalidRequestError):
        within(calls[call])
    assert engine.metrics().engine_steps == steps, "something ran"
    assert within(engine.generate, [rows[0]], greedy(3))[0].token_ids == tokens[0][:3]


@pytest.mark.parametrize("name", ["negative", "float", "text-without-tokenizer"])
def test_generate_names_the_bad_prompt(engine, name):
    batch = [[3]] * 31
    batch[27] = BAD_PROMPTS[name]
    with pytest.raises(InvalidRequestError, match=r"\b27\b"):
        within(engine.generate, batch, greedy(3))


@pytest.mark.parametrize("params", [{"max_tokens": 3}, 5, [GREEDY]], ids=["dict", "int", "list"])
def test_params_of_another_type_are_refused(engine, params):
    with pytest.raises(InvalidRequestError, match="SamplingParams"):
        engine.submit([1], params)


def test_params_must_be_as_many_as_prompts(engine):
    with pytest.raises(InvalidRequestError, match=r"one or one per prompt \(2\), got 3"):
        engine.generate([[1], [2]], [GREEDY] * 3)


def test_one_text_is_not_a_list_of_prompts(engine):
    with pytest.raises(InvalidRequestError, match="list of prompts"):
        engine.generate("abc", GREEDY)


@pytest.mark.parametrize(("length", "max_tokens"), [(496, 16), (511, 1), (500, 12)])
def test_up_to_the_models_limit(engine, length, max_tokens):
    (output,) = within(engine.generate, prompts(length), greedy(max_tokens))
    assert len(output.token_ids) == max_tokens


@pytest.mark.parametrize(
    ("length", "max_tokens"), [(1, 512), (512, 1), (500, 13), (513, 1), (1, 2**31 - 1)]
)
def test_beyond_the_models_limit(engine, expected, length, max_tokens):
    with pytest.raises(CapacityError, match=r"max_model_len \(512\)"):
        engine.submit(prompts(length)[0], greedy(max_tokens))
    assert within(engine.generate, [expected[0][0]], greedy(3))


def test_up_to_the_pools_limit_and_beyond(make_engine, expected):
    """Three blocks hold 48 tokens; the last generated token is never stored."""
    engine = make_engine(kv_cache_memory_bytes=4 * BLOCK_BYTES)
    (output,) = within(engine.generate, prompts(40), greedy(9))
    assert len(output.token_ids) == 9
    assert engine.metrics().num_blocks == 3
    for length, max_tokens in ((40, 10), (49, 1), (1, 49)):
        with pytest.raises(CapacityError, match=r"holds 48 tokens.*kv_cache_memory_bytes"):
            within(engine.generate, prompts(5, length), [greedy(3), greedy(max_tokens)])
    assert within(engine.generate, [expected[0][0]], greedy(3))[0].token_ids == expected[1][0][:3]


def test_max_model_len_of_the_config():
    engine = fastgen.Engine(tiny_model("qwen2"), max_model_len=20)
    assert len(within(engine.generate, prompts(15), greedy(5))[0].token_ids) == 5
    with pytest.raises(CapacityError, match=r"max_model_len \(20\)"):
        engine.submit(prompts(16)[0], greedy(5))
    engine.close()
    with pytest.raises(ValueError, match="max_model_len must be <= 512"):
        fastgen.optimize(tiny_model("qwen2"), max_model_len=513)


def test_refused_requests_are_no_finished_requests(engine):
    within(engine.generate, [[1]], greedy(2))
    before = engine.metrics().finished
    with pytest.raises(fastgen.InvalidRequestError):
        within(engine.generate, [[1], [2], []], greedy(2))
    assert engine.metrics().finished == before


def test_planted_missing_check_is_found(engine, monkeypatch):
    """Without the check an id outside the vocabulary is let in, and fails in the model."""
    monkeypatch.setattr(fastgen.api.require(engine.model).engine(), "check", lambda request: None)
    with pytest.raises(pytest.fail.Exception), pytest.raises(InvalidRequestError):
        request = engine.submit(BAD_PROMPTS["vocab"], greedy(3))
    assert within(engine.result, request).finish_reason == "error"
