"""The walk over all types: its table is of the installed transformers, and it sees mistakes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from every_model import classify, matrix
from every_model.building import SPECIAL, TYPES
from every_model.classify import EXACT, LOOP, UNBUILDABLE, UNPROVEN, WRONG, Verdict
from every_model.table import markdown, types_listed

from fastgen.generate.prepared import TransformersLoop

ROOT = Path(__file__).parents[1]
TABLE = (ROOT / "MODELS.md").read_text()
# What the table says of a few that are quick: each class, and models that number their tokens.
QUICK = ("llama", "bart", "mamba", "gemma4_assistant")


def walk(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "every_model", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests")},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def of_the_installed_version() -> bool:
    return f"types of transformers {transformers.__version__}'s" in TABLE


@pytest.mark.skipif(not of_the_installed_version(), reason="the table is of another transformers")
def test_the_table_lists_exactly_the_types():
    assert sorted(types_listed(TABLE)) == sorted(TYPES)


def test_the_table_has_nothing_wrong_or_unproven():
    assert set(types_listed(TABLE).values()) <= {EXACT, LOOP, UNBUILDABLE}


def test_the_counts_are_those_of_the_rows():
    outcomes = list(types_listed(TABLE).values())
    for outcome in (EXACT, LOOP, UNBUILDABLE):
        (count,) = re.findall(rf"(\d+) {outcome}[, ]", TABLE.split("A tiny random", 1)[0])
        assert int(count) == outcomes.count(outcome)


def test_sizes_are_for_types_that_are_known():
    if of_the_installed_version():
        assert not set(SPECIAL) - set(TYPES)


def test_some_types_are_classed_as_the_table_says(tmp_path):
    out = tmp_path / "models.json"
    done = walk(*QUICK, "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    listed = types_listed(TABLE)
    found = {name: verdict["outcome"] for name, verdict in json.loads(out.read_text()).items()}
    assert found == {name: listed[name] for name in QUICK}


@pytest.mark.slow
def test_all_types_are_classed_as_the_table_says(tmp_path):
    out = tmp_path / "models.json"
    done = walk("--out", str(out))
    assert done.returncode == 0, done.stdout
    found = {name: verdict["outcome"] for name, verdict in json.loads(out.read_text()).items()}
    assert found == types_listed(TABLE)


# The walk sees mistakes.


def test_other_tokens_are_wrong(monkeypatch):
    """fastgen's model gets other weights than transformers': the verdict names the first token."""
    seeds = iter(range(100))
    original = classify.tiny_model
    monkeypatch.setattr(
        classify, "tiny_model", lambda name, *_: original(name, classify.Recipe(seed=next(seeds)))
    )
    verdict = classify.classify("llama")
    assert verdict.outcome == WRONG
    assert re.search(r"DivergedError: alone, prompt of 5: token \d+ is \[\d+\]", verdict.reason)


def test_other_logits_are_wrong(monkeypatch):
    """All tokens stay, and every logit is scaled."""
    original = classify.Oracle.generate

    def generate(self, model, row):
        token_ids, logits = original(self, model, row)
        return token_ids, logits if model is self.plain else logits * 1.0001

    monkeypatch.setattr(classify.Oracle, "generate", generate)
    verdict = classify.classify("llama")
    assert verdict.outcome == WRONG
    assert "DivergedError: logits differ by" in verdict.reason


def test_transformers_loop_is_no_native_answer(monkeypatch):
    def refuses(*_):
        raise TransformersLoop("asked for by the test")

    monkeypatch.setattr(sys.modules["fastgen.generate.patch"], "requests_of", refuses)
    verdict = classify.classify("llama")
    assert verdict.outcome == WRONG
    assert "transformers' loop ran" in verdict.reason


@pytest.mark.slow
def test_a_process_that_takes_too_long_is_unproven(tmp_path):
    out = tmp_path / "models.json"
    done = walk("llama", "--cpu-seconds", "1", "--out", str(out))
    assert done.returncode == 1
    verdict = json.loads(out.read_text())["llama"]
    assert verdict["outcome"] == UNPROVEN
    assert "ended with code -" in verdict["reason"]


# Tables.

VERDICTS = {
    "a": Verdict("a", EXACT, model_class="A", layers=["kv 2x24", "kv 2x24"]).to_dict(),
    "b": Verdict("b", LOOP, "x | y < z", model_class="B").to_dict(),
}


def test_markdown():
    text = markdown(VERDICTS)
    assert types_listed(text) == {"a": EXACT, "b": LOOP}
    assert "1 exact, 1 transformers' loop, of the 2 types" in text
    assert "| a | exact | A | 2 x kv 2x24 |  |" in text
    assert "x \\| y &lt; z" in text


def test_the_matrix_shows_what_differs():
    other = {"a": Verdict("a", LOOP, "too new").to_dict()}
    text = matrix.comparison({"5.23.0": VERDICTS, "5.17.0": other})
    assert "| exact | 1 | 0 |" in text
    assert "| a | exact | transformers' loop | too new |" in text
    assert "transformers 5.17.0 lacks: b." in text
    assert "\n| b |" not in text
