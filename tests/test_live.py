"""Memory that parameters and merged weights share, and whether it is where it was: I3, I4."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from fastgen.passes import InputSpec, MergePlan
from test_fingerprint import change_in_place
from tiny_models import prompts, tiny_model
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers.models.llama import modeling_llama

import fastgen
from fastgen import live as live_file
from fastgen.live import Change, LiveWeights

QKV = tuple(f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkv")
BIASES = tuple(f"model.layers.0.self_attn.{name}_proj.bias" for name in "qkv")
GATE_UP = tuple(f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up"))
PLANS = [MergePlan("+".join(members), members) for members in (QKV, BIASES, GATE_UP)]
MEMBERS = (*QKV, *BIASES, *GATE_UP)


@pytest.fixture
def live():
    """A model, its weights laid out, and what every weight was before."""
    model = tiny_model("qwen2")
    before = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    weights = LiveWeights(model)
    weights.attach(PLANS)
    return model, weights, before


def merged_of(weights) -> dict[str, torch.Tensor]:
    specs = [InputSpec("merged", plan.name) for plan in PLANS]
    return {spec.target: tensor for spec, tensor in weights.resolve(specs).items()}


def assert_bit_equal(state, before):
    assert state.keys() == before.keys()
    for name, tensor in state.items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name]), name


def own_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def unique_bytes(tensors) -> int:
    """Bytes that the tensors' storages cover together."""
    total, end = 0, 0
    ranges = [
        (tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
        for tensor in tensors
    ]
    for start, size in sorted(ranges):
        total += max(0, start + size - max(start, end))
        end = max(end, start + size)
    return total


def test_parameters_keep_identity_values_and_everything_else():
    model = tiny_model("qwen2")
    model.model.layers[0].self_attn.k_proj.weight.requires_grad_(False)
    before = dict(model.named_parameters())
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradient = torch.ones_like(before[QKV[0]])
    before[QKV[0]].grad = gradient
    LiveWeights(model).attach(PLANS)
    for name, parameter in model.named_parameters():
        assert parameter is before[name]
        assert parameter.is_contiguous()
        assert parameter.is_leaf
        assert parameter.requires_grad == (name != QKV[1])
    assert before[QKV[0]].grad is gradient
    assert_bit_equal(model.state_dict(), values)


def test_each_member_has_a_storage_of_its_own_size(live):
    model, _, _ = live
    for name in MEMBERS:
        parameter = model.get_parameter(name)
        assert parameter.untyped_storage().nbytes() == own_bytes(parameter)
        assert parameter.storage_offset() == 0
    pointers = [p.untyped_storage().data_ptr() for p in model.parameters()]
    assert len(set(pointers)) == len(pointers)


def test_members_lie_in_the_merged_weight_in_the_plans_order(live):
    model, weights, before = live
    for plan in PLANS:
        merged = merged_of(weights)[plan.name]
        assert torch.equal(merged, torch.cat([before[name] for name in plan.members]))
        start = merged.data_ptr()
        for name in plan.members:
            parameter = model.get_parameter(name)
            assert parameter.data_ptr() == start
            start += own_bytes(parameter)


def test_a_change_in_place_is_seen_in_the_merged_weight(live):
    model, weights, _ = live
    merged = merged_of(weights)[PLANS[0].name]
    with torch.no_grad():
        model.get_parameter(QKV[1]).fill_(7.0)
    assert torch.equal(merged[64:96], torch.full((32, 64), 7.0))
    model.get_parameter(QKV[2]).data.copy_(torch.full((32, 64), 8.0))
    assert torch.equal(merged[96:], torch.full((32, 64), 8.0))
    assert not (merged[:64] == 7.0).any()


@pytest.mark.parametrize(
    "options",
    [{"foreach": False}, {"foreach": True}, {"fused": True}],
    ids=["plain", "foreach", "fused"],
)
def test_a_step_of_adamw_is_seen_in_the_merged_weight(live, options):
    model, weights, before = live
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, **options)
    ids = torch.tensor(prompts(9))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert weights.check() is not Change.MEMORY
    for plan in PLANS:
        merged = merged_of(weights)[plan.name]
        assert torch.equal(merged, torch.cat([model.get_parameter(n) for n in plan.members]))
        assert not torch.equal(merged, torch.cat([before[name] for name in plan.members]))


def test_attach_lets_go_of_the_old_memory():
    model = tiny_model("qwen2")
    old = [StorageWeakRef(model.get_parameter(name).untyped_storage()) for name in MEMBERS]
    LiveWeights(model).attach(PLANS)
    assert all(storage.expired() for storage in old)


def test_attach_holds_one_layer_twice_at_most(monkeypatch):
    """I3, the peak: what was merged before is gone when the next plan is laid out."""
    model = tiny_model("qwen2")
    old = {name: StorageWeakRef(model.get_parameter(name).untyped_storage()) for name in MEMBERS}
    merge, done = live_file._merge, []

    def watched(model, plan):
        assert all(old[name].expired() for name in done)
        done.extend(plan.members)
        return merge(model, plan)

    monkeypatch.setattr(live_file, "_merge", watched)
    LiveWeights(model).attach(PLANS)
    assert done == list(MEMBERS)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_parameter_memory_after_optimize_is_what_it_was(family):
    """I3: all storages that the model and the graph hold cover each byte once."""
    model = tiny_model(family)
    before = unique_bytes(model.parameters())
    assert before == sum(map(own_bytes, model.parameters()))
    fastgen.optimize(model)
    graph = fastgen.api.require(model).compiled
    held = [item for item in graph._arguments if isinstance(item, torch.Tensor)]
    constants = sum(
        own_bytes(item)
        for item, spec in zip(graph._arguments, graph.inputs.values(), strict=True)
        if spec.kind in ("constant", "buffer")
    )
    assert unique_bytes([*model.parameters(), *held]) == before + constants
    assert unique_bytes(model.parameters()) == before
    fastgen.restore(model)
    assert unique_bytes(model.parameters()) == before


def test_detach_gives_memory_back_and_every_parameter_its_own(live):
    model, weights, before = live
    parameters = dict(model.named_parameters())
    merged = [StorageWeakRef(tensor.untyped_storage()) for tensor in merged_of(weights).values()]
    weights.detach()
    assert all(storage.expired() for storage in merged)
    assert_bit_equal(model.state_dict(), before)
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
        assert parameter.untyped_storage().nbytes() == own_bytes(parameter)
    weights.detach()  # twice is once
    assert_bit_equal(model.state_dict(), before)


def test_detached_parameters_are_independent(live):
    model, weights, before = live
    weights.detach()
    with torch.no_grad():
        model.get_parameter(QKV[0]).fill_(7.0)
    state = {name: tensor for name, tensor in model.state_dict().items() if name != QKV[0]}
    assert_bit_equal(state, {name: before[name] for name in state})


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_restore_is_bit_equal_and_independent(family):
    """I4: equal state_dict, bit-equal logits, no storage larger than its parameter."""
    model = tiny_model(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.tensor(prompts(20))
    with torch.no_grad():
        logits = model(ids).logits
        fastgen.optimize(model)
        assert_bit_equal(model.state_dict(), before)
        assert torch.equal(model(ids).logits, logits)
        fastgen.restore(model)
        assert torch.equal(model(ids).logits, logits)
    assert_bit_equal(model.state_dict(), before)
    for parameter in model.parameters():
        assert parameter.untyped_storage().nbytes() == own_bytes(parameter)


@pytest.mark.parametrize("function", ["optimize", "restore"])
def test_inference_mode_around_the_call_leaves_a_model_that_trains(function):
    """Tensors made under inference_mode can never be trained; parameters must not become such."""
    model, plain = tiny_model("llama"), tiny_model("llama")
    if function == "restore":
        fastgen.optimize(model)
    with torch.inference_mode():
        getattr(fastgen, function)(model)
    ids = torch.tensor(prompts(9))
    for trained in (model, plain):
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
        trained(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    assert_bit_equal(model.state_dict(), plain.state_dict())


def test_a_change_that_cannot_be_rewritten_is_left_to_transformers(monkeypatch):
    """A changed model must never run on its old graph, nor fail where transformers would not."""
    model = fastgen.optimize(tiny_model("llama"))
    original = modeling_llama.LlamaMLP.forward

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return -original(self, x).float()

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", forward)
    ids = torch.tensor(prompts(5))
    expected = tiny_model("llama").generate(ids, max_new_tokens=8, do_sample=False)
    for _ in range(2):
        assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), expected)
    assert sum(fastgen.api.require(model).fallbacks.values()) == 2


def test_restore_holds_one_layer_twice_at_most(monkeypatch):
    """Giving memory back must not need twice the memory: merged weights go as they are split."""
    model = tiny_model("llama")
    fastgen.optimize(model)
    split, done = live_file._split, []

    def watched(merged, others):
        assert all(storage.expired() for storage in done), f"{len(done)} are still held"
        split(merged, others)
        done.append(StorageWeakRef(merged.tensor.untyped_storage()))

    monkeypatch.setattr(live_file, "_split", watched)
    fastgen.restore(model)
    assert len(done) == 4
    assert all(storage.expired() for storage in done)


def test_a_failed_attach_leaves_the_model_as_it_was(monkeypatch):
    model = tiny_model("qwen2")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    missing = MergePlan("missing", ("model.layers.0.mlp.up_proj.weight", "model.no_such.weight"))
    merge, made = live_file._merge, []

    def watched(model, plan):
        merged = merge(model, plan)
        made.append(StorageWeakRef(merged.tensor.untyped_storage()))
        return merged

    monkeypatch.setattr(live_file, "_merge", watched)
    with pytest.raises(AttributeError):
        LiveWeights(model).attach([*PLANS, missing])
    assert len(made) == len(PLANS)
    assert all(storage.expired() for storage in made)
    assert_bit_equal(model.state_dict(), before)
    for parameter in model.parameters():
        assert parameter.untyped_storage().nbytes() == own_bytes(parameter)


def test_the_weights_do_not_hold_the_model_and_outlive_it():
    model = tiny_model("qwen2")
    weights = LiveWeights(model)
    weights.attach(PLANS)
    watched = weakref.ref(model)
    del model
    gc.collect()
    assert watched() is None
    weights.detach()


def test_load_state_dict_reaches_the_merged_weight(live):
    model, weights, _ = live
    other = tiny_model("qwen2", seed=1).state_dict()
    model.load_state_dict(other)
    assert weights.check() is not Change.MEMORY
    for plan in PLANS:
        expected = torch.cat([other[name] for name in plan.members])
        assert torch.equal(merged_of(weights)[plan.name], expected)


# Whether memory is where it was.


def toggle_training(model):
    model.train()
    model.model.layers[0].eval()


def train(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.tensor(prompts(9))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


EMBEDDING = "model.embed_tokens.weight"


def module_of(model, name):
    return model.get_submodule(name.rpartition(".")[0])


def assign_parameter(model, name):
    module = module_of(model, name)
    module.weight = nn.Parameter(module.weight.detach().clone())


def assign_state_dict(model, name):
    state = {key: value.clone() for key, value in module_of(model, name).state_dict().items()}
    module_of(model, name).load_state_dict(state, assign=True)


def delete_module(model, name):
    parent, _, child = name.rpartition(".")[0].rpartition(".")
    delattr(model.get_submodule(parent), child)


def set_data(model, name, function):
    parameter = model.get_parameter(name)
    parameter.data = function(parameter.data)


MOVES = {
    "data": lambda model, name: set_data(model, name, torch.clone),
    "parameter": assign_parameter,
    "state-dict": assign_state_dict,
    "cast": lambda model, name: module_of(model, name).to(torch.bfloat16),
    "transposed": lambda model, name: set_data(model, name, torch.t),
    "deleted": delete_module,
}


@pytest.mark.parametrize("name", [QKV[0], GATE_UP[1], EMBEDDING], ids=["first", "last", "unmerged"])
@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_moved_memory_is_noticed(live, move, name):
    model, weights, _ = live
    merged = [InputSpec("merged", plan.name) for plan in PLANS]
    weights.resolve([*merged, InputSpec("parameter", EMBEDDING)])
    assert weights.check() is not Change.MEMORY
    move(model, name)
    assert weights.check() is Change.MEMORY


def test_a_replaced_buffer_is_noticed(live):
    model, weights, _ = live
    name = "model.rotary_emb.inv_freq"
    weights.resolve([InputSpec("buffer", name)])
    assert weights.check() is not Change.MEMORY
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq * 2
    assert weights.check() is Change.MEMORY


@pytest.mark.parametrize("change", [change_in_place, toggle_training, train, copy.deepcopy])
def test_memory_that_stays_is_current(live, change):
    model, weights, _ = live
    merged_of(weights)
    change(model)
    assert weights.check() is not Change.MEMORY


def test_detach_keeps_what_the_user_has_put_in_place(live):
    model, weights, before = live
    mine = torch.full((64, 64), 5.0)
    model.get_parameter(QKV[0]).data = mine
    weights.detach()
    assert model.get_parameter(QKV[0]).data_ptr() == mine.data_ptr()
    assert torch.equal(model.get_parameter(QKV[0]), torch.full((64, 64), 5.0))
    state = {name: tensor for name, tensor in model.state_dict().items() if name != QKV[0]}
    assert_bit_equal(state, {name: before[name] for name in state})


def test_attach_again_takes_the_new_weights(live):
    model, weights, _ = live
    new = {name: tensor.clone() for name, tensor in tiny_model("qwen2", 1).state_dict().items()}
    model.load_state_dict(new, assign=True)
    weights.attach(PLANS)
    for plan in PLANS:
        expected = torch.cat([new[name] for name in plan.members])
        assert torch.equal(merged_of(weights)[plan.name], expected)
    assert weights.check() is not Change.MEMORY
    assert unique_bytes([*model.parameters(), *merged_of(weights).values()]) == sum(
        map(own_bytes, model.parameters())
    )
