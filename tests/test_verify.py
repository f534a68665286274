"""fastgen.verify: what is equal is said to be, and a planted mistake is found where it is."""

import dataclasses
import json

import pytest
import torch
import transformers
from fastgen.kernels.packing import why_not_packed
from tiny_models import FAMILIES, QUICK_FAMILIES, prompts, tiny_model

import fastgen
from fastgen import verification
from fastgen.fingerprint import fingerprint
from fastgen.live import LiveWeights
from fastgen.reference import Reference
from fastgen.verification_report import LOGITS

ROWS = prompts(9, 20)
TOKENS = 6
OTHER_FAMILIES = tuple(f for f in FAMILIES if f not in ("gpt2", "olmo2", *QUICK_FAMILIES))


@pytest.fixture(autouse=True)
def cached(graphs_of_the_session):
    """What is tested here is not capture."""


def verify(model, rows=ROWS, **options):
    return fastgen.verify(model, rows, max_new_tokens=TOKENS, **options)


@pytest.fixture
def poisoned(monkeypatch):
    """From now on fastgen computes with a weight that is not the model's."""

    def poison(name: str, factor: float = 1.02):
        right = LiveWeights.resolve

        def resolve(self, *args, **kwargs):
            found = right(self, *args, **kwargs)
            for spec in found:
                if spec.target.endswith(name):
                    found[spec] = found[spec] * factor
            return found

        monkeypatch.setattr(LiveWeights, "resolve", resolve)

    return poison


@pytest.mark.parametrize("family", QUICK_FAMILIES)
def test_equal(family):
    model = tiny_model(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = fastgen.verify(model, max_new_tokens=TOKENS)
    assert report.verdict() == "equal", str(report)
    assert report.ok
    lengths = [prompt.num_prompt_tokens for prompt in report.prompts]
    assert lengths[:4] == [1, 15, 16, 17]
    assert lengths[-1] > verification.CHUNK, "nothing is computed in chunks"
    assert_layers_agree(report)
    assert 0 < report.noise < 1e-3
    assert fastgen.api.lookup(model) is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("family", QUICK_FAMILIES)
def test_equal_in_half_precision(family):
    report = verify(tiny_model(family, dtype=torch.bfloat16))
    assert report.ok, str(report)
    assert_layers_agree(report)


def assert_layers_agree(report):
    assert [layer.name for layer in report.layers] == ["model.layers.0", "model.layers.1", LOGITS]
    assert report.first_differing_layer is None, str(report)


@pytest.mark.parametrize(
    "family",
    ["gpt2", "olmo2", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHER_FAMILIES)],
)
def test_layers_of_other_families(family):
    """Norms that are not fused, norms behind the block, blocks with one sum, latent attention."""
    report = verify(tiny_model(family))
    assert report.ok, str(report)
    assert len(report.layers) == report.num_layers + 1 == 3
    assert report.first_differing_layer is None, str(report)


@pytest.mark.parametrize(
    ("weight", "layer"),
    [
        ("layers.0.mlp.down_proj.weight", "model.layers.0"),
        ("layers.1.self_attn.o_proj.weight", "model.layers.1"),
        ("layers.1.mlp.down_proj.weight", "model.layers.1"),
        ("model.norm.weight", LOGITS),
    ],
    ids=str,
)
def test_a_wrong_weight_is_found_in_its_layer(weight, layer, poisoned):
    poisoned(weight)
    report = verify(tiny_model("llama"))
    assert not report.ok
    assert report.first_differing_layer.name == layer, str(report)
    assert all(prompt.differs for prompt in report.prompts)
    where = "no layer differs" if layer == LOGITS else f"{layer} is the first layer that differs"
    assert where in str(report)


def test_a_large_mistake_changes_tokens(poisoned):
    poisoned("layers.1.mlp.down_proj.weight", -1.0)
    report = verify(tiny_model("llama"))
    parted = [prompt for prompt in report.prompts if prompt.parts_at is not None]
    assert parted
    for prompt in parted:
        assert prompt.gap >= prompt.margin > 0
        assert not prompt.near_tie, str(report)
    assert "DIFFERS at" in str(report)


@pytest.mark.skipif(
    why_not_packed(torch.empty(1, 1, dtype=torch.bfloat16)) is not None,
    reason="weights are not packed here",
)
def test_a_stale_packed_weight_is_found():
    """The model's weight was changed behind fastgen's back; its packed copy was not."""
    model = tiny_model("llama", dtype=torch.bfloat16)
    fastgen.optimize(model, weight_check="manual")
    assert verify(model).ok
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.data.mul_(-1)
    report = verify(model)
    assert not report.ok
    assert report.first_differing_layer.name == "model.layers.1", str(report)
    fastgen.weights_changed(model)
    assert verify(model).ok


def test_a_wrong_kernel_is_found(monkeypatch):
    """The norm before the MLP of layer 1 computes with an eps of its own."""
    right = verification.LayerOutputs

    def outputs(compiled, device):
        norms = [node for node in compiled.lowered.graph.nodes if "add_rms_norm" in node.name]
        norms[2].update_arg(3, 0.3)
        compiled.lowered.recompile()
        compiled._forward = compiled.lowered.forward
        return right(compiled, device)

    monkeypatch.setattr(verification, "LayerOutputs", outputs)
    report = verify(tiny_model("llama"))
    assert not report.ok
    assert report.first_differing_layer.name == "model.layers.1", str(report)


def test_nan_is_different_and_written_as_json(poisoned):
    poisoned("layers.0.mlp.down_proj.weight", float("nan"))
    report = verify(tiny_model("llama"))
    assert not report.ok
    assert report.first_differing_layer.name == "model.layers.0"
    assert json.loads(report.to_json()) == report.to_dict()


def wrong_tokens(monkeypatch, choose):
    """fastgen's own tokens differ, and not its logits."""
    right = verification._tokens

    def tokens(*args):
        return [choose(list(row)) for row in right(*args)]

    monkeypatch.setattr(verification, "_tokens", tokens)


def test_a_wrong_choice_of_tokens_is_found(monkeypatch):
    wrong_tokens(monkeypatch, lambda row: [*row[:-1], row[-1] ^ 1])
    report = verify(tiny_model("llama"))
    assert not report.ok
    assert [prompt.parts_at for prompt in report.prompts] == [TOKENS - 1] * 2
    assert not any(prompt.differs or prompt.near_tie for prompt in report.prompts)
    assert report.first_differing_layer is None
    assert "how the engine chooses tokens" in report.verdict()


def tied_model(best: int, other: int):
    """Two tokens whose logits are always the same."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[other] = model.lm_head.weight[best]
    return model


def test_a_near_tie_is_no_mistake(monkeypatch):
    first = Reference(tiny_model("llama")).generate(ROWS[0], 1)[0][0]
    model = tied_model(first, first ^ 1)
    assert verify(model, ROWS[:1]).ok
    wrong_tokens(monkeypatch, lambda row: [row[0] ^ 1, *row[1:]])
    report = verify(model, ROWS[:1])
    (prompt,) = report.prompts
    assert (prompt.parts_at, prompt.margin, prompt.gap) == (0, 0.0, 0.0)
    assert prompt.near_tie
    assert report.ok
    assert "near ties in 1 of 1" in report.verdict()


def test_a_tie_of_two_others_excuses_no_third(monkeypatch):
    first = Reference(tiny_model("llama")).generate(ROWS[0], 1)[0][0]
    wrong_tokens(monkeypatch, lambda row: [first ^ 4, *row[1:]])
    report = verify(tied_model(first, first ^ 2), ROWS[:1])
    (prompt,) = report.prompts
    assert prompt.margin == 0.0
    assert prompt.gap > 0
    assert not prompt.near_tie
    assert not report.ok


def test_a_mistake_of_the_engine_is_not_laid_on_a_layer(monkeypatch):
    right = verification._forced_logits
    monkeypatch.setattr(verification, "_forced_logits", lambda *a: [x + 1 for x in right(*a)])
    report = verify(tiny_model("llama"))
    assert not report.ok
    assert "look at the engine" in report.verdict()


def test_a_plain_forward_that_is_not_generate_is_no_noise(monkeypatch):
    """Some models' positions differ in the two: what parts them excuses nothing."""
    right = Reference.forward

    def forward(*args, **kwargs):
        logits, outputs = right(*args, **kwargs)
        return logits + 1, outputs

    noise = verify(tiny_model("llama")).noise
    monkeypatch.setattr(Reference, "forward", forward)
    report = verify(tiny_model("llama"))
    assert report.ok
    assert report.noise < 10 * noise
    assert report.layers == ()
    assert "is no noise" in str(report)


def test_an_optimised_model_is_verified_as_it_is(graphs_on_disk):
    model = tiny_model("gemma2")
    fastgen.optimize(tiny_model("gemma2"))  # writes the graph that the next one reads
    fastgen.optimize(model, block_size=32)
    optimized = fastgen.api.require(model)
    assert optimized.graph_source == "from the graph cache"
    report = verify(model)
    assert report.ok
    assert len(report.layers) == 3, "a graph from the disk does not say where its layers end"
    assert fastgen.api.require(model) is optimized
    assert optimized.engine().metrics().output_tokens == 4 * TOKENS  # forced, and its own
    assert optimized.fallbacks == {}
    with pytest.raises(ValueError, match="optimised with other"):
        verify(model, block_size=16)


def test_a_graph_that_names_no_layers(monkeypatch):
    monkeypatch.setattr("fastgen.layer_outputs.module_of", lambda node: None)
    report = verify(tiny_model("llama"))
    assert report.ok
    assert [layer.name for layer in report.layers] == [LOGITS]
    assert "does not say where they end" in str(report)


def test_an_adapter_is_verified():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    targets = ["q_proj", "v_proj", "up_proj"]
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    report = verify(peft.get_peft_model(tiny_model("llama"), config).eval())
    assert report.ok
    assert report.model == "LlamaForCausalLM"
    assert len(report.layers) == 3


def test_generation_config_and_mode_of_the_model_change_nothing():
    model = tiny_model("llama", attention_dropout=0.5).train()
    expected = verify(tiny_model("llama"))
    model.generation_config.update(do_sample=True, repetition_penalty=5.0)
    eos = Reference(model).generate(ROWS[0], 1)[0][0]
    model.generation_config.eos_token_id = eos
    assert verify(model).prompts == expected.prompts
    assert model.training


def test_forms_of_prompts():
    model = tiny_model("llama")
    ids = torch.tensor([[7, 7, *ROWS[0][:7]], ROWS[0]])
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    report = verify(model, {"input_ids": ids, "attention_mask": mask})
    assert [prompt.num_prompt_tokens for prompt in report.prompts] == [7, 9]
    assert [prompt.num_prompt_tokens for prompt in verify(model, ids).prompts] == [9, 9]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("text", "list of at least one prompt"),
        ([], "list of at least one prompt"),
        (torch.ones(3), "matrix of token ids"),
        (["text"], "tokenizer"),
        ([[]], "at least one token"),
        ([[128]], "token id"),
        ([[1] * 512], "max_model_len"),
    ],
    ids=["str", "none", "one-row", "no-tokenizer", "empty", "not-in-vocabulary", "too-long"],
)
def test_bad_prompts_are_refused(rows, message):
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=message):
        verify(model, rows)
    assert fastgen.api.lookup(model) is None


@pytest.mark.parametrize("number", [0, 1.0, None])
def test_bad_number_of_tokens(number):
    with pytest.raises(ValueError, match="max_new_tokens"):
        fastgen.verify(tiny_model("llama"), ROWS, max_new_tokens=number)


def test_what_the_engine_cannot_run_is_refused():
    model = fastgen.optimize(tiny_model("llama"))
    model.model.layers[0].register_forward_hook(lambda *_: None)
    with pytest.raises(fastgen.UnsupportedModelError, match="hook"):
        verify(model)
    mamba = transformers.MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=64)
    with pytest.raises(fastgen.UnsupportedModelError):
        verify(transformers.MambaForCausalLM(mamba))


@pytest.mark.skipif(
    why_not_packed(torch.empty(1, 1, dtype=torch.bfloat16)) is not None,
    reason="weights are not packed here",
)
def test_released_weights_cannot_be_compared():
    model = tiny_model("llama", dtype=torch.bfloat16)
    with pytest.raises(fastgen.ReleasedWeightsError, match="transformers needs weights"):
        verify(model, release_weights=True)
    assert fastgen.api.lookup(model) is None


def test_the_report_goes_through_json():
    report = verify(tiny_model("llama"))
    data = json.loads(report.to_json())
    assert data == report.to_dict()
    assert data["ok"] is True
    assert data["verdict"] == "equal"
    assert len(data["prompts"]) == 2
    assert data["largest_difference"].startswith("model.layers.")
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.noise = 0.0


def test_the_reference_shares_weights_and_leaves_the_model_alone():
    model = fastgen.optimize(tiny_model("llama"))
    optimized = fastgen.api.require(model)
    steps = optimized.ready(model).metrics().engine_steps
    reference = Reference(model)
    for own, shared in zip(model.parameters(), reference.model.parameters(), strict=True):
        assert own is shared
    logits, outputs = reference.forward(ROWS[0], 3, copies=2, layers=["model.layers.0"])
    assert logits.shape == (2, 3, 128)
    assert outputs["model.layers.0"].shape == (2, 9, 64)
    other, _ = reference.forward(ROWS[0], 3, rounded_otherwise=True)
    assert 0 < (other[0] - logits[0]).abs().max() < 1e-3
    tokens, scores = reference.generate(ROWS[0], 4)
    assert scores.argmax(-1).tolist() == tokens
    assert fingerprint(model) == optimized.fingerprint
    assert not any(module._forward_hooks for module in reference.model.modules())
    assert optimized.ready(model).metrics().engine_steps == steps
