"""The collector: names and values as a scraper reads them, and engines that come and go."""

from __future__ import annotations

import gc
import math
import subprocess
import sys
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics import exposition, parser
from prometheus_client.parser import text_string_to_metric_families
from test_histogram import histogram_of

from fastgen import EngineMetrics
from fastgen.errors import EngineClosedError, NotOptimizedError
from fastgen.histogram import NO_COUNTS, Histogram
from fastgen.prometheus import Collector

# Fields that repeat what others say, or that are no numbers.
NOT_EXPORTED = {
    "cache_waste",
    "forward_seconds",
    "sampling_seconds",
    "host_seconds",
    "capture_refusal",
}


class StubEngine:
    """Has the metrics that it is given, and raises those that are errors."""

    def __init__(self, answer: EngineMetrics | Exception, name: str = "some/model") -> None:
        self.answer, self.num_asked = answer, 0
        self.model = SimpleNamespace(config=SimpleNamespace(name_or_path=name))

    def metrics(self, wait: bool = True) -> EngineMetrics:
        self.num_asked += 1
        assert not wait, "a scrape waits for no step"
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def register(*engines: StubEngine) -> CollectorRegistry:
    registry = CollectorRegistry(auto_describe=True)
    collector = Collector(engines[0])
    for engine in engines[1:]:
        collector.add(engine)
    registry.register(collector)
    return registry


def scrape(registry: CollectorRegistry) -> dict[str, float]:
    """Sample -> value, as in the text that is scraped."""
    return {
        sample.name
        + "".join(f" {name}={value}" for name, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        for sample in family.samples
    }


def scrape_of(metrics: EngineMetrics) -> dict[str, float]:
    """The samples of one engine, without its name."""
    engine = StubEngine(metrics, "m")
    samples = scrape(register(engine))
    assert all(" model_name=m" in sample for sample in samples)
    return {sample.replace(" model_name=m", ""): value for sample, value in samples.items()}


# Names and values.


def test_counters_and_gauges():
    samples = scrape_of(
        EngineMetrics(
            engine_steps=3,
            prompt_tokens=40,
            output_tokens=50,
            computed_tokens=90,
            finished={"length": 2, "error": 1},
            preemptions=4,
            prefix_tokens=40,
            prefix_cache_hit_tokens=16,
            num_running=5,
            num_waiting=6,
            cache_usage=0.25,
            cache_waste_sum=1.5,
            cache_waste_steps=3,
            queue_full=7,
        )
    )
    expected = {
        "fastgen_engine_steps_total": 3,
        "fastgen_prompt_tokens_total": 40,
        "fastgen_generation_tokens_total": 50,
        "fastgen_computed_tokens_total": 90,
        "fastgen_request_success_total finished_reason=length": 2,
        "fastgen_request_success_total finished_reason=error": 1,
        "fastgen_num_preemptions_total": 4,
        "fastgen_prefix_cache_queries_total": 40,
        "fastgen_prefix_cache_hits_total": 16,
        "fastgen_num_requests_running": 5,
        "fastgen_num_requests_waiting": 6,
        "fastgen_kv_cache_usage_perc": 0.25,
        "fastgen_kv_cache_waste_ratio_sum": 1.5,
        "fastgen_kv_cache_waste_ratio_count": 3,
        "fastgen_requests_rejected_total": 7,
    }
    assert {name: samples[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("field", "name"),
    [
        ("ttft", "time_to_first_token_seconds"),
        ("tpot", "request_time_per_output_token_seconds"),
        ("queue_time", "request_queue_time_seconds"),
        ("e2e", "e2e_request_latency_seconds"),
    ],
)
def test_times_of_requests(field, name):
    values = [0.0004, 0.02, 0.02, 0.7, 0.7000001, 12.0, 90_000.0]
    samples = scrape_of(EngineMetrics(**{field: histogram_of(values)}))
    assert samples[f"fastgen_{name}_count"] == len(values)
    assert samples[f"fastgen_{name}_sum"] == pytest.approx(sum(values))
    assert samples[f"fastgen_{name}_bucket le=0.01"] == 1
    assert samples[f"fastgen_{name}_bucket le=0.02"] == 3
    assert samples[f"fastgen_{name}_bucket le=1.0"] == 5
    assert samples[f"fastgen_{name}_bucket le=10.0"] == 5
    assert samples[f"fastgen_{name}_bucket le=+Inf"] == len(values)
    assert f"fastgen_{name}_bucket le=1.25" not in samples


@pytest.mark.parametrize("name", ["prompt", "generation"])
def test_tokens_of_requests(name):
    field = {"prompt": "tokens_per_prompt", "generation": "tokens_per_output"}[name]
    samples = scrape_of(EngineMetrics(**{field: histogram_of([0, 1, 5, 6, 2000], NO_COUNTS)}))
    start = f"fastgen_request_{name}_tokens_bucket le="
    buckets = {key.removeprefix(start): n for key, n in samples.items() if key.startswith(start)}
    assert [buckets[le] for le in ("1.0", "2.0", "5.0", "10.0", "2000.0")] == [2, 2, 3, 4, 5]
    assert not {"0.0", "12.0", "31.0"} & set(buckets)


def test_times_of_steps_by_part():
    parts = {"forward": 0.008, "sampling": 0.0003, "host": 0.002}
    fields_ = {f"step_{part}": histogram_of([value] * 9) for part, value in parts.items()}
    samples = scrape_of(EngineMetrics(**fields_))
    for part, value in parts.items():
        assert samples[f"fastgen_step_time_seconds_sum part={part}"] == pytest.approx(9 * value)
        assert samples[f"fastgen_step_time_seconds_bucket le=+Inf part={part}"] == 9
    assert samples["fastgen_step_time_seconds_bucket le=0.0005 part=sampling"] == 9
    assert samples["fastgen_step_time_seconds_bucket le=0.0002 part=sampling"] == 0


@pytest.mark.parametrize(
    "name", [f.name for f in fields(EngineMetrics) if f.name not in NOT_EXPORTED]
)
def test_every_number_of_a_snapshot_is_scraped(name):
    value = getattr(EngineMetrics(), name)
    if isinstance(value, Histogram):
        value = histogram_of([1.0], value)
    elif name == "finished":
        value = {"stop": 1}
    else:
        value += 1
    assert scrape_of(replace(EngineMetrics(), **{name: value})) != scrape_of(EngineMetrics())


def test_buckets_never_fall_and_are_few():
    samples = scrape_of(EngineMetrics(ttft=histogram_of([10.0**-n for n in range(-3, 5)])))
    start = "fastgen_time_to_first_token_seconds_bucket le="
    buckets = [
        (math.inf if key.endswith("+Inf") else float(key.removeprefix(start)), count)
        for key, count in samples.items()
        if key.startswith(start)
    ]
    assert buckets == sorted(buckets)
    assert [count for _, count in buckets] == sorted(count for _, count in buckets)
    assert 15 <= len(buckets) <= 25


def test_names_are_as_prometheus_asks():
    registry = register(StubEngine(EngineMetrics(finished={"stop": 1})))
    for family in registry.collect():
        assert family.name.startswith("fastgen_")
        assert ":" not in family.name
        assert family.documentation.endswith(".")
        if family.type == "histogram":
            assert family.name.endswith(("_seconds", "_tokens")), "a unit is missing"


def test_the_stricter_format_is_read_too():
    engine = StubEngine(EngineMetrics(finished={"stop": 1}, ttft=histogram_of([0.1, 2.0])))
    text = exposition.generate_latest(register(engine)).decode()
    families = {family.name: family for family in parser.text_string_to_metric_families(text)}
    assert families["fastgen_time_to_first_token_seconds"].type == "histogram"
    assert families["fastgen_request_success"].type == "counter"


# Engines.


def test_registering_asks_no_engine():
    engine = StubEngine(EngineMetrics())
    registry = register(engine)
    assert engine.num_asked == 0
    scrape(registry)
    assert engine.num_asked == 1


def test_engines_have_labels():
    one, two = StubEngine(EngineMetrics(engine_steps=1), "a"), StubEngine(EngineMetrics(), "b")
    samples = scrape(register(one, two))
    assert samples["fastgen_engine_steps_total model_name=a"] == 1
    assert samples["fastgen_engine_steps_total model_name=b"] == 0


def test_a_name_of_ones_own():
    engine, registry = StubEngine(EngineMetrics()), CollectorRegistry()
    registry.register(Collector(engine, "blue"))
    assert "fastgen_engine_steps_total model_name=blue" in scrape(registry)


def test_a_model_without_a_name_is_called_by_its_class():
    samples = scrape(register(engine := StubEngine(EngineMetrics(), "")))
    assert engine.num_asked == 1
    assert "fastgen_engine_steps_total model_name=SimpleNamespace" in samples


def test_two_engines_of_one_name_are_refused():
    one, two = StubEngine(EngineMetrics()), StubEngine(EngineMetrics())
    collector = Collector(one)
    with pytest.raises(ValueError, match="'some/model' is another's; pass model_name"):
        collector.add(two)
    collector.add(two, "other")
    del one
    gc.collect()
    collector.add(StubEngine(EngineMetrics()))  # its name is free again


def test_a_second_collector_in_a_registry_is_refused():
    one, two = StubEngine(EngineMetrics()), StubEngine(EngineMetrics(), "b")
    registry = register(one)
    with pytest.raises(ValueError, match="Duplicated"):
        registry.register(Collector(two))


@pytest.mark.parametrize("error", [EngineClosedError, NotOptimizedError])
def test_an_engine_that_ended_has_no_samples(error):
    closed, running = StubEngine(EngineMetrics(), "a"), StubEngine(EngineMetrics(), "b")
    registry = register(closed, running)
    closed.answer = error("gone")
    samples = scrape(registry)
    assert samples
    assert all("model_name=b" in sample for sample in samples)


def test_another_error_is_not_hidden():
    engine = StubEngine(RuntimeError("a mistake"))
    with pytest.raises(RuntimeError, match="a mistake"):
        scrape(register(engine))


def test_a_forgotten_engine_is_not_kept():
    engine = StubEngine(EngineMetrics())
    registry = register(engine)
    del engine
    gc.collect()
    assert scrape(registry) == {}


# The dependency.


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_fastgen_does_not_import_it():
    look = "any(name.startswith('prometheus_client') for name in sys.modules)"
    imports = "fastgen, fastgen.outputs, fastgen.engine.metrics"
    assert run(f"import sys, {imports}; print({look})") == "False"


def test_without_it_the_error_says_what_to_install():
    text = run(
        "import sys; sys.modules['prometheus_client'] = None\n"
        "try:\n    import fastgen.prometheus\n"
        "except ImportError as error:\n    print(error)"
    )
    assert "pip install 'torch-fastgen[prometheus]'" in text
