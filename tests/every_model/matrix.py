"""Every type under each supported version: `python -m every_model.matrix`.

Makes a virtual environment per version in .matrix/, walks all types in it, and writes which types
differ in class between the versions, and why, to results/matrix.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

TORCH = "2.13.0"
TRANSFORMERS = ("5.23.0", "5.17.0")  # the newest known, and the oldest supported
_ROOT = Path(__file__).resolve().parents[2]
_FOLDER = _ROOT / ".matrix"


def environment(version: str) -> Path:
    """The Python of an environment with this transformers; made if it is not there."""
    place = _FOLDER / f"transformers-{version}"
    python = place / "bin" / "python"
    if not (place / ".installed").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", place], check=True)
        # Without the constraints, which fix one version of transformers; torch first, so that
        # nothing else pulls another build of it.
        pip = [python, "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, f"torch=={TORCH}"], check=True)
        wanted = f"transformers=={version}"
        subprocess.run([*pip, wanted, "-e", f"{_ROOT}[dev]"], check=True)
        (place / ".installed").touch()
    return python


def walk_in(version: str, python: Path, processes: int) -> dict[str, dict]:
    """The verdicts of all types that this transformers has."""
    out = _FOLDER / f"models-{version}.json"
    command = [python, "-m", "every_model", "-n", str(processes), "--resume", "--out", out]
    env = {**os.environ, "PYTHONPATH": str(_ROOT / "tests")}
    done = subprocess.run(command, env=env, cwd=_ROOT, check=False)
    if done.returncode not in (0, 1):  # 1: a type is wrong or unproven, which the table shows
        raise SystemExit(f"the walk with transformers {version} ended with {done.returncode}")
    return json.loads(out.read_text())


def comparison(walks: dict[str, dict[str, dict]]) -> str:
    """Markdown: counts per version, and a line per type whose class is not the same everywhere."""
    versions = list(walks)
    outcomes = {
        version: Counter(verdict["outcome"] for verdict in verdicts.values())
        for version, verdicts in walks.items()
    }
    lines = [
        "# Every causal LM under each supported transformers",
        "",
        f"torch {TORCH}, fp32 on the CPU; written by `make matrix`. What the classes mean:",
        "[MODELS.md](../MODELS.md).",
        "",
        f"| | {' | '.join(versions)} |",
        "|---|" + "---|" * len(versions),
    ]
    rows = {name: None for counts in outcomes.values() for name in counts}
    for name in rows:
        numbers = " | ".join(str(outcomes[version][name]) for version in versions)
        lines.append(f"| {name} | {numbers} |")
    lines += [
        "",
        "Types whose class differs (types that a version does not have are left out):",
        "",
        f"| type | {' | '.join(versions)} | why |",
        "|---|" + "---|" * (len(versions) + 1),
    ]
    shared = set.intersection(*(set(verdicts) for verdicts in walks.values()))
    for name in sorted(shared):
        found = [walks[version][name] for version in versions]
        if len({verdict["outcome"] for verdict in found}) > 1:
            reasons = dict.fromkeys(verdict["reason"] for verdict in found if verdict["reason"])
            why = "; ".join(reasons).replace("|", "\\|").replace("<", "&lt;")
            cells = [name, *(verdict["outcome"] for verdict in found), why]
            lines.append(f"| {' | '.join(cells)} |")
    for version in versions:
        others = {name for other in versions for name in walks[other]} - set(walks[version])
        if others:
            lines += ["", f"transformers {version} lacks: {', '.join(sorted(others))}."]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="every_model.matrix", description=__doc__)
    parser.add_argument("versions", nargs="*", default=TRANSFORMERS)
    parser.add_argument("-n", type=int, default=2, help="processes at a time")
    parser.add_argument("--test", action="store_true", help="run the quick tests in each, too")
    args = parser.parse_args()
    walks, failed = {}, []
    for version in args.versions:
        python = environment(version)
        walks[version] = walk_in(version, python, args.n)
        if args.test:
            tests = [python, "-m", "pytest", "-n", "auto", "--dist", "loadfile", "-m", "not slow"]
            if subprocess.run(tests, cwd=_ROOT, check=False).returncode:
                failed.append(version)
    (_ROOT / "results" / "matrix.md").write_text(comparison(walks))
    for version in failed:
        print(f"tests failed with transformers {version}")
    bad = ("WRONG", "unproven")
    return int(
        bool(failed) or any(v["outcome"] in bad for walk in walks.values() for v in walk.values())
    )


if __name__ == "__main__":
    sys.exit(main())
