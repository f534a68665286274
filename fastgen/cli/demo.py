"""fastgen demo: requests of unequal length through continuous batching, next to transformers."""

from __future__ import annotations

import argparse
import threading
import time
from pathlib import Path
from typing import Any

from .. import Engine, RequestOutput, SamplingParams, api
from ..text import encode_prompt
from .models import add_model_arguments, load_model

ASK = "Write a Python function, "
# What is asked, and the most tokens it may get; texts that begin with ASK are sent as a chat.
REQUESTS = (
    ("def read_file(path):\n", 64),
    (ASK + "`is_absolute(path)`: Return True if the path is absolute.", 96),
    ("def parse_args(args):\n", 96),
    (ASK + "`read_lines(path)`: Return the lines of a file as a list.", 48),
    ("def add(self, key, value):\n", 80),
    (ASK + "`remove(path)`: Remove a file.", 64),
    ("with open(path) as f:\n", 56),
    (ASK + "`find(self, name)`: Find an entry by its name.", 112),
    ("def get(self, name, default=None):\n", 72),
    (ASK + "`is_empty(queue)`: Return True if the queue is empty.", 40),
    ("def sort(items):\n", 48),
    (ASK + "`parse_header(line)`: Parse a header line.", 32),
)


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "demo", help="watch continuous batching, compare with transformers", description=__doc__
    )
    add_model_arguments(parser, required=False)
    parser.add_argument("--max-num-seqs", type=int, default=6, help="rows per step; default: 6")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    console = Console()
    folder = arguments.model or Path("demo")
    model, tokenizer = load_model(folder, arguments.dtype or "float32", arguments.device)
    prompts = [
        encode_prompt(
            [{"role": "user", "content": text}] if text.startswith(ASK) else text, tokenizer
        )
        for text, _ in REQUESTS
    ]
    console.print(
        f"[bold]fastgen demo[/bold]: {len(REQUESTS)} requests on a "
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameter model "
        f"({model.dtype}, {model.device}), up to {arguments.max_num_seqs} at a time"
    )
    expected, reference = run_transformers(model, prompts)
    api.optimize(model, max_num_seqs=arguments.max_num_seqs)
    with Engine(model, tokenizer) as engine:
        outputs, seconds = run_engine(engine, prompts, console)
        explanation = api.explain(model)
    equal = sum(out.token_ids == want for out, want in zip(outputs, expected, strict=True))
    console.print(comparison(outputs, seconds, reference))
    verdict = "equal" if equal == len(outputs) else "NOT equal"
    console.print(f"tokens of fastgen and transformers: [bold]{equal} of {len(outputs)} {verdict}")
    console.print(str(explanation), highlight=False, markup=False)
    return 0 if equal == len(outputs) else 1


def run_transformers(
    model: Any, prompts: list[list[int]]
) -> tuple[list[list[int]], dict[str, float]]:
    """The same prompts one after the other through plain transformers, before optimisation."""
    import torch

    class Clock:
        """A streamer that notes when the prompt and each token arrive."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: Any) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    tokens, first, per_token = [], [], []
    start = time.perf_counter()
    for prompt, (_, length) in zip(prompts, REQUESTS, strict=True):
        clock, ids = Clock(), torch.tensor([prompt], device=model.device)
        out = model.generate(ids, max_new_tokens=length, do_sample=False, streamer=clock)
        tokens.append(out[0, len(prompt) :].tolist())
        arrivals = clock.times[1:]
        # All prompts are there at the start, so that waiting for one's turn counts.
        first.append((arrivals[0] - start) * 1e3)
        if len(arrivals) > 1:
            per_token.append((arrivals[-1] - arrivals[0]) / (len(arrivals) - 1) * 1e3)
    seconds = time.perf_counter() - start
    return tokens, {
        "ttft_ms": sum(first) / len(first),
        "tpot_ms": sum(per_token) / len(per_token),
        "tokens_per_s": sum(map(len, tokens)) / seconds,
    }


def run_engine(
    engine: Engine, prompts: list[list[int]], console: Any
) -> tuple[list[RequestOutput], float]:
    """All prompts at once through the engine, shown as they grow."""
    from rich.live import Live

    texts = [""] * len(prompts)
    states = ["waiting"] * len(prompts)
    outputs: list[RequestOutput | None] = [None] * len(prompts)

    def follow(index: int, request: Any) -> None:
        for event in engine.stream(request):
            states[index] = event.finish_reason or "running"
            texts[index] += event.text
        outputs[index] = engine.result(request)

    start = time.perf_counter()
    requests = [
        engine.submit(prompt, SamplingParams(max_tokens=length, temperature=0.0))
        for prompt, (_, length) in zip(prompts, REQUESTS, strict=True)
    ]
    threads = [
        threading.Thread(target=follow, args=item, daemon=True) for item in enumerate(requests)
    ]
    with Live(console=console, refresh_per_second=12, transient=False) as live:
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            live.update(progress(texts, states))
            time.sleep(0.05)
        seconds = max(r.finish_time or start for r in requests) - start
        live.update(progress(texts, states))
    return [output for output in outputs if output is not None], seconds


def progress(texts: list[str], states: list[str]) -> Any:
    """One line per request: what it was asked, what came so far."""
    from rich.table import Table
    from rich.text import Text

    colours = {"waiting": "dim", "running": "yellow"}
    table = Table(box=None, pad_edge=False)
    table.add_column("request", no_wrap=True, min_width=28)
    table.add_column("state", no_wrap=True, min_width=7)
    table.add_column("the end of its text", no_wrap=True, overflow="ellipsis")
    for (prompt, _), text, state in zip(REQUESTS, texts, states, strict=True):
        tail = " ".join(text.split())
        table.add_row(
            Text(" ".join(prompt.removeprefix(ASK).split())[:28]),
            Text(state, style=colours.get(state, "green")),
            Text(tail[-60:]),
        )
    return table


def comparison(outputs: list[RequestOutput], seconds: float, reference: dict[str, float]) -> Any:
    """TTFT, TPOT and tokens/s of both."""
    from rich.table import Table

    def mean(values: list[float | None]) -> float:
        known = [value for value in values if value is not None]
        return sum(known) / len(known)

    table = Table(title="means over the requests, all there at the start")
    for name in ("", "TTFT ms", "TPOT ms", "tokens/s"):
        table.add_column(name, justify="right" if name else "left")
    rate = sum(len(output.token_ids) for output in outputs) / seconds
    ttft = mean([output.metrics.ttft_ms for output in outputs])
    tpot = mean([output.metrics.tpot_ms for output in outputs])
    table.add_row("fastgen", f"{ttft:.0f}", f"{tpot:.1f}", f"{rate:.0f}")
    table.add_row(
        "transformers, one by one",
        f"{reference['ttft_ms']:.0f}",
        f"{reference['tpot_ms']:.1f}",
        f"{reference['tokens_per_s']:.0f}",
    )
    return table
