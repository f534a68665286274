"""What the engine counts; see test_engine_metrics.py for an engine that does."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
import tracemalloc
from dataclasses import fields, replace

import pytest

from fastgen import EngineMetrics, SamplingParams
from fastgen.engine.block_pool import BlockPool
from fastgen.engine.metrics import MetricsRecorder
from fastgen.engine.request import Request
from fastgen.engine.scheduler import Scheduler
from fastgen.histogram import Histogram

INCIDENTS = ("kernel_fallbacks", "watchdog_warnings", "queue_full", "out_of_memory_steps")


def ended(
    reason: str = "length",
    *,
    queue: float | None = 1.0,
    ttft: float | None = 3.0,
    e2e: float = 7.0,
    num_prompt: int = 12,
    num_output: int = 5,
) -> Request:
    """A request with these times, in seconds after its arrival."""
    request = Request([0] * num_prompt, SamplingParams(max_tokens=10), arrival_time=100.0)
    request.output_token_ids = [0] * num_output
    request.scheduled_time = None if queue is None else 100.0 + queue
    request.first_token_time = None if ttft is None else 100.0 + ttft
    request.end(reason)
    request.finish_time = 100.0 + e2e
    return request


def tell(recorder: MetricsRecorder, request: Request) -> None:
    if request.first_token_time is not None:
        recorder.first_token(request)
    recorder.finished(request)


def snapshot(recorder: MetricsRecorder) -> EngineMetrics:
    return recorder.snapshot(None, None)


def only(histogram: Histogram) -> float:
    """The one value of a histogram."""
    assert histogram.count == 1
    low, high = histogram.quantile_range(0.5)
    assert low <= histogram.total <= high
    return histogram.total


def test_importing_the_recorder_loads_no_torch():
    code = "import sys, fastgen.engine.metrics; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_new_recorder_says_nothing():
    assert snapshot(MetricsRecorder()) == EngineMetrics()


# Requests.


def test_times_of_a_request():
    recorder = MetricsRecorder()
    tell(recorder, ended())
    metrics = snapshot(recorder)
    assert only(metrics.queue_time) == pytest.approx(1.0)
    assert only(metrics.ttft) == pytest.approx(3.0)
    assert only(metrics.tpot) == pytest.approx((7.0 - 3.0) / 4)
    assert only(metrics.e2e) == pytest.approx(7.0)
    assert only(metrics.tokens_per_prompt) == 12
    assert only(metrics.tokens_per_output) == 5
    assert metrics.finished == {"length": 1}


def test_the_first_tokens_times_do_not_wait_for_the_end():
    recorder, request = MetricsRecorder(), ended()
    recorder.first_token(request)
    metrics = snapshot(recorder)
    assert (metrics.queue_time.count, metrics.ttft.count) == (1, 1)
    assert (metrics.e2e.count, metrics.finished) == (0, {})


@pytest.mark.parametrize(
    ("request_", "counts"),
    [
        (ended("cancelled", queue=None, ttft=None, num_output=0), (0, 0, 0, 1)),
        (ended("deadline", ttft=None, num_output=0), (1, 0, 0, 1)),
        (ended("stop", num_output=1), (1, 1, 0, 1)),
        (ended("error", num_output=2), (1, 1, 1, 1)),
    ],
    ids=["never let in", "no token", "one token", "two tokens"],
)
def test_a_time_that_never_came_is_left_out(request_, counts):
    recorder = MetricsRecorder()
    tell(recorder, request_)
    metrics = snapshot(recorder)
    times = (metrics.queue_time, metrics.ttft, metrics.tpot, metrics.e2e)
    assert tuple(each.count for each in times) == counts
    assert metrics.tokens_per_output.total == len(request_.output_token_ids)


def test_a_running_request_is_not_counted_as_ended():
    request = Request([1], SamplingParams())
    with pytest.raises(AssertionError, match="when it has ended"):
        MetricsRecorder().finished(request)


def test_many_requests_against_their_own_numbers():
    rng, recorder = random.Random(5), MetricsRecorder()
    requests = [
        ended(
            rng.choice(["stop", "length", "cancelled"]),
            queue=rng.expovariate(2),
            ttft=rng.lognormvariate(0, 1),
            e2e=30 * rng.random(),
            num_prompt=rng.randrange(1, 5000),
            num_output=rng.randrange(0, 900),
        )
        for _ in range(2000)
    ]
    for request in requests:
        tell(recorder, request)
    metrics = snapshot(recorder)
    assert sum(metrics.finished.values()) == len(requests)
    true = sorted(request.first_token_time - request.arrival_time for request in requests)
    for share in (0.01, 0.5, 0.9, 0.99, 1.0):
        rank = max(1, -int(-share * len(true) // 1))
        assert metrics.ttft.quantile(share) == pytest.approx(true[rank - 1], rel=0.133)
    assert metrics.tokens_per_prompt.total == sum(len(r.prompt_token_ids) for r in requests)


# Steps.


def test_parts_of_a_step():
    recorder = MetricsRecorder()
    recorder.step(300, 256, seconds=0.010, forward=0.007, sampling=0.002)
    recorder.step(256, 250, seconds=0.020, forward=0.015, sampling=0.001)
    metrics = snapshot(recorder)
    assert (metrics.engine_steps, metrics.computed_tokens, metrics.output_tokens) == (2, 556, 506)
    assert metrics.forward_seconds == metrics.step_forward.total == pytest.approx(0.022)
    assert metrics.sampling_seconds == metrics.step_sampling.total == pytest.approx(0.003)
    assert metrics.host_seconds == metrics.step_host.total == pytest.approx(0.005)
    assert metrics.first_step_seconds == 0.010
    assert metrics.step_host.count == 2


def test_rounding_never_makes_a_sum_smaller():
    recorder = MetricsRecorder()
    recorder.step(1, 1, seconds=0.3, forward=0.1, sampling=0.2 + 1e-16)
    recorder.step(1, 1, seconds=0.3, forward=0.3, sampling=1e-9)
    assert snapshot(recorder).host_seconds >= 0


# Incidents, the scheduler's own numbers, threads, memory.


@pytest.mark.parametrize("incident", INCIDENTS)
def test_an_incident_is_counted_under_its_name(incident):
    recorder = MetricsRecorder()
    recorder.note(incident)
    recorder.note(incident)
    assert snapshot(recorder) == replace(EngineMetrics(), **{incident: 2})


def test_numbers_of_the_scheduler():
    recorder = MetricsRecorder()
    scheduler = Scheduler(
        BlockPool(11),
        block_size=4,
        max_num_seqs=1,
        max_num_batched_tokens=64,
        stats=recorder.scheduler_stats,
    )
    for _ in range(2):
        scheduler.add(Request([1] * 9, SamplingParams(max_tokens=4)))
    scheduler.schedule()
    metrics = recorder.snapshot(scheduler, None)
    assert (metrics.num_running, metrics.num_waiting) == (1, 1)
    assert (metrics.num_blocks, metrics.num_free_blocks) == (10, 7)
    assert metrics.cache_usage == pytest.approx(0.3)
    assert metrics.cache_waste == metrics.cache_waste_sum == pytest.approx(3 / 12)
    assert (metrics.cache_waste_steps, metrics.prefix_tokens) == (1, 9)


def test_nothing_is_lost_between_threads():
    recorder, snapshots = MetricsRecorder(), []
    request, stop = ended(), threading.Event()

    def record() -> None:
        for _ in range(2000):
            recorder.note("watchdog_warnings")
            recorder.finished(request)

    def look() -> None:
        while not stop.is_set():
            snapshots.append(snapshot(recorder))

    writers = [threading.Thread(target=record) for _ in range(4)]
    reader = threading.Thread(target=look)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in (reader, *writers):
            thread.start()
        for thread in writers:
            thread.join()
    finally:
        stop.set()
        reader.join()
        sys.setswitchinterval(interval)
    last = snapshot(recorder)
    assert (last.watchdog_warnings, last.finished, last.e2e.count) == (8000, {"length": 8000}, 8000)
    for each in snapshots:
        assert each.e2e.count == sum(each.finished.values()) == each.tokens_per_prompt.count
        assert each.e2e.total == pytest.approx(7.0 * each.e2e.count)


def test_memory_does_not_grow():
    rng, recorder = random.Random(0), MetricsRecorder()
    request = ended()

    def work() -> None:
        for _ in range(3000):
            recorder.step(9, 9, seconds=rng.random(), forward=rng.random() / 2, sampling=1e-3)
            request.finish_time = 103.0 + rng.random() * 1e4
            tell(recorder, request)

    work()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        work()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 10_000  # 18,000 more values are recorded


def test_a_snapshot_is_json():
    recorder = MetricsRecorder()
    tell(recorder, ended())
    data = json.loads(json.dumps(snapshot(recorder).to_dict()))
    assert set(data) == {item.name for item in fields(EngineMetrics)}
    assert data["finished"] == {"length": 1}
    assert data["ttft"]["count"] == 1
    assert data["ttft"]["p99"] == pytest.approx(3.0, rel=0.133)
