"""Check fastgen on this machine's GPU: kernels, tokens, and speed beside the goals.

    python examples/gpu_check.py --out results/gpu            # on a machine with a CUDA device
    python examples/gpu_check.py --out DIR --device cpu       # a dry run of the same code

Sections run in order, each within its time; each writes DIR/NAME.json as it goes, so that a run
that is cut short leaves what it has. At the end DIR/README.md says it all. No network is needed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from pathlib import Path

from fastgen.bench.gpu.report import report
from fastgen.bench.gpu.sections import BUDGET_S, is_wrong, run_sections, sections


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help="time for all sections")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run these sections only")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    if arguments.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before anybody imports Triton
    elif shutil.which("nvidia-smi") is None:
        parser.error("no NVIDIA driver here; use --device cpu for a dry run")
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as caches:
        os.environ["TRITON_CACHE_DIR"] = f"{caches}/triton"
        if arguments.device == "cuda":  # on the CPU that would compile the C++ kernels again
            os.environ["FASTGEN_CACHE_DIR"] = f"{caches}/fastgen"
        known = sections(arguments.device, Path(caches))
        names = [section.name for section in known]
        if wrong := set(arguments.only or ()) - set(names):
            parser.error(f"--only takes {', '.join(names)}; got {', '.join(sorted(wrong))}")
        chosen = [each for each in known if each.name in (arguments.only or names)]
        records = run_sections(
            chosen,
            arguments.out,
            arguments.device,
            arguments.budget_s,
            lambda line: print(line, flush=True),
        )
    (arguments.out / "README.md").write_text(report(records))
    print(f"written: {arguments.out / 'README.md'}")
    return 1 if is_wrong(records) else 0


if __name__ == "__main__":
    raise SystemExit(main())
