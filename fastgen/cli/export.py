"""fastgen export: a model as a folder that `fastgen generate --artifact` runs without its code."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from ..artifact.export import Progress, export
from ..artifact.program import DEFAULT, PROGRAMS
from .models import add_model_arguments, load_model


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "export", help="write a model, rewritten, into a folder", description=__doc__
    )
    add_model_arguments(parser, required=True)
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="new or empty")
    parser.add_argument(
        "--program", choices=PROGRAMS, default=DEFAULT, help=f"how it will run; default: {DEFAULT}"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    with shown_progress() as progress:
        progress("model", 0, 1)
        model, tokenizer = load_model(arguments.model, arguments.dtype, arguments.device)
        report = export(
            model,
            arguments.out,
            program=arguments.program,
            tokenizer=tokenizer,
            progress=progress,
        )
    print(report)
    return 0


@contextlib.contextmanager
def shown_progress() -> Iterator[Progress]:
    """What is being done, on stderr: as a bar (needs rich), or a line each if it is no terminal."""
    if not sys.stderr.isatty():
        said: set[str] = set()

        def say(what: str, done: int, total: int) -> None:
            if what not in said:
                print(f"{what} ...", file=sys.stderr)
            said.add(what)

        yield say
        return
    from rich.console import Console
    from rich.progress import Progress as Bars

    with Bars(console=Console(stderr=True), transient=True) as bars:
        tasks = {}

        def show(what: str, done: int, total: int) -> None:
            for other, task in tasks.items():
                if other != what:  # what came before has ended
                    bars.update(task, total=1, completed=1)
            if what not in tasks:
                tasks[what] = bars.add_task(what)
            bars.update(tasks[what], total=total if done else None, completed=done)

        yield show
