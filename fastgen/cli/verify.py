"""fastgen verify: whether fastgen computes what transformers computes, and where they part.

Exit code: 0 equal within the noise, 1 different, 2 could not be compared.
"""

from __future__ import annotations

import argparse
import sys
import traceback

from ..errors import FastgenError
from ..verification import verify
from .models import add_model_arguments, load_model


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "verify", help="compare tokens, logits and layers with transformers", description=__doc__
    )
    add_model_arguments(parser, required=True)
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="may be given several times; default: random tokens of several lengths",
    )
    parser.add_argument("--max-new-tokens", type=int, default=24, help="default: 24")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    try:
        model, tokenizer = load_model(arguments.model, arguments.dtype, arguments.device)
        report = verify(
            model,
            arguments.prompt,
            tokenizer=tokenizer,
            max_new_tokens=arguments.max_new_tokens,
        )
    except (FastgenError, OSError, ValueError) as error:
        print(f"fastgen: {error}", file=sys.stderr)
        return 2
    except Exception:  # else Python would end with 1, which means that they differ
        traceback.print_exc()
        return 2
    print(report.to_json() if arguments.json else report)
    return 0 if report.ok else 1
