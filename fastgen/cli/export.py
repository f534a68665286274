"""fastgen export: a model as a folder that `fastgen generate --artifact` runs without its code."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..artifact.export import FORMATS, export
from ..artifact.program import DEFAULT, PROGRAMS
from .models import add_model_arguments, load_model
from .progress import shown_progress


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "export", help="write a model, rewritten, into a folder", description=__doc__
    )
    add_model_arguments(parser, required=True)
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        required=True,
        help="a folder, new or empty; for --format graph a new file *.pt2",
    )
    parser.add_argument(
        "--program", choices=PROGRAMS, default=DEFAULT, help=f"how it will run; default: {DEFAULT}"
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default=FORMATS[0],
        help="artifact: the folder; graph: one file *.pt2 for torch alone; default: artifact",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    with shown_progress() as progress:
        progress("model", 0, 1)
        model, tokenizer = load_model(arguments.model, arguments.dtype, arguments.device)
        report = export(
            model,
            arguments.out,
            format=arguments.format,
            program=arguments.program,
            tokenizer=tokenizer,
            progress=progress,
        )
    print(report)
    return 0
