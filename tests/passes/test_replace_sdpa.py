"""replace_sdpa: causal attention of one sequence is found, and what only looks like it is not."""

from __future__ import annotations

import math
import re

import pytest
import torch
import torch.nn.functional as F
from fastgen.passes.replace_sdpa import replace_sdpa
from test_graph import evaluate, lift
from torch import nn

aten = torch.ops.aten
TOKENS, HEADS, KV_HEADS, HEAD_DIM = 6, 4, 2, 16


class Function(nn.Module):
    """A function of q, k and v; the input before them gives export its dynamic size."""

    def __init__(self, compute) -> None:
        super().__init__()
        self.compute = compute

    def forward(self, unused, query, key, value):
        return self.compute(query, key, value)


def qkv(heads=HEADS, kv_heads=HEADS, batch=1, keys=TOKENS, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def random(tokens, heads):
        rows = torch.randn(batch, tokens, heads, HEAD_DIM, generator=generator, dtype=dtype)
        return rows.transpose(1, 2)

    return random(TOKENS, heads), random(keys, kv_heads), random(keys, kv_heads)


def captured(compute, *example):
    return lift(Function(compute), torch.zeros(8), *example)


def attentions(graph):
    return [n for n in graph.graph.nodes if n.target is torch.ops.fastgen.attention.default]


def triangle(query):
    return torch.ones(query.shape[2], query.shape[2], dtype=torch.bool).tril()[None, None]


def repeat_kv(x):
    """transformers' way of giving every query head its key head."""
    batch, heads, tokens, head_dim = x.shape
    expanded = x[:, :, None, :, :].expand(batch, heads, HEADS // KV_HEADS, tokens, head_dim)
    return expanded.reshape(batch, HEADS, tokens, head_dim)


def causal(query, key, value):
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def causal_scaled(query, key, value):
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.5)


def causal_gqa(query, key, value):
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def causal_repeated(query, key, value):
    key, value = repeat_kv(key), repeat_kv(value)
    return causal(query, key, value)


def masked(query, key, value):
    return F.scaled_dot_product_attention(query, key, value, attn_mask=triangle(query))


def masked_like_an_input(query, key, value):
    """Of the query, only the shape is read."""
    positions = torch.ones_like(query[0, 0, :, 0]).cumsum(0)
    mask = (positions[None, :] <= positions[:, None])[None, None]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def read_transposed(query, key, value):
    return causal(query, key, value).transpose(1, 2).reshape(1, TOKENS, -1)


def read_twice(query, key, value):
    out = causal(query, key, value)
    return out.transpose(1, 2) + out.sum(dim=1, keepdim=True).transpose(1, 2)


@pytest.mark.parametrize(
    ("compute", "kv_heads"),
    [
        (causal, HEADS),
        (causal_scaled, HEADS),
        (causal_gqa, KV_HEADS),
        (causal_gqa, 1),
        (causal_repeated, KV_HEADS),
        (masked, HEADS),
        (masked_like_an_input, HEADS),
        (read_transposed, HEADS),
        (read_twice, HEADS),
    ],
)
def test_causal_attention_of_one_sequence(compute, kv_heads):
    example = qkv(kv_heads=kv_heads)
    graph = captured(compute, *example)
    report = replace_sdpa(graph)
    assert report.matches == 1
    assert report.refused == []
    (node,) = attentions(graph)
    shapes = [tuple(argument.meta["val"].shape) for argument in node.args[:3]]
    assert shapes == [(TOKENS, HEADS, HEAD_DIM)] + 2 * [(TOKENS, kv_heads, HEAD_DIM)]

    plain = compute(*example)
    got = evaluate(graph, nn.Module(), torch.zeros(8), *example)
    exact = compute(*(x.double() for x in example))
    eps = torch.finfo(torch.float32).eps
    bound = 2 * ((plain - exact).abs().max() + eps * exact.abs().max())
    assert got.shape == plain.shape
    assert (got - exact).abs().max() <= bound
    assert replace_sdpa(graph).matches == 0


def test_a_varying_number_of_tokens():
    class Causal(nn.Module):
        def forward(self, rows):
            query = rows.view(1, -1, HEADS, HEAD_DIM).transpose(1, 2)
            return causal(query, query, query).transpose(1, 2)

    graph = lift(Causal(), torch.randn(6, HEADS * HEAD_DIM))
    assert replace_sdpa(graph).matches == 1
    for tokens in (2, 9):
        rows = torch.randn(tokens, HEADS * HEAD_DIM)
        expected = Causal()(rows)
        got = evaluate(graph, nn.Module(), rows)
        eps = torch.finfo(torch.float32).eps
        # A row of probabilities sums to 1 +- tokens roundings.
        assert (got - expected).abs().max() <= 2 * tokens * eps * rows.abs().max()


def test_the_scale_is_that_of_the_call_or_of_the_head():
    for compute, scale in ((causal, 1 / math.sqrt(HEAD_DIM)), (causal_scaled, 0.5)):
        graph = captured(compute, *qkv())
        replace_sdpa(graph)
        assert attentions(graph)[0].args[4] == scale


def test_layers_are_numbered():
    def compute(query, key, value):
        return causal(causal(query, key, value), key, value)

    graph = captured(compute, *qkv())
    assert replace_sdpa(graph).matches == 2
    assert [node.args[8] for node in attentions(graph)] == [0, 1]


def test_repeated_keys_that_are_overwritten_stay_repeated():
    def compute(query, key, value):
        keys, values = repeat_kv(key), repeat_kv(value)
        key.mul_(2)
        return causal(query, keys, values)

    example = qkv(kv_heads=KV_HEADS)
    graph = captured(compute, *example)
    assert replace_sdpa(graph).matches == 1
    assert attentions(graph)[0].args[1].meta["val"].shape[1] == HEADS


def test_repeated_keys_that_are_not_repeated_heads():
    """Three keys are seen twice by the same head."""

    def compute(query, key, value):
        twice = key[:, :, None].expand(1, HEADS, 2, 3, HEAD_DIM)
        keys = twice.reshape(1, HEADS, TOKENS, HEAD_DIM)
        return causal(query, keys, keys)

    example = qkv(keys=3)
    graph = captured(compute, *example)
    assert replace_sdpa(graph).matches == 1
    got = evaluate(graph, nn.Module(), torch.zeros(8), *example)
    torch.testing.assert_close(got, compute(*example))


# Near misses.


def every_key(query, key, value):
    return F.scaled_dot_product_attention(query, key, value)


def with_dropout(query, key, value):
    return F.scaled_dot_product_attention(query, key, value, dropout_p=0.5, is_causal=True)


def without_batch(query, key, value):
    return causal(query[0], key[0], value[0])


def strided_heads(query, key, value):
    keys = key.transpose(2, 3).contiguous().transpose(2, 3)
    return causal(query, keys, value)


def one_key_more(query, key, value):
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril(1)[None, None]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def window(query, key, value):
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril().triu(-2)[None, None]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def every_key_shown(query, key, value):
    mask = torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def mask_per_head(query, key, value):
    mask = triangle(query).expand(1, HEADS, TOKENS, TOKENS)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def mask_written_afterwards(query, key, value):
    mask = triangle(query)
    mask[0, 0, 3, 1] = False
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def mask_of_the_values(query, key, value):
    mask = triangle(query) & (key[:, :1, :, 0].unsqueeze(2) < 100)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def random_mask(query, key, value):
    mask = triangle(query) & (torch.rand(1, 1, TOKENS, TOKENS) >= 0)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def additive_mask(query, key, value):
    mask = torch.zeros(1, 1, TOKENS, TOKENS).masked_fill(~triangle(query), float("-inf"))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def one_key_head_for_all(query, key, value):
    return F.scaled_dot_product_attention(query, key[:, :1], value[:, :1], is_causal=True)


@pytest.mark.parametrize(
    ("compute", "example", "reason"),
    [
        (causal, {"batch": 2}, "a batch of 2 sequences"),
        (causal, {"keys": 9}, "6 queries over 9 keys"),
        (causal, {"dtype": torch.float64}, "torch.float64"),
        (every_key, {}, "neither a mask nor is_causal"),
        (with_dropout, {}, "dropout of 0.5"),
        (without_batch, {}, "attention of 3 dimensions"),
        (strided_heads, {}, "not contiguous"),
        (one_key_head_for_all, {}, "broadcast over the heads"),
        (one_key_more, {}, "hides other keys"),
        (every_key_shown, {}, "hides other keys"),
        (window, {}, "hides other keys"),
        (mask_per_head, {}, r"a mask of shape \[1, 4, 6, 6\]"),
        (mask_written_afterwards, {}, "written in place"),
        (mask_of_the_values, {}, "computed from key"),
        (random_mask, {}, "random"),
        (additive_mask, {}, "a mask of type torch.float32"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_near_misses_are_refused(compute, example, reason):
    graph = captured(compute, *qkv(**example))
    before = [node.target for node in graph.graph.nodes]
    report = replace_sdpa(graph)
    assert report.matches == 0
    ((_, why),) = report.refused
    assert re.search(reason, why), why
    assert aten.scaled_dot_product_attention.default in before
    assert not attentions(graph)


def test_a_mask_of_a_varying_size_is_not_proven():
    class Masked(nn.Module):
        def forward(self, rows):
            query = rows.view(1, -1, HEADS, HEAD_DIM).transpose(1, 2)
            return masked(query, query, query)

    graph = lift(Masked(), torch.randn(6, HEADS * HEAD_DIM))
    ((_, why),) = replace_sdpa(graph).refused
    assert "varies" in why
