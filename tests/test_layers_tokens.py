"""Models whose layers are not all alike, each in every way a request can run.

The oracle is transformers' greedy continuation of each prompt alone.
"""

from __future__ import annotations

import pytest
import torch
from layer_models import (
    BLOCK_SIZE,
    LENGTHS,
    MODELS,
    NUM_TOKENS,
    QUICK_MODELS,
    answers_of,
    engine_of,
    layer_model,
)
from tiny_models import NativeTokens, left_padded

import fastgen
import fastgen.graphs
from fastgen import SamplingParams
from fastgen.graph_key import graph_key

GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0)


def model_params() -> list:
    return [
        pytest.param(name, marks=() if name in QUICK_MODELS else pytest.mark.slow)
        for name in MODELS
    ]


@pytest.fixture(scope="module", params=model_params())
def name(request):
    return request.param


@pytest.fixture(scope="module")
def answers(name):
    return answers_of(name, *LENGTHS)


@pytest.fixture(scope="module")
def engine(name):
    with pytest.MonkeyPatch.context() as patch:  # the second engine takes the first one's graph
        patch.setattr(fastgen.graphs, "graph_key", graph_key)
        with engine_of(name) as engine:
            yield engine


def tokens(engine, rows: list[list[int]]) -> list[list[int]]:
    return [output.token_ids for output in engine.generate(rows, GREEDY)]


def test_rows_alone(engine, answers):
    """Beyond every window and chunk, and tokens that vary."""
    for row, expected in zip(answers.rows, answers.expected, strict=True):
        with NativeTokens(engine.model, NUM_TOKENS):
            out = engine.model.generate(
                torch.tensor([row]), max_new_tokens=NUM_TOKENS, do_sample=False
            )
        assert out[0, len(row) :].tolist() == expected
    assert all(len(set(expected)) > 8 for expected in answers.expected)


def test_a_left_padded_batch(engine, answers):
    ids, mask = left_padded(answers.rows)
    with NativeTokens(engine.model, NUM_TOKENS * len(ids)):
        out = engine.model.generate(
            ids, attention_mask=mask, max_new_tokens=NUM_TOKENS, do_sample=False
        )
    assert out[:, ids.shape[1] :].tolist() == answers.expected


def test_requests_and_the_same_again(engine, answers):
    """The second time every full block of a prompt hits, but for one with its last token."""
    assert tokens(engine, answers.rows) == answers.expected
    before = engine.metrics().prefix_cache_hit_tokens
    assert tokens(engine, answers.rows) == answers.expected
    full_blocks = sum((length - 1) // BLOCK_SIZE for length in LENGTHS)
    assert engine.metrics().prefix_cache_hit_tokens - before >= full_blocks * BLOCK_SIZE


def test_prompts_in_chunks_under_preemption(name, engine, answers):
    """A pool for two of five requests at their full length, and 7 tokens in a step."""
    num_blocks = 1 + 2 * -(-(max(LENGTHS) + NUM_TOKENS) // BLOCK_SIZE)
    per_block = fastgen.explain(engine.model).spec.bytes_per_token * BLOCK_SIZE
    limits = {"kv_cache_memory_bytes": num_blocks * per_block, "max_num_batched_tokens": 7}
    with engine_of(name, **limits) as small:
        outputs = small.generate(answers.rows, GREEDY)
        metrics = small.metrics()
    assert [output.token_ids for output in outputs] == answers.expected
    assert sum(output.metrics.num_preemptions for output in outputs) > 0
    assert metrics.engine_steps >= metrics.computed_tokens / 7


def test_logits_and_cache_are_those_of_the_loop(name, engine, answers):
    """The cache that generate() returns goes on as transformers' own does."""
    plain, row = layer_model(name), torch.tensor([answers.rows[-1]])
    settings = {
        "max_new_tokens": 20,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    expected = plain.generate(row, **settings)
    with NativeTokens(engine.model, 20):
        found = engine.model.generate(row, **settings)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(
        torch.cat(found.logits), torch.cat(expected.logits), rtol=0, atol=1e-4
    )
    assert_same_cache(found.past_key_values, expected.past_key_values)
    last = expected.sequences[:, -1:]
    with torch.no_grad():
        theirs = plain(last, past_key_values=expected.past_key_values).logits
        ours = plain(last, past_key_values=found.past_key_values).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def assert_same_cache(found, expected) -> None:
    assert found.get_seq_length() == expected.get_seq_length()
    assert len(found.layers) == len(expected.layers)
    for one, other in zip(found.layers, expected.layers, strict=True):
        assert type(one) is type(other)
        for role in ("keys", "values"):
            ours, theirs = getattr(one, role, None), getattr(other, role, None)
            assert (ours is None) == (theirs is None)
            if theirs is not None:
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
