"""fastgen soak: thousands of requests of every conduct through one engine, and what became of them.

Random prompts, lengths, priorities and deadlines; requests that are cancelled before they run, in
the middle and after their end; readers that are slow, killed, or gone; at last eight threads at
once. While they run, blocks are counted and memory is watched; afterwards some are run again alone.

Exit code: 0 if all was well, 1 if anything was not as it must be.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from .. import __version__
from ..bench.soak.run import Setting, soak
from .models import add_model_arguments, load_model


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "soak", help="thousands of requests of every conduct, checked", description=__doc__
    )
    add_model_arguments(parser, required=False)
    default = Setting()
    for option, value, what in (
        ("--requests", default.num_requests, "how many"),
        ("--seed", default.seed, "of what is asked; when it comes depends on the machine"),
        ("--checked", default.num_checked, "how many, about, are run again alone"),
    ):
        parser.add_argument(option, type=int, default=value, help=f"{what}; default: {value}")
    parser.add_argument("--threads", type=int, default=None, help="torch threads")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run, model=Path("demo"))


def run(arguments: argparse.Namespace) -> int:
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    setting = Setting(
        num_requests=arguments.requests, seed=arguments.seed, num_checked=arguments.checked
    )

    def show_progress(num_ended: int) -> None:
        print(f"{num_ended} of {setting.num_requests} have ended", file=sys.stderr)

    model, tokenizer = load_model(arguments.model, arguments.dtype, arguments.device)
    result = {
        "model": str(arguments.model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": arguments.device,
        "versions": {
            "fastgen": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        **soak(model, tokenizer, setting, show_progress),
    }
    print(json.dumps(result, indent=2) if arguments.json else "\n".join(lines(result)))
    return 1 if result["num_violations"] else 0


def lines(result: dict[str, Any]) -> Iterator[str]:
    """The report as text."""
    setting, blocks, memory = result["setting"], result["blocks"], result["memory"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    yield (
        f"{setting['num_requests']} requests, seed {setting['seed']}, of {result['model']} "
        f"({result['dtype']}, {result['device']}); {versions}"
    )
    yield f"{'':<36}{'outputs that ended by':>34}"
    reasons = ("stop", "length", "cancelled", "deadline", "error")
    yield f"{'a request that':<36}" + "".join(f"{reason:>11}" for reason in reasons)
    for conduct, counts in result["by_conduct"].items():
        yield f"{conduct:<36}" + "".join(f"{counts.get(reason, ''):>11}" for reason in reasons)
    yield f"{'as the engine counts':<36}" + "".join(
        f"{result['finished'].get(reason, 0):>11}" for reason in reasons
    )
    states = ", ".join(f"{count} {state}" for state, count in result["cancelled_while"].items())
    yield f"cancelled when it was: {states}; given up while submitted: {result['given_up']}"
    yield f"turned away by a full queue, and came again: {result['queue_full']} times"
    for name in ("queue_time_ms", "ttft_ms", "tpot_ms"):
        values = ", ".join(
            f"{share} {'-' if value is None else f'{value:.1f}'}"
            for share, value in result[name].items()
        )
        title = {"queue_time_ms": "queue", "ttft_ms": "TTFT", "tpot_ms": "TPOT"}[name]
        yield f"{title} ms: {values}"
    yield (
        f"{result['output_tokens']} output and {result['prompt_tokens']} prompt tokens in "
        f"{result['seconds']:.1f} s, {result['engine_steps']} steps: "
        f"{result['output_tokens_per_s']:.0f} output tokens/s; {result['preemptions']} "
        f"preemptions, {result['prefix_cache_hit_rate']:.0%} of prompts found in the cache"
    )
    yield (
        f"blocks: {blocks['free_at_the_end']} of {blocks['total']} free at the end, at most "
        f"{blocks['most_used']} in use; counted anew {blocks['samples']} times"
    )
    yield f"memory: {_memory(memory)}; peak {_mib(result['peak_rss_bytes'])}"
    compared = result["compared"]
    yield (
        f"run again alone: {compared['whole']} that were whole, {compared['cut']} that were cut "
        "short, whose tokens must be the beginning"
    )
    yield from (f"VIOLATION: {text}" for text in result["violations"])
    count = result["num_violations"]
    yield "all was well" if not count else f"{count} violations"


def _memory(memory: dict[str, Any]) -> str:
    if memory["is_flat"] is None:
        return f"too few samples to judge ({memory['samples']})"
    return (
        f"median {_mib(memory['first_bytes'])} in the first and {_mib(memory['last_bytes'])} in "
        f"the last quarter of {memory['samples']} samples after the warm-up (allowed: "
        f"{_mib(memory['allowed_bytes'])} more)"
    )


def _mib(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**20:.1f} MiB"
