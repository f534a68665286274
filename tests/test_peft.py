"""LoRA adapters of PEFT: wrapped before or after optimize, merged, disabled, switched."""

import copy

import pytest
import torch
from following import assert_follows, epoch_of, small_model, tokens_of
from tiny_models import prompts

import fastgen
from fastgen import graphs as graphs_file

peft = pytest.importorskip("peft")

TARGETS = ["q_proj", "v_proj", "up_proj"]
ROW = prompts(9)[0]


def lora(seed: int = 0, **options) -> "peft.LoraConfig":
    torch.manual_seed(seed)
    options = {"r": 4, "lora_alpha": 32, "target_modules": TARGETS, **options}
    return peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **options)


def optimized_wrapper(family: str = "llama"):
    wrapper = peft.get_peft_model(small_model(family), lora()).eval()
    assert fastgen.optimize(wrapper) is wrapper
    return wrapper


def wrapped_optimized(family: str = "llama"):
    model = fastgen.optimize(small_model(family))
    tokens_of(model, ROW, 3)
    return peft.get_peft_model(model, lora()).eval()


@pytest.fixture
def adapted():
    return optimized_wrapper()


@pytest.mark.parametrize("make", [optimized_wrapper, wrapped_optimized])
def test_unmerged_is_native(make, family):
    adapted = make(family)
    base = tokens_of(copy.deepcopy(adapted).unload(), ROW, 8)
    assert_follows(adapted)
    assert tokens_of(adapted, ROW, 8) != base, "the adapter shows nothing"


@pytest.mark.parametrize("make", [optimized_wrapper, wrapped_optimized])
def test_every_state_of_one_adapter(make):
    adapted = make()
    unmerged = assert_follows(adapted)
    with adapted.disable_adapter():
        assert assert_follows(adapted) != unmerged
    assert assert_follows(adapted) == unmerged
    adapted.merge_adapter()
    assert assert_follows(adapted) == unmerged
    adapted.unmerge_adapter()
    assert assert_follows(adapted) == unmerged


@pytest.mark.parametrize(
    ("make", "safe"),
    [(optimized_wrapper, False), (wrapped_optimized, True)],
    ids=["in-place", "safe"],
)
def test_merge_and_unload(make, safe):
    adapted = make()
    unmerged = assert_follows(adapted)
    merged = adapted.merge_and_unload(safe_merge=safe)
    assert fastgen.api.lookup(merged) is not None
    assert assert_follows(merged) == unmerged
    merges = fastgen.explain(merged).to_dict()["passes"][1]
    assert merges["matches"] == 2
    assert merges["refused"] == []


def test_two_adapters(adapted):
    first = assert_follows(adapted)
    adapted.add_adapter("other", lora(seed=3, r=2))
    adapted.set_adapter("other")
    second = assert_follows(adapted)
    assert second != first
    adapted.set_adapter("default")
    assert assert_follows(adapted) == first


def test_training_an_adapter_is_followed(adapted):
    before = assert_follows(adapted)
    ids, epoch = torch.tensor([ROW]), epoch_of(adapted)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.3)
    adapted.train()
    adapted(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    adapted.eval()
    assert assert_follows(adapted) != before
    assert epoch_of(adapted) == epoch + 1


def test_switching_captures_nothing_again(adapted, monkeypatch):
    enabled = assert_follows(adapted)
    with adapted.disable_adapter():
        disabled = assert_follows(adapted)

    def fail(*_):
        raise AssertionError("captured again")

    monkeypatch.setattr(graphs_file, "capture", fail)
    for _ in range(2):
        epoch = epoch_of(adapted)
        with adapted.disable_adapter():
            assert assert_follows(adapted) == disabled
        assert assert_follows(adapted) == enabled
        assert epoch_of(adapted) >= epoch + 1


def test_the_last_four_graphs_are_kept():
    model = fastgen.optimize(small_model())
    graphs = fastgen.api.require(model)._graphs
    for scale in (2.0, 3.0, 4.0, 5.0, 6.0):
        model.model.layers[0].self_attn.scaling = scale
        tokens_of(model, ROW, 2)
    assert len(graphs) == 4
    assert list(graphs)[-1] == fastgen.api.require(model).fingerprint


def test_graphs_that_are_set_aside_hold_no_weights(adapted):
    assert_follows(adapted)
    with adapted.disable_adapter():
        assert_follows(adapted)
        graphs = list(fastgen.api.require(adapted)._graphs.values())
    assert len(graphs) >= 2
    for graph in graphs[:-1]:
        inputs = zip(graph.compiled.inputs.values(), graph.compiled._arguments, strict=True)
        held = {spec.kind for spec, argument in inputs if argument is not None}
        assert held <= {"constant", "batch"}


def test_the_wrapper_stands_for_its_model(adapted):
    inner = adapted.get_base_model()
    assert fastgen.optimize(adapted) is adapted
    assert fastgen.api.lookup(adapted) is fastgen.api.lookup(inner)
    expected = tokens_of(adapted, ROW, 6)
    with fastgen.Engine(adapted) as engine:
        params = fastgen.SamplingParams(max_tokens=6, temperature=0.0)
        assert engine.generate([ROW], params)[0].token_ids == expected
    assert fastgen.explain(adapted).model == type(inner).__name__
    fastgen.weights_changed(adapted)
    fastgen.release_cache(adapted)
    state = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    assert fastgen.restore(adapted) is adapted
    assert fastgen.api.lookup(inner) is None
    assert all(torch.equal(tensor, state[name]) for name, tensor in adapted.state_dict().items())
    for parameter in adapted.parameters():
        assert parameter.untyped_storage().nbytes() == parameter.nbytes
    assert tokens_of(adapted, ROW, 6) == expected


def test_save_and_load_of_the_adapter(adapted, tmp_path):
    expected = assert_follows(adapted)
    adapted.save_pretrained(tmp_path)
    base = copy.deepcopy(adapted).unload()
    fastgen.optimize(base)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert assert_follows(loaded) == expected


def test_disabling_a_merged_adapter_goes_through_transformers_once(adapted):
    """PEFT takes the merged adapter out again in the middle of a forward."""
    expected = tokens_of(copy.deepcopy(adapted).unload(), ROW, 8)
    adapted.merge_adapter()
    assert_follows(adapted)
    with adapted.disable_adapter():
        assert tokens_of(adapted, ROW, 8) == expected
        assert_follows(adapted)
    assert_follows(adapted)


def test_an_adapter_per_row_runs_transformers_loop(adapted):
    adapted.add_adapter("other", lora(seed=3))
    ids = torch.tensor([ROW, ROW])
    names = ["default", "other"]
    expected = copy.deepcopy(adapted).generate(
        input_ids=ids, adapter_names=names, max_new_tokens=6, do_sample=False
    )
    got = adapted.generate(input_ids=ids, adapter_names=names, max_new_tokens=6, do_sample=False)
    assert torch.equal(got, expected)
    assert any("hook" in reason for reason in fastgen.api.require(adapted).fallbacks)
    assert_follows(adapted)


def prompt_tuned(model):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    torch.manual_seed(1)
    wrapper = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for parameter in wrapper.prompt_encoder.parameters():
            parameter.normal_(0, 2)
    return wrapper


def test_a_learned_prompt_is_refused_by_name():
    wrapper = prompt_tuned(small_model())
    with pytest.raises(fastgen.UnsupportedModelError, match="PROMPT_TUNING"):
        fastgen.optimize(wrapper)


def test_a_learned_prompt_around_an_optimised_model_is_not_dropped():
    model = fastgen.optimize(small_model())
    wrapper, plain = prompt_tuned(model), prompt_tuned(small_model())
    ids = torch.tensor([ROW])
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
    expected = plain.generate(input_ids=ids, **arguments)
    assert torch.equal(wrapper.generate(input_ids=ids, **arguments), expected)
    with pytest.raises(fastgen.FastgenError, match="PROMPT_TUNING"):
        fastgen.Engine(wrapper).submit(ROW)
    assert_follows(model)


def test_dora_and_biases():
    wrapper = peft.get_peft_model(small_model(), lora(use_dora=True)).eval()
    fastgen.optimize(wrapper)
    assert_follows(wrapper)
    wrapper.merge_adapter()
    assert_follows(wrapper)
