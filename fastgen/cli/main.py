"""Entry point: reads the arguments, runs one command, turns errors into messages."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from .._version import __version__
from ..errors import FastgenError
from . import bench, cache, demo, explain, export, generate, kernels, plan, verify

COMMANDS = (demo, generate, export, explain, bench, verify, plan, cache, kernels)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastgen", description="Fast generation for Hugging Face causal LMs."
    )
    parser.add_argument("--version", action="version", version=f"fastgen {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for command in COMMANDS:
        command.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 for an error, 2 for bad arguments, 130."""
    arguments = build_parser().parse_args(argv)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        return arguments.run(arguments)
    except ImportError as error:
        extra = {"rich": "cli", "matplotlib": "plot"}.get(error.name or "")
        if extra is None:
            raise
        needed = f"pip install 'torch-fastgen[{extra}]'"
        print(f"this command needs {error.name}: {needed}", file=sys.stderr)
        return 1
    except (FastgenError, OSError, ValueError) as error:
        print(f"fastgen: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fastgen: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
