"""merge_linears: q, k, v of one attention and gate, up of one product; every near miss refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fastgen.passes import InputSpec, run_passes
from fastgen.passes.canonicalize import canonicalize
from fastgen.passes.merge_linears import merge_linears
from test_graph import Attention, evaluate, lift
from tiny_models import tiny_model
from torch import nn
from torch.nn.utils import parametrize

from fastgen.capture import capture

aten = torch.ops.aten
EPS = torch.finfo(torch.float32).eps


class Gated(nn.Module):
    """act(gate(x)) * up(x), in either order."""

    def __init__(self, act=F.silu, up_first=False, bias=False) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(16, 24, bias=bias), nn.Linear(16, 24, bias=bias)
        self.act, self.up_first = act, up_first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.up_first:
            return self.up(x) * self.act(self.gate(x))
        return self.act(self.gate(x)) * self.up(x)


class Layer(nn.Module):
    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(layer_idx, bias=True), Gated()
        self.down = nn.Linear(24, 16, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(x)
        return x + self.down(self.mlp(x))


class Stack(nn.Module):
    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(index) for index in range(num_layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def merged(module, refusals=None):
    """The module's graph before and after the pass, and the report."""
    captured = lift(module, torch.randn(5, 16), refusals=refusals)
    captured.remove_unused_inputs()
    before = captured.copy()
    report = merge_linears(captured)
    captured.graph.lint()
    return before, captured, report


def assert_equal_numerics(module, before, after):
    """The merged GEMM may sum in another order: 2 x (the unmerged error + eps x max) to fp64."""
    x = torch.randn(63, 16)
    exact = evaluate(before, module.double(), x.double())
    plain = evaluate(before, module.float(), x)
    ours = evaluate(after, module, x)
    assert ours.shape == plain.shape
    assert ours.dtype == plain.dtype
    allowed = 2 * ((plain - exact).abs().max() + EPS * exact.abs().max())
    assert (ours - exact).abs().max() <= allowed


def members(captured) -> list[tuple[str, ...]]:
    return [plan.members for plan in captured.merges]


def linears(captured) -> int:
    return sum(node.target is aten.linear.default for node in captured.graph.nodes)


def assert_untouched(before, after, report):
    assert report.matches == 0
    assert after.merges == []
    assert dict(after.inputs) == dict(before.inputs)
    assert str(after.graph) == str(before.graph)


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_q_k_v_of_one_attention(bias):
    module = Attention(bias=bias)
    before, after, report = merged(module)
    assert (report.matches, report.refused) == (1, [])
    expected = [("q.weight", "k.weight", "v.weight"), ("q.bias", "k.bias", "v.bias")]
    assert members(after) == expected[: 1 + bias]
    assert linears(after) == 2  # q, k, v in one, and o
    assert_equal_numerics(module, before, after)


@pytest.mark.parametrize("up_first", [False, True], ids=["gate-up", "up-gate"])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize(
    "act",
    [F.silu, F.relu, F.gelu, lambda x: F.gelu(x, approximate="tanh")],
    ids=["silu", "relu", "gelu", "gelu-tanh"],
)
def test_gate_and_up_of_one_product(act, bias, up_first):
    module = Gated(act, up_first, bias)
    before, after, report = merged(module)
    assert (report.matches, report.refused) == (1, [])
    assert {frozenset(names) for names in members(after)} == {
        frozenset({f"gate.{kind}", f"up.{kind}"}) for kind in ("weight", "bias")[: 1 + bias]
    }
    assert linears(after) == 1
    assert_equal_numerics(module, before, after)


def test_it_fires_twice_per_layer_and_never_again():
    module = Stack(3)
    before, after, report = merged(module)
    assert (report.matches, report.refused) == (6, [])
    assert linears(before) - linears(after) == 3 * (2 + 1)
    assert_equal_numerics(module, before, after)
    again = merge_linears(after)
    assert again.matches == 0
    assert len(after.merges) == 3 * (2 + 1)
    assert_equal_numerics(module, before, after)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_it_fires_twice_per_layer_of_a_model(family):
    model = tiny_model(family)
    captured = capture(model)
    canonicalize(captured)
    report = merge_linears(captured)
    assert (report.matches, report.refused) == (4, [])
    prefix = "model.layers.1."
    names = [name for names in members(captured) for name in names]
    assert len(names) == len(set(names))
    assert (
        prefix + "self_attn.q_proj.weight",
        prefix + "self_attn.k_proj.weight",
        prefix + "self_attn.v_proj.weight",
    ) in members(captured)
    assert (prefix + "mlp.gate_proj.weight", prefix + "mlp.up_proj.weight") in members(captured)
    assert merge_linears(captured).matches == 0


def test_each_merged_weight_is_an_input_in_place_of_its_members():
    _, after, _ = merged(Layer(0))
    names = {spec.target for spec in after.inputs.values() if spec.kind == "parameter"}
    assert names == {"attention.o.weight", "down.weight"}
    assert [spec for spec in after.inputs.values() if spec.kind == "merged"] == [
        InputSpec("merged", plan.name) for plan in after.merges
    ]
    assert list(after.inputs) == [node.name for node in after.placeholders()]


def test_the_new_nodes_carry_the_values_they_make():
    _, after, _ = merged(Attention(bias=True))
    for node in after.graph.nodes:
        if node.target is aten.linear.default and node.args[1].name.startswith("merged"):
            assert node.meta["val"].shape[-1] == 16 + 8 + 8
            assert node.args[1].meta["val"].shape == (32, 16)
            assert node.args[2].meta["val"].shape == (32,)
            widths = [user.meta["val"].shape[-1] for user in node.users]
            assert widths == [16, 8, 8]
            return
    raise AssertionError("no merged linear")


def test_the_graph_passes_the_pipelines_check():
    module = Stack(2)
    _, report = run_passes(lift(module, torch.randn(5, 16)))
    assert {item.status for item in report.passes} == {"applied", "not for cpu"}


def test_heads_between_the_linears_and_the_attention_do_not_matter():
    """q/k norms and rotations stand between; the linears behind them are still the members."""

    class NormedAttention(Attention):
        def forward(self, x):
            query, key, value = self.q(x), self.k(x), self.v(x)
            query = F.rms_norm(query, (16,))
            key = F.rms_norm(key, (8,)) * torch.cos(x.sum(-1, keepdim=True))
            return self.o(self.attend(query, key, value))

    module = NormedAttention()
    before, after, report = merged(module)
    assert (report.matches, report.refused) == (1, [])
    assert_equal_numerics(module, before, after)


def test_a_member_that_others_read_too_is_still_one_of_three():
    class Watched(Attention):
        def forward(self, x):
            value = self.v(x)
            return self.o(self.attend(self.q(x), self.k(x), value)) + value.sum(-1, keepdim=True)

    module = Watched()
    before, after, report = merged(module)
    assert report.matches == 1
    assert_equal_numerics(module, before, after)


# Near misses.


class MixedBias(Attention):
    def __init__(self):
        super().__init__()
        self.k = nn.Linear(16, 8, bias=True)


class DifferentInputs(Attention):
    def forward(self, x):
        return self.o(self.attend(self.q(x), self.k(x + 1), self.v(x)))


class OneLinearForTwo(Attention):
    def forward(self, x):
        key = self.k(x)
        return self.o(self.attend(self.q(x), key, key * 2))


class OneLinearForAll(Attention):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(16, 32)

    def forward(self, x):
        return self.o(self.attend(*self.qkv(x).split([16, 8, 8], dim=-1)))


class WithoutValue(Attention):
    def forward(self, x):
        return self.o(self.attend(self.q(x), self.k(x), x[:, :8]))


class WithAdapter(Attention):
    """LoRA that is not merged: the query is a sum of two linears."""

    def __init__(self):
        super().__init__()
        self.lora_a, self.lora_b = nn.Linear(16, 2, bias=False), nn.Linear(2, 16, bias=False)

    def forward(self, x):
        query = self.q(x) + self.lora_b(self.lora_a(x))
        return self.o(self.attend(query, self.k(x), self.v(x)))


class SharedWeight(Attention):
    """One parameter under two names of one linear each: it has two users."""

    def __init__(self):
        super().__init__()
        self.v.weight = self.k.weight


class UsedElsewhere(Attention):
    def forward(self, x):
        return super().forward(x) + self.q.weight.sum()


class BufferWeight(Attention):
    def __init__(self):
        super().__init__()
        weight = self.k.weight.detach().clone()
        del self.k.weight
        self.k.register_buffer("weight", weight)


class ComputedWeight(Attention):
    def forward(self, x):
        key = F.linear(x, self.k.weight * 2)
        return self.o(self.attend(self.q(x), key, self.v(x)))


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


def parametrised():
    module = Attention()
    parametrize.register_parametrization(module.k, "weight", Halved())
    return module


REFUSED = [
    pytest.param(MixedBias, "some linears have a bias and some have none", id="mixed-bias"),
    pytest.param(DifferentInputs, "the linears read different inputs", id="different-inputs"),
    pytest.param(
        OneLinearForTwo, "two of query, key, value come from the same linear", id="one-for-two"
    ),
    pytest.param(
        OneLinearForAll, "query, key, value come from one linear already", id="one-for-all"
    ),
    pytest.param(WithoutValue, "no linear feeds the value", id="missing-v-proj"),
    pytest.param(SharedWeight, "used more than once", id="shared-weight"),
    pytest.param(UsedElsewhere, "q.weight is used more than once", id="used-elsewhere"),
    pytest.param(BufferWeight, "not a parameter of the model", id="buffer-weight"),
    pytest.param(ComputedWeight, "is computed, not a parameter", id="computed-weight"),
    pytest.param(parametrised, "is computed, not a parameter", id="parametrised-weight"),
]


@pytest.mark.parametrize(("make", "reason"), REFUSED)
def test_near_misses_are_refused_with_the_reason(make, reason):
    module = make()
    before, after, report = merged(module)
    assert_untouched(before, after, report)
    ((where, why),) = report.refused
    assert where.startswith("attention")
    assert reason in why


@pytest.mark.parametrize("name", ["q.weight", "k.weight", "v.weight"])
def test_what_the_live_model_says_of_a_parameter_is_heard(name):
    """Ties and other storages are known only where the live model is at hand."""
    before, after, report = merged(Attention(), {name: "shares its memory with lm_head.weight"})
    assert_untouched(before, after, report)
    ((_, why),) = report.refused
    assert why == f"{name} shares its memory with lm_head.weight"


def test_weights_of_two_dtypes_are_refused():
    """Only a graph that nobody has run yet can look like this; the pass does not trust it."""
    captured = lift(Attention(), torch.randn(5, 16))
    weight = captured.placeholder("parameter", "k.weight")
    weight.meta["val"] = weight.meta["val"].to(torch.bfloat16)
    before = captured.copy()
    report = merge_linears(captured)
    assert_untouched(before, captured, report)
    assert report.refused == [("attention", "the weights differ in dtype or device")]


def test_a_tied_model_merges_the_rest():
    """Tied weights of one layer are refused and named; the other layer is merged."""
    model = tiny_model("llama")
    tied = model.model.layers[0].self_attn
    tied.v_proj.weight = tied.k_proj.weight
    captured = capture(model)
    canonicalize(captured)
    report = merge_linears(captured)
    assert report.matches == 3
    ((_, why),) = report.refused
    assert "k_proj.weight" in why or "v_proj.weight" in why
    assert not any("layers.0.self_attn" in name for names in members(captured) for name in names)


class Router(nn.Module):
    """A router reads what the experts read; it is nobody's sibling."""

    def __init__(self):
        super().__init__()
        self.mlp, self.router = Gated(), nn.Linear(16, 24, bias=False)

    def forward(self, x):
        return self.mlp(x) * F.softmax(self.router(x), dim=-1)


def test_a_linear_of_the_same_input_is_not_a_member():
    module = Router()
    before, after, report = merged(module)
    assert report.matches == 1
    assert members(after) == [("mlp.gate.weight", "mlp.up.weight")]
    assert linears(after) == 2
    assert_equal_numerics(module, before, after)


def test_a_parallel_mlp_is_merged_by_itself():
    class Parallel(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.mlp, self.down = Attention(), Gated(), nn.Linear(24, 16)

        def forward(self, x):
            return self.attention(x) + self.down(self.mlp(x))

    module = Parallel()
    before, after, report = merged(module)
    assert (report.matches, report.refused) == (2, [])
    assert sorted(map(len, members(after))) == [2, 3]
    assert_equal_numerics(module, before, after)


class Product(nn.Module):
    def __init__(self, compute):
        super().__init__()
        self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 16)
        self.compute = compute

    def forward(self, x):
        return self.compute(self, x)


LONE = [
    pytest.param(lambda self, x: F.silu(self.one(x)) * x, id="activated-times-input"),
    pytest.param(lambda self, x: F.silu(x) * self.one(x), id="activated-input"),
    pytest.param(lambda self, x: self.one(x) * x, id="linear-times-input"),
    pytest.param(lambda self, x: self.one(x) * self.two(x), id="no-activation"),
    pytest.param(lambda self, x: F.silu(self.one(x)) * 2.0, id="times-number"),
    pytest.param(lambda self, x: F.silu(self.one(x)) * F.silu(self.two(x)), id="both-activated"),
    pytest.param(lambda self, x: F.silu(self.one(x)) + self.two(x), id="sum"),
    pytest.param(lambda self, x: torch.sigmoid(self.one(x)) * self.two(x), id="sigmoid-gate"),
    pytest.param(lambda self, x: F.silu(self.one(x)) * self.two(x).cos(), id="up-is-changed"),
]


@pytest.mark.parametrize("compute", LONE)
def test_other_products_are_left_alone(compute):
    module = Product(compute)
    before, after, report = merged(module)
    assert_untouched(before, after, report)


@pytest.mark.parametrize(
    ("compute", "reason"),
    [
        pytest.param(
            lambda self, x: F.silu(self.one(x)) * self.two(x + 1),
            "the linears read different inputs",
            id="different-inputs",
        ),
        pytest.param(
            lambda self, x: F.silu(self.one(x)) * F.linear(x, self.two.weight),
            "some linears have a bias and some have none",
            id="mixed-bias",
        ),
        pytest.param(
            lambda self, x: F.silu(self.one(x)) * F.linear(x, self.one.weight, self.two.bias),
            "one.weight is used more than once",
            id="one-weight",
        ),
    ],
)
def test_products_that_nearly_fit_are_refused_with_the_reason(compute, reason):
    module = Product(compute)
    before, after, report = merged(module)
    assert_untouched(before, after, report)
    ((where, why),) = report.refused
    assert where.startswith("mul")
    assert why == reason


def test_a_linear_times_its_own_activation_is_not_merged_with_itself():
    """silu(one(x)) * one(x) of one call: there is nothing to merge."""

    def compute(self, x):
        hidden = self.one(x)
        return F.silu(hidden) * hidden

    module = Product(compute)
    before, after, report = merged(module)
    assert_untouched(before, after, report)


def test_a_later_export_of_the_module_is_as_before():
    module = Layer(0)
    before, _, _ = merged(module)
    assert str(lift(module, torch.randn(5, 16)).graph) == str(before.graph)


def test_planted_swapped_members_are_seen():
    module = Attention()
    before, after, _ = merged(module)
    (plan,) = after.merges
    object.__setattr__(plan, "members", (plan.members[0], plan.members[2], plan.members[1]))
    with pytest.raises(AssertionError):
        assert_equal_numerics(module, before, after)
