"""Attention in chunks, and numbers that a model gives to its tokens beside position_ids."""

from __future__ import annotations

import pytest
import torch
import transformers
from layer_models import WINDOW, layer_model
from tiny_models import prompts, tiny_model
from torch import nn
from transformers.models.llama import modeling_llama

import fastgen
from fastgen.capture import capture
from fastgen.capture.tracing import trace
from fastgen.compiled import compile_graph
from fastgen.errors import UnsupportedModelError


@pytest.fixture(scope="module")
def llama4():
    return capture(layer_model("llama4_text"))


def test_each_layer_has_its_mask(llama4):
    """Layers with RoPE look at one chunk, those without at everything."""
    layers = compile_graph(llama4).spec.layers
    assert [(layer.window, layer.chunk) for layer in layers] == [(0, 12), (0, 0), (0, 12)]


def test_the_loop_makes_what_the_forward_makes():
    """transformers' cache of chunked layers forgets nothing that a query sees."""
    model = layer_model("llama4_text")
    row = torch.tensor(prompts(17))
    out = model.generate(
        row,
        max_new_tokens=3 * WINDOW,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    with torch.no_grad():
        at_once = model(out.sequences).logits[0, 16:-1]
    torch.testing.assert_close(torch.cat(out.logits), at_once, rtol=0, atol=1e-4)


def chunked_llama(patch, chunk: int = 8):
    """All layers in chunks, and a cache that keeps everything."""
    mask = transformers.masking_utils.create_chunked_causal_mask
    patch.setattr(modeling_llama, "create_causal_mask", mask)
    model = tiny_model("llama")
    model.config.attention_chunk_size = chunk
    return model


def test_a_cache_that_forgets_part_of_a_chunk_is_refused(monkeypatch):
    model = chunked_llama(monkeypatch)
    kept = transformers.cache_utils.DynamicSlidingWindowLayer

    class Forgetful(transformers.DynamicCache):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.layers = [kept(sliding_window=7) for _ in range(2)]

    # By name: transformers puts another module in its place while it imports its processors.
    monkeypatch.setattr("transformers.DynamicCache", Forgetful)
    with pytest.raises(UnsupportedModelError, match=r"layer 0 has a mask with chunks of 8"):
        capture(model)


def scaled_llama(patch, count):
    """Queries scaled by a step function of what `count` makes of a tensor [1, num_tokens, ...]."""
    original = modeling_llama.LlamaAttention.forward

    def forward(self, hidden_states, *args, **kwargs):
        numbers = torch.floor((count(hidden_states).float() + 1) / 30)
        return original(self, hidden_states * (1 + numbers.view(1, -1, 1)), *args, **kwargs)

    patch.setattr(modeling_llama.LlamaAttention, "forward", forward)
    return tiny_model("llama")


def counts(captured) -> list:
    return [node for node in captured.graph.nodes if "arange" in str(node.target)]


def test_tokens_counted_from_the_cache_on_have_their_position(monkeypatch, llama4):
    """Where nothing shows it in a call of few tokens."""
    assert not counts(llama4)
    captured = capture(scaled_llama(monkeypatch, lambda x: torch.arange(x.shape[1]) + 0))
    assert not counts(captured)


def test_tokens_counted_anew_in_each_step_keep_their_place(monkeypatch):
    """transformers' loop would count them so, too."""
    captured = capture(scaled_llama(monkeypatch, lambda x: torch.arange(x.shape[1])))
    assert counts(captured)


def test_numbers_that_are_indices_too_keep_their_place(monkeypatch):
    def count(x):
        numbers = torch.arange(x.shape[1]) + 0
        return numbers + x[0, numbers].sum(-1).long() * 0

    assert counts(capture(scaled_llama(monkeypatch, count)))


class Folded(nn.Module):
    """A product whose sizes export cannot prove, as those of Llama 4's experts."""

    def forward(self, tokens, rows):
        x = tokens[:, None].float().expand(-1, 64).repeat(4, 1).view(4, -1, 64)
        x = torch.bmm(x, torch.ones(4, 64, 64)).view(-1, 64)
        return x.reshape(4, -1, 64).sum(0)[rows]


class Branching(nn.Module):
    """Another way for more than 20 tokens."""

    def forward(self, tokens, rows):
        return tokens[rows] * (2 if tokens.shape[0] > 20 else 1)


EXAMPLE = {"tokens": torch.arange(8), "rows": torch.tensor([1, 4, 6])}


def test_conditions_that_hold_for_every_size_are_found_to():
    program = trace(Folded(), EXAMPLE, ("tokens",))
    (out,) = (node for node in program.graph.nodes if node.op == "output")
    module = program.module()
    for num_tokens in (2, 3, 50):
        tokens, rows = torch.arange(num_tokens), torch.tensor([0, 1])
        assert torch.equal(module(tokens=tokens, rows=rows), Folded()(tokens, rows))
    assert out


def test_conditions_that_fail_for_a_size_are_refused():
    with pytest.raises(UnsupportedModelError, match="which fails for 21 tokens"):
        trace(Branching(), EXAMPLE, ("tokens",))


def test_masked_slots_within_a_chunk_go_to_the_loop():
    plain, fast = layer_model("llama4_text"), layer_model("llama4_text")
    fastgen.optimize(fast, graph_cache=False)
    ids = torch.tensor(prompts(20))
    mask = torch.ones_like(ids)
    mask[0, 8] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(fast.generate(ids, **settings), plain.generate(ids, **settings))
    assert any("chunks" in reason for reason in fastgen.explain(fast).fallbacks)
