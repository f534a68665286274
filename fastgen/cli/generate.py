"""fastgen generate: continue a prompt or answer a message, token by token."""

from __future__ import annotations

import argparse
import sys

from .. import Engine, SamplingParams
from .models import add_model_arguments, load_model


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "generate", help="generate text from a prompt", description=__doc__
    )
    add_model_arguments(parser, required=True)
    parser.add_argument(
        "--prompt", required=True, help="text to continue, or a message with --chat"
    )
    parser.add_argument("--chat", action="store_true", help="use the model's chat template")
    parser.add_argument("--max-tokens", type=int, default=128, help="default: 128")
    parser.add_argument("--temperature", type=float, default=0.0, help="default: 0, greedy")
    parser.add_argument("--top-k", type=int, default=0, help="default: 0, all")
    parser.add_argument("--top-p", type=float, default=1.0, help="default: 1, all")
    parser.add_argument("--seed", type=int, default=None)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    params = SamplingParams(
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )
    model, tokenizer = load_model(arguments.model, arguments.dtype, arguments.device)
    prompt = arguments.prompt
    if arguments.chat:
        prompt = [{"role": "user", "content": arguments.prompt}]
    with Engine(model, tokenizer) as engine:
        event = None
        for event in engine.stream(engine.submit(prompt, params)):
            print(event.text, end="", flush=True)
        print()
        if event is not None and event.metrics is not None:
            metrics = event.metrics
            print(
                f"[{event.finish_reason}: {metrics.num_output_tokens} tokens, "
                f"TTFT {metrics.ttft_ms or 0:.0f} ms, TPOT {metrics.tpot_ms or 0:.1f} ms]",
                file=sys.stderr,
            )
    return 0
