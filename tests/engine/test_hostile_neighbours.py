"""A hostile request beside two good ones: their tokens stay what they are alone, no block is lost,
and the hostile one gets an error that says why. Those around generate(): test_hostile_callers."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from engine_helpers import (  # noqa: F401 - the fixtures are used by name
    BLOCK_BYTES,
    LIMIT,
    Boom,
    TokenTokenizer,
    expected_fixture,
    gated_fixture,
    greedy,
    make_engine_fixture,
    model_fixture,
    wait_until,
    within,
)
from neighbours import (  # noqa: F401 - the fixtures are used by name
    alone_fixture,
    make_neighbours_fixture,
    neighbours_fixture,
)
from tiny_models import VOCAB, prompts

from fastgen import CapacityError, Engine, InvalidRequestError, RequestFailedError, SamplingParams
from fastgen.engine.request import RequestStatus

NAN, INF = math.nan, math.inf

# Refused: the caller gets an error, and the engine hears nothing of it.

PROMPTS = {
    "id-beyond-the-vocabulary": [1, VOCAB],
    "id-far-beyond": [10**12],
    "id-beyond-int64": [2**64],
    "negative": [1, -1],
    "bool": [1, True],
    "float": [1, 2.0],
    "nan": [NAN],
    "str": [1, "2"],
    "none": [1, None],
    "nested": [[1, 2]],
    "empty": [],
    "bytes": b"12",
    "set": {1, 2},
    "generator": (i for i in range(3)),
    "object": object(),
    "mixed-chat": [{"role": "user", "content": "x"}, 1],
}


@pytest.mark.parametrize("name", PROMPTS)
def test_a_bad_prompt(neighbours, name):
    neighbours.refuses(lambda engine: engine.submit(PROMPTS[name], greedy(4)), "prompt")


@pytest.mark.parametrize("length", [513, 10**6], ids=["long", "giant"])
def test_a_prompt_too_long(neighbours, length):
    prompt = [1] * length
    error = neighbours.refuses(lambda engine: engine.submit(prompt, greedy(1)), "max_model_len")
    assert type(error) is CapacityError


PARAMS: dict[str, tuple[dict[str, Any], str]] = {
    "stop-10000": ({"stop": [f"s{i}" for i in range(10_000)]}, "stop"),
    "stop-giant": ({"stop": ["x" * 10**6]}, "stop"),
    "stop-empty": ({"stop": [""]}, "stop"),
    "stop-bytes": ({"stop": [b"x"]}, "stop"),
    "stop-without-tokenizer": ({"stop": ["x"]}, "tokenizer"),
    "stop-ids-10000": ({"stop_token_ids": list(range(10_000))}, "stop_token_ids"),
    "stop-ids-beyond": ({"stop_token_ids": [VOCAB]}, "stop_token_ids"),
    "n-giant": ({"n": 10**9}, "n must be"),
    "n-0": ({"n": 0}, "n must be"),
    "n-bool": ({"n": True}, "n must be"),
    "max_tokens-2**31-1": ({"max_tokens": 2**31 - 1}, "max_tokens"),
    "max_tokens-giant": ({"max_tokens": 10**18}, "max_tokens"),
    "max_tokens-negative": ({"max_tokens": -1}, "max_tokens"),
    "max_tokens-inf": ({"max_tokens": INF}, "max_tokens"),
    "min_tokens-more": ({"min_tokens": 99}, "min_tokens"),
    "logprobs-giant": ({"logprobs": 10**6}, "logprobs"),
    "logprobs-negative": ({"logprobs": -1}, "logprobs"),
    "processed-giant": ({"processed_logprobs": 10**6}, "processed_logprobs"),
    "prompt_logprobs-giant": ({"prompt_logprobs": 10**6}, "prompt_logprobs"),
    "bias-id-beyond": ({"logit_bias": {VOCAB: 1.0}}, "logit_bias"),
    "bias-id-negative": ({"logit_bias": {-1: 1.0}}, "logit_bias"),
    "bias-id-str": ({"logit_bias": {"1": 1.0}}, "logit_bias"),
    "bias-nan": ({"logit_bias": {1: NAN}}, "logit_bias"),
    "bias-inf": ({"logit_bias": {1: INF}}, "logit_bias"),
    "bias-giant": ({"logit_bias": {1: 1e30}}, "logit_bias"),
    "bias-none": ({"logit_bias": {1: None}}, "logit_bias"),
    "bias-10000": ({"logit_bias": dict.fromkeys(range(10_000), 1.0)}, "logit_bias"),
    "temperature-nan": ({"temperature": NAN}, "temperature"),
    "temperature-inf": ({"temperature": INF}, "temperature"),
    "temperature-negative": ({"temperature": -1.0}, "temperature"),
    "temperature-str": ({"temperature": "hot"}, "temperature"),
    "top_p-nan": ({"top_p": NAN}, "top_p"),
    "top_p-0": ({"top_p": 0.0}, "top_p"),
    "top_k-giant": ({"top_k": 2**40}, "top_k"),
    "min_p-nan": ({"min_p": NAN}, "min_p"),
    "repetition-0": ({"repetition_penalty": 0.0}, "repetition_penalty"),
    "repetition-nan": ({"repetition_penalty": NAN}, "repetition_penalty"),
    "presence-giant": ({"presence_penalty": 1e9}, "presence_penalty"),
    "bad-word-10000-ids": ({"bad_words": [(1,) * 10_000]}, "bad_words"),
    "bad-words-10000": ({"bad_words": [(1,)] * 10_000}, "bad_words"),
    "bad-word-beyond": ({"bad_words": [(VOCAB,)]}, "bad_words"),
    "bad-word-empty": ({"bad_words": [()]}, "bad word"),
    "bad-word-int": ({"bad_words": [5]}, "bad_words"),
    "allowed-beyond": ({"allowed_token_ids": [VOCAB]}, "allowed_token_ids"),
    "allowed-none": ({"allowed_token_ids": []}, "allowed_token_ids"),
    "seed-negative": ({"seed": -1}, "seed"),
    "seed-giant": ({"seed": 2**80}, "seed"),
}


@pytest.mark.parametrize("name", PARAMS)
def test_bad_parameters(neighbours, name):
    fields, match = PARAMS[name]
    neighbours.refuses(
        lambda engine: engine.submit([1, 2], SamplingParams(**{"max_tokens": 8, **fields})), match
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"priority": 10**9},
        {"priority": NAN},
        {"deadline_s": NAN},
        {"deadline_s": -1.0},
        {"deadline_s": "soon"},
        {"cache_salt": 5},
    ],
    ids=str,
)
def test_bad_terms(neighbours, fields):
    neighbours.refuses(lambda engine: engine.submit([1], greedy(2), **fields), next(iter(fields)))


def test_planted_tensor_work_is_seen(neighbours):
    def touching(engine):
        torch.ones(2) + 1
        raise InvalidRequestError("prompt")

    with pytest.raises(AssertionError, match="a tensor was touched"):
        neighbours.refuses(touching, "prompt")


# Let in, and failing on their own.


def test_parameters_that_allow_no_token(neighbours):
    params = SamplingParams(max_tokens=8, allowed_token_ids=[3], bad_words=[(3,)])
    output = neighbours.beside(lambda engine: engine.result(engine.submit([1, 2], params)))
    assert output.finish_reason == "error"
    assert "allow no token" in output.error
    assert output.token_ids == []


def test_thousands_of_outputs(neighbours):
    """As many as are allowed are let in; they leave as one."""

    def call(engine: Engine):
        request = engine.submit([1, 2], SamplingParams(n=4000, max_tokens=8, seed=1))
        stream = engine.stream(request)
        next(stream)
        stream.close()
        return {output.finish_reason for output in request.outputs}

    assert "cancelled" in neighbours.beside(call)


def test_everything_at_its_limit(neighbours):
    params = SamplingParams(
        max_tokens=8,
        temperature=1e6,
        top_k=2**31 - 1,
        logprobs=1000,
        processed_logprobs=1000,
        prompt_logprobs=1000,
        logit_bias=dict.fromkeys(range(VOCAB), -100.0),
        bad_words=[(1,) * 1024] * 1024,
        stop_token_ids=[VOCAB - 1] * 1024,
        presence_penalty=2.0,
        frequency_penalty=-2.0,
        repetition_penalty=1e6,
        seed=2**63 - 1,
    )
    output = neighbours.beside(lambda engine: engine.result(engine.submit([1, 2], params)))
    assert output.finish_reason in ("length", "stop"), output.error
    assert len(output.logprobs[0]) == VOCAB


# Tokenizers. Encoding happens on the caller's thread, decoding where the text is wanted, and for
# stop strings on the engine's.


class Encoding(TokenTokenizer):
    """Gives rubbish for a prompt."""

    def __init__(self, ids: Any) -> None:
        self.ids = ids

    def __call__(self, text: str, **_: Any) -> Any:
        if isinstance(self.ids, BaseException):
            raise self.ids

        class Encoded:
            input_ids = self.ids

        return Encoded


@pytest.mark.parametrize(
    "ids",
    [[VOCAB], [-1], [None], ["a"], [1.5], [True], [], [[1]]],
    ids=["beyond", "negative", "none", "str", "float", "bool", "empty", "nested"],
)
def test_a_tokenizer_that_encodes_rubbish(neighbours, ids):
    neighbours.refuses(
        lambda engine: Engine(engine.model, Encoding(ids)).submit("text", greedy(4)), "prompt"
    )


def test_a_tokenizer_that_raises_while_it_encodes(neighbours):
    def call(engine):
        with pytest.raises(Boom, match="mine"):
            Engine(engine.model, Encoding(Boom("mine"))).submit("text", greedy(4))

    neighbours.beside(call)


class Panic(BaseException):
    """As a library in Rust raises it: no Exception."""


class Decoding(TokenTokenizer):
    """Gives or raises something for its fourth text and all that follow."""

    def __init__(self, rubbish: Any) -> None:
        self.rubbish, self.num_calls = rubbish, 0

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> Any:
        self.num_calls += 1
        if self.num_calls < 4:
            return super().decode(ids)
        if isinstance(self.rubbish, BaseException):
            raise self.rubbish
        return self.rubbish


RUBBISH = {
    "raises": Boom("mine"),
    "panics": Panic("mine"),
    "none": None,
    "int": 5,
    "bytes": b"abcdefgh",
    "list": ["a"] * 9,
}


@pytest.mark.parametrize("name", RUBBISH)
def test_a_tokenizer_that_fails_a_stream(neighbours, name):
    """Its reader meets the error; the request is over."""

    def call(engine):
        hostile = Engine(engine.model, Decoding(RUBBISH[name]))
        request = hostile.submit([1, 2, 3], greedy(30))
        with pytest.raises((Boom, Panic, TypeError, AttributeError)):
            list(hostile.stream(request))
        assert request.done.is_set()
        return request.finish_reason

    assert neighbours.beside(call) in ("cancelled", "length")


@pytest.mark.parametrize("name", RUBBISH)
def test_a_tokenizer_that_fails_stop_strings(neighbours, name):
    """It is called on the engine's own thread."""

    def call(engine):
        hostile = Engine(engine.model, Decoding(RUBBISH[name]))
        params = SamplingParams(max_tokens=30, temperature=0.0, stop=["never\n"])
        request = hostile.submit([1, 2, 3], params)
        assert request.done.wait(LIMIT)
        return request

    request = neighbours.beside(call)
    assert request.finish_reason == "error"
    assert 0 < len(request.output_token_ids) < 30
    if isinstance(RUBBISH[name], BaseException):
        assert request.error is RUBBISH[name]
    else:
        assert isinstance(request.error, TypeError | AttributeError)


def test_a_failed_stop_string_raises_from_the_stream(neighbours):
    def call(engine):
        hostile = Engine(engine.model, Decoding(Boom("mine")))
        params = SamplingParams(max_tokens=30, temperature=0.0, stop=["never\n"])
        list(hostile.stream(hostile.submit([1, 2, 3], params)))

    with pytest.raises((RequestFailedError, Boom), match="mine"):
        neighbours.beside(call)


@pytest.mark.parametrize("error", [Boom("mine"), Panic("mine")], ids=["raises", "panics"])
def test_a_tokenizer_that_fails_a_result(neighbours, error):
    def call(engine):
        tokenizer = Decoding(error)
        tokenizer.num_calls = 3
        hostile = Engine(engine.model, tokenizer)
        return hostile.result(hostile.submit([1, 2, 3], greedy(5)))

    output = neighbours.beside(call)
    assert output.finish_reason == "error"
    assert "mine" in output.error


# Cancelled, whatever they are doing.


def hostile_states() -> Iterator[tuple[str, dict[str, Any], int, Callable]]:
    """Names, settings of the engine, length of the prompt, and the state that is waited for."""
    yield "new", {}, 4, lambda r: r.status is RequestStatus.NEW
    yield "waiting", {"max_num_seqs": 2}, 4, lambda r: r.status is RequestStatus.WAITING
    yield "running", {}, 4, lambda r: len(r.output_token_ids) > 1
    yield (
        "in-chunks",
        {"max_num_batched_tokens": 16},
        200,
        lambda r: r.status is RequestStatus.RUNNING and 0 < r.num_computed_tokens < 200,
    )
    yield (
        "preempted",
        {"kv_cache_memory_bytes": 9 * BLOCK_BYTES},
        4,
        lambda r: r.status is RequestStatus.PREEMPTED,
    )
    yield "finished", {}, 4, lambda r: r.done.is_set()


STATES = list(hostile_states())


@pytest.mark.parametrize("state", STATES, ids=[state[0] for state in STATES])
@pytest.mark.parametrize("how", ["once", "twice", "many-threads"])
def test_cancelled_in_each_state(make_neighbours, state, how):
    name, fields, length, is_there = state
    neighbours = make_neighbours(**fields)
    engine, gate = neighbours.engine, neighbours.gate
    neighbours.begin()
    count = 3 if name == "finished" else 90
    request = engine.submit(prompts(length, seed=9)[0], greedy(count))
    for _ in range(80):
        if is_there(request):
            break
        gate.step()
    assert is_there(request), f"it never was {name}"
    threads = {"once": 1, "twice": 1, "many-threads": 4}[how]

    def cancel() -> None:
        for _ in range(2 if how == "twice" else 1):
            engine.cancel(request)

    callers = [threading.Thread(target=cancel, daemon=True) for _ in range(threads)]
    for caller in callers:
        caller.start()
    neighbours.finish()
    for caller in callers:
        within(caller.join)
    assert request.finish_reason == ("length" if name == "finished" else "cancelled")
    assert request.block_ids == []
    assert within(engine.metrics).finished == (
        {"length": 3} if name == "finished" else {"length": 2, "cancelled": 1}
    )


def test_cancelled_within_its_own_stream(neighbours):
    def call(engine):
        request = engine.submit([5, 6, 7], greedy(90))
        events = []
        for event in engine.stream(request):
            events.append(event)
            if len(events) == 3:
                engine.cancel(request)
        return events

    events = neighbours.beside(call)
    assert events[-1].finish_reason == "cancelled"
    assert 3 <= len(events) < 90


def test_cancelled_from_the_engines_own_thread(neighbours):
    """As a tokenizer can, which the engine calls for stop strings."""
    held: list = []

    class Cancels(TokenTokenizer):
        def decode(self, ids, skip_special_tokens=False):
            if held and threading.current_thread().name == "fastgen-engine":
                held[0].cancel(held[1])
            return super().decode(ids)

    def call(engine):
        hostile = Engine(engine.model, Cancels())
        params = SamplingParams(max_tokens=60, temperature=0.0, stop=["never\n"])
        request = hostile.submit([1, 2, 3], params)
        held.extend((hostile, request))
        return hostile.result(request)

    assert neighbours.beside(call).finish_reason == "cancelled"


@pytest.mark.parametrize("deadline_s", [0.0, 1e-9, 0.01])
def test_a_deadline_that_is_over(neighbours, deadline_s):
    output = neighbours.beside(
        lambda engine: engine.result(engine.submit([1], greedy(90), deadline_s=deadline_s))
    )
    assert output.finish_reason in ("deadline", "length")


def test_a_crowd_of_the_most_urgent(make_neighbours):
    """The good ones are put off, and are not forgotten."""
    neighbours = make_neighbours(max_num_seqs=2)
    neighbours.begin()
    crowd = [neighbours.engine.submit([1, 2], greedy(3), priority=-1000) for _ in range(40)]
    neighbours.finish()
    assert {request.finish_reason for request in crowd} == {"length"}
