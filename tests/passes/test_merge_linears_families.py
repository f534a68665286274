"""merge_linears on whole models: adapters, experts, projections of other kinds."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fastgen.passes.canonicalize import canonicalize
from fastgen.passes.merge_linears import merge_linears
from pass_helpers import count, logits, make_model, reasons
from test_graph import Attention, lift
from torch import nn

from fastgen.capture import capture

LINEAR = torch.ops.aten.linear.default
EPS = torch.finfo(torch.float32).eps
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def merged(model):
    """The model's graph before and after the pass, and the report."""
    captured = capture(model)
    canonicalize(captured)
    before = captured.copy()
    report = merge_linears(captured)
    captured.graph.lint()
    assert merge_linears(captured).matches == 0
    return before, captured, report


def assert_equal_numerics(before, after, model):
    """The merged GEMM may sum in another order: 2 x (the unmerged error + eps x max) to fp64."""
    plain, ours = logits(before, model), logits(after, model)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("batched_mm")  # grouped products know no fp64
    exact = logits(merged(model.double())[0], model)
    allowed = 2 * ((plain - exact).abs().max() + EPS * exact.abs().max())
    assert (ours - exact).abs().max() <= allowed


def last_names(captured) -> list[tuple[str, ...]]:
    return [
        tuple(name.removesuffix(".weight").rpartition(".")[2] for name in plan.members)
        for plan in captured.merges
        if "weight" in plan.name
    ]


def with_adapters(targets, **settings):
    peft = pytest.importorskip("peft")
    model = make_model("llama")
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=targets, **settings)
    wrapped = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.2)
    return wrapped.get_base_model().eval()


@pytest.mark.parametrize(
    "targets",
    [
        pytest.param(ALL, id="everywhere"),
        pytest.param(["q_proj", "v_proj"], id="q-and-v"),
        pytest.param(["k_proj", "up_proj"], id="k-and-up"),
    ],
)
def test_base_layers_merge_under_unmerged_lora(targets):
    model = with_adapters(targets, lora_dropout=0.1)
    before, after, report = merged(model)
    assert (report.matches, report.refused) == (4, [])
    names = [name for plan in after.merges for name in plan.members]
    assert not any("lora" in name for name in names)
    assert len(names) == 2 * 5
    for target in {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}:
        layer = f"model.layers.1.self_attn.{target}" if target[0] in "qkv" else target
        suffix = ".base_layer.weight" if target in targets else ".weight"
        assert any(name.endswith(layer + suffix) for name in names)
    assert count(before, LINEAR) - count(after, LINEAR) == 2 * (2 + 1)
    assert_equal_numerics(before, after, model)


def test_dora_reads_the_base_weight_twice_and_is_refused():
    model = with_adapters(["q_proj"], use_dora=True)
    _, after, report = merged(model)
    assert report.matches == 2, "gate and up"
    assert not any("q_proj" in plan.name for plan in after.merges)
    assert all("q_proj.base_layer.weight is used more than once" in why for why in reasons(report))


@pytest.mark.parametrize(
    ("family", "matches", "refusals"),
    [
        pytest.param("qwen2_moe", 4, {}, id="qwen2_moe"),  # attention, the shared expert
        pytest.param("mixtral", 2, {}, id="mixtral", marks=pytest.mark.slow),
        pytest.param("gpt_oss", 2, {}, id="gpt_oss"),
        pytest.param("cohere2", 4, {}, id="parallel-blocks"),
        pytest.param(
            "deepseek_v3", 2, {"the linears read different inputs": 2}, id="latent-attention"
        ),
        pytest.param("phi3", 0, {"query, key, value come from one linear already": 2}, id="phi3"),
        pytest.param(
            "gpt2", 0, {"no linear feeds the query, but aten.addmm.default": 2}, id="conv1d"
        ),
    ],
)
def test_families(family, matches, refusals):
    model = make_model(family)
    before, after, report = merged(model)
    assert report.matches == matches
    assert reasons(report) == refusals
    gates = [names for names in last_names(after) if len(names) == 2]
    assert set(gates) <= {("gate_proj", "up_proj")}
    assert_equal_numerics(before, after, model)


def test_a_router_never_joins_its_experts():
    _, after, _ = merged(make_model("qwen2_moe"))
    names = [name for plan in after.merges for name in plan.members]
    assert not any(
        name.endswith(("mlp.gate.weight", "shared_expert_gate.weight")) for name in names
    )


class Adapted(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 2, bias=False), nn.Linear(2, 16, bias=False)
        self.side = nn.Linear(16, 16, bias=False)


class TwoOfOneInput(Adapted):
    def forward(self, x):
        return self.o(self.attend(self.q(x) * torch.sigmoid(self.side(x)), self.k(x), self.v(x)))


class OnlyTheAdapterShares(Adapted):
    """k and v read x + 1; of the query only its adapter does."""

    def forward(self, x):
        query = self.q(x) + self.b(self.a(x + 1))
        return self.o(self.attend(query, self.k(x + 1), self.v(x + 1)))


class WrittenMeanwhile(Adapted):
    def forward(self, x):
        x = x * 2
        query = self.q(x)
        x.add_(1)
        return self.o(self.attend(query, self.k(x), self.v(x)))


class WrittenElsewhere(Adapted):
    def forward(self, x):
        query, other = self.q(x), x * 2
        other.add_(1)
        return self.o(self.attend(query, self.k(x), self.v(x))) + other


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        pytest.param(TwoOfOneInput, "2 linears of the shared input feed the query", id="gated"),
        pytest.param(OnlyTheAdapterShares, "read different inputs", id="adapter-of-another-input"),
        pytest.param(WrittenMeanwhile, "read different inputs", id="input-written-meanwhile"),
        pytest.param(WrittenElsewhere, "writes in place between", id="other-written-meanwhile"),
    ],
)
def test_near_misses_are_refused_with_the_reason(make, reason):
    captured = lift(make(), torch.randn(5, 16))
    report = merge_linears(captured)
    assert report.matches == 0
    ((_, why),) = report.refused
    assert reason in why


@pytest.mark.parametrize(
    "act",
    [F.silu, F.relu, F.gelu, lambda x: F.gelu(x, approximate="tanh")],
    ids=["silu", "relu", "gelu", "gelu-tanh"],
)
def test_a_gate_with_an_adapter(act):
    class Gated(Adapted):
        def forward(self, x):
            return act(self.q(x) + self.b(self.a(x)) * 2.0) * self.side(x)

    captured = lift(Gated(), torch.randn(5, 16))
    report = merge_linears(captured)
    assert (report.matches, report.refused) == (1, [])
    assert [plan.members for plan in captured.merges] == [("q.weight", "side.weight")]
