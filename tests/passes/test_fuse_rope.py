"""fuse_rope: one op rotates query and key of an attention, bit-equal; near misses are refused."""

from __future__ import annotations

import operator

import pytest
import torch
from fastgen.kernels import attention
from fastgen.passes import run_passes
from fastgen.passes.fuse_rope import fuse_rope
from pass_helpers import (
    captured_family,
    count,
    every_family,
    fuse_family,
    fuse_module,
    logits,
    reasons,
)
from test_graph import lift
from torch import nn

aten = torch.ops.aten
ROPE = torch.ops.fastgen.rope.default

# family: (rotated layers of two, interleaved, rotary_dim of heads of 16)
FAMILIES = {
    "llama": (2, False, 16),
    "qwen3": (2, False, 16),
    "qwen2_moe": (2, False, 16),
    "gemma3_text": (2, False, 16),
    "olmo2": (2, False, 16),
    "gpt_oss": (2, False, 16),
    "smollm3": (1, False, 16),
    "phi3": (2, False, 8),
    "stablelm": (2, False, 8),
    "gpt_neox": (2, False, 8),
    "glm": (2, True, 8),
    "cohere2": (2, True, 16),
}


@every_family(FAMILIES, quick_in_fp32=("llama", "gpt_oss", "phi3", "cohere2"))
def test_every_rotation_of_a_family_is_fused(family, dtype):
    before, after, report = fuse_family(fuse_rope, family, dtype)
    layers, interleaved, rotary_dim = FAMILIES[family]
    assert (report.matches, report.refused) == (layers, [])
    assert (count(before, aten.neg.default), count(after, aten.neg.default)) == (
        0 if family == "gpt_oss" else 4 * layers // 2,
        0,
    )
    for node in after.graph.nodes:
        if node.target is ROPE:
            query, key, cos, sin = (arg.meta["val"] for arg in node.args[:4])
            assert (query.shape[1:], key.shape[2]) == ((4, 16), 16)
            assert cos.shape[1] == sin.shape[1] == rotary_dim
            assert node.args[4] is interleaved
            wide = torch.float32 if family in ("olmo2", "cohere2") else dtype
            assert (query.dtype, cos.dtype) == (dtype, wide)
            assert "nn_module_stack" in node.meta


@pytest.mark.parametrize("family", ["llama", "cohere2", "gpt_oss"])
def test_tables_are_made_once_and_attention_takes_the_result_as_it_is(family):
    _, after, _ = fuse_family(fuse_rope, family, torch.bfloat16)
    ropes = [node for node in after.graph.nodes if node.target is ROPE]
    assert len({node.args[2:4] for node in ropes}) == 1
    attentions = [
        node for node in after.graph.nodes if node.target is torch.ops.fastgen.attention.default
    ]
    for rope, node in zip(ropes, attentions, strict=True):
        assert [arg.target for arg in node.args[:2]] == [operator.getitem] * 2
        assert [arg.args for arg in node.args[:2]] == [(rope, 0), (rope, 1)]
        assert all(arg.meta["val"].is_contiguous() for arg in node.args[:2])


def test_halves_out_of_neighbours_are_refused_by_name():
    before, after, report = fuse_family(fuse_rope, "deepseek_v3", torch.bfloat16)
    assert report.matches == 0
    assert str(after.graph) == str(before.graph)
    why = "it takes pairs of one layout (neighbours) and gives the other (halves)"
    assert reasons(report) == {why: 4}


def test_a_model_without_rotation_has_nothing_to_say():
    _, _, report = fuse_family(fuse_rope, "gpt2", torch.bfloat16)
    assert (report.matches, report.refused) == (0, [])


def test_the_pipeline_runs_all_passes_after_each_other():
    _, before = captured_family("qwen3", torch.bfloat16)
    after, report = run_passes(before)
    assert {item.name: item.matches for item in report.passes if "fuse" in item.name} == {
        "fuse_rms_norm": 9,
        "fuse_rope": 2,
        "fuse_gated_activation": 2,
        "fuse_rope_store": 0,  # only for GPUs
    }
    assert {item.status for item in report.passes[:-1]} == {"applied"}
    assert count(after, torch.ops.fastgen.paged_attention.default) == 2


@pytest.mark.parametrize("change", ["interleaved", "tables"])
def test_planted_mistakes_are_seen(change):
    model, before = captured_family("llama", torch.bfloat16)
    after = before.copy()
    fuse_rope(after)
    node = next(node for node in after.graph.nodes if node.target is ROPE)
    query, key, cos, sin, interleaved = node.args
    if change == "interleaved":
        node.args = (query, key, cos, sin, not interleaved)
    else:
        node.args = (query, key, sin, cos, interleaved)
    assert not torch.equal(logits(after, model), logits(before, model))


def halves(x):
    return torch.cat((-x[..., 4:], x[..., :4]), dim=-1)


def rotate(x, cos, sin):
    return x * cos + halves(x) * sin


class Rotated(nn.Module):
    """Attention over four heads of 8 whose query and key are rotated by `turn`."""

    def __init__(self, turn, key_turn=None, after=None, width=slice(0, 8)) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 32, bias=False) for _ in range(3))
        self.inv_freq = nn.Buffer(torch.tensor([1.0, 0.3, 0.1, 0.03]))
        self.turn, self.key_turn, self.width = turn, key_turn or turn, width
        self.after = after or (lambda query, key, value: (query, key, value))

    def forward(self, x):
        angles = torch.arange(x.shape[0], device=x.device)[None, :, None] * self.inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        tables = (angles.cos(), angles.sin())
        cos, sin = (table.to(x.dtype).unsqueeze(1)[..., self.width] for table in tables)
        query, key, value = (
            linear(x)[None].unflatten(-1, (4, 8)).transpose(1, 2)
            for linear in (self.q, self.k, self.v)
        )
        query, key = self.turn(query, cos, sin), self.key_turn(key, cos, sin)
        query, key, value = self.after(query, key, value)
        heads = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        return attention(*heads, None, 0.5, 0, 0.0, None, 0).flatten(-2)


def run(module):
    module = module.to(torch.bfloat16)
    module.inv_freq = nn.Buffer(module.inv_freq.float())
    before = lift(module, torch.randn(5, 16).to(torch.bfloat16))
    return fuse_module(fuse_rope, before, module, torch.randn(7, 16).to(torch.bfloat16))


def by_chunks(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def by_split(x, cos, sin):
    first, second = x.split([4, 4], dim=-1)
    return sin * torch.cat((-second, first), dim=-1) + cos * x


def neighbours(x, cos, sin):
    return x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2) * sin


def upcast(x, cos, sin):
    wide = x.float()
    return (wide * cos + halves(wide) * sin).to(x.dtype)


def by_halves(x, cos, sin):
    first, second = x[..., :4], x[..., 4:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def partly(x, cos, sin):
    rotary, rest = x[..., :4], x[..., 4:]
    turned = torch.cat((-rotary[..., 2:], rotary[..., :2]), dim=-1)
    return torch.cat((rotary * cos + turned * sin, rest), dim=-1)


def half_cast(x, cos, sin):
    """Unlike upcast: products in bf16, their sum in bf16 too, then twice through fp32."""
    return (x * cos + halves(x) * sin).float().to(x.dtype)


@pytest.mark.parametrize(
    ("turn", "interleaved"),
    [
        pytest.param(rotate, False, id="halves"),
        pytest.param(by_chunks, False, id="chunk"),
        pytest.param(by_split, False, id="split-and-swapped-operands"),
        pytest.param(neighbours, True, id="neighbours"),
        pytest.param(upcast, False, id="upcast"),
        pytest.param(by_halves, False, id="four-products"),
        pytest.param(partly, False, id="partial"),
        pytest.param(half_cast, False, id="cast-and-back-stays"),
    ],
)
def test_spellings(turn, interleaved):
    width = {by_halves: slice(0, 4), partly: slice(2, 6)}.get(turn, slice(0, 8))
    after, report = run(Rotated(turn, width=width))
    assert (report.matches, report.refused) == (1, [])
    (node,) = (node for node in after.graph.nodes if node.target is ROPE)
    assert node.args[4] is interleaved
    wide = torch.float32 if turn is upcast else torch.bfloat16
    assert node.args[2].meta["val"].dtype == wide


def test_whoever_else_reads_the_rotated_heads_gets_them():
    def after(query, key, value):
        return query, key, value + key + query.sum(2, keepdim=True)

    _, report = run(Rotated(rotate, after=after))
    assert report.matches == 1


def test_norms_and_scales_between_rotation_and_attention_do_not_matter():
    def after(query, key, value):
        return query * 0.5, key.transpose(2, 3).contiguous().transpose(2, 3), value

    _, report = run(Rotated(rotate, after=after))
    assert report.matches == 1


def other_way(x, cos, sin):
    return x * cos + torch.cat((x[..., 4:], -x[..., :4]), dim=-1) * sin


def not_halves(x, cos, sin):
    return x * cos + torch.cat((-x[..., 2:], x[..., :2]), dim=-1) * sin


def flat_stack(x, cos, sin):
    turned = torch.cat((-x[..., 1::2], x[..., ::2]), dim=-1)
    return x * cos + turned * sin


def stacked_halves(x, cos, sin):
    turned = torch.stack((-x[..., 4:], x[..., :4]), dim=-1).flatten(-2)
    return x * cos + turned * sin


def other_input(x, cos, sin):
    return (x + 1) * cos + halves(x) * sin


def turned_read(x, cos, sin):
    turned = halves(x)
    return x * cos + turned * sin + turned


def product_read(x, cos, sin):
    product = x * cos
    return product + halves(x) * sin + product.sum()


def wide_read(x, cos, sin):
    wide = x.float()
    return (wide * cos + halves(wide) * sin).to(x.dtype) + wide.sum().to(x.dtype)


def stays_wide(x, cos, sin):
    return (x * cos.float() + halves(x) * sin.float()).cos().to(x.dtype)


def table_per_head(x, cos, sin):
    return rotate(x, cos.expand(1, 4, -1, -1), sin)


def two_dtypes(x, cos, sin):
    return (x * cos + halves(x) * sin.float()).to(x.dtype)


def wrong_products(x, cos, sin):
    first, second, cos, sin = x[..., :4], x[..., 4:], cos[..., :4], sin[..., :4]
    return torch.cat((first * cos - second * sin, second * cos + second * sin), dim=-1)


def quarters(x, cos, sin):
    first, second, cos, sin = x[..., :4], x[..., 2:6], cos[..., :4], sin[..., :4]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def written_meanwhile(x, cos, sin):
    product, other = x * cos, x * 2
    other.add_(1)
    return product + halves(x) * sin + other * 0


NEAR_MISSES = [
    pytest.param(other_way, "it turns the other way", id="other-way"),
    pytest.param(not_halves, "the parts that change places are not", id="not-halves"),
    pytest.param(flat_stack, "it takes pairs of one layout", id="neighbours-to-halves"),
    pytest.param(stacked_halves, "it takes pairs of one layout", id="halves-to-neighbours"),
    pytest.param(other_input, "what is added is not the input times a table", id="other-input"),
    pytest.param(turned_read, "what is turned is not multiplied", id="turned-read"),
    pytest.param(product_read, "what is added is not the input times", id="product-read"),
    pytest.param(wide_read, "the cast input, is read by others too", id="upcast-read"),
    pytest.param(stays_wide, "the result is torch.float32, the input torch.bfloat16", id="fp32"),
    pytest.param(table_per_head, "not [1, 1, num_tokens, the width]", id="table-per-head"),
    pytest.param(two_dtypes, "cos and sin differ in dtype", id="dtypes-of-tables"),
    pytest.param(wrong_products, "not those of a rotation", id="wrong-products"),
    pytest.param(quarters, "not the two halves of one tensor", id="overlapping-parts"),
    pytest.param(written_meanwhile, "writes in place between", id="written-meanwhile"),
]


@pytest.mark.parametrize(("turn", "reason"), NEAR_MISSES)
def test_near_misses_are_refused_with_the_reason(turn, reason):
    after, report = run(Rotated(turn))
    assert report.matches == 0
    assert count(after, ROPE) == 0
    assert any(reason in why for _, why in report.refused), report.refused


PAIRS = [
    pytest.param(
        lambda: Rotated(rotate, key_turn=lambda x, cos, sin: x),
        "1 rotations behind the query, 0 behind the key",
        id="key-not-rotated",
    ),
    pytest.param(
        lambda: Rotated(rotate, key_turn=lambda x, cos, sin: rotate(x, sin, cos)),
        "rotated by different tables",
        id="other-tables",
    ),
    pytest.param(
        lambda: Rotated(rotate, key_turn=neighbours), "in different ways", id="other-layout"
    ),
    pytest.param(
        lambda: Rotated(rotate, after=lambda q, k, v: (q, q, v)),
        "query and key are one rotation",
        id="query-is-key",
    ),
    pytest.param(
        lambda: Rotated(rotate, after=lambda q, k, v: (q + k, k, v)),
        "2 rotations behind the query, 1 behind the key",
        id="query-of-both",
    ),
]


@pytest.mark.parametrize(("make", "reason"), PAIRS)
def test_pairs_that_do_not_fit_are_refused_with_the_reason(make, reason):
    after, report = run(make())
    assert report.matches == 0
    assert count(after, ROPE) == 0
    assert any(reason in why for _, why in report.refused), report.refused


def test_a_rotation_without_attention_is_refused():
    class Value(Rotated):
        def forward(self, x):
            heads = x[None, None]
            cos = torch.ones(1, 1, x.shape[0], 8, dtype=x.dtype)
            return super().forward(x) + rotate(heads[..., :8], cos, cos).sum()

    _, report = run(Value(rotate))
    assert report.matches == 1
    ((_, why),) = report.refused
    assert why == "rotates neither the query nor the key of an attention"


def test_a_key_made_after_the_rotated_query_is_refused():
    """One op cannot give the query before it has the key."""

    class Late(Rotated):
        def forward(self, x):
            table = x[None, None, :, :8]
            query = rotate(self.q(x)[None].unflatten(-1, (4, 8)).transpose(1, 2), table, table)
            key = rotate(self.k(x)[None].unflatten(-1, (4, 8)).transpose(1, 2), table, table)
            heads = (tensor[0].transpose(0, 1) for tensor in (query, key, key))
            return attention(*heads, None, 0.5, 0, 0.0, None, 0).flatten(-2)

    _, report = run(Late(rotate))
    assert report.matches == 0
    assert "not everything that is rotated is known where" in report.refused[0][1]
