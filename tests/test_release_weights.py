"""release_weights: the packed copy is the only one, and nothing computes without saying so."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from fastgen.kernels.packing import unpack, why_not_packed, why_not_tiles
from fastgen.passes import InputSpec
from peft import LoraConfig, get_peft_model
from test_saving import (  # noqa: F401 - every way of saving, with the models of this file
    TIED,
    assert_bit_equal,
    test_accelerator_save_model,
    test_deepcopy_is_independent_and_not_optimised,
    test_load_state_dict_of_what_was_saved,
    test_safetensors_save_file,
    test_safetensors_save_model,
    test_save_pretrained,
    test_save_pretrained_in_shards,
    test_torch_save_of_every_single_parameter,
    test_torch_save_of_the_model,
    test_torch_save_of_the_state_dict,
)
from tiny_models import NativeTokens, prompts, tiny_model
from torch.multiprocessing.reductions import StorageWeakRef

import fastgen
from fastgen.live import LiveWeights
from fastgen.released import WAY_BACK, is_released

BF16 = torch.bfloat16
pytestmark = [
    pytest.mark.usefixtures("graphs_of_the_session"),
    pytest.mark.skipif(
        (reason := why_not_packed(torch.empty(1, 1, dtype=BF16))) is not None,
        reason=f"weights are not packed here: {reason}",
    ),
]
ROW = torch.tensor(prompts(9))
Q, UP, DOWN = (
    f"model.layers.0.{name}.weight" for name in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
)
HEAD, NORM, EMBEDDING = "lm_head.weight", "model.norm.weight", "model.embed_tokens.weight"
# What each layer of a tiny model releases: q, k, v, o, gate, up, down.
LINEARS_OF_A_LAYER = 7
RESTORE = r"released.*fastgen\.restore\(model\)"


def raises(match=RESTORE):
    return pytest.raises(fastgen.ReleasedWeightsError, match=f"(?s){match}")


def small(tied=False, **fields):
    family = "llama" if tied else "qwen2"
    return tiny_model(family, dtype=BF16, tie_word_embeddings=tied, num_hidden_layers=1, **fields)


def released_model(**fields):
    return fastgen.optimize(small(**fields), release_weights=True)


def generate(model, num_tokens=6, **arguments):
    return model.generate(ROW, max_new_tokens=num_tokens, do_sample=False, **arguments).tolist()


def values_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def released_names(model):
    return {name for name, p in model.named_parameters(remove_duplicate=False) if is_released(p)}


@pytest.fixture(params=[False, True], ids=["untied", "tied"], scope="module")
def saved(request):
    """A released model that has generated, and its weights before it was optimised."""
    model = small(tied=request.param)
    before = values_of(model)
    fastgen.optimize(model, release_weights=True)
    generate(model)
    assert len(released_names(model)) == LINEARS_OF_A_LAYER + (not request.param)
    return model, before


@pytest.fixture(scope="module")
def released():
    """A released model that no test changes."""
    return released_model()


# Memory and tokens.


def test_tokens_are_those_of_packed_weights_and_of_the_restored_model():
    model = fastgen.optimize(small(), pack=True)
    expected = generate(model)
    fastgen.restore(model)
    fastgen.optimize(model, release_weights=True)
    with NativeTokens(model):
        assert generate(model) == expected
    fastgen.restore(model)
    assert generate(fastgen.optimize(model, pack=True)) == expected


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_memory_is_gone(tied):
    model = small(tied=tied)
    storages = {n: StorageWeakRef(p.untyped_storage()) for n, p in model.named_parameters()}
    fastgen.optimize(model, release_weights=True)
    names = released_names(model)
    assert all(storages[name].expired() for name in names)
    # Nor is it in a merged weight: only the biases are merged still.
    merged = fastgen.api.require(model).weights._merged
    assert all(plan.name.endswith("bias") for plan in merged)
    for name in names:  # what a parameter has in its place: one element
        with torch._C.DisableTorchFunctionSubclass():
            nothing = model.get_parameter(name).untyped_storage().nbytes()
        assert nothing == BF16.itemsize
    own = sum(model.get_parameter(name).nbytes for name in names)
    assert fastgen.explain(model).released_bytes == own


def test_one_layer_at_a_time_exists_twice(monkeypatch):
    """When a weight is packed, all that were packed before are gone."""
    model = tiny_model("qwen2", dtype=BF16)
    alive, pack = [], fastgen.live.pack
    seen = []

    def watched(weight, *rest):
        seen.append(sum(not storage.expired() for storage in alive))
        alive.append(StorageWeakRef(weight.untyped_storage()))
        return pack(weight, *rest)

    monkeypatch.setattr(fastgen.live, "pack", watched)
    fastgen.optimize(model, release_weights=True)
    assert seen == [0] * 9  # 2 layers of qkv, o, gate/up and down, and the head
    assert all(storage.expired() for storage in alive)


def test_explain_says_what_was_released_and_what_stayed():
    explanation = fastgen.explain(released_model(tied=True))
    assert explanation.kept.keys() <= {TIED, EMBEDDING}
    ((num_bytes, why),) = explanation.kept.values()
    assert num_bytes == 128 * 64 * 2
    assert "embedding" in why
    assert "MiB of weights, whose packed copies are the only ones" in str(explanation)
    assert why in str(explanation)
    assert explanation.to_dict()["released_bytes"] == explanation.released_bytes > 0
    plain = fastgen.explain(fastgen.optimize(small(), pack=True))
    assert plain.released_bytes == 0
    assert "only ones" not in str(plain)


# What needs the weights.


def backward_of_before(model):
    """A loss of before the weights were released has kept them as they were."""
    fastgen.restore(model)
    loss = model(input_ids=ROW, labels=ROW).loss
    fastgen.optimize(model, release_weights=True)
    loss.backward()


def step(model):
    parameter = model.get_parameter(Q)
    parameter.grad = torch.ones(parameter.shape, dtype=BF16)
    torch.optim.AdamW([parameter], fused=False).step()


@torch.no_grad()
def write(model):
    model.get_parameter(Q).zero_()


USES = {
    "forward": lambda model: model(input_ids=ROW),
    "training": lambda model: model.train()(input_ids=ROW, labels=ROW).loss.backward(),
    "head": lambda model: model.lm_head(torch.ones(1, 64, dtype=BF16)),
    "functional": lambda model: torch.ones(1, 64, dtype=BF16) @ model.lm_head.weight.T,
    "step": step,
    "in-place": write,
    "data": lambda model: model.get_parameter(Q).data,
    "set-data": lambda model: setattr(model.get_parameter(Q), "data", torch.ones(64, 64)),
    "numpy": lambda model: model.get_parameter(Q).float().numpy(),
    "foreach": lambda model: torch._foreach_add([model.get_parameter(Q)], 1),
    "to": lambda model: model.to(torch.float32),
    "half": lambda model: model.half(),
    "share-memory": lambda model: model.share_memory(),
    "no-cache": lambda model: generate(model, use_cache=False),
    "load": lambda model: model.load_state_dict(model.state_dict()),
    "load-assign": lambda model: model.load_state_dict(model.state_dict(), assign=True),
    "load-part": lambda model: model.load_state_dict({Q: torch.ones(64, 64)}, strict=False),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_whatever_needs_the_values_raises_and_changes_nothing(released, use):
    before, tokens = values_of(released), generate(released)
    with raises():
        use(released)
    released.eval().get_parameter(Q).grad = None
    assert_bit_equal(released.state_dict(), before)
    with NativeTokens(released):
        assert generate(released) == tokens


def test_a_backward_from_before_is_refused():
    model = released_model()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        backward_of_before(model)


def test_the_message_names_the_weight_and_what_was_tried(released):
    with raises(f"linear needs the values of {HEAD}, which was {RESTORE}"):
        released.lm_head(torch.ones(1, 64, dtype=BF16))
    with raises(f"data needs the values of {UP}"):
        _ = released.get_parameter(UP).data
    with raises(r"transformers' own loop \(use_cache=False\)"):
        generate(released, use_cache=False)


def test_what_needs_no_values_works(released):
    parameter = released.get_parameter(Q)
    assert parameter.shape == (64, 64)
    assert parameter.dtype == released.dtype == BF16
    assert parameter.device == released.device
    assert parameter.requires_grad
    assert parameter.is_leaf
    assert isinstance(parameter, torch.nn.Parameter)
    assert released.num_parameters() == small().num_parameters()
    assert "q_proj" in repr(parameter)
    torch.optim.AdamW(released.parameters()).step()  # no gradients: nothing to do
    released.zero_grad()


def test_what_goes_past_it_finds_no_number(released):
    with pytest.warns(UserWarning, match="copy construct"):
        assert torch.tensor(released.get_parameter(Q)).isnan().all()


def test_a_pickled_parameter_is_a_plain_one(released):
    parameter = released.get_parameter(UP)
    loaded = pickle.loads(pickle.dumps(parameter))
    assert type(loaded) is torch.nn.Parameter
    assert torch.equal(loaded, parameter.detach())


# Changes while the weights are released.


def replace_weight(model):
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(128, 64, dtype=BF16))


def swap_weights(model):
    attention = model.model.layers[0].self_attn
    attention.k_proj.weight, attention.v_proj.weight = (
        attention.v_proj.weight,
        attention.k_proj.weight,
    )


def add_adapter(model):
    get_peft_model(model, LoraConfig(target_modules=["q_proj"]))


def edit_config(model):
    model.config.rms_norm_eps = 0.5


CHANGES = {
    "weight": replace_weight,
    "swap": swap_weights,
    "adapter": add_adapter,
    "config": edit_config,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_model_is_not_captured_and_can_be_restored(change):
    model = released_model()
    change(model)
    why = "another tensor now" if change is swap_weights else "must be captured again"
    for _ in range(2):
        with raises(f"released.*{why}: {re.escape(WAY_BACK)}"):
            generate(model)
    fastgen.restore(model)
    assert released_names(model) == set()
    assert not model(input_ids=ROW).logits.isnan().any()


def test_a_change_of_what_stayed_is_followed():
    """In place, and as another tensor: the released weights stay where they are."""
    model, plain = released_model(), small()
    packed = {id(p) for p in model.parameters() if is_released(p)}
    for change in ("in place", "another"):
        for each in (model, plain):
            with torch.no_grad():
                if change == "in place":
                    each.get_parameter(NORM).mul_(-1.5)
                    each.get_parameter(EMBEDDING)[:64].mul_(0.5)
                else:
                    each.model.norm.weight = torch.nn.Parameter(each.model.norm.weight + 2)
        tokens = generate(model)
        assert tokens == generate(fastgen.optimize(copy.deepcopy(plain), pack=True))
        assert {id(p) for p in model.parameters() if is_released(p)} == packed
    fastgen.restore(model)
    assert_bit_equal(model.state_dict(), plain.state_dict())


def test_weights_changed_may_be_called():
    model = released_model()
    tokens = generate(model)
    fastgen.weights_changed(model)
    assert generate(model) == tokens
    assert fastgen.api.require(model).weight_epoch == 1


@pytest.mark.parametrize("how", ["state-dict", "detach", "view"])
def test_a_write_into_a_copy_is_not_lost_silently(how):
    """The tensors of a plain state_dict are the weights; here the write would reach nothing."""
    model = released_model()
    state = model.state_dict()
    target = {"state-dict": state[UP], "detach": model.get_parameter(UP).detach()}.get(how)
    (state[UP].view(-1)[:3] if target is None else target).zero_()
    del state, target
    for use in (generate, torch.nn.Module.state_dict):
        with raises(f"{UP} was {RESTORE}"):
            use(model)
    fastgen.restore(model)
    assert_bit_equal(model.state_dict(), small().state_dict())


def test_reading_a_copy_is_no_write():
    model = released_model()
    state = model.state_dict()
    for tensor in state.values():
        (tensor.float() * 2).sum()
    generate(model)
    state[NORM].mul_(2)  # this one is the weight itself
    assert torch.equal(model.get_parameter(NORM), state[NORM])
    generate(model)


# restore.


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_restore_brings_everything_back(tied):
    model = small(tied=tied)
    model.get_parameter(UP).requires_grad_(False)
    model.get_parameter(Q).note = "mine"
    model.get_parameter(DOWN).grad = torch.ones(64, 96, dtype=BF16)
    parameters, before = dict(model.named_parameters(remove_duplicate=False)), values_of(model)
    with torch.no_grad():
        logits = model(input_ids=ROW).logits
    fastgen.optimize(model, release_weights=True)
    generate(model)
    fastgen.restore(model)
    assert_bit_equal(model.state_dict(), before)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ROW).logits, logits)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert parameter is parameters[name]
        assert type(parameter) is torch.nn.Parameter
        assert parameter.requires_grad == (name != UP)
        assert parameter.untyped_storage().nbytes() == parameter.nbytes
    assert vars(model.get_parameter(Q)) == {"note": "mine"}
    assert model.get_parameter(DOWN).grad.sum() == 64 * 96
    model.float()(input_ids=ROW, labels=ROW).loss.backward()


def test_other_models_of_the_class_are_not_concerned():
    model, other = (tiny_model("mistral", dtype=BF16, num_hidden_layers=1) for _ in range(2))
    before = values_of(model)
    fastgen.optimize(model, release_weights=True)
    other.half().bfloat16().load_state_dict(model.state_dict())
    assert_bit_equal(other.state_dict(), before)
    copy.deepcopy(model).half()
    fastgen.restore(model)
    assert "_apply" not in vars(type(model))
    assert "_load_from_state_dict" not in vars(type(model))


def test_a_weight_of_two_linears_stays_one():
    model = tiny_model("qwen2", dtype=BF16)
    first, second = (layer.mlp.down_proj for layer in model.model.layers)
    second.weight = first.weight
    before = values_of(model)
    fastgen.optimize(model, release_weights=True)
    assert is_released(first.weight)
    assert first.weight is second.weight
    state, names = model.state_dict(), (DOWN, DOWN.replace("0", "1"))
    assert_bit_equal(state, before)
    assert len({state[name].data_ptr() for name in names}) == 1
    copied = copy.deepcopy(model)
    assert copied.get_parameter(names[0]) is copied.get_parameter(names[1])
    fastgen.restore(model)
    assert first.weight is second.weight
    assert_bit_equal(model.state_dict(), before)


def test_a_model_made_under_inference_mode():
    with torch.inference_mode():
        model = small()
    before, other = values_of(model), copy.deepcopy(model)
    fastgen.optimize(model, release_weights=True)
    with torch.inference_mode():
        assert_bit_equal(model.state_dict(), before)
    assert generate(model) == generate(fastgen.optimize(other, pack=True))
    fastgen.restore(model)
    assert_bit_equal(model.state_dict(), before)


def test_restore_in_inference_mode_leaves_weights_that_can_be_trained():
    model = released_model()
    with torch.inference_mode():
        fastgen.restore(model)
    model(input_ids=ROW, labels=ROW).loss.backward()


# Adapters.


def test_an_adapter_on_released_weights():
    """The base's weights go with the adapter's; the adapter alone can be saved and loaded."""
    torch.manual_seed(1)
    model = get_peft_model(small(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.eval()
    before = values_of(model)
    expected = generate(fastgen.optimize(copy.deepcopy(model), pack=True))
    fastgen.optimize(model, release_weights=True)
    with NativeTokens(model):
        assert generate(model) == expected
    assert_bit_equal(model.state_dict(), before)
    adapter = {name: value * 3 for name, value in before.items() if "lora_" in name}
    model.load_state_dict(adapter, strict=False)
    assert generate(model) != expected
    for use in (model.merge_adapter, model.half):
        with raises():
            use()
    with raises(), model.disable_adapter():
        generate(model)
    fastgen.restore(model)
    assert_bit_equal(model.state_dict(), before | adapter)


# What is refused.


def test_a_weight_whose_memory_is_not_its_own_stays():
    model = small()
    both = torch.zeros(2, 128 * 64, dtype=BF16)
    both[0] = model.lm_head.weight.detach().flatten()
    model.lm_head.weight.data = both[0].view(128, 64)
    fastgen.optimize(model, release_weights=True)
    assert not is_released(model.lm_head.weight)
    ((num_bytes, why),) = fastgen.explain(model).kept.values()
    assert (num_bytes, why) == (128 * 64 * 2, f"{HEAD} is not all of its memory, or not contiguous")


def test_a_weight_that_a_buffer_looks_into_stays():
    model = small()
    model.register_buffer("look", model.get_parameter(DOWN).detach()[0])
    fastgen.optimize(model, release_weights=True)
    assert fastgen.explain(model).kept[DOWN][1] == f"{DOWN} shares its memory with look"


@pytest.mark.skipif(
    (missing := why_not_tiles(torch.empty(32, 32, dtype=BF16))) is not None,
    reason=f"one layout alone: {missing}",
)
def test_a_weight_that_is_read_in_two_layouts_stays():
    model = small()
    before, weights = model.get_parameter(DOWN).clone(), LiveWeights(model)
    weights.attach(())
    inputs = [InputSpec("packed", DOWN, layout) for layout in ("tiles", "gated_tiles")]
    for _ in range(2):
        packed = weights.resolve(inputs, release=True)
        for spec in inputs:
            assert torch.equal(unpack(packed[spec], spec.layout, len(before)), before)
    assert not is_released(model.get_parameter(DOWN))
    assert weights.released.kept[DOWN][1] == "the graph reads it in two layouts"


REFUSED = {
    "fp32": (torch.float32, {}, "the weight is float32"),
    "no-pass": (
        BF16,
        {"passes_off": ("pack_linears", "pack_gated_linears")},
        "pack_linears is off",
    ),
}


@pytest.mark.parametrize(("dtype", "fields", "why"), REFUSED.values(), ids=REFUSED)
def test_nothing_to_release_is_an_error(dtype, fields, why):
    model = small().to(dtype)
    before = values_of(model)
    with pytest.raises(fastgen.UnsupportedModelError, match=f"none can be freed: {why}"):
        fastgen.optimize(model, release_weights=True, **fields)
    assert fastgen.api.lookup(model) is None
    assert_bit_equal(model.state_dict(), before)
    model(input_ids=ROW)


def test_a_failure_in_the_midst_leaves_the_model_as_it_was(monkeypatch):
    model = small()
    before, pack, calls = values_of(model), fastgen.live.pack, []

    def failing(weight, *rest):
        calls.append(weight.shape)
        if len(calls) == 4:
            raise MemoryError
        return pack(weight, *rest)

    monkeypatch.setattr(fastgen.live, "pack", failing)
    with pytest.raises(MemoryError):
        fastgen.optimize(model, release_weights=True)
    assert released_names(model) == set()
    assert_bit_equal(model.state_dict(), before)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"release_weights": 1}, "must be a bool, got 1"),
        ({"release_weights": True, "pack": False}, "pack must be True"),
    ],
    ids=["not-a-bool", "not-packed"],
)
def test_settings_that_contradict_each_other(fields, match):
    with pytest.raises(ValueError, match=match):
        fastgen.Config(**fields)
