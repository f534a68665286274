"""canonicalize: what torch.export leaves around the arithmetic is gone, and no bit has moved."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fastgen.passes.canonicalize import canonicalize
from test_graph import evaluate, lift
from torch import nn

aten = torch.ops.aten


class Body(nn.Module):
    """A linear and a vector, computed with as `compute(self, x)` says."""

    def __init__(self, compute) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.vector = nn.Parameter(torch.randn(8))
        self.compute = compute

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.compute(self, x)


def no_grad_region(self, x):
    with torch.no_grad():
        angle = self.linear(x).cos()
    return angle * self.vector


def enabled_grad_region(self, x):
    with torch.enable_grad():
        return self.linear(x) + 1


def autocast_off_region(self, x):
    with torch.autocast("cpu", enabled=False):
        return self.linear(x).float() + 1


def region_of_several_results(self, x):
    with torch.no_grad():
        angle = self.linear(x)
        cos, sin = angle.cos(), angle.sin()
    return cos * self.vector + sin * x


def two_regions(self, x):
    with torch.no_grad():
        angle = self.linear(x)
    with torch.autocast("cpu", enabled=False):
        angle = angle * self.vector
    return angle + x


def region_in_a_region(self, x):
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        angle = self.linear(x).float() * 2
    return angle + self.vector


def region_between_operations_of_a_region(self, x):
    with torch.no_grad():
        angle = self.linear(x)
        with torch.autocast("cpu", enabled=False):
            angle = angle.cos() * self.vector
        angle = angle + x
    return angle * self.vector


REGIONS = pytest.mark.parametrize(
    "compute",
    [
        no_grad_region,
        enabled_grad_region,
        autocast_off_region,
        region_of_several_results,
        two_regions,
        region_in_a_region,
        region_between_operations_of_a_region,
    ],
    ids=lambda compute: compute.__name__,
)


def canonicalized(compute, grad=True):
    """The module, its graph before and after the pass, and the pass's report."""
    torch.manual_seed(0)
    module = Body(compute)
    with torch.set_grad_enabled(grad):
        captured = lift(module, torch.randn(5, 8))
    before = captured.copy()
    report = canonicalize(captured)
    captured.graph.lint()
    return module, before, captured, report


def assert_bit_equal(module, before, after):
    for num_tokens in (2, 63):
        x = torch.randn(num_tokens, 8)
        expected = module(x.clone()).detach()
        for captured in (before, after):
            given = x.clone()
            assert torch.equal(evaluate(captured, module, given), expected)
            assert torch.equal(given, x), "an input was changed"


def targets(captured) -> list:
    return [node.target for node in captured.graph.nodes if node.op == "call_function"]


@REGIONS
def test_regions_are_inlined(compute):
    module, before, after, report = canonicalized(compute, grad=compute is not enabled_grad_region)
    assert any("wrap_with" in str(target) for target in targets(before)), "no region was traced"
    assert report.matches > 0
    assert not any("wrap_with" in str(target) for target in targets(after))
    assert not [node for node in after.graph.nodes if node.op == "get_attr"]
    assert not list(after.module.children())
    assert_bit_equal(module, before, after)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_an_enabled_autocast_is_refused(dtype):
    def compute(self, x):
        with torch.autocast("cpu", dtype=dtype):
            y = self.linear(x)
        return y.float()

    captured = lift(Body(compute), torch.randn(5, 8))
    with pytest.raises(ValueError, match="enabled autocast"):
        canonicalize(captured)


def test_an_enabled_autocast_within_a_region_is_refused():
    def compute(self, x):
        with torch.no_grad():
            y = self.linear(x)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = self.linear(y)
            y = y.float() + 1
        return y * self.vector

    captured = lift(Body(compute), torch.randn(5, 8))
    with pytest.raises(ValueError, match="enabled autocast"):
        canonicalize(captured)


SAME = [
    pytest.param(lambda self, x: self.linear(x).to(torch.float32) + 1, id="to-same-dtype"),
    pytest.param(lambda self, x: self.linear(x).to("cpu", torch.float32) + 1, id="to-same-device"),
    pytest.param(lambda self, x: self.linear(x) * 1.0 + 1, id="times-one"),
    pytest.param(lambda self, x: self.linear(x) * 1 + 1, id="times-int-one"),
    pytest.param(lambda self, x: F.dropout(self.linear(x), 0.3, False) + 1, id="dropout-off"),
    pytest.param(lambda self, x: F.dropout(self.linear(x), 0.0, True) + 1, id="dropout-of-none"),
    pytest.param(lambda self, x: self.linear(x).detach() + 1, id="detach"),
    pytest.param(lambda self, x: aten.alias(self.linear(x)) + 1, id="alias"),
]


@pytest.mark.parametrize("compute", SAME)
def test_what_changes_nothing_is_taken_away(compute):
    module, before, after, report = canonicalized(compute)
    assert targets(after) == [aten.linear.default, aten.add.Tensor]
    assert report.matches == len(targets(before)) - len(targets(after))
    assert_bit_equal(module, before, after)


DIFFERENT = [
    pytest.param(lambda self, x: self.linear(x).to(torch.bfloat16).to(torch.float32), id="rounds"),
    pytest.param(lambda self, x: (self.linear(x) > 0).to(torch.float32), id="mask-to-float"),
    pytest.param(lambda self, x: self.linear(x) * 1.5, id="times-more"),
    pytest.param(lambda self, x: self.linear(x) * -1, id="times-minus-one"),
    pytest.param(lambda self, x: self.linear(x) * self.vector, id="times-tensor"),
    pytest.param(lambda self, x: self.linear(x).long() * 1.0, id="int-times-float-one"),
    pytest.param(lambda self, x: (x > 0) * 1, id="bool-times-one"),
]


@pytest.mark.parametrize("compute", DIFFERENT)
def test_what_changes_something_stays(compute):
    module, before, after, _ = canonicalized(compute)
    kept = [target for target in targets(before) if target != aten._assert_tensor_metadata.default]
    assert targets(after) == kept
    assert_bit_equal(module, before, after)


def test_active_dropout_stays():
    _, before, after, _ = canonicalized(lambda self, x: F.dropout(self.linear(x), 0.5, True))
    assert aten.dropout.default in targets(before)
    assert aten.dropout.default in targets(after)


def times_one_then_in_place(self, x):
    hidden = self.linear(x)
    scaled = hidden * 1.0
    scaled += 1
    return hidden + scaled


def copied_then_in_place(self, x):
    hidden = self.linear(x)
    copy = hidden.to(torch.float32, copy=True)
    copy += 1
    return hidden + copy


def copied_then_source_in_place(self, x):
    hidden = self.linear(x)
    copy = hidden * 1.0
    hidden += 1
    return hidden + copy


def input_copied_then_in_place(self, x):
    copy = x.to(torch.float32, copy=True)
    copy.mul_(2)
    return self.linear(copy) + x


@pytest.mark.parametrize(
    "compute",
    [
        times_one_then_in_place,
        copied_then_in_place,
        copied_then_source_in_place,
        input_copied_then_in_place,
    ],
    ids=lambda compute: compute.__name__,
)
def test_a_copy_that_in_place_arithmetic_needs_stays_a_copy(compute):
    module, before, after, _ = canonicalized(compute)
    assert_bit_equal(module, before, after)


def test_weights_that_nothing_reads_are_no_inputs():
    _, before, after, _ = canonicalized(lambda self, x: x + self.vector)
    assert [spec.target for spec in before.inputs.values()] == [
        "vector",
        "linear.weight",
        "linear.bias",
        "x",
    ]
    assert [spec.target for spec in after.inputs.values()] == ["vector", "x"]
    assert list(after.inputs) == [node.name for node in after.placeholders()]


@pytest.mark.parametrize("compute", [no_grad_region, SAME[0].values[0]], ids=["region", "to"])
def test_second_run_matches_nothing(compute):
    _, _, captured, report = canonicalized(compute)
    assert report.matches > 0
    again = canonicalize(captured)
    assert (again.matches, again.refused) == (0, [])


def test_a_later_export_of_the_module_is_as_before():
    module, before, _, _ = canonicalized(no_grad_region)
    assert targets(lift(module, torch.randn(5, 8))) == targets(before)


def test_planted_wrong_identity_is_seen():
    module, before, after, _ = canonicalized(lambda self, x: self.linear(x) * 1.5)
    product = next(node for node in after.graph.nodes if node.target is aten.mul.Tensor)
    product.replace_all_uses_with(product.args[0])
    with pytest.raises(AssertionError):
        assert_bit_equal(module, before, after)
