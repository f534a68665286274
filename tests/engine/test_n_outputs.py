"""Several outputs of one prompt: tokens, seeds, events, shared blocks, cancelling, errors."""

from __future__ import annotations

from collections import Counter

import pytest
from engine_helpers import (  # noqa: F401 - the fixtures are used by name
    BLOCK_BYTES,
    Boom,
    TokenTokenizer,
    core_of,
    engine_fixture,
    expected_fixture,
    gate_fixture,
    gated_fixture,
    greedy,
    make_engine_fixture,
    model_fixture,
    raise_once,
    within,
)
from tiny_models import prompts

import fastgen
from fastgen import InvalidRequestError, RequestFailedError, SamplingParams
from fastgen.config import SEED_MAX
from fastgen.engine import delivery
from fastgen.engine.engine import EngineCore
from fastgen.limits import LIMITS


def sampled(n: int = 1, seed: int | None = 7, max_tokens: int = 10, **fields) -> SamplingParams:
    return SamplingParams(n=n, seed=seed, max_tokens=max_tokens, temperature=1.5, **fields)


def tokens_of(output: fastgen.RequestOutput) -> list[list[int]]:
    return [completion.token_ids for completion in output.outputs]


@pytest.mark.parametrize("n", [1, 2, 5])
def test_greedy_outputs_are_equal(engine, expected, n):
    rows, tokens = expected
    params = SamplingParams(n=n, max_tokens=10, temperature=0.0)
    outputs = within(engine.generate, rows[:3], params)
    for output, row, own in zip(outputs, rows, tokens, strict=False):
        assert tokens_of(output) == [own[:10]] * n
        assert output.prompt_ids == row
        assert [completion.index for completion in output.outputs] == list(range(n))
        assert {completion.finish_reason for completion in output.outputs} == {"length"}
    assert engine.metrics().finished == {"length": 3 * n}


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize(
    "fields", [{}, {"prefix_cache": False}, {"max_num_batched_tokens": 7}], ids=str
)
def test_output_i_has_the_seed_plus_i(make_engine, expected, n, fields):
    row = expected[0][3]
    engine = make_engine(**fields, poisoned=True)
    (output,) = within(engine.generate, [row], sampled(n))
    alone = [within(engine.generate, [row], sampled(seed=7 + i))[0].token_ids for i in range(n)]
    assert tokens_of(output) == alone
    assert len({tuple(tokens) for tokens in alone}) == n


def test_the_largest_seed_goes_on_at_zero(engine, expected):
    row = expected[0][0]
    (output,) = within(engine.generate, [row], sampled(2, SEED_MAX))
    last, first = within(engine.generate, [row] * 2, [sampled(seed=SEED_MAX), sampled(seed=0)])
    assert tokens_of(output) == [last.token_ids, first.token_ids]


def test_without_a_seed_outputs_differ(engine, expected):
    (output,) = within(engine.generate, expected[0][:1], sampled(5, None))
    assert len({tuple(tokens) for tokens in tokens_of(output)}) == 5


def test_what_is_read_of_the_request_is_of_the_first(engine, expected):
    (output,) = within(engine.generate, expected[0][:1], sampled(3, logprobs=1))
    first = output.outputs[0]
    assert output.token_ids == first.token_ids
    assert (output.text, output.finish_reason, output.error) == ("", "length", None)
    assert output.logprobs == first.logprobs
    assert output.metrics == first.metrics


def test_stream_mixes_the_outputs(model, engine, expected):
    row = expected[0][2]
    engine = fastgen.Engine(model, TokenTokenizer())
    request = engine.submit(row, sampled(3, logprobs=0))
    events = within(lambda: list(engine.stream(request)))
    output = within(engine.result, request)
    for completion in output.outputs:
        own = [event for event in events if event.index == completion.index]
        assert [t for event in own for t in event.token_ids] == completion.token_ids
        assert "".join(event.text for event in own) == completion.text
        assert [lp for event in own for lp in event.logprobs or []] == completion.logprobs
        assert [event.finish_reason for event in own] == [None] * 10 + ["length"]
        assert own[-1].metrics == completion.metrics
    order = [event.index for event in events if event.token_ids]
    assert order != sorted(order), "one output after the other"
    assert Counter(order) == {0: 10, 1: 10, 2: 10}


def test_outputs_that_end_at_different_times(model, engine, expected):
    row = expected[0][0]
    engine = fastgen.Engine(model, TokenTokenizer())
    (free,) = within(engine.generate, [row], sampled(4, max_tokens=30))
    stop = free.outputs[1].token_ids[2]
    request = engine.submit(row, sampled(4, max_tokens=30, stop_token_ids=[stop]))
    events = within(lambda: list(engine.stream(request)))
    for completion, whole in zip(within(engine.result, request).outputs, free.outputs, strict=True):
        ids = whole.token_ids
        end = ids.index(stop) + 1 if stop in ids else 30
        assert completion.token_ids == ids[:end]
        ends = [e.finish_reason for e in events if e.index == completion.index]
        assert ends[-1] == completion.finish_reason == ("stop" if stop in ids else "length")
    assert within(lambda: list(engine.stream(request))) == sorted(events, key=lambda e: e.index)


@pytest.mark.parametrize(("length", "computed"), [(33, 33 + 4), (32, 32 + 4), (15, 5 * 15)])
def test_children_share_the_prompts_blocks(make_engine, length, computed):
    """Full blocks are computed once; then each child computes what is left, at least a token."""
    engine = make_engine()
    within(engine.generate, prompts(length), SamplingParams(n=5, max_tokens=1, temperature=0.0))
    metrics = engine.metrics()
    assert metrics.computed_tokens == computed
    assert metrics.engine_steps == 1
    assert metrics.prefix_cache_hit_tokens == 4 * (length // 16 * 16)


def test_children_in_a_pool_that_is_too_small(make_engine, expected):
    row, own = expected[0][3], expected[1][3]
    engine = make_engine(kv_cache_memory_bytes=9 * BLOCK_BYTES, poisoned=True)
    params = SamplingParams(n=5, max_tokens=40, temperature=0.0)
    (output,) = within(engine.generate, [row], params)
    assert tokens_of(output) == [own[:40]] * 5
    assert engine.metrics().preemptions > 0


def test_cancel_ends_all_outputs(engine, gate, expected):
    request = engine.submit(expected[0][1], sampled(3, max_tokens=300))
    gate.wait()
    gate.step(3)
    gate.open_once_posted(lambda: engine.cancel(request))
    output = within(engine.result, request)
    assert [completion.finish_reason for completion in output.outputs] == ["cancelled"] * 3
    assert all(each.block_ids == [] for each in request.outputs)


def test_leaving_a_stream_ends_all_outputs(engine, expected):
    request = engine.submit(expected[0][1], sampled(3, max_tokens=300))
    stream = engine.stream(request)
    within(next, stream)
    within(stream.close)
    assert [each.finish_reason for each in request.outputs] == ["cancelled"] * 3


def test_failing_step_fails_all_outputs(engine, gate, expected):
    rows, tokens = expected
    error = Boom("no luck")
    gate._run = raise_once(gate._run, error)
    request = engine.submit(rows[1], sampled(3))
    gate.open()
    with pytest.raises(RequestFailedError, match="no luck"):
        within(lambda: list(engine.stream(request)))
    output = within(engine.result, request)
    assert [completion.finish_reason for completion in output.outputs] == ["error"] * 3
    assert all("no luck" in completion.error for completion in output.outputs)
    assert within(engine.generate, rows[:1], greedy(3))[0].token_ids == tokens[0][:3]


def test_output_that_fails_alone(engine, expected, monkeypatch):
    """One child can have no token; a stream raises, a result shows it beside the others."""
    sample = delivery.sample

    def fails_second(logits, states):
        sampled = sample(logits, states)
        for row, state in enumerate(states):
            if state.request.index == 1:
                sampled.errors[row] = InvalidRequestError("no token")
        return sampled

    monkeypatch.setattr(delivery, "sample", fails_second)
    (output,) = within(engine.generate, expected[0][:1], sampled(3))
    reasons = [completion.finish_reason for completion in output.outputs]
    assert reasons == ["length", "error", "length"]
    assert "no token" in output.outputs[1].error
    request = engine.submit(expected[0][0], sampled(3, max_tokens=300))
    with pytest.raises(RequestFailedError, match="no token"):
        within(lambda: list(engine.stream(request)))
    assert [e.finish_reason for e in request.outputs] == ["cancelled", "error", "cancelled"]


def test_prompt_is_checked_once(engine, expected, monkeypatch):
    """As many outputs as may be asked for: no work or memory that grows with their square."""
    core, checked = core_of(engine), []
    monkeypatch.setattr(core, "check", checked.append)
    monkeypatch.setattr(core._mailbox, "post", lambda message: None)
    request = engine.submit(expected[0][0], sampled(LIMITS["n"].high))
    assert len(checked) == 1
    assert len(request.outputs) == LIMITS["n"].high
    assert all(each.outputs is request.outputs for each in request.outputs)


def test_planted_equal_seeds_are_found(engine, expected, monkeypatch):
    submit_all = EngineCore.submit_all

    def same_seed(self, requests, **options):
        for request in requests:
            request.index = 0
        submit_all(self, requests, **options)

    monkeypatch.setattr(EngineCore, "submit_all", same_seed)
    request = engine.submit(expected[0][0], sampled(3))
    for each in request.outputs:
        assert each.done.wait(20)
    assert len({tuple(each.output_token_ids) for each in request.outputs}) == 1
