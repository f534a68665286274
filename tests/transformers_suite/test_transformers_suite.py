"""The accounting of the suite on a checkout of a few toy tests; the suite itself, on request."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from comparison import compare, markdown, results
from run import forget_interrupted
from suite_plugin import read_lines

RUN = Path(__file__).parent / "run.py"
CHECKOUT = "FASTGEN_TRANSFORMERS_CHECKOUT"

TOY_TESTS = """
import sys

import torch
import transformers

SIZES = dict(vocab_size=64, hidden_size=32, num_attention_heads=4, num_hidden_layers=1)
GREEDY = dict(inputs=torch.tensor([[3, 4, 5]]), max_new_tokens=3, do_sample=False)


def llama():
    config = transformers.LlamaConfig(**SIZES, intermediate_size=32, eos_token_id=None)
    return transformers.LlamaForCausalLM(config).eval()


def test_native():
    model = llama()
    assert torch.equal(model.generate(**GREEDY), model.generate(**GREEDY))


def test_loop_in_the_second_call():
    model = llama()
    model.generate(**GREEDY)
    with torch.autocast("cpu", torch.bfloat16):
        model.generate(**GREEDY)


def test_refused_model():
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, pad_token_id=0,
        decoder_start_token_id=0,
    )
    transformers.T5ForConditionalGeneration(config).eval().generate(**GREEDY)


def test_call_that_raises():
    try:
        llama().generate(**GREEDY, no_such_argument=1)
    except ValueError:
        return
    raise AssertionError("no_such_argument was accepted")


def test_no_generate():
    pass  # .generate( is named here: else the test would be left out


def test_other_with_fastgen():
    llama().generate(**GREEDY)
    assert "fastgen" not in sys.modules, "fastgen is here"


def test_exit_with_fastgen():
    llama().generate(**GREEDY)
    if "fastgen" in sys.modules:
        sys.modules["os"]._exit(7)


def test_same_random_model():
    logits = llama().generate(**GREEDY, return_dict_in_generate=True, output_logits=True).logits
    if "fastgen" in sys.modules:
        torch.testing.assert_close(logits, torch.load("logits"))
    else:
        torch.save(logits, "logits")


def test_fails_anyway():
    raise AssertionError("in both, and .generate( is not to blame")


def test_skipped_anyway():
    import pytest

    pytest.skip("in both, .generate( or not")


def test_not_about_generation():
    raise AssertionError("was run")
"""


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    """The suite on the toy checkout: exit code, results.json, results.md."""
    checkout, out = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("out")
    folder = checkout / "tests" / "models" / "toy"
    folder.mkdir(parents=True)
    (folder / "test_modeling_toy.py").write_text(TOY_TESTS)
    command = [sys.executable, RUN, checkout, "--families", "toy", "--no-generation", "--hub"]
    done = subprocess.run([*command, "--out", out], timeout=300, stdout=subprocess.DEVNULL)
    data = json.loads((out / "results.json").read_text())
    return done.returncode, data["files"]["toy"], (out / "results.md").read_text()


@pytest.mark.slow
def test_each_test_is_of_its_kind(toy_run):
    _, toy, _ = toy_run
    kinds = {name.rpartition("::test_")[2]: kind for name, kind in toy["kinds"].items()}
    assert kinds == {
        "native": "native",
        "loop_in_the_second_call": "loop",
        "refused_model": "loop",
        "call_that_raises": "no generate",
        "no_generate": "no generate",
        "other_with_fastgen": "failed",
        "exit_with_fastgen": "failed",
        "same_random_model": "native",
    }
    assert toy["outcomes"] == {"passed": 8, "failed": 1, "skipped": 1}


@pytest.mark.slow
def test_reasons_of_loops_and_failures_are_told(toy_run):
    code, toy, text = toy_run
    loops = sorted(toy["reasons"])
    assert loops[0] == "autocast is on"
    assert loops[1].startswith("refused: T5ForConditionalGeneration")
    failures = {name.rpartition("::")[2]: why for name, why in toy["failures"].items()}
    assert "fastgen is here" in failures["test_other_with_fastgen"]
    assert failures["test_exit_with_fastgen"] == "failed: pytest ended with exit code 7"
    assert "| toy | 8 | 2 | 2 | 2 | 2 | 1 / 1 |" in text
    assert "- 1 x autocast is on" in text
    assert code == 1


def test_a_test_that_is_skipped_or_missing_with_fastgen_has_failed():
    passed = {"outcome": "passed", "reason": "", "calls": [{"by": "engine", "why": ""}]}
    skipped = {"outcome": "skipped", "reason": "not today", "calls": []}
    comparison = compare({"a": passed, "b": passed, "c": passed}, {"a": passed, "b": skipped})
    assert comparison.kinds == {"a": "native", "b": "failed", "c": "failed"}
    assert comparison.failures == {"b": "skipped: not today", "c": "missing: it was not run"}
    assert "- `b`: skipped: not today" in markdown({}, {"file": comparison})


def test_a_test_that_never_ended_has_failed():
    lines = [{"test": "a", "event": "begins"}, {"test": "a", "event": "ends", "outcome": "passed"}]
    found = results([*lines, {"test": "b", "event": "begins"}], "killed")
    assert found["a"]["outcome"] == "passed"
    assert (found["b"]["outcome"], found["b"]["reason"]) == ("failed", "killed")


def test_a_line_that_was_cut_short_is_not_read(tmp_path):
    record = tmp_path / "record"
    record.write_text('{"test": "a"}\n{"test": "b')
    assert read_lines(record) == [{"test": "a"}]


def test_a_test_that_was_interrupted_is_run_again(tmp_path):
    record = tmp_path / "record"
    ended = '{"test": "a", "event": "ends"}\n'
    record.write_text(ended + '{"test": "b", "event": "begins"}\n{"test": "b", "ev')
    forget_interrupted(record)
    assert record.read_text() == ended
    forget_interrupted(record)
    assert record.read_text() == ended


@pytest.mark.slow
def test_what_passes_without_fastgen_passes_with_it(tmp_path):
    checkout = os.environ.get(CHECKOUT)
    if not checkout:
        pytest.skip(f"{CHECKOUT} does not name a checkout of transformers")
    done = subprocess.run([sys.executable, RUN, checkout, "--out", tmp_path])
    assert done.returncode == 0, (tmp_path / "results.md").read_text()
