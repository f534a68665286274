"""fuse_rms_norm: every spelling of transformers' becomes the op, bit-equal; near misses do not."""

from __future__ import annotations

import operator

import pytest
import torch
from fastgen.passes.fuse_rms_norm import fuse_rms_norm
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

NORM = torch.ops.fastgen.rms_norm.default
ADD_NORM = torch.ops.fastgen.add_rms_norm.default

# family: (norms alone, norms of a sum) in two layers
FAMILIES = {
    "llama": (1, 4),
    "qwen2": (1, 4),
    "mistral": (1, 4),
    "phi3": (1, 4),
    "granite": (1, 4),
    "smollm3": (1, 4),
    "mixtral": (1, 4),
    "qwen2_moe": (1, 4),
    "gpt_oss": (1, 4),
    "qwen3": (5, 4),
    "qwen3_moe": (5, 4),
    "deepseek_v3": (5, 4),
    "gemma2": (5, 4),
    "gemma3_text": (9, 4),
    "olmo2": (8, 1),
}
FP32_WEIGHT = ("gpt_oss", "olmo2", "gemma2", "gemma3_text")


@every_family(FAMILIES, quick_in_fp32=("llama", "qwen3", "gemma3_text", "olmo2"))
def test_every_norm_of_a_family_is_fused(family, dtype):
    _, after, report = fuse_family(fuse_rms_norm, family, dtype)
    alone, with_sum = FAMILIES[family]
    assert (report.matches, report.refused) == (alone + with_sum, [])
    assert (count(after, NORM), count(after, ADD_NORM)) == (alone, with_sum)
    assert count(after, torch.ops.aten.rsqrt.default) == 0
    norms = [node for node in after.graph.nodes if node.target in (NORM, ADD_NORM)]
    assert {node.args[-2] for node in norms} == {1.0 if family.startswith("gemma") else 0.0}
    rounds = dtype == torch.bfloat16 and family not in FP32_WEIGHT
    assert {node.args[-1] for node in norms} == {rounds}
    assert all(node.args[-4] is not None for node in norms), "every norm has its weight"


@pytest.mark.parametrize("family", ["cohere2", "gpt_neox", "gpt2"])
def test_layer_norms_are_not_rms_norms(family):
    before, after, report = fuse_family(fuse_rms_norm, family, torch.bfloat16)
    assert report.matches == 0
    assert str(after.graph) == str(before.graph)
    spelled_out = {"what is squared is not what is multiplied by the root": 3}
    assert reasons(report) == (spelled_out if family == "cohere2" else {})


def test_the_new_nodes_carry_what_the_old_ones_did():
    _, before = captured_family("llama", torch.bfloat16)
    fuse_rms_norm(before)
    for node in before.graph.nodes:
        if node.target is ADD_NORM:
            normed, total = node.meta["val"]
            assert str(normed.shape) == str(total.shape) == str(node.args[0].meta["val"].shape)
            assert "nn_module_stack" in node.meta
            for part in node.users:
                assert part.target is operator.getitem
                assert part.meta["val"] is node.meta["val"][part.args[1]]


@pytest.mark.parametrize(
    ("position", "value"), [(-3, 2e-2), (-2, 0.5), (-1, False)], ids=["eps", "offset", "cast"]
)
def test_planted_wrong_settings_are_seen(position, value):
    model, before = captured_family("llama", torch.bfloat16)
    after = before.copy()
    fuse_rms_norm(after)
    node = next(node for node in after.graph.nodes if node.target is ADD_NORM)
    args = list(node.args)
    args[position] = value
    if position == -2:
        args[-1] = False
    node.args = tuple(args)
    assert not torch.equal(logits(after, model), logits(before, model))


class Norm(nn.Module):
    """A norm spelled by a function of (input, weight)."""

    def __init__(self, spell, dtype=torch.bfloat16, weight_dtype=None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16).to(weight_dtype or dtype))
        self.spell = spell

    def forward(self, x):
        return self.spell(x, self.weight)


def run(spell, dtype=torch.bfloat16, weight_dtype=None, shape=(5, 16)):
    module = Norm(spell, dtype, weight_dtype)
    before = lift(module, torch.randn(shape).to(dtype))
    return fuse_module(fuse_rms_norm, before, module, torch.randn(7, *shape[1:]).to(dtype))


def root(x, eps=1e-5):
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def llama(x, weight):
    hidden = x.float()
    return weight * (hidden * root(hidden)).to(x.dtype)


SPELLINGS = [
    pytest.param(llama, (True, 0.0, True), id="llama"),
    pytest.param(lambda x, w: (root(x.float()) * x.float()).to(x.dtype) * w, None, id="cast-twice"),
    pytest.param(
        lambda x, w: (w * (x.float() * root(x.float()))).to(x.dtype), None, id="olmo2-twice"
    ),
    pytest.param(
        lambda x, w: (lambda h: ((h * root(h)) * w.float()).type_as(x))(x.float()),
        (True, 0.0, False),
        id="weight-in-fp32",
    ),
    pytest.param(
        lambda x, w: (lambda h: ((h * root(h)) * (1.0 + w.float())).type_as(x))(x.float()),
        (True, 1.0, False),
        id="gemma",
    ),
    pytest.param(
        lambda x, w: (lambda h: ((h * root(h)) * (w.float() + 1)).to(x.dtype))(x.float()),
        (True, 1.0, False),
        id="integer-offset",
    ),
    pytest.param(
        lambda x, w: (lambda h: (h * root(h)).type_as(x))(x.float()) + w,
        (False, 0.0, False),
        id="no-weight",
    ),
    pytest.param(
        lambda x, w: (lambda h: (h * root(h)).to(x.dtype) * (1 + w))(x.float()),
        (True, 0.0, True),
        id="offset-rounded-before",
    ),
    pytest.param(
        lambda x, w: (lambda h: (h * root(h)).to(x.dtype) * w.sum(-1, keepdim=True))(x.float()),
        (False, 0.0, False),
        id="times-something-else",
    ),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("spell", "settings"), SPELLINGS)
def test_spellings(spell, settings, dtype):
    after, report = run(spell, dtype)
    if settings is None:  # the cast is made twice, and torch.export keeps both
        assert report.matches == 0
        return
    assert (report.matches, report.refused) == (1, [])
    (node,) = (node for node in after.graph.nodes if node.target is NORM)
    assert (node.args[1] is not None, *node.args[3:]) == settings


@pytest.mark.parametrize(("spell", "settings"), SPELLINGS)
def test_spellings_in_fp32(spell, settings):
    """The casts are gone, and with them the difference between rounding first and last."""
    after, report = run(spell, torch.float32)
    assert (report.matches, report.refused) == (1, [])
    (node,) = (node for node in after.graph.nodes if node.target is NORM)
    assert node.args[4] is False


def residual(x, w, other=None):
    total = x + (x * 2 if other is None else other)
    return llama(total, w) + total


SUMS = [
    pytest.param(lambda x, w: residual(x, w), None, id="sum-read-later"),
    pytest.param(lambda x, w: llama(x + x * 2, w), None, id="sum-not-read"),
    pytest.param(
        lambda x, w: residual(x, w, (x * 2).float()),
        "",
        id="fp32-stream",
    ),
    pytest.param(lambda x, w: residual(x, w, w), "it broadcasts", id="broadcast"),
    pytest.param(lambda x, w: residual(x, w, 2.0), "it is no sum of two tensors", id="number"),
]


@pytest.mark.parametrize(("spell", "why"), SUMS)
def test_sums(spell, why):
    after, report = run(spell)
    if why == "":
        assert report.matches == 0, "an fp32 stream with a bf16 weight"
        assert list(reasons(report)) == ["the weight is torch.bfloat16, the input torch.float32"]
        return
    assert report.matches == 1
    assert count(after, ADD_NORM) == (why is None)
    expected = [] if why is None else [f"the sum stays outside the norm: {why}"]
    assert [reason for _, reason in report.refused] == expected


def test_a_sum_of_two_dtypes_stays_outside():
    def spell(x, w):
        return residual(x.float(), w.float(), x)

    after, report = run(spell, weight_dtype=torch.float32)
    assert report.matches == 1
    assert count(after, NORM) == 1
    ((_, why),) = report.refused
    assert why == ("the sum stays outside the norm: it adds torch.float32 and torch.bfloat16")


def test_a_weight_made_after_the_sum_leaves_it_outside():
    def spell(x, w):
        total = x + x * 2
        return llama(total, w.cos()) + total

    after, report = run(spell)
    assert (report.matches, count(after, NORM), count(after, ADD_NORM)) == (1, 1, 0)
    assert "is computed, maybe after it" in report.refused[0][1]


def shared(which):
    def spell(x, w):
        hidden = x.float()
        square = hidden.pow(2)
        mean = square.mean(-1, keepdim=True)
        shifted = mean + 1e-5
        scale = torch.rsqrt(shifted)
        scaled = hidden * scale
        rounded = scaled.to(x.dtype)
        values = locals()
        return w * rounded + values[which].sum(-1, keepdim=True).to(x.dtype)

    return spell


def in_place(x, w):
    y = x * 1.5
    hidden = y.float()
    scale = root(hidden)
    scaled = hidden * scale
    y.add_(1)
    return w * scaled.to(y.dtype) + y


NEAR_MISSES = [
    pytest.param(shared("hidden"), "the input in fp32, is read by others too", id="cast-read"),
    pytest.param(shared("square"), "the square, is read by others too", id="square-read"),
    pytest.param(shared("mean"), "no eps is added to the mean square", id="mean-read"),
    pytest.param(shared("shifted"), "what follows the mean square", id="shifted-read"),
    pytest.param(
        shared("scale"), "what is squared is not what is multiplied by the root", id="root-read"
    ),
    pytest.param(shared("scaled"), "the result is not rounded to torch.bfloat16", id="scaled-read"),
    pytest.param(
        lambda x, w: (w * (x.float() * torch.rsqrt(x.float().pow(2).mean(-2, True) + 1e-5))).to(
            x.dtype
        ),
        "the mean is over dims [-2]",
        id="other-dim",
    ),
    pytest.param(
        lambda x, w: (x.float() * torch.rsqrt(x.float().pow(2).mean((0, 1), True) + 1e-5)).to(
            x.dtype
        ),
        "the mean is over dims [0, 1]",
        id="two-dims",
    ),
    pytest.param(
        lambda x, w: (lambda h: (h.T * torch.rsqrt(h.pow(2).mean(-1) + 1e-5)).T.to(x.dtype))(
            x.float()
        ),
        "does not keep the last one",
        id="no-keepdim",
    ),
    pytest.param(
        lambda x, w: (
            lambda h: w * (h * (torch.rsqrt(h.pow(2).mean(-1, True)) + 1e-5)).to(x.dtype)
        )(x.float()),
        "no eps is added to the mean square",
        id="eps-outside-the-root",
    ),
    pytest.param(
        lambda x, w: (
            lambda h: w * (h * torch.rsqrt(h.pow(2).mean(-1, True) + w.abs().sum())).to(x.dtype)
        )(x.float()),
        "no eps is added to the mean square",
        id="eps-is-a-tensor",
    ),
    pytest.param(
        lambda x, w: (lambda h: w * (h / (h.pow(2).mean(-1, True) + 1e-5).sqrt()).to(x.dtype))(
            x.float()
        ),
        "is not rsqrt",
        id="divided-by-sqrt",
    ),
    pytest.param(
        lambda x, w: (lambda h: (h * (h.pow(2).mean(-1, True) + 1e-5).pow(-0.5)).to(x.dtype))(
            x.float()
        ),
        "is not rsqrt",
        id="power",
    ),
    pytest.param(lambda x, w: w * (x * root(x)), "computed in torch.bfloat16", id="not-fp32"),
    pytest.param(
        lambda x, w: (lambda h: ((h - h.mean(-1, True)) * root(h - h.mean(-1, True))).to(x.dtype))(
            x.float()
        ),
        "what is squared is not what is multiplied",
        id="layer-norm",
    ),
    pytest.param(
        lambda x, w: (lambda h: h * root(h))(x.float()),
        "the result is not rounded",
        id="stays-fp32",
    ),
    pytest.param(in_place, "writes in place between", id="written-meanwhile"),
]


@pytest.mark.parametrize(("spell", "reason"), NEAR_MISSES)
def test_near_misses_are_refused_with_the_reason(spell, reason):
    after, report = run(spell)
    assert report.matches == 0
    assert count(after, NORM) == 0
    assert any(reason in why for _, why in report.refused), report.refused


@pytest.mark.parametrize("first", [True, False], ids=["cast-first", "cast-last"])
def test_a_weight_of_another_dtype_is_refused(first):
    def spell(x, w):
        hidden = x.float()
        scaled = hidden * root(hidden)
        return w * scaled.to(x.dtype) if first else (w * scaled).to(x.dtype)

    _, report = run(spell, weight_dtype=torch.float32)
    assert report.matches == 0
    assert list(reasons(report)) == ["the weight is torch.float32, the input torch.bfloat16"]


@pytest.mark.parametrize("transposed", [False, True], ids=["heads-last", "heads-first"])
def test_strided_heads(transposed):
    """q/k norms read slices of a merged projection, before or after the heads come first."""

    def spell(x, w):
        heads = x[..., :64].unflatten(-1, (4, 16))
        return llama(heads.transpose(0, 1) if transposed else heads, w).sum(-1)

    _, report = run(spell, shape=(5, 96))
    assert (report.matches, report.refused) == (1, [])
