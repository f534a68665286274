"""Walk all types, or those that are named: `python -m every_model [TYPE ...] [-n N]`."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import sys
from pathlib import Path

from .walk import walk


def main() -> int:
    parser = argparse.ArgumentParser(prog="every_model", description=__doc__)
    parser.add_argument("types", nargs="*", help="all of transformers' causal LMs, if none")
    parser.add_argument("-n", type=int, default=2, help="processes at a time")
    parser.add_argument("--out", type=Path, default=Path("build/models.json"))
    parser.add_argument("--table", type=Path, help="where the Markdown table is written")
    parser.add_argument("--resume", action="store_true", help="keep what is in --out already")
    parser.add_argument("--cpu-seconds", type=int, default=240, help="allowed for one type")
    args = parser.parse_args()
    return walk(args.types, args.out, args.n, args.cpu_seconds, args.resume, args.table)


if __name__ == "__main__":
    sys.exit(main())
