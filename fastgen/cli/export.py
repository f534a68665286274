"""fastgen export: a model as a folder that `fastgen generate --artifact` runs without its code."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..artifact.export import export
from ..artifact.program import DEFAULT, PROGRAMS
from .models import add_model_arguments, load_model
from .progress import shown_progress


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
