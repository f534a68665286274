"""Where the time of fastgen's steps goes, and how near to the machine's limits it is spent.

The engine runs a workload twice per round: as it is, and watched. Watched, every node of the
rewritten graph is timed around its call, as are scheduling, batch building and sampling. Nothing
is left behind: the normal path holds no hook, and the difference between the two runs is reported.
Only on the CPU, where a call returns when its work is done.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from .. import Engine, SamplingParams, api, kernels
from ..compiled import CompiledForward, ForwardOutput
from ..costs import Cost, Sizes, Step, kind_of, node_cost, op_name
from ..engine import delivery
from ..engine.batch import build_batch
from ..engine.engine import EngineCore
from ..engine.runner import Runner
from ..engine.scheduler import SchedulerOutput
from .machine import measure_machine
from .workloads import Workload

KERNELS = ("GEMM", "attention", "other kernels")
# What a step's time is divided into, in the order it is shown. Python: the graph's own between its
# nodes, with the freeing of values; delivery: tokens to requests, and what is posted to the engine.
PARTS: tuple[str, ...] = (
    *KERNELS,
    "sampling",
    "host: scheduling",
    "host: batch",
    "host: Python",
    "host: delivery",
)
DECODE, PROMPT = "decode", "prompt"


@dataclass
class StepRecord:
    """One watched step, times in seconds.

    kind: PROMPT if it computed a token of a prompt, else DECODE. nodes: of the graph, in order.
    """

    kind: str
    step: Step
    total_s: float = 0.0
    scheduling_s: float = 0.0
    batch_s: float = 0.0
    forward_s: float = 0.0
    sampling_s: float = 0.0
    nodes: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, output: SchedulerOutput) -> StepRecord:
        """What a scheduled step computes, as `build_batch` lays it out."""
        sequences = tuple(
            (item.num_tokens, item.start + (0 if item.query is not None else item.num_tokens))
            for item in output.scheduled
        )
        prompt = any(item.start < len(item.request.prompt_token_ids) for item in output.scheduled)
        num_rows = sum(item.num_logits for item in output.scheduled)
        return cls(PROMPT if prompt else DECODE, Step(output.num_tokens, num_rows, sequences))


class WatchedForward:
    """A compiled forward's graph with every node timed.

    ops: the name of each node's op; times: what each took the last time, in the same order.
    """

    def __init__(self, compiled: CompiledForward) -> None:
        self.compiled = compiled
        lowered = compiled.lowered
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        graph.output(graph.graph_copy(lowered.graph, val_map=copies))
        for old, new in copies.items():
            new.meta = dict(old.meta)
        implementations = {
            choice.function: op
            for op in compiled.report.kernels
            for choice in kernels.implementations(op)
        }
        self.placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        self.nodes = [node for node in graph.nodes if node.op == "call_function"]
        self.ops = [op_name(node, implementations) for node in self.nodes]
        self.times = [0.0] * len(self.nodes)
        for index, node in enumerate(self.nodes):
            node.target = _timed(node.target, self.times, index)
        self.forward = fx.GraphModule(lowered, graph).forward

    def costs(self, step: Step) -> list[Cost]:
        """What each node computes and reads in a step; nothing for ops that are not counted."""
        sizes = Sizes(self.placeholders, list(self.compiled.inputs.values()), step)
        pairs = zip(self.ops, self.nodes, strict=True)
        return [node_cost(op, node, sizes) for op, node in pairs]


def _timed(target: Any, times: list[float], index: int) -> Callable[..., Any]:
    clock = time.perf_counter

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = clock()
        result = target(*args, **kwargs)
        times[index] = clock() - start
        return result

    return timed


class _WatchedRunner(Runner):
    """Runs a step as `Runner` does and notes what it took in the last record."""

    def __init__(self, runner: Runner, watched: WatchedForward, records: list) -> None:
        super().__init__(runner.compiled, runner.kv_cache, runner.device)
        self.watched, self.records = watched, records

    @torch.inference_mode()
    def run(self, output: SchedulerOutput) -> ForwardOutput:
        record: StepRecord = self.records[-1]
        start = time.perf_counter()
        batch = build_batch(output, self.kv_cache.block_size, self.device)
        built = time.perf_counter()
        result = self.compiled.run(batch, self.kv_cache)
        record.forward_s = time.perf_counter() - built
        record.batch_s = built - start
        record.nodes = list(self.watched.times)
        return result


@contextlib.contextmanager
def watching(core: EngineCore, watched: WatchedForward) -> Iterator[list[StepRecord]]:
    """Time every step of an idle engine that has run before; what was put in is taken out again.

    The sampler is watched for all engines of the process.
    """
    records: list[StepRecord] = []
    engine: Any = core
    scheduler, runner, compiled = engine._scheduler, engine._runner, engine.compiled
    assert scheduler is not None, "the engine has not run yet"
    schedule, step, forward = scheduler.schedule, engine.step, compiled._forward
    sample = delivery.sample

    def timed_schedule() -> SchedulerOutput:
        start = time.perf_counter()
        output = schedule()
        seconds = time.perf_counter() - start
        if output.scheduled:
            records.append(StepRecord.of(output))
            records[-1].scheduling_s = seconds
        return output

    def timed_sample(*args: Any) -> Any:
        start = time.perf_counter()
        sampled = sample(*args)
        records[-1].sampling_s = time.perf_counter() - start
        return sampled

    def timed_step() -> bool:
        start = time.perf_counter()
        worked = step()
        if worked:
            records[-1].total_s = time.perf_counter() - start
        return worked

    def put_in() -> None:
        scheduler.schedule, engine.step = timed_schedule, timed_step
        engine._runner = _WatchedRunner(runner, watched, records)
        compiled._forward, delivery.sample = watched.forward, timed_sample

    def take_out() -> None:
        del scheduler.schedule, engine.step
        engine._runner, compiled._forward, delivery.sample = runner, forward, sample

    core._mailbox.call(put_in)
    try:
        yield records
    finally:
        core._mailbox.call(take_out)


def profile_workload(
    model: Any, workload: Workload, block_size: int, rounds: int
) -> dict[str, Any]:
    """Run a workload plain and watched in each round; of the watched runs the median is told.

    Returns: "overhead" (watched / plain time - 1), "seconds", "machine", and per kind of step
        ("decode", "prompt", "workload") its parts in seconds and its rooflines; see `summarize`.
    Raises: ValueError on another device than the CPU.
    """
    if model.device.type != "cpu":
        raise ValueError(
            f"--profile times ops around their calls, which on {model.device.type} return before "
            "the work is done; use --device cpu, or torch.profiler"
        )
    machine = measure_machine(model.device, model.dtype)
    api.optimize(model, block_size=block_size)
    try:
        with Engine(model) as engine:
            core = api.require(model).engine()
            watched = WatchedForward(core.compiled)
            plain, runs = [], []
            for _ in range(rounds):
                plain.append(_run_fresh(engine, workload))
                runs.append(_run_fresh(engine, workload, core, watched))
    finally:
        api.restore(model)
    runs.sort(key=lambda run: run[0])
    plain_s = sorted(seconds for seconds, _ in plain)[rounds // 2]
    seconds, records = runs[rounds // 2]
    return {
        "seconds": seconds,
        "plain_seconds": plain_s,
        "overhead": seconds / plain_s - 1,
        "machine": machine,
        **summarize(watched, records, seconds, machine),
    }


def _run_fresh(
    engine: Engine,
    workload: Workload,
    core: EngineCore | None = None,
    watched: WatchedForward | None = None,
) -> tuple[float, list[StepRecord]]:
    """A workload on a new cache, after a tiny request; watched if there is something to watch."""
    api.release_cache(engine.model)
    engine.generate([[1, 2, 3]], SamplingParams(max_tokens=2, temperature=0.0))
    prompts = [prompt for prompt, _ in workload.requests]
    params = [
        SamplingParams(max_tokens=length, temperature=0.0, ignore_eos=True)
        for _, length in workload.requests
    ]
    watch = watching(core, watched) if core and watched else contextlib.nullcontext([])
    with watch as records:
        start = time.perf_counter()
        if workload.sequential:
            for prompt, own in zip(prompts, params, strict=True):
                engine.generate([prompt], own)
        else:
            engine.generate(prompts, params)
        return time.perf_counter() - start, records


def summarize(
    watched: WatchedForward,
    records: list[StepRecord],
    seconds: float,
    machine: dict[str, float],
) -> dict[str, Any]:
    """Per kind of step and for all: number of steps, tokens, seconds by part, rooflines, top ops.

    The parts of a kind add up to its seconds. The workload has "outside steps" too: requests on
    their way in and out, and the engine's waking up.
    """
    kinds = {
        DECODE: [record for record in records if record.kind == DECODE],
        PROMPT: [record for record in records if record.kind == PROMPT],
    }
    result = {kind: _summary(watched, own, machine) for kind, own in kinds.items() if own}
    workload = _summary(watched, records, machine)
    workload["parts"]["outside steps"] = seconds - workload["seconds"]
    workload["seconds"] = seconds
    return {**result, "workload": workload}


def _summary(
    watched: WatchedForward, records: list[StepRecord], machine: dict[str, float]
) -> dict[str, Any]:
    names = {"GEMM": "GEMM", "attention": "attention", "other": "other kernels"}
    kinds = [names[kind_of(op)] for op in watched.ops]
    parts = dict.fromkeys(PARTS, 0.0)
    ops: defaultdict[str, float] = defaultdict(float)
    costs = {"GEMM": Cost(), "attention": Cost()}
    for record in records:
        for kind, op, spent in zip(kinds, watched.ops, record.nodes, strict=True):
            parts[kind] += spent
            ops[op] += spent
        for kind, cost in zip(kinds, watched.costs(record.step), strict=True):
            if kind in costs:
                costs[kind] += cost
        in_kernels = sum(record.nodes)
        rest = record.scheduling_s + record.batch_s + record.forward_s + record.sampling_s
        parts["sampling"] += record.sampling_s
        parts["host: scheduling"] += record.scheduling_s
        parts["host: batch"] += record.batch_s
        parts["host: Python"] += record.forward_s - in_kernels
        parts["host: delivery"] += record.total_s - rest
    return {
        "steps": len(records),
        "tokens": sum(record.step.num_tokens for record in records),
        "seconds": sum(record.total_s for record in records),
        "parts": parts,
        "roofline": {kind: roofline(cost, parts[kind], machine) for kind, cost in costs.items()},
        "ops": dict(sorted(ops.items(), key=lambda item: -item[1])),
    }


def roofline(cost: Cost, seconds: float, machine: dict[str, float]) -> dict[str, Any]:
    """What was reached, and of which limit: bound by whatever alone would take longer."""
    computing = cost.flops / machine["gemm_tflop_per_s"] / 1e12
    reading = cost.bytes / machine["read_gb_per_s"] / 1e9
    return {
        "flops": cost.flops,
        "streamed_bytes": cost.streamed_bytes,
        "activation_bytes": cost.activation_bytes,
        "flops_per_byte": cost.flops / cost.bytes if cost.bytes else 0.0,
        "gflop_per_s": cost.flops / seconds / 1e9 if seconds else 0.0,
        "gb_per_s": cost.bytes / seconds / 1e9 if seconds else 0.0,
        "compute_share": computing / seconds if seconds else 0.0,
        "bandwidth_share": reading / seconds if seconds else 0.0,
        "bound_by": "compute" if computing > reading else "bandwidth",
    }
