"""Logits that are not finite end their own request, and no other."""

from __future__ import annotations

import pytest
import torch
from engine_helpers import (  # noqa: F401 - the fixtures are used by name
    core_of,
    engine_fixture,
    expected_fixture,
    greedy,
    model_fixture,
    within,
)
from sampler_helpers import GREEDY, random_logits, state
from tiny_models import tiny_model

import fastgen
from fastgen import SamplingParams
from fastgen.engine.sampler import sample

BAD = {
    "nan": lambda row: row.__setitem__(7, float("nan")),
    "inf": lambda row: row.__setitem__(7, float("inf")),
    "nothing but -inf": lambda row: row.fill_(float("-inf")),
    "nothing but nan": lambda row: row.fill_(float("nan")),
}
SETTINGS = {
    "greedy": GREEDY,
    "greedy with logprobs": SamplingParams(temperature=0.0, logprobs=3, processed_logprobs=3),
    "greedy with a bias": SamplingParams(temperature=0.0, logit_bias={3: 1.0}),
    "drawn": SamplingParams(),
    "drawn with logprobs": SamplingParams(logprobs=3, processed_logprobs=3),
    "top-k": SamplingParams(top_k=5),
    "nucleus": SamplingParams(top_p=0.9),
    "min-p": SamplingParams(min_p=0.1),
    "penalised": SamplingParams(repetition_penalty=1.3),
}


@pytest.mark.parametrize("vocab_size", [100, 5000])
@pytest.mark.parametrize("params", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("spoil", BAD.values(), ids=BAD)
def test_only_its_row_has_an_error(spoil, params, vocab_size):
    logits = random_logits(3, vocab_size)
    spoilt = logits.clone()
    spoil(spoilt[1])
    clean = sample(logits, [state(params, seed) for seed in range(3)])
    found = sample(spoilt, [state(params, seed) for seed in range(3)])
    assert clean.errors == {}
    assert list(found.errors) == [1]
    assert "finite" in str(found.errors[1])
    assert [found.token_ids[row] for row in (0, 2)] == [clean.token_ids[row] for row in (0, 2)]
    for asked in ("logprobs", "processed_logprobs"):
        expected = getattr(clean, asked)
        assert getattr(found, asked) == {row: v for row, v in expected.items() if row != 1}


def test_masked_logits_are_no_error():
    logits = random_logits(2, 100)
    logits[0, 5:] = float("-inf")
    assert sample(logits, [state(GREEDY), state()]).errors == {}


@pytest.mark.parametrize(
    "params", [greedy(12), SamplingParams(max_tokens=12, seed=3)], ids=["greedy", "drawn"]
)
def test_its_neighbours_go_on(engine, expected, monkeypatch, params):
    rows, _ = expected
    alone = [within(engine.generate, [row], params)[0].token_ids for row in rows[:3]]
    core = core_of(engine)
    run, victims = core._runner.run, []

    def run_with_a_fault(output):
        result = run(output)
        for row, item in enumerate(output.scheduled):
            request = item.request
            is_victim = item.samples and request.prompt_token_ids == rows[1]
            if is_victim and len(request.output_token_ids) == 4:
                assert all(each.samples for each in output.scheduled), "rows are not items"
                logits = result.logits.clone()
                logits[row, 9] = float("nan")
                result = result._replace(logits=logits)
                victims.append(request)
        return result

    monkeypatch.setattr(core._runner, "run", run_with_a_fault)
    requests = [engine.submit(row, params, cache_salt="these") for row in rows[:3]]
    outputs = [within(engine.result, request) for request in requests]
    assert victims == [requests[1]]
    assert [output.finish_reason for output in outputs] == ["length", "error", "length"]
    assert "token 4 of the output" in outputs[1].error
    assert outputs[1].token_ids == alone[1][:4]
    assert [outputs[i].token_ids for i in (0, 2)] == [alone[i] for i in (0, 2)]
    # What it computed may be as wrong: nobody finds its blocks.
    again = engine.submit(rows[1], greedy(1), cache_salt="these")
    assert within(engine.result, again).outputs[0].metrics.num_cached_tokens == 0


def test_generate_goes_on_as_transformers_does():
    """With NaN transformers' greedy decoding takes what argmax says; nothing tells it to stop."""
    model = tiny_model("qwen2")
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    prompt = torch.tensor([[3, 1, 4, 1, 5]])
    expected = model.generate(prompt, max_new_tokens=6, do_sample=False)
    fastgen.optimize(model)
    found = within(lambda: model.generate(prompt, max_new_tokens=6, do_sample=False))
    metrics = fastgen.api.require(model).engine().metrics()
    assert torch.equal(found, expected)
    assert metrics.output_tokens == 6, "the engine made them"
    output = within(fastgen.Engine(model).generate, [[3, 1, 4]], greedy(3))[0]
    assert output.finish_reason == "error"
    fastgen.restore(model)
