"""Stop strings and tokens in the engine, where a token is a character; failing tokenizers."""

from __future__ import annotations

import threading

import pytest
from engine_helpers import (  # noqa: F401 - the fixtures are used by name
    Boom,
    TokenTokenizer,
    engine_fixture,
    expected_fixture,
    greedy,
    model_fixture,
    within,
)

import fastgen
from fastgen import RequestFailedError, SamplingParams


@pytest.fixture(name="engine")
def text_engine(engine):
    return fastgen.Engine(engine.model, TokenTokenizer())


def text_of(token_ids: list[int]) -> str:
    return TokenTokenizer().decode(token_ids)


def both_ways(engine, row: list[int], **fields) -> fastgen.RequestOutput:
    """The output, after a check that a stream gives the same."""
    params = SamplingParams(**{"max_tokens": 20, "temperature": 0.0, **fields})
    request = engine.submit(row, params)
    events = within(lambda: list(engine.stream(request)))
    (output,) = within(engine.generate, [row], params)
    assert "".join(event.text for event in events) == output.text
    assert [token for event in events for token in event.token_ids] == output.token_ids
    last = events[-1]
    assert (last.finish_reason, last.stop_reason) == (output.finish_reason, output.stop_reason)
    return output


@pytest.mark.parametrize("include", [False, True])
def test_request_ends_at_a_stop_string(engine, expected, include):
    rows, tokens = expected
    text = text_of(tokens[1])
    stop = text[5:8]
    end = text.index(stop) + 3
    output = both_ways(engine, rows[1], stop=[stop], include_stop_str_in_output=include)
    assert output.token_ids == tokens[1][:end]
    assert output.text == (text[:end] if include else text[: end - 3])
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)


def test_stop_string_that_is_the_whole_text(engine, expected):
    rows, tokens = expected
    output = both_ways(engine, rows[1], stop=text_of(tokens[1][:4]))
    assert (output.text, output.token_ids) == ("", tokens[1][:4])


def test_stop_string_as_the_last_token_is_a_stop(engine, expected):
    rows, tokens = expected
    output = both_ways(engine, rows[1], stop=text_of(tokens[1][2:4]), max_tokens=4)
    assert (output.finish_reason, output.text) == ("stop", text_of(tokens[1][:2]))


def test_stop_string_that_is_only_begun_is_shown(engine, expected):
    rows, tokens = expected
    output = both_ways(engine, rows[1], stop=text_of(tokens[1][2:5]), max_tokens=4)
    assert (output.finish_reason, output.stop_reason) == ("length", None)
    assert output.text == text_of(tokens[1][:4])


def test_stop_string_waits_for_min_tokens(engine, expected):
    rows, tokens = expected
    stop = text_of(tokens[1][2:4])
    output = both_ways(engine, rows[1], stop=stop, min_tokens=4, max_tokens=8)
    assert output.token_ids[:5] == tokens[1][:5]


@pytest.mark.parametrize("include", [False, True])
def test_stop_token_is_a_token_without_text(engine, expected, monkeypatch, include):
    """Its text is shown only if that was asked for; the model's own end token has no reason."""
    rows, tokens = expected
    stop, end = tokens[1][3], tokens[1].index(tokens[1][3]) + 1
    shown = text_of(tokens[1][: end - (not include)])
    fields = {"include_stop_str_in_output": include}
    output = both_ways(engine, rows[1], stop_token_ids=[stop], **fields)
    assert (output.token_ids, output.text) == (tokens[1][:end], shown)
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    monkeypatch.setattr(engine.model.generation_config, "eos_token_id", stop)
    output = both_ways(engine, rows[1], stop="never", **fields)
    assert (output.token_ids, output.text) == (tokens[1][:end], shown)
    assert (output.finish_reason, output.stop_reason) == ("stop", None)


def test_special_tokens_are_shown_where_that_is_asked_for(model, engine, expected):
    rows, tokens = expected
    special = tokens[1][2]

    class WithSpecial(TokenTokenizer):
        def decode(self, ids, skip_special_tokens=False):
            return super().decode([i for i in ids if i != special or not skip_special_tokens])

    engine = fastgen.Engine(model, WithSpecial())
    for stop in ((), ("never",)):
        hidden = both_ways(engine, rows[1], stop=stop)
        assert hidden.text == text_of([i for i in tokens[1][:20] if i != special])
        shown = both_ways(engine, rows[1], stop=stop, skip_special_tokens=False)
        assert shown.text == text_of(tokens[1][:20])


class FailsOn(TokenTokenizer):
    """Raises at one token: in any thread, or in the engine's only."""

    def __init__(self, token_id: int, error: BaseException, only_engine: bool = False) -> None:
        self.token_id, self.error, self.only_engine = token_id, error, only_engine

    def decode(self, ids, skip_special_tokens=False):
        engine_thread = threading.current_thread().name == "fastgen-engine"
        if self.token_id in ids and (engine_thread or not self.only_engine):
            raise self.error
        return super().decode(ids)


class Panic(BaseException):
    """What a tokenizer in Rust raises that has come to its end."""


@pytest.mark.parametrize("stop", [["never"], []], ids=["stop", "no-stop"])
@pytest.mark.parametrize("error", [Boom("no luck"), Panic("no luck")], ids=["error", "panic"])
def test_tokenizer_that_raises_ends_its_request_only(model, engine, expected, stop, error):
    rows, tokens = expected
    token = next(t for t in tokens[0] if t not in tokens[1][:20] and t not in tokens[2][:20])
    engine = fastgen.Engine(model, FailsOn(token, error, only_engine=isinstance(error, Panic)))
    params = SamplingParams(max_tokens=20, temperature=0.0, stop=stop)
    params = [SamplingParams(max_tokens=40, temperature=0.0, stop=stop), params, params]
    bad, *others = within(engine.generate, rows[:3], params)
    assert [other.token_ids for other in others] == [tokens[1][:20], tokens[2][:20]]
    assert [other.text for other in others] == [text_of(tokens[1][:20]), text_of(tokens[2][:20])]
    if stop or not isinstance(error, Panic):
        assert bad.finish_reason == "error"
        assert "no luck" in bad.error
    metrics = within(engine.metrics)
    assert metrics.num_free_blocks == metrics.num_blocks


def test_tokenizer_that_raises_fails_a_stream(model, engine, expected):
    rows, tokens = expected
    engine = fastgen.Engine(model, FailsOn(tokens[0][3], Boom("no luck"), only_engine=True))
    request = engine.submit(rows[0], SamplingParams(max_tokens=9, temperature=0.0, stop="never"))
    with pytest.raises(RequestFailedError, match="no luck"):
        within(lambda: list(engine.stream(request)))
    assert request.block_ids == []
    assert within(engine.generate, rows[1:2], greedy(3))[0].token_ids == tokens[1][:3]


class BrokenCharacters(TokenTokenizer):
    """Every token is the first half of a character that never becomes whole."""

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return "\ufffd" * len(ids)


def test_stop_string_that_only_the_last_flush_completes(model, engine, expected):
    """What is held back as unfinished is text once nothing can finish it."""
    engine = fastgen.Engine(model, BrokenCharacters())
    output = both_ways(engine, expected[0][0], max_tokens=3, stop="\ufffd\ufffd")
    assert (output.finish_reason, output.text) == ("stop", "")
    assert len(output.token_ids) == 3
