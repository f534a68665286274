"""What is watched on a live model, and memory that parameters and merged weights share."""

from __future__ import annotations

import copy
import gc
import types
import weakref

import pytest
import torch
from fastgen.passes import InputSpec, MergePlan
from safetensors.torch import load_file, save_file, save_model
from tiny_models import prompts, tiny_model
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

import fastgen
from fastgen import live as live_file
from fastgen.live import LiveWeights, fingerprint, hooked_modules

HEADER_BYTES = 16 * 1024  # what a file holds besides numbers

# Fingerprint.


class Adapter(nn.Module):
    """What LoRA makes of a linear: the linear itself, two small ones and a dictionary of scales."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base.out_features, bias=False)})
        self.scaling = {"default": 1.0}
        self._active_adapter = ["default"]
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output = self.base_layer(x)
        for name in self._active_adapter:
            output = output + self.lora_B[name](self.lora_A[name](x)) * self.scaling[name]
        return output


def adapted_model():
    model = tiny_model("llama")
    attention = model.model.layers[0].self_attn
    attention.q_proj = Adapter(attention.q_proj)
    return model


def tied_model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=128,
        num_hidden_layers=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
        **sizes,
    )
    return LlamaForCausalLM(config).eval()


def layer_of(model):
    return model.model.layers[0]


def set_on(module, name, value):
    """An assignment, for a lambda."""
    setattr(module, name, value)


def swap_class_forward(model, patch):
    original = modeling_llama.LlamaMLP.forward
    patch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: original(self, x) * 2)


def swap_instance_forward(model, patch=None):
    mlp = layer_of(model).mlp
    mlp.forward = types.MethodType(lambda self, x: x, mlp)


def add_hook(model, patch=None):
    layer_of(model).register_forward_hook(lambda *args: None)


def add_pre_hook(model, patch=None):
    model.lm_head.register_forward_pre_hook(lambda *args: None)


def parametrise(model, patch):
    parametrize.register_parametrization(layer_of(model).mlp.up_proj, "weight", nn.Identity())


def attention_of(model):
    return layer_of(model).self_attn


CHANGES = {
    "class-forward": swap_class_forward,
    "instance-forward": swap_instance_forward,
    "hook": add_hook,
    "pre-hook": add_pre_hook,
    "parametrization": parametrise,
    "other-kind-of-module": lambda m, _: set_on(layer_of(m).mlp, "act_fn", nn.ReLU()),
    "order-of-layers": lambda m, _: set_on(m.model, "layers", m.model.layers[::-1]),
    "fewer-layers": lambda m, _: set_on(m.model, "layers", m.model.layers[:1]),
    "new-module": lambda m, _: set_on(layer_of(m).mlp, "extra", nn.Linear(4, 4)),
    "lora": lambda m, _: set_on(attention_of(m), "v_proj", Adapter(attention_of(m).v_proj)),
    "new-bias": lambda m, _: set_on(m.lm_head, "bias", nn.Parameter(torch.zeros(128))),
    "cast": lambda m, _: m.to(torch.bfloat16),
    "cast-of-one": lambda m, _: m.lm_head.to(torch.float16),
    "cast-of-a-buffer": lambda m, _: m.model.rotary_emb.double(),
    "device": lambda m, _: m.lm_head.to("meta"),
    "vocabulary": lambda m, _: m.resize_token_embeddings(160),
    "tie": lambda m, _: set_on(m.lm_head, "weight", m.model.embed_tokens.weight),
    "float": lambda m, _: set_on(m.model.norm, "variance_epsilon", 1e-3),
    "int": lambda m, _: set_on(attention_of(m), "num_key_value_groups", 1),
    "flag": lambda m, _: set_on(attention_of(m), "is_causal", False),
    "none": lambda m, _: set_on(attention_of(m), "scaling", None),
    "new-attribute": lambda m, _: set_on(attention_of(m), "softcap", 30.0),
    "list": lambda m, _: layer_of(m).mlp.factors.append(3.0),
    "tuple": lambda m, _: set_on(layer_of(m).mlp, "pair", (1, 3)),
    "dict": lambda m, _: layer_of(m).mlp.scaling.update(default=0.5),
    "config": lambda m, _: set_on(m.config, "rms_norm_eps", 1e-3),
    "inside-the-config": lambda m, _: m.config.rope_parameters.update(rope_theta=5e5),
    "attention-implementation": lambda m, _: m.set_attn_implementation("eager"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changes_the_function_changes_the_fingerprint(change, monkeypatch):
    model = tiny_model("llama")
    mlp = layer_of(model).mlp
    mlp.factors, mlp.pair, mlp.scaling = [1.0, 2.0], (1, 2), {"default": 1.0}
    before = fingerprint(model)
    assert fingerprint(model) == before
    change(model, monkeypatch)
    assert fingerprint(model) != before


ADAPTER_CHANGES = {
    "other-adapter": lambda adapter: set_on(adapter, "_active_adapter", []),
    "disabled": lambda adapter: set_on(adapter, "_disable_adapters", True),
    "merged": lambda adapter: adapter.merged_adapters.append("default"),
    "scaled": lambda adapter: adapter.scaling.update(default=2.0),
    "added": lambda adapter: adapter.lora_A.update({"other": nn.Linear(64, 2, bias=False)}),
}


@pytest.mark.parametrize("change", ADAPTER_CHANGES.values(), ids=ADAPTER_CHANGES)
def test_the_state_of_an_adapter_is_in_the_fingerprint(change):
    model = adapted_model()
    before = fingerprint(model)
    change(attention_of(model).q_proj)
    assert fingerprint(model) != before


def test_a_broken_tie_changes_the_fingerprint():
    model = tied_model()
    before = fingerprint(model)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    assert fingerprint(model) != before


def change_in_place(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)


def replace_values(model):
    for parameter in model.parameters():
        parameter.data = parameter.data + 1


def toggle_training(model):
    model.train()
    layer_of(model).eval()


def generate(model, **arguments):
    model.generate(torch.tensor(prompts(5)), max_new_tokens=3, **arguments)


def generate_everything(model):
    told = {"output_scores": True, "output_hidden_states": True, "return_dict_in_generate": True}
    generate(model, num_beams=2, **told)


def train(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.tensor(prompts(9))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def checkpoint_gradients(model):
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True


HARMLESS = {
    "values-in-place": change_in_place,
    "other-values": replace_values,
    "train-and-eval": toggle_training,
    "greedy": lambda model: generate(model, do_sample=False),
    "sampling": lambda model: generate(model, do_sample=True),
    "beams-and-hidden-states": generate_everything,
    "training-step": train,
    "frozen": lambda model: model.requires_grad_(False),
    "gradient-checkpointing": checkpoint_gradients,
    "state-dict": lambda model: model.load_state_dict(tiny_model("llama", 1).state_dict()),
    "deepcopy": copy.deepcopy,
    "generation-config": lambda m: set_on(m.generation_config, "max_new_tokens", 7),
}


@pytest.mark.parametrize("change", HARMLESS.values(), ids=HARMLESS)
def test_what_does_not_change_the_function_does_not_change_the_fingerprint(change):
    model = tiny_model("llama")
    before = fingerprint(model)
    change(model)
    assert fingerprint(model) == before


def test_the_fingerprint_of_an_optimised_model_is_that_of_the_plain_one():
    model = tiny_model("llama")
    before = fingerprint(model)
    fastgen.optimize(model)
    assert fingerprint(model) == before
    model.generate(torch.tensor(prompts(5)), max_new_tokens=3, do_sample=False)
    assert fingerprint(model) == before
    fastgen.restore(model)
    assert fingerprint(model) == before


def test_the_fingerprint_holds_no_weights():
    model = tiny_model("llama")
    kept = fingerprint(model)
    weight = weakref.ref(layer_of(model).mlp.up_proj.weight)
    del model
    gc.collect()
    assert weight() is None
    assert kept == kept


def test_hooked_modules_are_named():
    model = tiny_model("llama")
    assert hooked_modules(model) == []
    add_hook(model)
    add_pre_hook(model)
    swap_instance_forward(model)
    assert hooked_modules(model) == ["model.layers.0", "model.layers.0.mlp", "lm_head"]


def test_hooks_that_collect_hidden_states_are_no_hooks():
    model = tiny_model("llama")
    model(torch.tensor(prompts(3)), output_hidden_states=True, output_attentions=True)
    assert hooked_modules(model) == []


# Memory.

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
    weights = LiveWeights(model, PLANS)
    weights.attach()
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
    LiveWeights(model, PLANS).attach()
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
    assert weights.current()
    for plan in PLANS:
        merged = merged_of(weights)[plan.name]
        assert torch.equal(merged, torch.cat([model.get_parameter(n) for n in plan.members]))
        assert not torch.equal(merged, torch.cat([before[name] for name in plan.members]))


def test_attach_lets_go_of_the_old_memory():
    model = tiny_model("qwen2")
    old = [StorageWeakRef(model.get_parameter(name).untyped_storage()) for name in MEMBERS]
    LiveWeights(model, PLANS).attach()
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
    LiveWeights(model, PLANS).attach()
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

    def watched(model, plan, merged):
        assert all(storage.expired() for storage in done), f"{len(done)} are still held"
        split(model, plan, merged)
        done.append(StorageWeakRef(merged.untyped_storage()))

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
        made.append(StorageWeakRef(merged.untyped_storage()))
        return merged

    monkeypatch.setattr(live_file, "_merge", watched)
    with pytest.raises(AttributeError):
        LiveWeights(model, [*PLANS, missing]).attach()
    assert len(made) == len(PLANS)
    assert all(storage.expired() for storage in made)
    assert_bit_equal(model.state_dict(), before)
    for parameter in model.parameters():
        assert parameter.untyped_storage().nbytes() == own_bytes(parameter)


def test_the_weights_do_not_hold_the_model_and_outlive_it():
    model = tiny_model("qwen2")
    weights = LiveWeights(model, PLANS)
    weights.attach()
    watched = weakref.ref(model)
    del model
    gc.collect()
    assert watched() is None
    weights.detach()


# Saving: I13.


def test_safetensors_save_file(live, tmp_path):
    model, _, before = live
    save_file(model.state_dict(), tmp_path / "all.safetensors")
    assert_bit_equal(load_file(tmp_path / "all.safetensors"), before)
    size = (tmp_path / "all.safetensors").stat().st_size
    total = sum(map(own_bytes, before.values()))
    assert total < size < total + HEADER_BYTES


def test_safetensors_save_model(live, tmp_path):
    model, _, before = live
    save_model(model, str(tmp_path / "all.safetensors"))
    assert_bit_equal(load_file(tmp_path / "all.safetensors"), before)


@pytest.mark.parametrize("name", [QKV[1], GATE_UP[0], GATE_UP[1]])
def test_torch_save_of_one_parameter(live, name, tmp_path):
    model, _, before = live
    torch.save(model.get_parameter(name), tmp_path / "one.pt")
    assert torch.equal(torch.load(tmp_path / "one.pt"), before[name])
    size = (tmp_path / "one.pt").stat().st_size
    assert own_bytes(before[name]) < size < own_bytes(before[name]) + HEADER_BYTES


def test_torch_save_of_the_state_dict(live, tmp_path):
    model, _, before = live
    torch.save(model.state_dict(), tmp_path / "all.pt")
    assert_bit_equal(torch.load(tmp_path / "all.pt"), before)
    total = sum(map(own_bytes, before.values()))
    assert total < (tmp_path / "all.pt").stat().st_size < total + 2 * HEADER_BYTES


def test_save_pretrained(live, tmp_path):
    model, _, before = live
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_bit_equal(loaded.state_dict(), before)
    assert_bit_equal(load_file(tmp_path / "model.safetensors"), before)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size < sum(map(own_bytes, before.values())) + HEADER_BYTES


def test_deepcopy(live):
    model, weights, before = live
    other = copy.deepcopy(model)
    assert_bit_equal(other.state_dict(), before)
    with torch.no_grad():
        for parameter in other.parameters():
            assert parameter.untyped_storage().nbytes() == own_bytes(parameter)
            parameter.zero_()
    assert_bit_equal(model.state_dict(), before)
    assert weights.current()


def test_load_state_dict_reaches_the_merged_weight(live):
    model, weights, _ = live
    other = tiny_model("qwen2", seed=1).state_dict()
    model.load_state_dict(other)
    assert weights.current()
    for plan in PLANS:
        expected = torch.cat([other[name] for name in plan.members])
        assert torch.equal(merged_of(weights)[plan.name], expected)


# Whether memory is where it was.


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
    assert weights.current()
    move(model, name)
    assert not weights.current()


def test_a_replaced_buffer_is_noticed(live):
    model, weights, _ = live
    name = "model.rotary_emb.inv_freq"
    weights.resolve([InputSpec("buffer", name)])
    assert weights.current()
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq * 2
    assert not weights.current()


@pytest.mark.parametrize("change", [change_in_place, toggle_training, train, copy.deepcopy])
def test_memory_that_stays_is_current(live, change):
    model, weights, _ = live
    merged_of(weights)
    change(model)
    assert weights.current()


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
    weights.detach()
    weights.attach()
    for plan in PLANS:
        expected = torch.cat([new[name] for name in plan.members])
        assert torch.equal(merged_of(weights)[plan.name], expected)
    assert weights.current()
    assert unique_bytes([*model.parameters(), *merged_of(weights).values()]) == sum(
        map(own_bytes, model.parameters())
    )


def test_planted_slices_of_one_storage_are_seen(tmp_path):
    """Members that were plain slices of the merged weight: what the own storages are for."""
    model = tiny_model("qwen2")
    members = [model.get_parameter(name) for name in QKV]
    merged = torch.cat([member.detach() for member in members])
    for member, part in zip(members, merged.split([64, 32, 32]), strict=True):
        member.data = part
    assert members[1].untyped_storage().nbytes() > own_bytes(members[1])
    torch.save(members[1], tmp_path / "one.pt")
    assert (tmp_path / "one.pt").stat().st_size > own_bytes(members[1]) + HEADER_BYTES
