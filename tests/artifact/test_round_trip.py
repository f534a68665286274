"""live -> export -> load: the same fp32 tokens, whatever was exported and how."""

from __future__ import annotations

import json

import pytest
import torch
from artifact_helpers import ROOT, in_fresh_process, read_manifest
from tiny_models import (
    FAMILIES,
    QUICK_FAMILIES,
    NativeTokens,
    greedy_alone,
    prompts,
    tiny_model,
)

import fastgen
from fastgen import ArtifactError, Engine, SamplingParams

GREEDY = SamplingParams(max_tokens=24, temperature=0.0)
# Within a block, at its end, and beyond every window.
LENGTHS = (5, 16, 40)


def family_params() -> list:
    return [
        pytest.param(name, marks=() if name in QUICK_FAMILIES else pytest.mark.slow)
        for name in FAMILIES
    ]


def answers(model, rows: list[list[int]]) -> list[list[int]]:
    with Engine(model) as engine, NativeTokens(model):
        return [output.token_ids for output in engine.generate(rows, GREEDY)]


@pytest.mark.parametrize("family", family_params())
def test_a_family(family, tmp_path):
    rows, expected = greedy_alone(tiny_model(family), *LENGTHS, num_tokens=24)
    fastgen.export(tiny_model(family), tmp_path / "out")
    assert answers(fastgen.load(tmp_path / "out"), rows) == expected


ONLY_LOADS = """
import json, sys
import torch, fastgen
model = fastgen.load(sys.argv[1])
tokens = model.generate(torch.tensor(json.loads(sys.argv[2])), max_new_tokens=12)
print(json.dumps({
    "tokens": tokens.tolist(),
    "transformers": sorted(name for name in sys.modules if name.split(".")[0] == "transformers"),
    "capture": [name for name in sys.modules if name.startswith("fastgen.capture")],
    "compiler": "torch._dynamo" in sys.modules,
    "explained": str(fastgen.explain(model)),
    "steps": model.metrics().engine_steps,
}))
"""


def test_a_process_without_the_models_code(llama_folder, tmp_path):
    ids = torch.tensor(prompts(9))
    expected = tiny_model("llama").generate(ids, max_new_tokens=12, do_sample=False)
    said = in_fresh_process(ONLY_LOADS, llama_folder, json.dumps(ids.tolist()), cwd=tmp_path)
    assert said["tokens"] == expected.tolist()
    assert said["transformers"] == []
    assert said["capture"] == []
    assert not said["compiler"]
    assert said["steps"] == 12
    assert f"graph         from {llama_folder}" in said["explained"]


NEVER_SEEN = """
import sys
import torch, fastgen
from transformers import LlamaConfig, LlamaForCausalLM
class Mine(LlamaForCausalLM):
    pass
torch.manual_seed(0)
sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
model = Mine(LlamaConfig(vocab_size=128, initializer_range=0.3, **sizes)).eval()
ids = torch.tensor([[3, 1, 4, 1, 5]])
print(model.generate(ids, max_new_tokens=8, do_sample=False).tolist())
fastgen.export(model, sys.argv[1])
"""
LOADS_IT = """
import sys
import torch, fastgen
model = fastgen.load(sys.argv[1])
print(model.generate(torch.tensor([[3, 1, 4, 1, 5]]), max_new_tokens=8).tolist())
"""


@pytest.mark.slow
def test_a_class_that_is_nowhere(tmp_path):
    expected = in_fresh_process(NEVER_SEEN, tmp_path / "out", cwd=tmp_path)
    assert read_manifest(tmp_path / "out").model == "Mine"
    assert in_fresh_process(LOADS_IT, tmp_path / "out", cwd=tmp_path) == expected


def test_the_demo_model_with_text(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    demo = ROOT / "examples/demo_model"
    model = AutoModelForCausalLM.from_pretrained(demo, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(demo)
    chat = [{"role": "user", "content": "Write a Python function, `f(x)`: Return x."}]
    asked = ["def main(", chat]
    with Engine(model, tokenizer) as engine:
        live, live_params = engine.generate(asked, GREEDY), engine.default_params()
    fastgen.export(model, tmp_path / "out", tokenizer=tokenizer)
    loaded = fastgen.load(tmp_path / "out")
    with Engine(loaded, loaded.tokenizer) as engine:
        again = engine.generate(asked, GREEDY)
        assert engine.default_params() == live_params
    assert [(each.text, each.token_ids) for each in again] == [
        (each.text, each.token_ids) for each in live
    ]
    assert vars(loaded.generation_config)["eos_token_id"] == model.generation_config.eos_token_id


WITH_TEXT = """
import json, sys
import fastgen
model = fastgen.load(sys.argv[1])
with fastgen.Engine(model, model.tokenizer) as engine:
    text = engine.generate(["def main("], fastgen.SamplingParams(max_tokens=5))[0].text
models = [name for name in sys.modules if name.startswith("transformers.models.")]
print(json.dumps({
    "text": text,
    "code": [name for name in models if ".modeling_" in name and ".auto." not in name],
    "base": "transformers.modeling_utils" in sys.modules,
}))
"""


@pytest.mark.slow
def test_text_needs_a_tokenizer_and_no_model_code(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    demo = ROOT / "examples/demo_model"
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(demo),
        AutoTokenizer.from_pretrained(demo),
    )
    fastgen.export(model, tmp_path / "out", tokenizer=tokenizer)
    said = in_fresh_process(WITH_TEXT, tmp_path / "out", cwd=tmp_path)
    assert said["text"]
    assert (said["code"], said["base"]) == ([], False)


def test_a_model_that_was_trained_after_optimize(graphs_of_the_session, tmp_path):
    model = fastgen.optimize(tiny_model("llama"))
    before = model.generate(torch.tensor(prompts(9)), max_new_tokens=12, do_sample=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for _ in range(3):
        ids = torch.tensor(prompts(20))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    fastgen.export(model, tmp_path / "out")
    rows, expected = greedy_alone(fastgen.restore(model), *LENGTHS, num_tokens=24)
    loaded = fastgen.load(tmp_path / "out")
    assert answers(loaded, rows) == expected
    after = loaded.generate(torch.tensor(prompts(9)), max_new_tokens=12)
    assert not torch.equal(before, after)


def test_a_model_that_was_changed_after_optimize(graphs_of_the_session, tmp_path):
    def changed(model):
        for layer in model.model.layers:
            layer.input_layernorm.variance_epsilon = 0.5
        return model

    rows, expected = greedy_alone(changed(tiny_model("llama")), *LENGTHS, num_tokens=24)
    fastgen.export(changed(fastgen.optimize(tiny_model("llama"))), tmp_path / "out")
    assert answers(fastgen.load(tmp_path / "out"), rows) == expected


def adapted():
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    return peft.get_peft_model(tiny_model("llama"), config).eval()


@pytest.mark.parametrize("merged", [True, False], ids=["merged", "adapter"])
def test_a_peft_model(merged, tmp_path):
    rows, expected = greedy_alone(adapted().merge_and_unload(), *LENGTHS, num_tokens=24)
    model = adapted()
    fastgen.export(model.merge_and_unload() if merged else model, tmp_path / "out")
    assert answers(fastgen.load(tmp_path / "out"), rows) == expected


def test_packed_weights(tmp_path):
    live = fastgen.optimize(tiny_model("llama", dtype=torch.bfloat16))
    rows = prompts(*LENGTHS)
    expected = answers(live, rows)
    fastgen.export(live, tmp_path / "out")
    loaded = fastgen.load(tmp_path / "out")
    assert answers(loaded, rows) == expected
    assert fastgen.api.require(loaded).compiled.spec == fastgen.api.require(live).compiled.spec
    assert fastgen.explain(loaded).report.passes == fastgen.explain(live).report.passes


def test_released_weights_on_both_sides(tmp_path):
    live = fastgen.optimize(tiny_model("llama", dtype=torch.bfloat16), release_weights=True)
    rows = prompts(*LENGTHS)
    expected = answers(live, rows)
    fastgen.export(live, tmp_path / "out")
    loaded = fastgen.load(tmp_path / "out", release_weights=True)
    assert fastgen.explain(loaded).released_bytes > 0
    assert answers(loaded, rows) == expected
    fastgen.restore(loaded)
    plain = tiny_model("llama", dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(value, plain[name]) for name, value in loaded.state_dict().items())


def test_a_loaded_model_is_exported_again(llama_folder, loaded, tmp_path):
    fastgen.export(loaded, tmp_path / "again")
    rows = prompts(*LENGTHS)
    assert answers(fastgen.load(tmp_path / "again"), rows) == answers(loaded, rows)
    assert (
        read_manifest(tmp_path / "again").files["model.safetensors"]
        == (read_manifest(llama_folder).files["model.safetensors"])
    )
    assert read_manifest(tmp_path / "again").model == "LlamaForCausalLM"


def test_export_leaves_the_model_as_it_was(tmp_path):
    model = tiny_model("llama")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    fastgen.export(model, tmp_path / "out")
    assert fastgen.api.lookup(model) is None
    assert "generate" not in vars(type(model))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_settings_that_the_graph_depends_on_come_along(graphs_of_the_session, tmp_path):
    live = fastgen.optimize(tiny_model("llama"), deterministic=True, max_num_seqs=4)
    fastgen.export(live, tmp_path / "out")
    loaded = fastgen.load(tmp_path / "out", max_num_seqs=8, max_model_len=64)
    config = fastgen.api.require(loaded).config
    assert (config.deterministic, config.max_num_seqs, config.max_model_len) == (True, 8, 64)
    assert fastgen.api.require(loaded).max_model_len == 64
    assert "deterministic=True" in str(fastgen.explain(loaded))
    with pytest.raises(ArtifactError, match="deterministic was True when"):
        fastgen.load(tmp_path / "out", deterministic=False)
    with pytest.raises(ValueError, match="max_model_len must be <= 512"):
        fastgen.load(tmp_path / "out", max_model_len=1024)
    with pytest.raises(TypeError, match="no field 'max_sequences'"):
        fastgen.load(tmp_path / "out", max_sequences=1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": "onnx"}, "format must be one of"),
        ({"program": "magic"}, "program must be one of"),
    ],
    ids=["format", "program"],
)
def test_what_export_does_not_know(fields, message, tmp_path):
    with pytest.raises(ArtifactError, match=message):
        fastgen.export(tiny_model("llama"), tmp_path / "out", **fields)


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(ArtifactError, match="new or an empty folder"):
        fastgen.export(tiny_model("llama"), tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["mine"]


def test_a_failed_export_leaves_nothing(tmp_path):
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))  # the check of the graph says nothing
    with pytest.raises(ArtifactError, match="says nothing"):
        fastgen.export(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_progress_and_report(tmp_path):
    told: list[tuple[str, int, int]] = []
    report = fastgen.export(
        tiny_model("llama"), tmp_path / "out", progress=lambda *what: told.append(what)
    )
    assert [what for what, _, _ in told][:2] == ["graph", "weights"]
    weights = [(done, total) for what, done, total in told if what == "weights"]
    assert weights[0] == (0, weights[-1][1])
    assert weights[-1][0] == weights[-1][1]
    on_disk = {
        each.relative_to(tmp_path / "out").as_posix(): each.stat().st_size
        for each in (tmp_path / "out").rglob("*")
    }
    assert report.file_bytes == on_disk
    assert {"graph", "weights", "hashes"} <= set(report.seconds)
    assert "model.safetensors" in str(report)
