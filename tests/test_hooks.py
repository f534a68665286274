"""Hooks and replaced forwards: a graph would skip them, so they are refused or left to the loop."""

import copy
import types

import pytest
import torch
from following import assert_follows, small_model, tokens_of
from tiny_models import prompts
from torch import nn

import fastgen

ROW = prompts(9)[0]


def negate(module, arguments, output):
    return -output


def negate_input(module, arguments):
    return (-arguments[0], *arguments[1:])


def own_forward(module):
    module.forward = types.MethodType(lambda self, x: -type(self).forward(self, x), module)
    return types.SimpleNamespace(remove=lambda: vars(module).pop("forward"))


ADDITIONS = {
    "forward-hook": lambda mlp: mlp.register_forward_hook(negate),
    "pre-hook": lambda mlp: mlp.register_forward_pre_hook(negate_input),
    "forward": own_forward,
}


@pytest.mark.parametrize("add", ADDITIONS.values(), ids=ADDITIONS)
def test_before_optimize_they_are_refused_by_name(add):
    model = small_model()
    add(model.model.layers[0].mlp)
    with pytest.raises(fastgen.UnsupportedModelError, match=r"model\.layers\.0\.mlp"):
        fastgen.optimize(model)
    assert fastgen.api.lookup(model) is None


@pytest.mark.parametrize("add", ADDITIONS.values(), ids=ADDITIONS)
def test_after_optimize_transformers_loop_runs_them(add):
    model = fastgen.optimize(small_model())
    before = assert_follows(model)
    handle = add(model.model.layers[0].mlp)
    expected = tokens_of(copy.deepcopy(model), ROW, 8)
    assert tokens_of(model, ROW, 8) == expected != before[0]
    assert "model.layers.0.mlp" in str(fastgen.explain(model))
    handle.remove()
    assert assert_follows(model) == before


def test_a_hook_on_all_modules_of_torch():
    model, calls = fastgen.optimize(small_model()), []
    before = assert_follows(model)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: calls.append(1))
    try:
        tokens_of(model, ROW, 3)
        assert calls, "the hook did not run"
        with pytest.raises(fastgen.UnsupportedModelError, match="every module"):
            fastgen.optimize(small_model())
    finally:
        handle.remove()
    assert assert_follows(model) == before


def test_a_refused_model_keeps_its_merged_memory():
    """A hook comes and goes without a copy of the weights."""
    model = fastgen.optimize(small_model())
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    handle = model.lm_head.register_forward_hook(lambda *_: None)
    tokens_of(model, ROW, 2)
    handle.remove()
    assert_follows(model)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before


# Copies.


def test_two_optimised_models_of_one_class():
    one, other = small_model(), small_model()
    with torch.no_grad():
        other.lm_head.weight.mul_(-1)
    fastgen.optimize(one)
    fastgen.optimize(other)
    first, second = assert_follows(one), assert_follows(other)
    assert first != second
    fastgen.restore(one)
    assert tokens_of(one, ROW, 8) == first[0]
    assert assert_follows(other) == second


def test_a_deepcopy_can_be_optimised_on_its_own():
    model = fastgen.optimize(small_model())
    before = assert_follows(model)
    twin = fastgen.optimize(copy.deepcopy(model))
    with torch.no_grad():
        twin.model.layers[0].mlp.up_proj.weight.mul_(-1)
    assert assert_follows(twin) != before
    assert assert_follows(model) == before
