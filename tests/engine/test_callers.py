"""Modes of the calling thread: the engine's own thread does not take part in them."""

from __future__ import annotations

import pytest
import torch
from engine_helpers import engine_fixture, expected_fixture, greedy, model_fixture, within  # noqa: F401

import fastgen

MODES = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_tokens_do_not_depend_on_the_callers_mode(engine, expected, mode):
    rows, tokens = expected
    with mode():
        request = engine.submit(rows[1], greedy(20))
        streamed = [token for event in engine.stream(request) for token in event.token_ids]
        outputs = engine.generate(rows[:3], greedy(20))
    assert streamed == tokens[1][:20]
    assert [output.token_ids for output in outputs] == [own[:20] for own in tokens[:3]]


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_an_engine_made_in_a_mode_works_outside_of_it(model, expected, mode):
    """Its cache and its batches must be no tensors of that mode."""
    rows, tokens = expected
    within(fastgen.api.require(model).close_engine)
    with mode(), fastgen.Engine(model) as engine:
        engine.generate(rows[:1], greedy(2))
    with fastgen.Engine(model) as engine:
        (output,) = engine.generate(rows[:1], greedy(20))
    assert output.token_ids == tokens[0][:20]
