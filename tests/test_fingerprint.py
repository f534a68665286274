"""The fingerprint: what changes a captured graph, what does not, and which hooks count."""

from __future__ import annotations

import copy
import gc
import types
import weakref

import pytest
import torch
from test_saving import tied_model
from tiny_models import prompts, tiny_model
from torch import nn
from torch.nn.utils import parametrize
from transformers.models.llama import modeling_llama

import fastgen
from fastgen.fingerprint import fingerprint, hooked_modules


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
