"""fastgen explain: what fastgen does to a model, and what it refuses."""

from __future__ import annotations

import argparse

from .. import api
from .models import add_model_arguments, load_model, random_model


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "explain", help="show what is rewritten in a model", description=__doc__
    )
    add_model_arguments(parser, required=False)
    parser.add_argument("--shape", help="a known shape with random weights instead of --model")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if (arguments.model is None) == (arguments.shape is None):
        raise ValueError("give either --model DIR or --shape NAME")
    if arguments.model is not None:
        model, _ = load_model(arguments.model, arguments.dtype, arguments.device)
    else:
        model = random_model(arguments.shape, arguments.dtype or "bfloat16", arguments.device)
    explanation = api.explain(api.optimize(model))
    print(explanation.to_json() if arguments.json else explanation)
    return 0
