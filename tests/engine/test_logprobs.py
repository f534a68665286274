"""Log-probabilities of generated tokens and of the prompt, against log_softmax of transformers.

The bound is measured: twice what two plain forwards of the same tokens, in batches of different
shapes, differ by.
"""

from __future__ import annotations

import pytest
import torch
from engine_helpers import (  # noqa: F401 - the fixtures are used by name
    BLOCK_BYTES,
    expected_fixture,
    gated_fixture,
    make_engine_fixture,
    model_fixture,
    within,
)
from tiny_models import VOCAB, prompts, tiny_model
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fastgen import Engine, SamplingParams
from fastgen.engine import scheduler as scheduler_module
from fastgen.engine.logprobs import logprobs_of
from fastgen.outputs import Logprob

SCHEDULES = {
    "default": {},
    "chunks-of-7": {"max_num_batched_tokens": 7},
    "one-token-steps": {"max_num_batched_tokens": 1},
    "tiny-pool": {"kv_cache_memory_bytes": 9 * BLOCK_BYTES, "max_num_batched_tokens": 50},
}


@pytest.fixture(scope="module")
def plain():
    return tiny_model("qwen2")


@torch.no_grad()
def log_softmax(plain, ids: list[int]) -> torch.Tensor:
    """[num_tokens, vocab_size] of one forward."""
    return torch.log_softmax(plain(torch.tensor([ids])).logits[0].float(), dim=-1)


@torch.no_grad()
def noise(plain, ids: list[int]) -> float:
    """The largest difference to a token-by-token forward and to one beside another row."""
    whole = log_softmax(plain, ids)
    cache, steps = None, []
    for token_id in ids:
        out = plain(torch.tensor([[token_id]]), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits[0, -1])
    beside = plain(torch.tensor([ids, ids[::-1]])).logits[0]
    others = (torch.log_softmax(torch.stack(steps), -1), torch.log_softmax(beside, -1))
    return max((whole - other).abs().max().item() for other in others)


def check_logprobs(
    entries: list[dict[int, Logprob]], tokens: list[int], expected: torch.Tensor, count, bound
) -> None:
    """One entry per token: its own first, and `count` most likely ones in order."""
    assert len(entries) == len(tokens) == len(expected)
    for entry, token_id, row in zip(entries, tokens, expected, strict=True):
        assert next(iter(entry)) == token_id
        assert len(entry) in ({count, count + 1} if count else {1})
        for other, logprob in entry.items():
            assert abs(logprob.logprob - row[other].item()) <= bound
            above = (row > row[other] + 2 * bound).sum().item() + 1
            below = (row >= row[other] - 2 * bound).sum().item()
            assert above <= logprob.rank <= below
        ranked = sorted(entry.values(), key=lambda logprob: logprob.rank)
        assert [each.rank for each in ranked][:count] == list(range(1, count + 1))
        values = [each.logprob for each in ranked]
        assert values == sorted(values, reverse=True)


def check_output(plain, output, count: int | None, prompt_count: int | None) -> None:
    ids, tokens = output.prompt_ids, output.token_ids
    expected = log_softmax(plain, ids + tokens)
    bound = 2 * noise(plain, ids + tokens)
    assert bound > 0
    if count is None:
        assert output.logprobs is None
    else:
        own = expected[len(ids) - 1 : -1]
        check_logprobs(output.logprobs, tokens, own, count, bound)
    if prompt_count is None:
        assert output.prompt_logprobs is None
    else:
        assert output.prompt_logprobs[0] is None
        given = output.prompt_logprobs[1:]
        check_logprobs(given, ids[1:], expected[: len(ids) - 1], prompt_count, bound)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_logprobs_are_the_models(make_engine, plain, expected, schedule):
    engine = make_engine(**SCHEDULES[schedule], poisoned=True)
    counts = [(5, 3), (0, 0), (None, 2), (1, None), (20, 0), (3, 20)]
    params = [
        SamplingParams(max_tokens=20, temperature=0.0, logprobs=count, prompt_logprobs=prompt)
        for count, prompt in counts
    ]
    outputs = within(engine.generate, expected[0], params)
    for output, own, (count, prompt) in zip(outputs, expected[1], counts, strict=True):
        assert output.token_ids == own[:20]
        check_output(plain, output, count, prompt)
    assert (engine.metrics().preemptions > 0) == (schedule == "tiny-pool")


def test_logprobs_are_raw(make_engine, plain, expected):
    """Whatever changes the logits before a token is drawn does not change its log-probability."""
    params = SamplingParams(
        max_tokens=15,
        temperature=3.0,
        seed=1,
        top_k=50,
        logprobs=4,
        repetition_penalty=1.5,
        logit_bias={5: 10.0},
        bad_words=[[7]],
    )
    (output,) = within(make_engine().generate, expected[0][:1], params)
    check_output(plain, output, 4, None)
    assert any(len(entry) == 5 for entry in output.logprobs), "every token was among the best"


PROCESSED = {
    "temperature": {"temperature": 0.7},
    "hot": {"temperature": 3.0},
    "top-k": {"top_k": 12},
    "top-p": {"top_p": 0.8},
    "min-p": {"min_p": 0.05},
    "all": {"temperature": 1.5, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
    "penalty": {"repetition_penalty": 1.4, "temperature": 0.8},
    "bias": {"logit_bias": {5: 6.0, 9: -6.0}},
    "greedy": {"temperature": 0.0, "repetition_penalty": 1.4},
}


def processed(scores: torch.Tensor, ids: list[int], params: SamplingParams) -> torch.Tensor:
    """[vocab_size] by transformers' own processors, in the engine's order."""
    scores = scores[None].clone()
    for token_id, bias in params.logit_bias.items():
        scores[0, token_id] += bias
    wanted = [RepetitionPenaltyLogitsProcessor(params.repetition_penalty)]
    if not params.greedy:
        wanted += [TemperatureLogitsWarper(params.temperature)]
        wanted += [MinPLogitsWarper(params.min_p)] if params.min_p else []
        wanted += [TopKLogitsWarper(params.top_k)] if params.top_k else []
        wanted += [TopPLogitsWarper(params.top_p)] if params.top_p < 1 else []
    for processor in wanted:
        scores = processor(torch.tensor([ids]), scores)
    return torch.log_softmax(scores[0], dim=-1)


@torch.no_grad()
def logits_of(plain, ids: list[int], beside: int = 0) -> torch.Tensor:
    """[num_tokens, vocab_size] fp32 of one forward, alone or beside other rows."""
    rows = [ids] + [ids[::-1]] * beside
    return plain(torch.tensor(rows)).logits[0].float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("options", PROCESSED.values(), ids=PROCESSED)
def test_raw_and_processed_agree_with_a_forward(options, dtype, graphs_of_the_session):
    """As a trainer computes them again: within twice what two forwards differ by."""
    plain, model = tiny_model("qwen2", dtype=dtype), tiny_model("qwen2", dtype=dtype)
    params = SamplingParams(max_tokens=24, seed=3, logprobs=0, processed_logprobs=3, **options)
    prompt = prompts(11)[0]
    with Engine(model) as engine:
        (output,) = engine.generate([prompt], params)
        events = list(engine.stream(engine.submit(prompt, params)))
    ids = prompt + output.token_ids
    forwards = [logits_of(plain, ids), *(logits_of(plain, ids, beside) for beside in (1, 6))]
    cache = None
    with torch.no_grad():  # what generate() computes
        rows = []
        for token_id in ids:
            out = plain(torch.tensor([[token_id]]), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            rows.append(out.logits[0, -1].float())
    forwards.append(torch.stack(rows))

    def of(forward: torch.Tensor, kind) -> torch.Tensor:
        return torch.stack(
            [
                kind(forward[place - 1], ids[:place])[ids[place]]
                for place in range(len(prompt), len(ids))
            ]
        )

    raw = [of(forward, lambda row, _: torch.log_softmax(row, -1)) for forward in forwards]
    drawn = [of(forward, lambda row, seen: processed(row, seen, params)) for forward in forwards]
    for given, (first, *others) in ((output.logprobs, raw), (output.processed_logprobs, drawn)):
        got = torch.tensor(
            [entry[token].logprob for entry, token in zip(given, output.token_ids, strict=True)]
        )
        bound = 2 * max((first - other).abs().max() for other in others)
        assert 0 < bound < 1
        assert (got - first).abs().max() <= bound
    assert (raw[0] - drawn[0]).abs().max() > 1e-3, "the two kinds are the same here"
    assert [e.processed_logprobs[0] for e in events[:-1]] == output.processed_logprobs
    assert [e.logprobs[0] for e in events[:-1]] == output.logprobs


def test_processed_logprobs_leave_out_what_cannot_be_drawn(make_engine, expected):
    params = SamplingParams(max_tokens=4, seed=0, top_k=2, processed_logprobs=9)
    (output,) = within(make_engine().generate, expected[0][:1], params)
    for entry in output.processed_logprobs:
        assert len(entry) == 2
        assert sum(torch.tensor(each.logprob).exp() for each in entry.values()) == pytest.approx(1)
    assert output.logprobs is None


def test_prompt_logprobs_after_a_preemption_within_the_prompt(
    make_engine, plain, gated, monkeypatch
):
    """64 of 70 are known when the request loses its blocks; none comes twice or is missing."""
    monkeypatch.setattr(scheduler_module, "MAX_PROMPT_LOGITS", 4)
    engine = make_engine(kv_cache_memory_bytes=7 * BLOCK_BYTES)
    gate = gated(engine)
    old_row, row = prompts(10, 70, seed=4)
    old = engine.submit(old_row, SamplingParams(max_tokens=60, temperature=0.0))
    gate.wait()
    params = SamplingParams(max_tokens=2, temperature=0.0, prompt_logprobs=2, logprobs=0)
    request = engine.submit(row, params)
    while not request.num_preemptions:
        gate.step()
    assert len(request.prompt_logprobs) == 65, "the first is None, the next is known"
    monkeypatch.setattr(scheduler_module, "MAX_PROMPT_LOGITS", 7)  # the known end within a chunk
    gate.open()
    output = within(engine.result, request)
    within(engine.result, old)
    check_output(plain, output, 0, 2)


def test_prompt_logprobs_in_chunks_of_their_own(make_engine, plain, monkeypatch):
    """Rows of logits per step are limited; other requests go on beside."""
    monkeypatch.setattr(scheduler_module, "MAX_PROMPT_LOGITS", 10)
    engine = make_engine(poisoned=True)
    rows = prompts(35, 21, 1, 16, seed=5)
    wanted = SamplingParams(max_tokens=3, temperature=0.0, prompt_logprobs=1)
    outputs = within(engine.generate, rows, wanted)
    for output in outputs:
        check_output(plain, output, None, 1)
    assert engine.metrics().engine_steps >= (35 + 21) // 10


def test_prompt_logprobs_are_computed_though_the_prompt_is_cached(make_engine, plain):
    engine = make_engine()
    params = SamplingParams(max_tokens=3, temperature=0.0, prompt_logprobs=1, logprobs=1)
    row = prompts(40)[0]
    first, again = (within(engine.generate, [row], params)[0] for _ in range(2))
    check_output(plain, again, 1, 1)
    assert again.metrics.num_cached_tokens == 0
    assert first.token_ids == again.token_ids
    plainly = SamplingParams(max_tokens=3, temperature=0.0, logprobs=1)
    (shared,) = within(engine.generate, [row], plainly)
    assert shared.metrics.num_cached_tokens == 32
    check_output(plain, shared, 1, None)


@pytest.mark.parametrize("n", [1, 3])
def test_prompt_logprobs_come_once_for_all_outputs(make_engine, plain, n):
    params = SamplingParams(
        n=n, max_tokens=4, temperature=1.0, seed=0, prompt_logprobs=1, logprobs=2
    )
    (output,) = within(make_engine().generate, prompts(20), params)
    assert len(output.prompt_logprobs) == 20
    for completion in output.outputs:
        assert len(completion.logprobs) == 4
    check_output(plain, output, 2, 1)


def test_more_than_the_vocabulary_is_all_of_it(make_engine, plain):
    params = SamplingParams(max_tokens=2, temperature=0.0, logprobs=1000, prompt_logprobs=1000)
    (output,) = within(make_engine().generate, prompts(3), params)
    assert [len(entry) for entry in output.logprobs] == [VOCAB] * 2
    assert sum(2.718281828459045**each.logprob for each in output.logprobs[0].values()) == (
        pytest.approx(1.0, rel=1e-4)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_logits_are_normalised_in_fp32(dtype):
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows = logprobs_of(logits, [3, 4], 2)
    expected = torch.log_softmax(logits.float(), dim=-1)
    assert [row[t].logprob for row, t in zip(rows, (3, 4), strict=True)] == [
        expected[0, 3].item(),
        expected[1, 4].item(),
    ]


def test_rank_of_a_token():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
    for token_id, rank in enumerate((4, 1, 3, 2)):
        (row,) = logprobs_of(logits, [token_id], 2)
        assert row[token_id].rank == rank
        assert [row[1].rank, row[3].rank] == [1, 2]


@pytest.mark.parametrize("planted", ["shifted", "scaled"])
def test_planted_mistake_is_found(make_engine, plain, expected, monkeypatch, planted):
    from fastgen.engine import delivery

    def broken(logits, token_ids, count):
        if planted == "shifted":
            token_ids = token_ids[1:] + token_ids[:1]
        return logprobs_of(logits * (1.001 if planted == "scaled" else 1), token_ids, count)

    monkeypatch.setattr(delivery, "logprobs_of", broken)
    params = SamplingParams(max_tokens=2, temperature=0.0, prompt_logprobs=0)
    (output,) = within(make_engine().generate, expected[0][3:4], params)
    with pytest.raises(AssertionError):
        check_output(plain, output, None, 0)
