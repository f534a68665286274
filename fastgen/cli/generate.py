"""Continue a prompt or answer a message, token by token; or several at once, printed at the end.

With one --prompt the text is printed as it comes. With more, or with --watch, all run together,
and their texts are printed in the order of the prompts when the last has ended, each after a line
`=== prompt N`, which a single one goes without. Text goes to stdout; times and metrics to stderr.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .. import Engine, RequestOutput, SamplingParams, load
from ..errors import RequestFailedError
from ..outputs import RequestMetrics
from .models import add_model_arguments, load_model
from .progress import shown_progress
from .watch import watch


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "generate",
        help="generate text from a prompt",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(parser, required=False)
    parser.add_argument(
        "--artifact",
        metavar="DIR",
        type=Path,
        help="what `fastgen export` wrote, instead of --model; load none that you would not run",
    )
    parser.add_argument(
        "--prompt",
        required=True,
        action="append",
        metavar="TEXT",
        help="text to continue, or a message with --chat; may be given several times",
    )
    parser.add_argument("--chat", action="store_true", help="use the model's chat template")
    parser.add_argument("--max-tokens", type=int, default=128, help="default: 128")
    parser.add_argument("--temperature", type=float, default=0.0, help="default: 0, greedy")
    parser.add_argument("--top-k", type=int, default=0, help="default: 0, all")
    parser.add_argument("--top-p", type=float, default=1.0, help="default: 1, all")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument(
        "--watch",
        action="store_true",
        help="show the engine's metrics on stderr while prompts run: a live table (needs rich), or "
        "a line per second if stderr is no terminal; the texts follow at the end. Quantiles are "
        "estimates, wrong by at most 13.2%%",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    params = SamplingParams(
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )
    model, tokenizer = _model(arguments)
    prompts: list[Any] = arguments.prompt
    if arguments.chat:
        prompts = [[{"role": "user", "content": text}] for text in prompts]
    with Engine(model, tokenizer) as engine:
        if len(prompts) == 1 and not arguments.watch:
            _stream(engine, prompts[0], params)
            return 0
        requests = [engine.submit(prompt, params) for prompt in prompts]
        if arguments.watch:
            watch(engine, requests, sys.stderr)  # stdout is for the texts
        outputs = [engine.result(request) for request in requests]
    for number, output in enumerate(outputs, 1):
        if len(outputs) > 1:
            print(f"=== prompt {number}")
        print(output.text)
        _tell(output.finish_reason, output.metrics)
    _raise_failures(outputs)
    return 0


def _model(arguments: argparse.Namespace) -> tuple[Any, Any]:
    if (arguments.model is None) == (arguments.artifact is None):
        raise ValueError("give either --model DIR or --artifact DIR")
    if arguments.artifact is None:
        return load_model(arguments.model, arguments.dtype, arguments.device)
    if arguments.dtype is not None or arguments.device != "cpu":
        raise ValueError("an artifact has the dtype and the device that it was exported with")
    with shown_progress() as progress:
        model = load(arguments.artifact, progress=progress)
    return model, model.tokenizer


def _stream(engine: Engine, prompt: Any, params: SamplingParams) -> None:
    event = None
    for event in engine.stream(engine.submit(prompt, params)):
        print(event.text, end="", flush=True)
    print()
    if event is not None and event.metrics is not None:
        _tell(str(event.finish_reason), event.metrics)


def _tell(reason: str, metrics: RequestMetrics) -> None:
    print(
        f"[{reason}: {metrics.num_output_tokens} tokens, "
        f"TTFT {metrics.ttft_ms or 0:.0f} ms, TPOT {metrics.tpot_ms or 0:.1f} ms]",
        file=sys.stderr,
    )


def _raise_failures(outputs: list[RequestOutput]) -> None:
    """Raises: RequestFailedError if any of them has ended by an error."""
    failed = [f"prompt {n}: {out.error}" for n, out in enumerate(outputs, 1) if out.error]
    if failed:
        raise RequestFailedError("; ".join(failed))
