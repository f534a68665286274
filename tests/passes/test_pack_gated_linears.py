"""pack_gated_linears: both projections with their product become one op, nothing else does."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from fastgen.kernels.packing import why_not_tiles
from fastgen.passes import run_passes
from fastgen.passes.canonicalize import canonicalize
from fastgen.passes.fuse_gated_activation import fuse_gated_activation
from fastgen.passes.pack_gated_linears import pack_gated_linears
from fastgen.passes.pack_linears import pack_linears, packed_bytes
from fastgen.passes.pipeline import check_form, check_values
from pass_helpers import captured_family, count, logits, reasons
from peft import LoraConfig, get_peft_model
from test_graph import evaluate, lift
from tiny_models import tiny_model
from torch import nn

import fastgen
from fastgen.capture import capture

BF16 = torch.bfloat16
GATED = torch.ops.fastgen.packed_gated_linear.default
pytestmark = pytest.mark.skipif(
    (reason := why_not_tiles(torch.empty(1, 32, dtype=BF16))) is not None,
    reason=f"no layout of our own here: {reason}",
)


def prepared(family: str, dtype=BF16, budget: int = sys.maxsize):
    """A family's model and its graph as this pass finds it."""
    model, graph = captured_family(family, dtype)
    fuse_gated_activation(graph)
    graph.pack_budget_bytes = budget
    return model, graph


# family: activation
FAMILIES = {
    "llama": "silu",
    "qwen3": "silu",
    "gemma2": "gelu_tanh",
    "gemma3_text": "gelu_tanh",
    "phi3": "silu",  # one linear in the model, and a chunk of it
    "stablelm": "silu",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_of_a_family(family):
    """The op's own body computes with the plain weight: its logits have the same bits."""
    model, before = prepared(family)
    after = before.copy()
    report = pack_gated_linears(after)
    assert (report.matches, report.refused) == (2, [])
    check_form(after)
    check_values(before, after)
    for num_tokens in (1, 13):
        expected = logits(before, model, num_tokens)
        assert expected.isfinite().all()
        assert torch.equal(logits(after, model, num_tokens), expected)
    for node in after.graph.nodes:
        if node.target is GATED:
            assert node.args[3:] == (96, FAMILIES[family])
            assert str(node.meta["val"].shape).endswith("96])")
    layouts = [spec.layout for spec in after.inputs.values() if spec.kind == "packed"]
    assert layouts == ["gated_tiles"] * 2
    again = pack_gated_linears(after)
    assert (again.matches, again.refused) == (0, [])


def test_the_linears_are_gone_and_the_parameters_are_those_of_the_model():
    model, graph = prepared("llama")
    merges = list(graph.merges)
    linears = count(graph, torch.ops.aten.linear.default)
    pack_gated_linears(graph)
    assert count(graph, torch.ops.aten.linear.default) == linears - 2
    assert count(graph, torch.ops.fastgen.silu_mul.default) == 0
    assert graph.merges == merges
    packed = [spec for spec in graph.inputs.values() if spec.kind == "packed"]
    plain = {spec.target for spec in graph.inputs.values() if spec.kind == "merged"}
    assert not plain & {spec.target for spec in packed}, "the plain weight is no input any more"
    pack_linears(graph)
    assert pack_gated_linears(graph).matches == 0
    assert all(name in dict(model.named_parameters()) for plan in merges for name in plan.members)


def test_of_an_optimised_model_everything_stays():
    model = tiny_model("llama", dtype=BF16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fastgen.optimize(model, pack=True)
    compiled = fastgen.api.require(model).compiled
    assert compiled.report.kernels["fastgen::packed_gated_linear"]["cpu"]["calls"] == 2
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    num_parameters = sum(1 for _ in model.parameters())
    fastgen.restore(model)
    assert sum(1 for _ in model.parameters()) == num_parameters
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)


@pytest.mark.parametrize("packs", [0, 1, 2])
def test_copies_stay_within_the_budget(packs):
    one = 2 * 96 * 64 * 2  # gate and up, bf16
    _, graph = prepared("llama", budget=packs * one + one - 1)
    report = pack_gated_linears(graph)
    assert (report.matches, len(report.refused)) == (packs, 2 - packs)
    assert packed_bytes(graph) == packs * one
    assert all(why.endswith(f"and {one - 1} are left for them") for _, why in report.refused)


def report_of(reports):
    return next(item for item in reports.passes if item.name == "pack_gated_linears")


def test_projections_that_were_not_merged():
    graph = capture(tiny_model("llama", dtype=BF16))
    graph.pack_budget_bytes = sys.maxsize
    _, reports = run_passes(graph, ("merge_linears",))
    report = report_of(reports)
    assert report.matches == 0
    assert reasons(report) == {"gate and up are not parts of one linear": 2}


@pytest.mark.parametrize("adapted", ["gate_proj", "up_proj"])
def test_an_adapter_on_one_of_the_two(adapted):
    config = LoraConfig(r=4, target_modules=[adapted], layers_to_transform=[1])
    model = tiny_model("llama", dtype=BF16)
    get_peft_model(model, config)
    graph = capture(model.eval())
    graph.pack_budget_bytes = sys.maxsize
    report = report_of(run_passes(graph)[1])
    assert report.matches == 1
    assert reasons(report) == {"gate and up are not parts of one linear": 1}


def test_fp32_is_refused():
    _, graph = prepared("llama", torch.float32)
    report = pack_gated_linears(graph)
    assert (report.matches, reasons(report)) == (0, {"the weight is float32": 2})


def test_it_can_be_switched_off_by_name():
    graph = capture(tiny_model("llama", dtype=BF16))
    graph.pack_budget_bytes = sys.maxsize
    rewritten, reports = run_passes(graph, ("pack_gated_linears",))
    assert report_of(reports).status == "off"
    assert count(rewritten, GATED) == 0
    assert count(rewritten, torch.ops.fastgen.silu_mul.default) == 2


# Little modules.


class Projections(nn.Module):
    def __init__(self, compute, width: int = 64, outputs: int = 96) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.both = nn.Linear(width, outputs).to(BF16)
        self.other = nn.Linear(width, outputs).to(BF16)
        self.compute = compute

    def forward(self, x):
        return self.compute(self, x)


def run(compute, width: int = 64, budget: int = sys.maxsize):
    """Bit-equal results. Returns the graph after and the report."""
    module = Projections(compute, width)
    before = lift(module, torch.randn(5, width).to(BF16))
    before.pack_budget_bytes = budget
    canonicalize(before)
    fuse_gated_activation(before)
    after = before.copy()
    report = pack_gated_linears(after)
    check_form(after)
    check_values(before, after)
    batch = torch.randn(7, width).to(BF16)
    expected = evaluate(before, module, batch.clone())
    assert torch.equal(evaluate(after, module, batch.clone()), expected)
    assert pack_gated_linears(after).matches == 0
    return after, report


def chunks(m, x):
    gate, up = m.both(x).chunk(2, dim=-1)
    return F.silu(gate) * up


def chunks_of_1(m, x):
    gate, up = m.both(x).chunk(2, dim=1)
    return up * F.gelu(gate, approximate="tanh")


def splits(m, x):
    gate, up = m.both(x).split(48, dim=-1)
    return F.silu(gate) * up


def slices(m, x):
    both = m.both(x)
    return F.silu(both[..., :48]) * both[..., 48:]


def slices_from_the_end(m, x):
    both = m.both(x)
    return F.silu(both[..., :-48]) * both[..., -48:]


def three_dimensions(m, x):
    gate, up = m.both(x[None]).chunk(2, dim=-1)
    return (F.silu(gate) * up)[0]


def without_bias(m, x):
    gate, up = F.linear(x, m.both.weight).chunk(2, dim=-1)
    return F.silu(gate) * up


HALVES = (
    chunks,
    chunks_of_1,
    splits,
    slices,
    slices_from_the_end,
    three_dimensions,
    without_bias,
)


@pytest.mark.parametrize("compute", HALVES, ids=lambda compute: compute.__name__)
def test_halves_however_they_are_taken(compute):
    after, report = run(compute)
    assert (report.matches, report.refused) == (1, [])
    assert count(after, torch.ops.aten.linear.default) == 0


def exact_gelu(m, x):
    gate, up = m.both(x).chunk(2, dim=-1)
    return F.gelu(gate) * up


def swapped(m, x):
    up, gate = m.both(x).chunk(2, dim=-1)
    return F.silu(gate) * up


def thirds(m, x):
    gate, up, _ = m.both(x).split(32, dim=-1)
    return F.silu(gate) * up


def overlapping(m, x):
    both = m.both(x)
    return F.silu(both[..., :60]) * both[..., 36:]


def halves_of_another_view(m, x):
    both = m.both(x).unflatten(-1, (2, 48))
    return F.silu(both[:, 0]) * both[:, 1]


def up_read_twice(m, x):
    gate, up = m.both(x).chunk(2, dim=-1)
    return F.silu(gate) * up + up


def both_read_together_again(m, x):
    gate, up = m.both(x).chunk(2, dim=-1)
    return F.silu(gate) * up + (gate - up)


def the_linear_read_again(m, x):
    both = m.both(x)
    gate, up = both.chunk(2, dim=-1)
    return F.silu(gate) * up + both.sum()


def the_slices_linear_read_again(m, x):
    both = m.both(x)
    return F.silu(both[..., :48]) * both[..., 48:] + both.sum()


def one_half_of_each(m, x):
    return F.silu(m.both(x)[..., :48]) * m.other(x)[..., 48:]


def an_adapted_gate(m, x):
    gate, up = m.both(x).chunk(2, dim=-1)
    return F.silu(gate + m.other(x)[..., :48]) * up


def a_computed_weight(m, x):
    gate, up = F.linear(x, m.both.weight * 2).chunk(2, dim=-1)
    return F.silu(gate) * up


def an_input_written_meanwhile(m, x):
    x = x * 1.5
    gate, up = m.both(x).chunk(2, dim=-1)
    x.add_(1)
    return F.silu(gate) * up + x.sum()


OTHERS = "others read the two projections, too"
NOT_ONE = "gate and up are not parts of one linear"
NEAR_MISSES = [
    (exact_gelu, "the exact GELU is not part of the kernel"),
    (swapped, "of 96 outputs the gate is (48, 96), up (0, 48): not the halves"),
    (thirds, "of 96 outputs the gate is (0, 32), up (32, 64): not the halves"),
    (overlapping, "of 96 outputs the gate is (0, 60), up (36, 96): not the halves"),
    (halves_of_another_view, NOT_ONE),
    (up_read_twice, OTHERS),
    (both_read_together_again, OTHERS),
    (the_linear_read_again, OTHERS),
    (the_slices_linear_read_again, OTHERS),
    (one_half_of_each, NOT_ONE),
    (an_adapted_gate, NOT_ONE),
    (a_computed_weight, "is computed, not a weight of the model"),
    (an_input_written_meanwhile, "writes in place between"),
]


@pytest.mark.parametrize(
    ("compute", "reason"), NEAR_MISSES, ids=[compute.__name__ for compute, _ in NEAR_MISSES]
)
def test_near_misses_are_refused_with_the_reason(compute, reason):
    _, report = run(compute)
    assert report.matches == 0
    ((_, why),) = report.refused
    assert reason in why


def test_a_width_that_has_no_tiles():
    _, report = run(chunks, width=48)
    assert report.matches == 0
    ((_, why),) = report.refused
    assert "48 inputs, not a multiple of 32" in why


def test_a_copy_of_outputs_that_are_no_whole_groups_counts_with_its_padding():
    """Twice 48 outputs are three groups: nothing is padded. One byte less is too little."""
    room = 96 * 64 * 2
    assert run(chunks, budget=room)[1].matches == 1
    _, report = run(chunks, budget=room - 1)
    assert reasons(report) == {
        f"a packed copy takes {room} bytes, and {room - 1} are left for them": 1
    }
