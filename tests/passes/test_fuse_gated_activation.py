"""fuse_gated_activation: act(gate) * up of two equal tensors becomes the op, nothing else does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fastgen.passes.fuse_gated_activation import fuse_gated_activation
from pass_helpers import captured_family, count, every_family, fuse_family, fuse_module, logits
from test_graph import lift
from torch import nn

SILU = torch.ops.fastgen.silu_mul.default
GELU = torch.ops.fastgen.gelu_mul.default

# family: fused products in two layers
FAMILIES = {
    "llama": 2,
    "phi3": 2,
    "gemma2": 2,
    "mixtral": 2,
    "qwen2_moe": 4,  # experts and the shared expert
    "deepseek_v3": 3,  # a dense layer; experts and the shared expert
    "cohere2": 2,
    "stablelm": 2,
}


@every_family(FAMILIES, quick_in_fp32=("llama", "gemma2"))
def test_every_product_of_a_family_is_fused(family, dtype):
    _, after, report = fuse_family(fuse_gated_activation, family, dtype)
    assert (report.matches, report.refused) == (FAMILIES[family], [])
    op, other = (GELU, SILU) if family == "gemma2" else (SILU, GELU)
    assert (count(after, op), count(after, other)) == (FAMILIES[family], 0)
    for node in after.graph.nodes:
        if node.target in (SILU, GELU):
            assert str(node.meta["val"].shape) == str(node.args[0].meta["val"].shape)
            assert node.args[2:] == ((True,) if op is GELU else ())


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gpt_oss"])
def test_what_has_no_gate_is_left_alone(family):
    """GELU spelled out, GELU of one linear, and a clamped gate with a sigmoid of its own."""
    before, after, report = fuse_family(fuse_gated_activation, family, torch.bfloat16)
    assert (report.matches, report.refused) == (0, [])
    assert str(after.graph) == str(before.graph)


class Product(nn.Module):
    def __init__(self, compute) -> None:
        super().__init__()
        self.compute = compute

    def forward(self, x):
        return self.compute(x, x.cos())


def run(compute, dtype=torch.bfloat16, shape=(5, 16)):
    module = Product(compute)
    before = lift(module, torch.randn(shape).to(dtype))
    return fuse_module(fuse_gated_activation, before, module, torch.randn(7, *shape[1:]).to(dtype))


GATED = [
    pytest.param(lambda a, b: F.silu(a) * b, SILU, (), id="silu"),
    pytest.param(lambda a, b: b * F.silu(a), SILU, (), id="up-first"),
    pytest.param(lambda a, b: F.gelu(a) * b, GELU, (False,), id="gelu"),
    pytest.param(lambda a, b: b * F.gelu(a, approximate="tanh"), GELU, (True,), id="gelu-tanh"),
    pytest.param(lambda a, b: F.silu(a) * F.gelu(b), SILU, (), id="both-activated"),
    pytest.param(lambda a, b: F.silu(a) * a, SILU, (), id="by-its-own-input"),
    pytest.param(lambda a, b: F.silu(a[:, ::2]) * b[:, 1::2], SILU, (), id="strided"),
    pytest.param(lambda a, b: F.silu(a.T) * b.T, SILU, (), id="transposed"),
]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
@pytest.mark.parametrize(("compute", "op", "rest"), GATED)
def test_products(compute, op, rest, dtype):
    after, report = run(compute, dtype)
    assert (report.matches, report.refused) == (1, [])
    (node,) = (node for node in after.graph.nodes if node.target is op)
    assert node.args[2:] == rest


def written_meanwhile(a, b):
    gate = a * 1.5
    activated = F.silu(gate)
    b.add_(1)
    return activated * b


NEAR_MISSES = [
    pytest.param(
        lambda a, b: (lambda h: h * b + h)(F.silu(a)), "is read by others too", id="read-twice"
    ),
    pytest.param(lambda a, b: (lambda h: h * h)(F.silu(a)), "is read by others too", id="squared"),
    pytest.param(
        lambda a, b: F.silu(a) * b[:, :1], "the shapes differ: it broadcasts", id="broadcast"
    ),
    pytest.param(
        lambda a, b: F.silu(a) * b.float(),
        "the gate is torch.bfloat16, the other torch.float32",
        id="dtypes",
    ),
    pytest.param(written_meanwhile, "writes in place between", id="written-meanwhile"),
]


@pytest.mark.parametrize(("compute", "reason"), NEAR_MISSES)
def test_near_misses_are_refused_with_the_reason(compute, reason):
    _, report = run(compute)
    assert report.matches == 0
    ((where, why),) = report.refused
    assert where.startswith("mul")
    assert reason in why


NOT_GATED = [
    pytest.param(lambda a, b: F.silu(a) * 2.0, id="number"),
    pytest.param(lambda a, b: F.silu(a) + b, id="sum"),
    pytest.param(lambda a, b: F.relu(a) * b, id="relu"),
    pytest.param(lambda a, b: torch.sigmoid(a) * b, id="sigmoid"),
    pytest.param(lambda a, b: a * torch.sigmoid(a) * b, id="silu-spelled-out"),
    pytest.param(lambda a, b: F.silu(a * b), id="product-inside"),
    pytest.param(lambda a, b: F.silu(a).cos() * b, id="not-at-once"),
]


@pytest.mark.parametrize("compute", NOT_GATED)
def test_other_products_are_left_alone(compute):
    _, report = run(compute)
    assert (report.matches, report.refused) == (0, [])


def test_planted_gate_and_up_in_each_others_place_are_seen():
    model, before = captured_family("llama", torch.bfloat16)
    after = before.copy()
    fuse_gated_activation(after)
    node = next(node for node in after.graph.nodes if node.target is SILU)
    node.args = node.args[::-1]
    assert not torch.equal(logits(after, model), logits(before, model))


def test_planted_other_gelu_is_seen():
    model, before = captured_family("gemma2", torch.float32)
    after = before.copy()
    fuse_gated_activation(after)
    node = next(node for node in after.graph.nodes if node.target is GELU)
    node.args = (*node.args[:2], False)
    assert not torch.equal(logits(after, model), logits(before, model))
