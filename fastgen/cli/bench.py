"""fastgen bench: tokens per second against transformers on the same work, in one run.

No speed without parity: the run begins with a comparison of fp32 tokens and of first-step logits,
and stops if they differ. Engines then take turns, round by round; the table shows medians.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .. import Engine, SamplingParams, __version__, api
from .models import DTYPES, SHAPES, load_model, random_model
from .parity import check_parity

ONE_BY_ONE_REQUESTS = 8  # of the mix, seeded: the slowest peer runs a part and is marked so


@dataclass(frozen=True)
class Workload:
    """Requests as (prompt ids, number of output tokens)."""

    name: str
    requests: list[tuple[list[int], int]]

    @property
    def output_tokens(self) -> int:
        return sum(length for _, length in self.requests)


@dataclass(frozen=True)
class Measurement:
    """One engine on one workload in one round."""

    engine: str
    seconds: float
    output_tokens: int
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    steps: int | None = None
    computed_tokens: int | None = None
    cache_waste: float | None = None

    @property
    def tokens_per_s(self) -> float:
        return self.output_tokens / self.seconds


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "bench", help="measure against transformers, with a parity gate", description=__doc__
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--shape", choices=SHAPES, help="a known shape with random weights")
    source.add_argument("--model", metavar="DIR", type=Path, help="a model folder, or 'demo'")
    parser.add_argument("--workload", choices=("single", "mixed"), default="mixed")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default: bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=None, help="torch threads")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3, medians are shown")
    parser.add_argument("--block-size", type=int, default=16, help="16, 32 or 64; default: 16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-peers", action="store_true", help="measure fastgen alone")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def make_workload(name: str, vocab_size: int, max_len: int, seed: int) -> Workload:
    """single: 128 + 128 tokens. mixed: 32 requests, log-normal prompts and outputs.

    Lengths beyond the model's limit are cut so that every request fits.
    """
    draw = random.Random(seed)

    def prompt(length: int) -> list[int]:
        return [draw.randrange(vocab_size) for _ in range(length)]

    def log_normal(median: float, low: int, high: int) -> int:
        return int(min(high, max(low, draw.lognormvariate(0, 0.9) * median)))

    if name == "single":
        return Workload(name, [(prompt(min(128, max_len // 2)), min(128, max_len // 2))])
    requests = []
    for _ in range(32):
        length = min(log_normal(110, 16, 512), max_len // 2)
        requests.append((prompt(length), min(log_normal(72, 16, 256), max_len // 2)))
    return Workload(name, requests)


def run(arguments: argparse.Namespace) -> int:
    if arguments.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {arguments.rounds}")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    if arguments.shape:
        model = random_model(arguments.shape, arguments.dtype, arguments.device, arguments.seed)
    else:
        model, _ = load_model(arguments.model, arguments.dtype, arguments.device)
    model.generation_config.eos_token_id = None  # every request runs to its length
    model.generation_config.pad_token_id = 0
    limit = model.config.max_position_embeddings
    workload = make_workload(arguments.workload, model.config.vocab_size, limit, arguments.seed)

    parity = check_parity(model, workload.requests)
    result: dict[str, Any] = {
        "setting": setting(arguments, workload),
        "parity": parity.to_dict(),
        "machine": measure_machine(model.device, model.dtype),
    }
    if not parity.passed:
        print(json.dumps(result, indent=2))
        raise ValueError("the parity gate failed: tokens or logits differ from transformers'")
    rounds = measure(model, workload, arguments)
    result["engines"] = summarize(rounds)
    result["shares"] = shares(model, result)
    result["waste"] = block_waste(model, workload) if arguments.workload == "mixed" else {}
    print(json.dumps(result, indent=2)) if arguments.json else show(result)
    return 0


def setting(arguments: argparse.Namespace, workload: Workload) -> dict[str, Any]:
    import transformers

    return {
        "model": arguments.shape or str(arguments.model),
        "workload": workload.name,
        "requests": len(workload.requests),
        "prompt_tokens": sum(len(prompt) for prompt, _ in workload.requests),
        "output_tokens": workload.output_tokens,
        "dtype": arguments.dtype,
        "device": arguments.device,
        "threads": torch.get_num_threads(),
        "rounds": arguments.rounds,
        "fastgen": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def measure(model: Any, workload: Workload, arguments: argparse.Namespace) -> list[Measurement]:
    """All engines in turn, round by round. Peers see the model restored, fastgen optimised."""
    engines: list[Callable[[], Measurement]] = [
        lambda: run_fastgen(model, workload, arguments.block_size)
    ]
    if not arguments.no_peers:
        engines.append(lambda: run_one_by_one(model, workload))
        if len(workload.requests) > 1:
            engines.append(lambda: run_static_batch(model, workload))
    return [engine() for _ in range(arguments.rounds) for engine in engines]


def run_fastgen(model: Any, workload: Workload, block_size: int) -> Measurement:
    api.optimize(model, block_size=block_size)
    try:
        with Engine(model) as engine:
            engine.generate([[1, 2, 3]], SamplingParams(max_tokens=2, temperature=0.0))  # warm up
            before = engine.metrics()
            params = [
                SamplingParams(max_tokens=length, temperature=0.0, ignore_eos=True)
                for _, length in workload.requests
            ]
            start = time.perf_counter()
            outputs = engine.generate([prompt for prompt, _ in workload.requests], params)
            seconds = time.perf_counter() - start
            after = engine.metrics()
    finally:
        api.restore(model)
    ttft = [output.metrics.ttft_ms for output in outputs if output.metrics.ttft_ms is not None]
    tpot = [output.metrics.tpot_ms for output in outputs if output.metrics.tpot_ms is not None]
    return Measurement(
        "fastgen",
        seconds,
        sum(len(output.token_ids) for output in outputs),
        statistics.mean(ttft),
        statistics.mean(tpot),
        after.engine_steps - before.engine_steps,
        after.computed_tokens - before.computed_tokens,
        after.cache_waste,
    )


def run_one_by_one(model: Any, workload: Workload) -> Measurement:
    """transformers' generate, one request after the other."""
    part = workload.requests
    name = "transformers, one by one"
    if len(part) > ONE_BY_ONE_REQUESTS:
        part = random.Random(1).sample(part, ONE_BY_ONE_REQUESTS)
        name += f" ({ONE_BY_ONE_REQUESTS} of {len(workload.requests)} requests)"
    start = time.perf_counter()
    for prompt, length in part:
        ids = torch.tensor([prompt], device=model.device)
        model.generate(ids, max_new_tokens=length, do_sample=False)
    return Measurement(name, time.perf_counter() - start, sum(length for _, length in part))


def run_static_batch(model: Any, workload: Workload) -> Measurement:
    """transformers' generate, all requests in one left-padded batch that runs to the longest."""
    longest = max(len(prompt) for prompt, _ in workload.requests)
    pads = [longest - len(prompt) for prompt, _ in workload.requests]
    ids = [[0] * pad + prompt for pad, (prompt, _) in zip(pads, workload.requests, strict=True)]
    mask = [[0] * pad + [1] * (longest - pad) for pad in pads]
    start = time.perf_counter()
    model.generate(
        torch.tensor(ids, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        max_new_tokens=max(length for _, length in workload.requests),
        do_sample=False,
    )
    name = f"transformers, one static batch of {len(workload.requests)}"
    return Measurement(name, time.perf_counter() - start, workload.output_tokens)


def block_waste(model: Any, workload: Workload) -> dict[str, float]:
    """Cache waste of the workload by block size; the scheduler alone decides it."""
    from ..engine.block_pool import BlockPool
    from ..engine.request import Request
    from ..engine.scheduler import Scheduler

    waste = {}
    for block_size in (16, 32, 64):
        scheduler = Scheduler(
            BlockPool(1 << 16), block_size=block_size, max_num_seqs=256, max_num_batched_tokens=2048
        )
        for prompt, length in workload.requests:
            params = SamplingParams(max_tokens=length, temperature=0.0)
            scheduler.add(Request(list(prompt), params))
        while (output := scheduler.schedule()).scheduled:
            scheduler.advance(output)
            for item in output.scheduled:
                if item.samples:
                    scheduler.append_token(item.request, 0)
        waste[str(block_size)] = scheduler.stats.cache_waste
    return waste


def measure_machine(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Read bandwidth in GB/s and GEMM rate in TFLOP/s, best of several tries."""

    def best(function: Callable[[], Any], tries: int) -> float:
        times = []
        for _ in range(tries):
            start = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return min(times)

    data = torch.ones(1 << 27, dtype=torch.float32, device=device)  # 512 MiB
    read = best(data.sum, 5)
    left = torch.randn(2048, 2048, device=device).to(dtype)
    gemm = best(lambda: left @ left, 5)
    return {
        "read_gb_per_s": data.nbytes / read / 1e9,
        "gemm_tflop_per_s": 2 * 2048**3 / gemm / 1e12,
    }


def summarize(rounds: list[Measurement]) -> list[dict[str, Any]]:
    """Medians per engine, and each one's time per token over fastgen's."""
    rows = []
    for name in dict.fromkeys(item.engine for item in rounds):
        items = [item for item in rounds if item.engine == name]
        rows.append(
            {
                **asdict(sorted(items, key=lambda item: item.seconds)[len(items) // 2]),
                "tokens_per_s": statistics.median(item.tokens_per_s for item in items),
                "all_tokens_per_s": [item.tokens_per_s for item in items],
            }
        )
    for row in rows:
        row["fastgen_is_faster_by"] = rows[0]["tokens_per_s"] / row["tokens_per_s"]
    return rows


def shares(model: Any, result: dict[str, Any]) -> dict[str, float]:
    """What share of the machine fastgen's run used: weights read per second, FLOP/s of linears."""
    fastgen, machine = result["engines"][0], result["machine"]
    embedding = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is embedding
    weights = list(model.parameters())
    read = sum(weight.nbytes for weight in weights) - (0 if tied else embedding.nbytes)
    head = model.get_output_embeddings().weight.numel()
    body = sum(weight.numel() for weight in weights if weight.dim() == 2)
    body -= head + (0 if tied else embedding.numel())
    flops = 2 * (body * fastgen["computed_tokens"] + head * fastgen["output_tokens"])
    seconds = fastgen["seconds"]
    return {
        "read_bandwidth": read * fastgen["steps"] / seconds / 1e9 / machine["read_gb_per_s"],
        "gemm_rate": flops / seconds / 1e12 / machine["gemm_tflop_per_s"],
    }


def show(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    where, parity, machine = result["setting"], result["parity"], result["machine"]
    console = Console()
    console.print(
        f"{where['model']}, {where['dtype']}, {where['device']} ({where['threads']} threads), "
        f"workload {where['workload']}: {where['requests']} requests, {where['prompt_tokens']} "
        f"prompt and {where['output_tokens']} output tokens; fastgen {where['fastgen']}, torch "
        f"{where['torch']}, transformers {where['transformers']}"
    )
    console.print(
        f"parity: passed; fp32 tokens equal on {parity['fp32_requests']} requests "
        f"({parity['fp32_tokens']} tokens, {parity['chunked_requests']} chunked); first-step "
        f"logits off by {parity['logits_error']:.2e}, transformers' own by "
        f"{parity['transformers_logits_error']:.2e}; equal tokens in {where['dtype']}: "
        f"{parity['equal_token_share']:.0%}"
    )
    table = Table()
    for name in ("engine", "tokens/s", "fastgen is", "TTFT ms", "TPOT ms"):
        table.add_column(name, justify="left" if name == "engine" else "right")
    for row in result["engines"]:
        table.add_row(
            row["engine"],
            f"{row['tokens_per_s']:.1f}",
            f"{row['fastgen_is_faster_by']:.2f}x",
            "" if row["ttft_ms"] is None else f"{row['ttft_ms']:.0f}",
            "" if row["tpot_ms"] is None else f"{row['tpot_ms']:.1f}",
        )
    console.print(table)
    share = result["shares"]
    console.print(
        f"machine: reads {machine['read_gb_per_s']:.1f} GB/s, GEMM "
        f"{machine['gemm_tflop_per_s']:.2f} TFLOP/s; fastgen read weights at "
        f"{share['read_bandwidth']:.0%} and computed at {share['gemm_rate']:.0%} of that"
    )
    if result["waste"]:
        by_size = ", ".join(f"{size}: {part:.1%}" for size, part in result["waste"].items())
        console.print(f"cache waste by block size: {by_size}")
