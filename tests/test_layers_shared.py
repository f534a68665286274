"""Layers that read an earlier one's keys and values: kept once, written before they are read."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from fastgen.passes import run_passes
from fastgen.passes.fuse_rope import fuse_rope
from fastgen.passes.fuse_rope_store import fuse_rope_store
from fastgen.passes.insert_paged_cache import insert_paged_cache
from layer_models import layer_model
from tiny_models import tiny_model
from transformers.models.llama import modeling_llama

import fastgen
from fastgen.capture import capture
from fastgen.compiled import compile_graph
from fastgen.errors import UnsupportedModelError
from fastgen.generate.returned_cache import fill_cache

PAGED = torch.ops.fastgen.paged_attention.default


@pytest.fixture(scope="module")
def gemma3n():
    model = layer_model("gemma3n_text")
    return model, capture(model)


def paged(captured) -> list:
    graph, _ = run_passes(captured)
    return [node for node in graph.graph.nodes if node.target is PAGED]


def test_sharing_layers_have_no_entry(gemma3n):
    """Layers 3 and 4 read what layers 1 and 2 keep, as the configuration says."""
    model, captured = gemma3n
    spec = compile_graph(captured).spec
    assert spec.entries == (0, 1, 2, 1, 2)
    assert [layer.window for layer in spec.layers] == [12, 0, 12]
    assert model.config.kv_sharing_modes == [None, "store", "store", "reuse", "reuse"]
    per_layer = 2 * 2 * 16 * 4
    assert (spec.bytes_per_token, spec.shared_bytes_per_token) == (3 * per_layer, 2 * per_layer)


def test_only_the_first_reader_stores(gemma3n):
    """And it stands before all others in the graph."""
    nodes = paged(gemma3n[1])
    assert [node.args[5] is None for node in nodes] == [False, False, False, True, True]
    assert nodes[3].args[1:5] == nodes[1].args[1:5]
    assert nodes[4].args[1:5] == nodes[2].args[1:5]
    assert [node.args[10] for node in nodes] == [12, 0, 12, 0, 12]


def test_the_saving_is_explained():
    model = fastgen.optimize(layer_model("gemma3n_text"), graph_cache=False)
    explanation = fastgen.explain(model)
    assert "one graph of 5 attention layers" in str(explanation)
    assert "2 layers read the cache of earlier ones, which saves 512 bytes per token" in str(
        explanation
    )
    assert explanation.to_dict()["cache"]["entries"] == [0, 1, 2, 1, 2]


def shared_llama(patch, *, between=None, sliding: bool = False):
    """A Llama whose second layer is given the keys and values of the first."""
    original = modeling_llama.ALL_ATTENTION_FUNCTIONS.get_interface
    kept = {}

    def get_interface(name, default):
        attend = original(name, default)

        def shared(module, query, key, value, mask, **kwargs):
            if module.layer_idx:
                key, value = kept["pair"]
                if between is not None:
                    between(key)
                if sliding:
                    kwargs["sliding_window"] = 4
            kept["pair"] = key, value
            return attend(module, query, key, value, mask, **kwargs)

        return shared

    functions = SimpleNamespace(get_interface=get_interface)
    patch.setattr(modeling_llama, "ALL_ATTENTION_FUNCTIONS", functions)
    return tiny_model("llama")


def test_keys_that_are_shared_are_kept_once(monkeypatch):
    captured = capture(shared_llama(monkeypatch))
    assert compile_graph(captured).spec.entries == (0, 0)


def test_keys_that_are_changed_in_between_are_kept_twice(monkeypatch):
    """What the second layer reads is no longer what the first one stored."""
    captured = capture(shared_llama(monkeypatch, between=lambda key: key[0].mul_(2)))
    assert compile_graph(captured).spec.entries == (0, 1)


def test_keys_that_are_seen_less_far_are_kept_twice(monkeypatch):
    captured = capture(shared_llama(monkeypatch))
    second = [n for n in captured.graph.nodes if n.target is torch.ops.fastgen.attention.default][1]
    second.args = (*second.args[:5], 4, *second.args[6:])
    spec = compile_graph(captured).spec
    assert spec.entries == (0, 1)
    assert [layer.window for layer in spec.layers] == [0, 4]


def test_the_rope_of_shared_keys_stores_them(monkeypatch):
    """On a GPU: the key that is stored while it is rotated has readers that store nothing."""
    graph = capture(shared_llama(monkeypatch)).copy()
    assert fuse_rope(graph).matches == 1
    insert_paged_cache(graph)
    report = fuse_rope_store(graph)
    assert report.matches == 1
    nodes = [node for node in graph.graph.nodes if node.target is PAGED]
    assert [node.args[5] for node in nodes] == [None, None]
    assert nodes[0].args[1] is nodes[1].args[1]
    fused = nodes[0].args[1].args[0]
    assert fused.target is torch.ops.fastgen.rope_store_kv.default
    graph.graph.lint()


@pytest.mark.parametrize(("own", "filled"), [(True, [0, 1]), (False, [0])])
def test_a_cache_with_a_place_for_each_layer_is_filled(own, filled):
    """Where transformers keeps a copy for a layer that shares, so does the returned cache."""
    from transformers import DynamicCache

    cache = DynamicCache()
    if own:
        cache.update(torch.zeros(1, 1, 0, 2), torch.zeros(1, 1, 0, 2), 1)
    pages = [(torch.ones(1, 3, 2), torch.ones(1, 3, 2))]
    engine = SimpleNamespace(
        read_caches=lambda _: [pages],
        compiled=SimpleNamespace(spec=SimpleNamespace(entries=(0, 0))),
    )
    call = SimpleNamespace(
        past_key_values=cache,
        engine=engine,
        input_ids=torch.ones(1, 2),
        prompt_shape=(1, 2),
        attention_mask=None,
    )
    fill_cache(call, [], 3)  # pyright: ignore
    assert [i for i, layer in enumerate(cache.layers) if layer.get_seq_length() == 3] == filled


def test_layers_out_of_order_are_refused(monkeypatch):
    model = tiny_model("llama")
    first, second = model.model.layers
    first.self_attn.layer_idx, second.self_attn.layer_idx = 1, 0
    with pytest.raises(UnsupportedModelError, match=r"runs its layers in the order \[1, 0\]"):
        capture(model)
