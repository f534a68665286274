"""Metrics of engines for Prometheus; needs prometheus_client, which `import fastgen` does not.

    from prometheus_client import REGISTRY, start_http_server
    from fastgen.prometheus import Collector

    REGISTRY.register(Collector(engine))
    start_http_server(9090)

What vLLM measures too has vLLM's name, with `fastgen_` in place of `vllm:`: colons are kept for
the recording rules of whoever runs Prometheus.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

try:
    from prometheus_client.core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
        SummaryMetricFamily,
    )
    from prometheus_client.metrics_core import Metric
    from prometheus_client.registry import Collector as _Collector
    from prometheus_client.utils import floatToGoString
except ImportError as error:
    raise ImportError(
        "fastgen.prometheus needs prometheus_client: pip install 'torch-fastgen[prometheus]'",
        name=error.name,
    ) from error

from .errors import EngineClosedError, NotOptimizedError
from .histogram import Histogram
from .outputs import EngineMetrics


class Measured(Protocol):
    """An engine, as far as it matters here."""

    def metrics(self, wait: bool = True) -> EngineMetrics:
        """Its counters; `wait=False`: at once, even while a step hangs."""
        ...


@dataclass(frozen=True)
class _Value:
    """A counter or gauge: a field of EngineMetrics under a name, or, by reason, all of a dict."""

    field: str
    name: str
    help: str
    label: str | None = None


@dataclass(frozen=True)
class _Distribution:
    """A histogram: fields of EngineMetrics under one name, each with its value of the label.

    lowest, highest: The buckets that are shown, of those with a bound of 1, 2 or 5 times a power
    of ten; all values are in their cumulative counts.
    """

    fields: dict[str, str]
    name: str
    help: str
    lowest: float
    highest: float
    label: str | None = None


_GAUGES = (
    _Value("num_running", "num_requests_running", "Requests that hold cache blocks."),
    _Value("num_waiting", "num_requests_waiting", "Requests that wait to be let in."),
    _Value("cache_usage", "kv_cache_usage_perc", "Allocated blocks of all blocks; 1 is all."),
    _Value("num_blocks", "kv_cache_blocks", "Blocks of the KV cache."),
    _Value("num_free_blocks", "kv_cache_free_blocks", "Blocks that no request holds."),
    _Value("num_cached_blocks", "prefix_cache_blocks", "Blocks whose content can be found."),
    _Value("captured_graphs", "cuda_graphs", "Sizes of decode steps captured as CUDA graphs."),
    _Value("first_step_seconds", "first_step_seconds", "Time of the engine's first step."),
)
_COUNTERS = (
    _Value("prompt_tokens", "prompt_tokens", "Tokens of prompts that were queued."),
    _Value("output_tokens", "generation_tokens", "Tokens that were generated."),
    _Value("computed_tokens", "computed_tokens", "Tokens that went through the model."),
    _Value("engine_steps", "engine_steps", "Steps that ended without an error."),
    _Value("replayed_steps", "cuda_graph_steps", "Steps that were replayed from CUDA graphs."),
    _Value(
        "finished",
        "request_success",
        "Requests that ended, by reason; errors are among them.",
        label="finished_reason",
    ),
    _Value("preemptions", "num_preemptions", "Times that a request lost its blocks to another."),
    _Value("prefix_tokens", "prefix_cache_queries", "Tokens looked up in the prefix cache."),
    _Value("prefix_cache_hit_tokens", "prefix_cache_hits", "Those of them that were found."),
    _Value("forks", "beam_forks", "Beams that went on from another beam's blocks."),
    _Value("block_copies", "beam_block_copies", "Blocks that were copied for them."),
    _Value("kernel_fallbacks", "kernel_fallbacks", "Kernels that gave way to their reference."),
    _Value("watchdog_warnings", "watchdog_warnings", "Times that something was found to hang."),
    _Value("queue_full", "requests_rejected", "Requests rejected because too many waited."),
    _Value("out_of_memory_steps", "out_of_memory_steps", "Steps that ran out of memory."),
)
_DISTRIBUTIONS = (
    _Distribution(
        {"": "ttft"},
        "time_to_first_token_seconds",
        "From submit to the first token.",
        1e-3,
        1e3,
    ),
    _Distribution(
        {"": "tpot"},
        "request_time_per_output_token_seconds",
        "Mean time of a request's tokens after the first.",
        1e-4,
        1e1,
    ),
    _Distribution(
        {"": "queue_time"},
        "request_queue_time_seconds",
        "From submit to the first step.",
        1e-4,
        1e3,
    ),
    _Distribution({"": "e2e"}, "e2e_request_latency_seconds", "From submit to the end.", 1e-3, 1e4),
    _Distribution(
        {"": "tokens_per_prompt"}, "request_prompt_tokens", "Tokens of a request's prompt.", 1, 1e6
    ),
    _Distribution(
        {"": "tokens_per_output"}, "request_generation_tokens", "Tokens it generated.", 1, 1e6
    ),
    _Distribution(
        {"forward": "step_forward", "sampling": "step_sampling", "host": "step_host"},
        "step_time_seconds",
        "Time of a step: in the model, from logits to tokens, and the rest of it.",
        1e-5,
        1e1,
        label="part",
    ),
)
_PREFIX = "fastgen_"
_SHOWN = ("1.00", "2.00", "5.00")


class Collector(_Collector):
    """Reads engines' snapshots whenever a registry is scraped; never waits for a step.

    Engines are not kept alive. One that is closed or gone, or whose model was restored, has no
    samples any more. A registry takes one Collector; `add` gives it further engines.

    Args:
        engine: A fastgen.Engine or AsyncEngine.
        model_name: The label `model_name` of all samples; left out, what the model's config calls
            it (`name_or_path`), or its class.
    """

    def __init__(self, engine: Measured, model_name: str | None = None) -> None:
        self._engines: dict[str, weakref.ref[Measured]] = {}
        self._lock = threading.Lock()
        self.add(engine, model_name)

    def add(self, engine: Measured, model_name: str | None = None) -> None:
        """Read another engine too. Raises: ValueError if a living one has that name."""
        name = _name_of(engine) if model_name is None else model_name
        with self._lock:
            known = self._engines.get(name)
            if known is not None and known() is not None:
                raise ValueError(
                    f"model_name must be one per engine, and {name!r} is another's; pass model_name"
                )
            self._engines[name] = weakref.ref(engine)

    def collect(self) -> Iterable[Metric]:
        """All families, with the samples of all engines."""
        return _families(list(self._snapshots()))

    def describe(self) -> Iterable[Metric]:
        """All families, without samples: no engine is asked when the collector is registered."""
        return _families([])

    def _snapshots(self) -> Iterator[tuple[str, EngineMetrics]]:
        with self._lock:
            engines = list(self._engines.items())
        for name, reference in engines:
            engine = reference()
            if engine is None:
                continue
            try:
                yield name, engine.metrics(wait=False)
            except (EngineClosedError, NotOptimizedError):
                continue


def _families(snapshots: list[tuple[str, EngineMetrics]]) -> Iterator[Metric]:
    for kind, values in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
        for value in values:
            labels = ["model_name", *([value.label] if value.label else [])]
            family = kind(_PREFIX + value.name, value.help, labels=labels)
            for name, metrics in snapshots:
                found = getattr(metrics, value.field)
                for label, number in (found if value.label else {"": found}).items():
                    family.add_metric([name, label] if value.label else [name], number)
            yield family
    waste = SummaryMetricFamily(
        f"{_PREFIX}kv_cache_waste_ratio",
        "Unused slots of all slots of allocated blocks, a value per step.",
        labels=["model_name"],
    )
    for name, metrics in snapshots:
        waste.add_metric([name], metrics.cache_waste_steps, metrics.cache_waste_sum)
    yield waste
    for each in _DISTRIBUTIONS:
        labels = ["model_name", *([each.label] if each.label else [])]
        family = HistogramMetricFamily(_PREFIX + each.name, each.help, labels=labels)
        for name, metrics in snapshots:
            for label, field in each.fields.items():
                histogram: Histogram = getattr(metrics, field)
                values = [name, label] if each.label else [name]
                family.add_metric(values, _buckets(histogram, each), histogram.total)
        yield family


def _buckets(histogram: Histogram, shown: _Distribution) -> list[tuple[str, float]]:
    """(le, cumulative count) of the buckets that are shown, and of +Inf."""
    buckets = [
        (floatToGoString(bound), histogram.num_up_to(bound))
        for bound in histogram.bounds
        if shown.lowest <= bound <= shown.highest and f"{bound:.2e}"[:4] in _SHOWN
    ]
    return [*buckets, ("+Inf", histogram.count)]


def _name_of(engine: Any) -> str:
    model = engine.model
    return getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__
