"""The key of a cached graph: whatever a capture could see changes it; the rest does not."""

from __future__ import annotations

import functools
import inspect
import sys
import types

import pytest
import torch
from test_fingerprint import ADAPTER_CHANGES, CHANGES, HARMLESS, adapted_model, layer_of, set_on
from tiny_models import tiny_model
from torch import nn
from transformers import masking_utils
from transformers.models.llama import modeling_llama

from fastgen import graph_key as keys
from fastgen.graph_key import NotCacheableError, graph_key, sources_digest


def key_of(model, passes_off=(), budget=0) -> str:
    return graph_key(model, passes_off, budget)


# Models with these go to capture, which refuses them.
_HOOKS = ("hook", "pre-hook", "instance-forward")
_ONE_DEVICE = {name: change for name, change in CHANGES.items() if name not in _HOOKS}


@pytest.mark.parametrize("change", _ONE_DEVICE.values(), ids=_ONE_DEVICE)
def test_what_changes_the_fingerprint_changes_the_key(change, monkeypatch):
    model = tiny_model("llama")
    mlp = layer_of(model).mlp
    mlp.factors, mlp.pair, mlp.scaling = [1.0, 2.0], (1, 2), {"default": 1.0}
    before = key_of(model)
    assert key_of(model) == before
    change(model, monkeypatch)
    assert key_of(model) != before


@pytest.mark.parametrize("change", ADAPTER_CHANGES.values(), ids=ADAPTER_CHANGES)
def test_the_state_of_an_adapter_is_in_the_key(change):
    model = adapted_model()
    before = key_of(model)
    change(layer_of(model).self_attn.q_proj)
    assert key_of(model) != before


@pytest.mark.parametrize("change", HARMLESS.values(), ids=HARMLESS)
def test_what_does_not_change_the_function_does_not_change_the_key(change):
    model = tiny_model("llama")
    before = key_of(model)
    change(model)
    assert key_of(model) == before


def times(factor):
    """A function that differs from another one of its kind in what it closes over alone."""
    return lambda x: x * factor


def patch_helper(patch, factor=1):
    original = modeling_llama.apply_rotary_pos_emb
    patch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda *args: original(*args))


def patch_method(patch):
    patch.setattr(modeling_llama.LlamaRotaryEmbedding, "compute", times(2), raising=False)


def patch_far_helper(patch):
    original = masking_utils.sliding_window_overlay
    patch.setattr(masking_utils, "sliding_window_overlay", lambda window: original(window + 1))


def patch_torch_function(patch):
    original = torch.nn.functional.silu
    patch.setattr(torch.nn.functional, "silu", lambda x, inplace=False: original(x) * 2)


def patch_torch_module(patch):
    patch.setattr(nn.Linear, "forward", lambda self, x: x @ self.weight.T)


PATCHES = {
    "helper": patch_helper,
    "method": patch_method,
    "helper-of-a-helper": patch_far_helper,
    "torch-function": patch_torch_function,
    "torch-module": patch_torch_module,
}


@pytest.mark.parametrize("change", PATCHES.values(), ids=PATCHES)
def test_code_that_is_replaced_at_run_time_is_in_the_key(change, monkeypatch):
    model = tiny_model("llama")
    before = key_of(model)
    with monkeypatch.context() as patch:
        change(patch)
        assert key_of(model) != before
    assert key_of(model) == before


@pytest.mark.parametrize(
    "make",
    [
        lambda factor: times(factor),
        lambda factor: functools.partial(torch.mul, other=factor),
        lambda factor: torch.tensor([1.0, factor]),
        lambda factor: {"scale": [torch.float32, (factor, None)]},
        lambda factor: lambda x, by=factor: x * by,
    ],
    ids=["closure", "partial", "tensor", "containers", "default"],
)
def test_attributes_are_in_the_key_by_what_they_do(make):
    model = tiny_model("llama")
    layer_of(model).mlp.scale = make(2.0)
    before = key_of(model)
    layer_of(model).mlp.scale = make(2.0)
    assert key_of(model) == before
    layer_of(model).mlp.scale = make(3.0)
    assert key_of(model) != before


class Thing:
    pass


def called_thing(*args):
    return _THING


_THING = Thing()


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (Thing(), r"layers.0.mlp.extra is a test_graph_key.Thing"),
        ([1, {"a": Thing()}], r"mlp.extra is a test_graph_key.Thing"),
        (times(Thing()), r"mlp.extra is a test_graph_key.Thing"),
        (called_thing, r"mlp.extra is a test_graph_key.Thing"),
        (torch.zeros(1 << 20), "4194304 bytes"),
        (types.MethodType(called_thing, Thing()), r"mlp.extra is a test_graph_key.Thing"),
        ([nn.Linear(2, 2)], "no lasting name"),
    ],
    ids=["object", "in-a-container", "in-a-closure", "global", "tensor", "method", "hidden-module"],
)
def test_what_has_no_lasting_name_prevents_caching(value, reason):
    model = tiny_model("llama")
    layer_of(model).mlp.extra = value
    with pytest.raises(NotCacheableError, match=reason):
        key_of(model)


def test_a_module_without_a_source_file_prevents_caching(monkeypatch):
    code = (
        "from torch import nn\nclass Typed(nn.Module):\n    def forward(self, x):\n        return x"
    )
    typed = types.ModuleType("typed_by_hand")
    exec(code, vars(typed))
    monkeypatch.setitem(sys.modules, "typed_by_hand", typed)
    model = tiny_model("llama")
    layer_of(model).mlp.act_fn = typed.Typed()
    with pytest.raises(NotCacheableError, match="no source file"):
        key_of(model)


def edit_file(model, patch, tmp_path):
    """The file that defines the forwards, with one more line."""
    path = tmp_path / "modeling_llama.py"
    path.write_text(inspect.getsource(modeling_llama) + "# edited\n")
    patch.setattr(modeling_llama, "__file__", str(path))


SETTINGS = {
    "source-file": edit_file,
    "own-sources": lambda m, patch, _: patch.setattr(keys, "_OWN_SOURCES", "edited"),
    "torch-version": lambda m, patch, _: patch.setattr(keys, "_version", lambda name: "0.0"),
    "python-version": lambda m, patch, _: patch.setattr(sys, "version", "3.99"),
    "processor": lambda m, patch, _: patch.setattr(keys, "_processor", lambda: "another"),
    "no-kernels": lambda m, patch, _: patch.setattr(keys, "why_missing", lambda: "no compiler"),
    "environment": lambda m, patch, _: patch.setenv("FASTGEN_CPU_ISA", "generic"),
}


@pytest.mark.parametrize("change", SETTINGS.values(), ids=SETTINGS)
def test_versions_machine_and_sources_are_in_the_key(change, monkeypatch, tmp_path):
    model = tiny_model("llama")
    before = key_of(model)
    change(model, monkeypatch, tmp_path)
    assert key_of(model) != before


def test_what_the_passes_are_told_is_in_the_key(monkeypatch):
    model = tiny_model("llama")
    assert len({key_of(model), key_of(model, ("fuse_rope",)), key_of(model, budget=8)}) == 3
    monkeypatch.setattr(keys, "PASSES", keys.PASSES[:-1])
    assert key_of(model) != key_of(tiny_model("llama"), ("fuse_rope",))


def test_a_pass_of_somebody_elses_prevents_caching(monkeypatch):
    monkeypatch.setattr(keys, "PASSES", (keys.Pass(lambda captured: None),))
    with pytest.raises(NotCacheableError, match="pass"):
        key_of(tiny_model("llama"))


def test_an_edited_pass_has_another_digest(tmp_path):
    (tmp_path / "fuse.py").write_text("a = 1")
    before = sources_digest([tmp_path])
    assert sources_digest([tmp_path]) == before
    (tmp_path / "fuse.py").write_text("a = 2")
    assert sources_digest([tmp_path]) != before


def test_families_windows_and_configurations_have_keys_of_their_own():
    models = [tiny_model("llama"), tiny_model("qwen2"), tiny_model("mistral")]
    models += [tiny_model("mistral", sliding_window=w) for w in (None, 7)]
    models.append(tiny_model("llama", rms_norm_eps=1e-4))
    assert len(set(map(key_of, models))) == len(models)


def test_shapes_are_in_the_key_and_values_are_not():
    assert key_of(tiny_model("llama")) == key_of(tiny_model("llama", seed=1))
    assert key_of(tiny_model("llama")) != key_of(tiny_model("llama", hidden_size=128))
    model = tiny_model("llama")
    before = key_of(model)
    set_on(model.lm_head.weight, "data", model.lm_head.weight.data.T.contiguous().T)
    assert key_of(model) != before  # the same numbers in another order of memory
