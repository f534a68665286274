"""The simulation: its trace, what its steps cost, and what it says of the scheduler. No torch."""

from __future__ import annotations

import json
import math
import statistics
import sys
import weakref

import pytest

from fastgen.bench import simulate
from fastgen.bench.simulate import requests_per_s
from fastgen.bench.simulation import engine as simulated
from fastgen.bench.simulation import growth
from fastgen.bench.simulation.engine import Limits, SimulatedEngine
from fastgen.bench.simulation.load import Goal, Load, Quantiles, capacity
from fastgen.bench.simulation.step_cost import COSTS, StepCost, parse_cost
from fastgen.bench.simulation.trace import NUM_REMEMBERED, Trace
from fastgen.cli.main import main
from fastgen.engine.request_heap import MAX_STALE
from fastgen.engine.scheduler import Scheduler

COST = StepCost(0.01, 1e-4, 1e-6, "a test")
SMALL = Limits(num_blocks=512, max_num_seqs=16, max_num_batched_tokens=256, max_model_len=512)


def load(rate: float, num_requests: int = 150, goal: Goal | None = None, limits=SMALL) -> Load:
    return Load(limits, COST, goal or Goal(), rate, num_requests, seed=3)


# The trace.


def take(trace: Trace, count: int) -> list[tuple[float, list[int], int]]:
    return [(trace.next_time, *trace.take()) for _ in range(count)]


def test_a_seed_gives_one_trace_and_a_rate_its_speed():
    requests = take(Trace(1.0, 512, 7), 300)
    assert take(Trace(1.0, 512, 7), 300) == requests
    assert take(Trace(1.0, 512, 8), 300) != requests
    faster = take(Trace(2.0, 512, 7), 300)
    assert [request[1:] for request in faster] == [request[1:] for request in requests]
    assert [2 * time for time, *_ in faster] == pytest.approx([time for time, *_ in requests])


def test_arrivals_have_the_rate_and_come_in_bursts():
    times = [time for time, *_ in take(Trace(5.0, 64, 0), 20_000)]
    assert times == sorted(times)
    # 200 cycles of calm and burst, of 100 +- 82 mean arrivals each: within three deviations.
    assert 20_000 / times[-1] == pytest.approx(5.0, rel=3 * 0.82 / math.sqrt(200))
    counts = [0] * (int(times[-1] / 4) + 1)  # in windows of 20 mean arrivals, a burst's length
    for time in times:
        counts[int(time / 4)] += 1
    assert statistics.variance(counts) > 3 * statistics.mean(counts), "a Poisson process has 1"


def test_lengths_have_long_tails_and_fit():
    requests = take(Trace(1.0, 2048, 0), 3000)
    outputs = sorted(output for *_, output in requests)
    assert all(prompt and len(prompt) + output <= 2048 for _, prompt, output in requests)
    assert outputs[0] >= 48
    # P(output > x) = (48 / x) ** 1.5: the median is 76, and of 100 requests one exceeds 1024.
    assert outputs[1500] == pytest.approx(76, rel=0.1)
    assert outputs[-60] < 1024 <= outputs[-10]


def test_prompts_form_trees():
    """Most go on from an earlier one or share a system prompt; some of each."""
    trace = Trace(1.0, 1024, 0)
    heads, said, continued = set(), [], 0
    for _, prompt, output in take(trace, 200):
        heads.add(bytes(prompt[:16]))
        said.append(bytes(prompt) + bytes(output))
        trace.ended(said[-1])
    for _, prompt, _ in take(trace, 200):
        continued += any(bytes(prompt).startswith(text) for text in said)
    assert 5 < len(heads) <= 32
    assert 50 < continued < 150


def test_the_trace_forgets():
    trace = Trace(1.0, 512, 0)
    for number in range(3 * NUM_REMEMBERED):
        trace.ended(b"%d" % number)
    assert len(trace._ended) == NUM_REMEMBERED
    assert trace._ended[-1] == b"%d" % (3 * NUM_REMEMBERED - 1)


# What a step costs.


def test_virtual_time_is_what_the_steps_cost():
    engine = SimulatedEngine(SMALL, COST)
    request = engine.add(list(range(20)), 3, 0.0)
    engine.step()  # the prompt
    assert engine.clock.now == pytest.approx(0.01 + 20e-4)
    assert request.first_token_time == engine.clock.now
    engine.add(list(range(100, 130)), 1, engine.clock.now)
    _, ended = engine.step()  # a token that reads 20, and another prompt
    assert [len(request.prompt_token_ids) for request in ended] == [30]
    assert engine.clock.now == pytest.approx(0.02 + 51e-4 + 20e-6)
    engine.step()
    assert engine.clock.now == pytest.approx(0.03 + 52e-4 + 41e-6)
    assert request.finish_time == engine.clock.now
    assert engine.num_live == engine.pool.num_used == 0


def test_times_of_a_request_that_waits():
    engine = SimulatedEngine(Limits(64, max_num_seqs=1, max_model_len=512), COST)
    first, second = (engine.add(list(range(k, k + 50)), 4, 0.0) for k in (0, 100))
    while engine.num_live:
        engine.step()
    metrics = [request.metrics() for request in (first, second)]
    assert [m.queue_time_ms for m in metrics] == [0, metrics[0].e2e_ms]
    assert metrics[0].tpot_ms == pytest.approx(10 + 0.1 + 51e-3)  # it reads 50, 51, 52
    assert metrics[1].ttft_ms == pytest.approx(metrics[0].e2e_ms + 10 + 5)


@pytest.mark.parametrize("name", COSTS)
def test_named_costs(name):
    cost = parse_cost(name)
    assert cost.source.startswith(("measured: ", "not measured: "))
    assert 1e-3 < cost.fixed_s < 0.1
    assert cost.per_read_s < cost.per_token_s < cost.fixed_s


def test_given_costs():
    assert parse_cost("0.5,1e-3,0") == StepCost(0.5, 1e-3, 0, "given")


# Loads.


def test_every_request_gets_its_tokens_and_gives_its_blocks_back():
    run = load(rate=20.0)
    added = []
    add = run.engine.add
    run.engine.add = lambda *a, **k: added.append(add(*a, **k))  # pyright: ignore
    result = run.run()
    assert result["requests"] == len(added) == 150
    times = [time for time, *_ in take(Trace(20.0, SMALL.max_model_len, 3), 150)]
    assert [request.arrival_time for request in added] == times
    assert {request.finish_reason for request in added} == {"length"}
    wanted = [request.sampling.max_tokens for request in added]
    assert [len(request.output_token_ids) for request in added] == wanted
    assert result["output_tokens"] == sum(wanted)
    assert run.engine.num_live == run.engine.pool.num_used == 0
    assert result["max_running"] <= SMALL.max_num_seqs
    assert 0.2 < result["prefix_hit_rate"] < 1
    said = [bytes(request.prompt_token_ids + request.output_token_ids) for request in added]
    prompts = [bytes(request.prompt_token_ids) for request in added]
    assert sum(any(map(prompt.startswith, said)) for prompt in prompts) > 20, "none goes on"
    assert sum(part["requests"] for part in result["parts"]) == 150
    assert len(result["parts"]) == 10
    ttft = [request.metrics().ttft_ms for request in added]
    assert result["ttft_ms"]["p50"] == pytest.approx(statistics.median_low(ttft), rel=0.01)


def test_what_requests_see_is_the_same_in_every_run():
    results = [load(rate=20.0).run() for _ in range(2)]
    seen = [
        {key: value for key, value in result.items() if "host" not in key and key != "parts"}
        for result in results
    ]
    assert seen[0] == seen[1]


def test_a_pool_that_is_short_preempts():
    scarce = Limits(80, max_num_seqs=16, max_num_batched_tokens=256, max_model_len=512)
    assert load(rate=20.0, limits=scarce).run()["preemptions"] > 0
    assert load(rate=20.0).run()["preemptions"] == 0


@pytest.mark.parametrize(
    ("goal", "low", "high"),
    [
        (Goal(math.inf, math.inf), 1, 1),
        (Goal(300, 30), 0.05, 0.95),
        (Goal(0, math.inf), 0, 0),
        (Goal(math.inf, 0), 0, 0),
    ],
    ids=["none", "both", "TTFT", "TPOT"],
)
def test_goodput_counts_who_meets_both_limits(goal, low, high):
    result = load(rate=10.0, goal=goal).run()
    assert low <= result["good_share"] <= high
    assert result["goodput_per_s"] == pytest.approx(result["good_share"] * result["arrived_per_s"])


def test_capacity_is_what_full_steps_give():
    """If a step takes the same time whatever is in it, each of 16 sequences gets a token in it."""
    cost = StepCost(0.01, 0, 0, "a test")
    limits = Limits(4096, max_num_seqs=16, max_num_batched_tokens=1 << 14, max_model_len=512)
    trace = Trace(1.0, 512, 0)
    mean_output = statistics.mean(output for *_, output in take(trace, 20_000))
    # The mean of 2000 outputs, whose deviation is about the mean, is known to a fiftieth.
    assert capacity(limits, cost, 0) * mean_output == pytest.approx(1600, rel=0.07)


def test_more_than_can_be_served_waits():
    per_s = capacity(SMALL, COST, 0)
    low, high = (load(part * per_s, 150, Goal(500, 40)).run() for part in (0.3, 2.0))
    assert 2 * low["max_waiting"] < high["max_waiting"]
    assert low["queue_time_ms"]["p50"] * 20 < high["queue_time_ms"]["p50"]
    assert low["good_share"] > high["good_share"] + 0.3


def test_nothing_is_kept_of_requests_that_have_finished(monkeypatch):
    alive: weakref.WeakSet = weakref.WeakSet()
    run, most = load(rate=5.0, num_requests=300), 0

    def add(*args, **kwargs):
        nonlocal most
        alive.add(request := SimulatedEngine.add(run.engine, *args, **kwargs))
        most = max(most, len(alive) - run.engine.num_live)
        return request

    monkeypatch.setattr(run.engine, "add", add)
    result = run.run()
    assert result["max_running"] + result["max_waiting"] < 100, "most of them must have finished"
    assert most <= MAX_STALE + SMALL.max_num_seqs
    assert len(run._parts) == 10
    for values in (run._queue, run._ttft, run._tpot, run._host_step):
        assert len(values._counts) < 1500  # from 1e-9 to 1e4 in steps of 2 %


def test_quantiles_are_right_to_one_per_cent():
    values = Quantiles()
    assert values.quantile(0.5) is None
    for number in range(1, 1001):
        values.add(number / 7)
    for part in (0.01, 0.5, 0.99, 1.0):
        assert values.quantile(part) == pytest.approx(1000 * part / 7, rel=0.0101)
    assert values.largest == 1000 / 7


# Growth, measured in calls in place of seconds, so that it is the same on any machine.


@pytest.fixture
def calls_for_seconds(monkeypatch):
    count = 0

    def note(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    monkeypatch.setattr(simulated.time, "thread_time", lambda: count * 1e-6)
    monkeypatch.setattr(growth, "NUM_STEPS", 8)
    monkeypatch.setattr(growth, "NUM_RUNNING", 32)
    before = sys.getprofile()
    sys.setprofile(note)
    yield
    sys.setprofile(before)


class LooksAtAllThatWait(Scheduler):
    def schedule(self):
        for request in self.waiting:
            request.metrics()
        return super().schedule()


def test_a_step_does_not_depend_on_what_waits_or_has_finished(calls_for_seconds):
    sizes = {"waiting": (64, 512), "finished": (64, 512)}
    for series in growth.measure_growth(sizes):
        for cost, power in series["exponents"].items():
            assert abs(power) < 0.05, (series["series"], cost, series["rows"])


def test_growth_shows_in_the_power(calls_for_seconds, monkeypatch):
    (running,) = growth.measure_growth({"running": (64, 512)})
    assert 0.5 < running["exponents"]["step_us"] <= 1.0
    monkeypatch.setattr(simulated, "Scheduler", LooksAtAllThatWait)
    (waiting,) = growth.measure_growth({"waiting": (64, 512)})
    assert waiting["exponents"]["step_us"] > 0.3


@pytest.mark.parametrize("power", [0, 1, 1.5])
def test_exponent(power):
    assert growth.exponent([(n, 3 * n**power) for n in (10, 40, 90)]) == pytest.approx(power)


@pytest.mark.parametrize("name", ["short", "pool"])
def test_other_series(name):
    size = {"short": 32, "pool": 1 << 14}[name]
    costs = growth.SERIES[name](size)
    assert all(value > 0 for value in costs.values())


# The command.


def test_rates():
    assert requests_per_s("80%", 5.0) == 4.0
    assert requests_per_s("3.5", 5.0) == 3.5


def test_the_command_prints_tables_and_draws(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(simulate, "measure_growth", lambda sizes: GROWTH if sizes else [])
    small = ["--requests", "40", "--rate", "50%", "2", "--max-num-seqs", "16"]
    picture, file = tmp_path / "a.png", tmp_path / "a.json"
    arguments = ["bench", "--simulate", *small, "--plot", str(picture), "--out", str(file)]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    for text in ("40 requests", "16 sequences", "good/s", "TTFT", "hits", "preempted", "power"):
        assert text in out
    assert picture.stat().st_size > 10_000
    result = json.loads(file.read_text())
    assert [row["requests"] for row in result["loads"]] == [40, 40]
    assert result["loads"][0]["load"] == pytest.approx(0.5)
    assert result["loads"][1]["rate"] == 2
    assert result["setting"]["cost"]["source"].startswith("measured: ")

    assert main(["bench", "--simulate", *small, "--no-growth", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["growth"] == []
    assert again["loads"][0]["ttft_ms"] == result["loads"][0]["ttft_ms"]


GROWTH = [
    {
        "series": "waiting",
        "rows": [
            {"size": size, "step_us": 300.0, "request_us": 150.0, "cancel_us": 4.0}
            for size in (1024, 4096)
        ],
        "exponents": {"step_us": 0.0, "request_us": 0.0, "cancel_us": 0.0},
    }
]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rate", "0"), "more than 0"),
        (("--rate", "fast"), "per cent of the capacity"),
        (("--requests", "0"), "at least one request"),
        (("--step-cost", "free"), "FIXED,TOKEN,READ"),
        (("--step-cost", "0,1,1"), "more than 0 s"),
        (("--blocks", "10"), "need 257 blocks"),
        (("--max-num-seqs", "0"), "max_num_seqs"),
        (("--block-size", "0"), "block_size"),
        (("--max-model-len", "8"), "16 tokens"),
        (("--profile",), "--profile is for models only"),
        (("--rounds", "5"), "--rounds is for models only"),
    ],
    ids=" ".join,
)
def test_bad_input_is_one_line(arguments, message, capsys):
    assert main(["bench", "--simulate", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_options_of_simulations_are_for_simulations(capsys):
    assert main(["bench", "--model", "demo", "--rate", "5"]) == 1
    assert "--rate is for --simulate only" in capsys.readouterr().err
