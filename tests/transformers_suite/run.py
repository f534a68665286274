"""Run transformers' own generation tests with every model optimised by fastgen first.

    python tests/transformers_suite/run.py /path/to/a/checkout/of/transformers

Each test file runs without fastgen (the baseline) and with it, in processes of their own. A test
that passes in the baseline is counted as native, transformers' loop, without generate(), or failed.
Writes results.json and results.md; the exit code is 1 if a test fails with fastgen only, or a file
cannot be run. The tests need what the checkout's tests need (`parameterized`, `httpx`, ...). They
run offline, on tiny stand-ins for models of the hub, unless --hub is given. A run that was
interrupted goes on where it was, if it is given the same --out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comparison import KINDS, Comparison, compare, markdown, results
from stand_ins import write_stand_ins
from suite_plugin import read_lines

HERE = Path(__file__).parent
MODES = ("baseline", "fastgen")
NO_TESTS = "no test is about generation"
GENERATION = (
    "tests/generation/test_utils.py",
    "tests/generation/test_logits_process.py",
    "tests/generation/test_stopping_criteria.py",
    "tests/generation/test_streamers.py",
    "tests/generation/test_candidate_generator.py",
    "tests/generation/test_configuration_utils.py",
    "tests/pipelines/test_pipelines_text_generation.py",
)


def main() -> int:
    arguments = parse_arguments()
    checkout, out = arguments.checkout.resolve(), arguments.out.resolve()
    files = chosen_files(checkout, arguments.families, arguments.generation)
    out.mkdir(parents=True, exist_ok=True)
    if not arguments.hub:
        write_stand_ins(out / "hub")
        os.environ.update(HF_HUB_CACHE=str(out / "hub"), HF_HUB_OFFLINE="1")
    with ThreadPoolExecutor(arguments.jobs) as pool:
        suite = Suite(checkout, out, arguments.keyword, arguments.timeout)
        compared = pool.map(suite.compare_file, files)
        comparisons: dict[str, Comparison] = {}
        for file, comparison in zip(files, compared, strict=True):
            comparisons[Path(file).stem.removeprefix("test_modeling_")] = comparison
            print(f"{file}: {summary(comparison)}", flush=True)
            write_results(checkout, comparisons, out)
    print((out / "results.md").read_text())
    return int(any(c.failures or c.not_run for c in comparisons.values()))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("checkout", type=Path, help="has tests/ and conftest.py of transformers")
    parser.add_argument(
        "--families",
        nargs="*",
        help='folders of tests/models, or "all"; default: the families of tests/tiny_models.py',
    )
    parser.add_argument(
        "--no-generation",
        dest="generation",
        action="store_false",
        help="leave out the tests that are not about one family",
    )
    parser.add_argument(
        "--hub",
        action="store_true",
        help="use the hub, or what is cached of it, and no stand-ins for its tiny models",
    )
    parser.add_argument("--out", type=Path, default=Path("transformers-suite"), help="for results")
    parser.add_argument("-k", dest="keyword", default="", help="only these tests, as for pytest")
    parser.add_argument("--jobs", type=int, default=1, help="test files at the same time")
    parser.add_argument("--timeout", type=int, default=600, help="seconds in which a test must end")
    return parser.parse_args()


def chosen_files(checkout: Path, families: list[str] | None, generation: bool) -> list[str]:
    """Paths of test files in the checkout."""
    if families is None:
        sys.path.insert(0, str(HERE.parent))
        from tiny_models import FAMILIES

        families = [family.removesuffix("_text") for family in FAMILIES]
    if families == ["all"]:
        found = sorted(checkout.glob("tests/models/*/test_modeling_*.py"))
        files = [str(path.relative_to(checkout)) for path in found]
    else:
        files = [f"tests/models/{name}/test_modeling_{name}.py" for name in families]
    if generation:
        files = [*GENERATION, *files]
    if missing := [file for file in files if not (checkout / file).exists()]:
        raise SystemExit(f"{checkout} must be a checkout of transformers; it has no {missing}")
    return files


@dataclass(frozen=True)
class Suite:
    """Runs test files of a checkout, and keeps their records and logs in the folder `out`."""

    checkout: Path
    out: Path
    keyword: str
    timeout: int  # seconds

    def compare_file(self, file: str) -> Comparison:
        """Run one test file in both modes."""
        found: dict[str, dict[str, Any]] = {}
        for mode in MODES:
            record = self.out / f"{file.replace('/', '.')}.{mode}.jsonl"
            forget_interrupted(record)
            how_it_ended = self._run_file(file, mode, record)
            found[mode] = results(read_lines(record), how_it_ended)
            if not found[mode] and how_it_ended != NO_TESTS:
                log = record.with_suffix(".log")
                return Comparison(not_run=f"{mode}: {how_it_ended}, before any test; see {log}")
        return compare(found["baseline"], found["fastgen"])

    def _run_file(self, file: str, mode: str, record: Path) -> str:
        """Run until every test was begun; how the process ended that took a test with it."""
        how_it_ended = ""
        while True:
            num_before = len(read_lines(record))
            ended = self._run_pytest(file, mode, record)
            lines = read_lines(record)
            if not lines or lines[-1]["event"] == "ends" or len(lines) == num_before:
                return how_it_ended or ended
            how_it_ended = ended

    def _run_pytest(self, file: str, mode: str, record: Path) -> str:
        """One process, which continues the record; how it ended. It is ended if nothing happens."""
        command = [sys.executable, "-m", "pytest", file, "-q", "-p", "suite_plugin"]
        command += ["-p", "no:cacheprovider", "-k", self.keyword]
        command += [f"--suite-mode={mode}", f"--suite-record={record}"]
        python_path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": python_path}
        with record.with_suffix(".log").open("a") as log:
            process = subprocess.Popen(
                command, cwd=self.checkout, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
            size = -1
            while True:
                try:
                    code = process.wait(self.timeout)
                    return NO_TESTS if code in (0, 5) else f"pytest ended with exit code {code}"
                except subprocess.TimeoutExpired:
                    size, before = record.stat().st_size if record.exists() else 0, size
                    if size == before:
                        process.kill()
                        process.wait()
                        return f"no test began or ended within {self.timeout} s"


def forget_interrupted(record: Path) -> None:
    """Take away a test that began and never ended, because the run itself was interrupted."""
    lines = read_lines(record)
    if lines and lines[-1]["event"] == "begins":
        record.write_text("".join(json.dumps(line) + "\n" for line in lines[:-1]))


def summary(comparison: Comparison) -> str:
    if comparison.not_run:
        return comparison.not_run
    counts = ", ".join(f"{comparison.count(kind)} {kind}" for kind in KINDS)
    return f"{comparison.outcomes['passed']} pass without fastgen; with it {counts}"


def versions(checkout: Path) -> dict[str, str]:
    import torch
    import transformers

    import fastgen

    return {
        "fastgen": fastgen.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "Python": sys.version.split()[0],
        "checkout": checkout.name,
    }


def write_results(checkout: Path, comparisons: dict[str, Comparison], out: Path) -> None:
    with_versions = versions(checkout)
    (out / "results.md").write_text(markdown(with_versions, comparisons))
    data = {name: vars(comparison) for name, comparison in comparisons.items()}
    (out / "results.json").write_text(
        json.dumps({"versions": with_versions, "files": data}, indent=1) + "\n"
    )


if __name__ == "__main__":
    sys.exit(main())
