"""fastgen verify: what it prints, and the exit code that a CI looks at."""

import json

import pytest
import torch
import transformers

from fastgen.cli.main import main
from fastgen.live import LiveWeights


@pytest.fixture(autouse=True)
def cached(graphs_of_the_session):
    """What is tested here is not capture."""


ARGUMENTS = ("--dtype", "float32", "--prompt", "def main(", "--max-new-tokens", "4")


def verify(capsys, *arguments):
    code = main(["verify", *arguments])
    return code, capsys.readouterr()


def test_equal_is_0(capsys):
    code, printed = verify(capsys, "--model", "demo", *ARGUMENTS, "--prompt", "import os\n")
    assert code == 0, printed.err
    lines = printed.out.splitlines()
    assert lines[0].startswith("LlamaForCausalLM, float32 on cpu: 2 prompts, 4 greedy tokens")
    assert lines[-1].strip() == "equal"
    assert "layers compared on prompt" in printed.out
    assert "6 of 6" in printed.out


def test_different_is_1_and_names_the_layer(capsys, monkeypatch):
    right = LiveWeights.resolve

    def resolve(self, *args, **kwargs):
        found = right(self, *args, **kwargs)
        for spec in found:
            if spec.target.endswith("layers.3.mlp.down_proj.weight"):
                found[spec] = found[spec] * -1
        return found

    monkeypatch.setattr(LiveWeights, "resolve", resolve)
    code, printed = verify(capsys, "--model", "demo", *ARGUMENTS)
    assert code == 1, printed.err
    assert "DIFFERENT in 1 of 1 prompts: model.layers.3 is the first" in printed.out
    code, printed = verify(capsys, "--model", "demo", *ARGUMENTS, "--json")
    assert code == 1
    data = json.loads(printed.out)
    assert data["ok"] is False
    assert data["first_differing_layer"] == "model.layers.3"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "/nowhere"), "config.json"),
        (("--model", "demo", "--prompt", ""), "at least one token"),
        (("--model", "demo", "--max-new-tokens", "0"), "max_new_tokens"),
        (("--model", "demo", "--max-new-tokens", "99999"), "max_model_len"),
    ],
    ids=["no-model", "empty-prompt", "no-tokens", "too-long"],
)
def test_what_could_not_run_is_2(arguments, message, capsys):
    code, printed = verify(capsys, *arguments)
    assert code == 2
    assert message in printed.err
    assert printed.out == ""


def test_an_unsupported_model_is_2(capsys, monkeypatch):
    config = transformers.MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=64)
    model = transformers.MambaForCausalLM(config)
    monkeypatch.setattr("fastgen.cli.verify.load_model", lambda *_: (model, None))
    code, printed = verify(capsys, "--model", "recurrent")
    assert code == 2
    assert "MambaForCausalLM" in printed.err


def test_a_crash_is_not_taken_for_a_difference(capsys, monkeypatch):
    def crash(*args, **kwargs):
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr("fastgen.cli.verify.verify", crash)
    code, printed = verify(capsys, "--model", "demo")
    assert code == 2
    assert "no memory left" in printed.err
