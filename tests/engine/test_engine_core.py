"""The engine through `fastgen.Engine`: tokens, events, limits, metrics. Faults: test_engine_faults.

Tokens are compared with transformers' greedy loop, run for each prompt alone on a second model.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from engine_helpers import (  # noqa: F401 - the fixtures are used by name
    BLOCK_BYTES,
    GREEDY,
    TokenTokenizer,
    engine_fixture,
    expected_fixture,
    gate_fixture,
    gated_fixture,
    greedy,
    idle,
    make_engine_fixture,
    model_fixture,
    within,
)
from tiny_models import VOCAB, prompts

import fastgen
from fastgen import SamplingParams
from fastgen.engine import runner

# What changes the schedule and must not change a token.
SCHEDULES = {
    "default": {},
    "one-token-steps": {"max_num_batched_tokens": 1},
    "chunks-of-7": {"max_num_batched_tokens": 7},
    "one-at-a-time": {"max_num_seqs": 1},
    "blocks-of-64": {"block_size": 64},
    "tiny-pool": {"kv_cache_memory_bytes": 9 * BLOCK_BYTES, "max_num_batched_tokens": 50},
}


# Tokens.


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_greedy_tokens_equal_transformers(make_engine, expected, schedule):
    rows, tokens = expected
    engine = make_engine(**SCHEDULES[schedule])
    outputs = within(engine.generate, rows, greedy(len(tokens[0])))
    assert [output.token_ids for output in outputs] == tokens
    assert [output.prompt_ids for output in outputs] == rows
    assert {output.finish_reason for output in outputs} == {"length"}
    assert all(output.error is None for output in outputs)
    preempted = engine.metrics().preemptions
    assert preempted > 0 if schedule == "tiny-pool" else preempted == 0


def test_poisoned_blocks_never_show(make_engine, expected):
    """Every freed block is NaN; preempted requests compute into them and read nothing else."""
    rows, tokens = expected
    engine = make_engine(**SCHEDULES["tiny-pool"], poisoned=True)
    outputs = within(engine.generate, rows, greedy(len(tokens[0])))
    assert [output.token_ids for output in outputs] == tokens
    assert engine.metrics().preemptions > 0
    core = fastgen.api.require(engine.model).engine()
    cache = core._mailbox.call(lambda: core._runner.kv_cache.tensors["key:0"])  # pyright: ignore
    poisoned = [block for block in range(1, 9) if cache[block].isnan().any()]
    assert poisoned, "nothing was poisoned: the test shows nothing"


def test_planted_read_past_the_end_is_found(make_engine, expected, monkeypatch):
    """A step that attends to one slot too many sees NaN, or another sequence's keys."""
    rows, tokens = expected
    build_batch = runner.build_batch

    def one_too_long(*args):
        batch = build_batch(*args)
        batch.seq_lens += 1
        return batch

    monkeypatch.setattr(runner, "build_batch", one_too_long)
    engine = make_engine(**SCHEDULES["tiny-pool"], poisoned=True)
    outputs = within(engine.generate, rows, greedy(len(tokens[0])))
    assert all(output.token_ids != own for output, own in zip(outputs, tokens, strict=True))


def test_max_tokens_of_one(engine, expected):
    rows, tokens = expected
    outputs = within(engine.generate, rows, greedy(1))
    assert [output.token_ids for output in outputs] == [own[:1] for own in tokens]
    assert outputs[0].metrics.tpot_ms is None


def test_params_of_each_prompt(engine, expected):
    rows, tokens = expected
    params = [
        greedy(3),
        SamplingParams(max_tokens=5, temperature=5.0, top_k=1, seed=1),
        SamplingParams(max_tokens=7, top_p=1e-6, seed=2),
        greedy(2),
    ]
    outputs = within(engine.generate, rows[:4], params)
    assert [output.token_ids for output in outputs] == [
        own[:length] for own, length in zip(tokens, (3, 5, 7, 2), strict=False)
    ]


def test_no_prompts_give_no_outputs(engine):
    assert within(engine.generate, [], GREEDY) == []


@pytest.mark.parametrize("kind", [tuple, np.array, torch.tensor], ids=["tuple", "array", "tensor"])
def test_prompts_of_any_integer_kind(engine, expected, kind):
    rows, tokens = expected
    (output,) = within(engine.generate, [kind(rows[1])], greedy(5))
    assert (output.prompt_ids, output.token_ids) == (rows[1], tokens[1][:5])


# Ends.


@pytest.mark.parametrize("as_list", [False, True], ids=["int", "list"])
def test_models_end_token_is_the_last(engine, expected, monkeypatch, as_list):
    rows, tokens = expected
    eos = tokens[0][6]
    end = tokens[0].index(eos) + 1
    monkeypatch.setattr(
        engine.model.generation_config, "eos_token_id", [VOCAB - 1, eos] if as_list else eos
    )
    stopped, ignored = within(
        engine.generate,
        [rows[0], rows[0]],
        [greedy(20), SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)],
    )
    assert (stopped.token_ids, stopped.finish_reason) == (tokens[0][:end], "stop")
    assert (ignored.token_ids, ignored.finish_reason) == (tokens[0][:20], "length")


def test_stop_token_ids_hold_even_where_eos_is_ignored(engine, expected):
    rows, tokens = expected
    stop = tokens[0][6]
    end = tokens[0].index(stop) + 1
    params = SamplingParams(
        max_tokens=20, temperature=0.0, stop_token_ids=(stop, VOCAB - 1), ignore_eos=True
    )
    (output,) = within(engine.generate, [rows[0]], params)
    assert (output.token_ids, output.finish_reason) == (tokens[0][:end], "stop")


def test_default_params_are_the_models_generation_config(engine, expected, monkeypatch):
    rows, tokens = expected
    config = engine.model.generation_config
    monkeypatch.setattr(config, "max_new_tokens", 4)
    monkeypatch.setattr(config, "do_sample", False)
    (output,) = within(engine.generate, [rows[0]])
    assert output.token_ids == tokens[0][:4]
    assert within(engine.result, engine.submit(rows[0])).token_ids == tokens[0][:4]
    monkeypatch.setattr(config, "do_sample", True)
    monkeypatch.setattr(config, "temperature", 0.5)
    monkeypatch.setattr(config, "top_p", 0.25)
    monkeypatch.setattr(config, "top_k", None)
    assert engine.default_params() == SamplingParams(
        max_tokens=4, temperature=0.5, top_k=50, top_p=0.25
    )


# Streams and results.


def test_stream_is_a_token_at_a_time_then_the_end(engine, expected):
    rows, tokens = expected
    events = within(lambda: list(engine.stream(engine.submit(rows[2], greedy(9)))))
    assert [event.token_ids for event in events] == [*([token] for token in tokens[2][:9]), []]
    assert [event.finish_reason for event in events] == [None] * 9 + ["length"]
    assert all(event.metrics is None and event.text == "" for event in events[:-1])
    assert events[-1].metrics.num_output_tokens == 9


def test_streams_text_is_the_results_text(model, engine, expected):
    rows, tokens = expected
    engine = fastgen.Engine(model, TokenTokenizer())
    events = within(lambda: list(engine.stream(engine.submit(rows[2], greedy(9)))))
    (output,) = within(engine.generate, [rows[2]], greedy(9))
    assert output.text == TokenTokenizer().decode(tokens[2][:9])
    assert "".join(event.text for event in events) == output.text
    assert all(event.text for event in events[:-1])
    (from_text,) = within(engine.generate, [TokenTokenizer().decode(rows[2])], greedy(9))
    assert from_text == output or from_text.token_ids == output.token_ids


def test_submit_returns_before_anything_ran(engine, gate, expected):
    request = engine.submit(expected[0][0], greedy(3))
    gate.wait()
    assert request.finish_reason is None
    assert request.output_token_ids == []
    gate.open()
    assert within(engine.result, request).token_ids == expected[1][0][:3]


def test_result_of_a_request_that_is_done(engine, expected):
    request = engine.submit(expected[0][0], greedy(3))
    idle(engine)
    assert within(engine.result, request).token_ids == expected[1][0][:3]


def test_result_may_be_asked_twice(engine, expected):
    request = engine.submit(expected[0][0], greedy(3))
    first = within(engine.result, request)
    assert within(engine.result, request) == first


def test_result_after_the_stream(engine, expected):
    request = engine.submit(expected[0][0], greedy(3))
    events = within(lambda: list(engine.stream(request)))
    output = within(engine.result, request)
    assert output.token_ids == expected[1][0][:3]
    assert output.metrics == events[-1].metrics


def test_two_streams_of_one_request(engine, gate, expected):
    """Both get all tokens, wherever they begin."""
    request = engine.submit(expected[0][0], greedy(8))
    gate.wait()
    gate.step(2)
    with ThreadPoolExecutor(2) as executor:
        futures = [executor.submit(lambda: list(engine.stream(request))) for _ in range(2)]
        gate.open()
        both = [future.result(timeout=30) for future in futures]
    for events in both:
        assert [t for event in events for t in event.token_ids] == expected[1][0][:8]
        assert events[-1].finish_reason == "length"


def test_result_from_two_threads(engine, gate, expected):
    request = engine.submit(expected[0][0], greedy(3))
    gate.wait()
    with ThreadPoolExecutor(2) as executor:
        futures = [executor.submit(within, engine.result, request) for _ in range(2)]
        gate.open()
        outputs = [future.result() for future in futures]
    assert [output.token_ids for output in outputs] == [expected[1][0][:3]] * 2


# Cancelling.


def test_cancel_while_waiting(make_engine, expected, gated):
    engine = make_engine(max_num_seqs=1)
    gate = gated(engine)
    first = engine.submit(expected[0][0], greedy(20))
    waiting = engine.submit(expected[0][1], greedy(20))
    gate.wait()
    gate.open_once_posted(lambda: engine.cancel(waiting))
    output = within(engine.result, waiting)
    assert (output.token_ids, output.finish_reason) == ([], "cancelled")
    assert output.metrics.queue_time_ms is None
    assert output.metrics.ttft_ms is None
    assert output.metrics.e2e_ms > 0
    assert within(engine.result, first).token_ids == expected[1][0][:20]


def test_cancel_within_a_chunked_prompt(make_engine, expected, gated):
    engine = make_engine(max_num_batched_tokens=7)
    gate = gated(engine)
    request = engine.submit(prompts(60)[0], greedy(20))
    gate.wait()
    gate.step(3)
    assert request.num_computed_tokens == 21
    assert request.block_ids
    gate.open_once_posted(lambda: engine.cancel(request))
    assert request.block_ids == []
    output = within(engine.result, request)
    assert (output.token_ids, output.finish_reason) == ([], "cancelled")
    assert output.metrics.queue_time_ms is not None


def test_cancel_while_decoding_keeps_the_tokens_so_far(engine, gate, expected):
    request = engine.submit(expected[0][1], greedy(30))
    other = engine.submit(expected[0][2], greedy(30))
    gate.wait()
    gate.step(4)
    gate.open_once_posted(lambda: engine.cancel(request))
    assert request.block_ids == [], "the blocks are free when cancel returns"
    output = within(engine.result, request)
    assert output.finish_reason == "cancelled"
    assert 4 <= len(output.token_ids) < 30
    assert output.token_ids == expected[1][1][: len(output.token_ids)]
    assert within(engine.result, other).token_ids == expected[1][2][:30]


def test_cancel_a_preempted_request(make_engine, gated):
    engine = make_engine(kv_cache_memory_bytes=5 * BLOCK_BYTES)
    gate = gated(engine)
    old, young = (engine.submit(row, greedy(40)) for row in prompts(20, 20))
    gate.wait()
    while not young.num_preemptions:
        gate.step()
    assert young.output_token_ids
    gate.open_once_posted(lambda: engine.cancel(young))
    assert within(engine.result, young).finish_reason == "cancelled"
    assert within(engine.result, old).finish_reason == "length"


def test_cancel_after_the_end_changes_nothing(engine, expected):
    request = engine.submit(expected[0][0], greedy(3))
    idle(engine)
    within(engine.cancel, request)
    within(engine.cancel, request)
    assert within(engine.result, request).finish_reason == "length"


def test_cancelled_stream_ends_with_an_event(engine, gate, expected):
    request = engine.submit(expected[0][0], greedy(30))
    gate.wait()
    gate.step(2)
    gate.open_once_posted(lambda: engine.cancel(request))
    events = within(lambda: list(engine.stream(request)))
    assert events[-1].finish_reason == "cancelled"
    assert [event.token_ids[0] for event in events[:-1]] == request.output_token_ids


@pytest.mark.parametrize("error", [GeneratorExit, KeyboardInterrupt], ids=lambda e: e.__name__)
def test_leaving_a_stream_early_frees_its_blocks(engine, expected, error):
    request = engine.submit(expected[0][0], greedy(300))
    stream = engine.stream(request)
    within(next, stream)

    def leave():
        with pytest.raises(error):
            stream.throw(error)

    within(leave)
    assert request.finish_reason == "cancelled"
    assert request.block_ids == []
    assert within(engine.result, request).finish_reason == "cancelled"


def test_interrupted_generate_cancels_all(engine, expected, monkeypatch):
    waited = []

    def interrupted(request):
        waited.append(request)
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(expected[0], greedy(300))
    assert waited[0].finish_reason == "cancelled"
    metrics = engine.metrics()
    assert (metrics.num_running, metrics.num_waiting) == (0, 0)
    assert metrics.num_free_blocks == metrics.num_blocks


# Seeds.


def sampled(seed: int | None, max_tokens: int = 12, **fields) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=1.5, seed=seed, **fields)


def test_seed_decides_the_tokens(engine, expected):
    row = expected[0][0]
    first, again, other, zero, zero_again = (
        within(engine.generate, [row], sampled(seed))[0].token_ids for seed in (7, 7, 8, 0, 0)
    )
    assert first == again
    assert zero == zero_again
    assert len({tuple(tokens) for tokens in (first, other, zero)}) == 3


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_sampled_tokens_do_not_depend_on_the_batch(make_engine, engine, expected, schedule):
    rows = expected[0]
    params = [
        sampled(11, 30),
        sampled(11, 30, top_k=5),
        greedy(30),
        sampled(2**63 - 1, 30, top_p=0.8),
        sampled(0, 30),
    ]
    rows = rows[: len(params)]
    alone = [
        within(engine.generate, [row], own)[0].token_ids
        for row, own in zip(rows, params, strict=True)
    ]
    other = make_engine(**SCHEDULES[schedule])
    together = within(other.generate, rows, params)
    assert [output.token_ids for output in together] == alone
    backwards = within(other.generate, rows[::-1], params[::-1])
    assert [output.token_ids for output in backwards] == alone[::-1]


def test_without_a_seed_torch_decides(engine, expected):
    rows = [expected[0][0]] * 3

    def run():
        return [o.token_ids for o in within(engine.generate, rows, sampled(None))]

    torch.manual_seed(5)
    first = run()
    torch.manual_seed(5)
    assert run() == first
    assert run() != first
    assert len({tuple(tokens) for tokens in first}) == 3, "equal requests got equal seeds"


def test_seeded_and_greedy_requests_leave_torchs_generator_alone(engine, expected):
    before = torch.get_rng_state()
    within(engine.generate, expected[0][:2], [sampled(3), greedy(5)])
    assert torch.equal(torch.get_rng_state(), before)


def test_threads_get_what_they_get_alone(make_engine, expected):
    """Four threads submit, stream and collect at once, through a pool that is too small."""
    rows, _ = expected
    engine = make_engine(kv_cache_memory_bytes=12 * BLOCK_BYTES, max_num_batched_tokens=64)
    jobs = [
        (row, params)
        for seed, row in enumerate(rows)
        for params in (greedy(20), sampled(seed, 20), sampled(seed, 15, top_p=0.9))
    ]
    serial = [within(engine.generate, [row], params)[0].token_ids for row, params in jobs]
    barrier = threading.Barrier(4)

    def work(number: int) -> list[list[int]]:
        barrier.wait()
        requests = [engine.submit(row, params) for row, params in jobs[number::4]]
        if number % 2:
            return [engine.result(request).token_ids for request in requests]
        return [
            [token for event in engine.stream(request) for token in event.token_ids]
            for request in requests
        ]

    with ThreadPoolExecutor(4) as executor:
        results = list(executor.map(lambda number: within(work, number), range(4)))
    for number, own in enumerate(results):
        assert own == serial[number::4]


# Metrics.


def test_metrics_of_a_request(engine, expected):
    (output,) = within(engine.generate, [expected[0][2]], greedy(10))
    metrics = output.metrics
    assert metrics.num_prompt_tokens == len(expected[0][2])
    assert metrics.num_output_tokens == 10
    assert 0 <= metrics.queue_time_ms < metrics.ttft_ms < metrics.e2e_ms
    assert metrics.tpot_ms == pytest.approx((metrics.e2e_ms - metrics.ttft_ms) / 9)
    assert metrics.output_tokens_per_s == pytest.approx(10 / metrics.e2e_ms * 1000)
    assert metrics.num_preemptions == 0


def test_metrics_of_the_engine(make_engine, expected):
    engine = make_engine(max_num_seqs=8)
    assert engine.metrics() == fastgen.EngineMetrics()
    rows = expected[0][:3]
    within(engine.generate, rows, greedy(10))
    metrics = engine.metrics()
    total = sum(map(len, rows))
    assert metrics.engine_steps == 10
    assert metrics.prompt_tokens == total
    assert metrics.computed_tokens == total + 3 * 9
    assert metrics.output_tokens == 30
    assert metrics.finished == {"length": 3}
    assert (metrics.num_running, metrics.num_waiting, metrics.preemptions) == (0, 0, 0)
    assert metrics.num_blocks == metrics.num_free_blocks == 8 * (512 // 16)
    assert metrics.cache_usage == 0.0
    assert 0 < metrics.cache_waste < 1
    assert metrics.forward_seconds > 0
    assert metrics.sampling_seconds > 0
    assert metrics.host_seconds > 0


def test_metrics_while_requests_run_and_wait(make_engine, expected, gated):
    engine = make_engine(max_num_seqs=2)
    gate = gated(engine)
    requests = [engine.submit(row, greedy(5)) for row in prompts(17, 33, 5)]
    gate.wait()
    gate.step()  # the first one ran alone
    seen = []
    gate.open_once_posted(lambda: seen.append(engine.metrics()))
    (metrics,) = seen
    assert (metrics.num_running, metrics.num_waiting) == (2, 1)
    assert metrics.num_blocks - metrics.num_free_blocks == 2 + 3
    assert metrics.cache_usage == 5 / metrics.num_blocks
    for request in requests:
        within(engine.result, request)


def test_metrics_survive_a_released_cache(make_engine, expected):
    """Counters are since the engine was created; the pool's figures are of the pool there is."""
    engine = make_engine(kv_cache_memory_bytes=5 * BLOCK_BYTES)
    within(engine.generate, prompts(20, 20), greedy(40))
    before = engine.metrics()
    assert before.preemptions > 0
    fastgen.release_cache(engine.model)
    after = engine.metrics()
    for name in ("engine_steps", "output_tokens", "finished", "preemptions", "forward_seconds"):
        assert getattr(after, name) == getattr(before, name), name
    assert after.num_blocks == 0
    within(engine.generate, expected[0][:1], greedy(2))
    assert engine.metrics().finished == {"length": 3}
