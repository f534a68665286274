"""run_passes: what a pass did is committed or thrown away, and the report says which."""

from __future__ import annotations

import logging

import pytest
import torch
from fastgen.passes import PASSES, InputSpec, MergePlan, PassReport, run_passes
from fastgen.passes.pipeline import Pass
from test_graph import Attention, evaluate, lift, text_of

aten = torch.ops.aten
OPTIONAL = [item.name for item in PASSES if not item.required]
REQUIRED = [item.name for item in PASSES if item.required]


@pytest.fixture
def captured():
    return lift(Attention(bias=True), torch.randn(5, 16))


def output_of(captured):
    return next(node for node in captured.graph.nodes if node.op == "output")


def append(captured, target, *args, **kwargs):
    """Have the graph return target(its output, *args)."""
    output = output_of(captured)
    with captured.graph.inserting_before(output):
        node = captured.graph.call_function(target, (output.args[0], *args), kwargs)
    node.meta = dict(output.args[0].meta)
    output.args = (node,)


def doubles(captured):
    append(captured, aten.mul.Tensor, 2.0)
    return PassReport("doubles", matches=1)


def adds_one(captured):
    append(captured, aten.add.Tensor, 1.0)
    return PassReport("adds_one", matches=1)


def raises(captured):
    append(captured, aten.mul.Tensor, 100.0)
    captured.merges.append(MergePlan("a+b", ("a", "b")))
    raise KeyError("nothing like this in the graph")


def reads_before_it_is_made(captured):
    first = next(node for node in captured.graph.nodes if node.op == "call_function")
    with captured.graph.inserting_before(first):
        captured.graph.call_function(aten.relu.default, (output_of(captured).args[0],))
    return PassReport("reads_before_it_is_made", matches=1)


def forgets_to_name_an_input(captured):
    node = captured.add_input(
        "extra", InputSpec("batch", "extra"), captured.placeholders()[-1].meta["val"]
    )
    del captured.inputs[node.name]
    return PassReport("forgets_to_name_an_input", matches=1)


def names_an_input_that_is_not_there(captured):
    captured.inputs["extra"] = InputSpec("batch", "extra")
    return PassReport("names_an_input_that_is_not_there", matches=1)


def cuts_the_logits(captured):
    append(captured, aten.slice.Tensor, -1, 0, 3)
    return PassReport("cuts_the_logits", matches=1)


def drops_a_token(captured):
    append(captured, aten.slice.Tensor, 0, 1, 2**62)
    return PassReport("drops_a_token", matches=1)


def adds_a_dimension(captured):
    append(captured, aten.unsqueeze.default, 0)
    return PassReport("adds_a_dimension", matches=1)


def rounds_the_logits(captured):
    append(captured, aten.to.dtype, torch.bfloat16)
    return PassReport("rounds_the_logits", matches=1)


def multiplies_what_does_not_fit(captured):
    weight = captured.placeholder("parameter", "k.weight")
    append(captured, aten.mm.default, weight)
    return PassReport("multiplies_what_does_not_fit", matches=1)


BROKEN = pytest.mark.parametrize(
    "broken",
    [
        raises,
        reads_before_it_is_made,
        forgets_to_name_an_input,
        names_an_input_that_is_not_there,
        cuts_the_logits,
        drops_a_token,
        adds_a_dimension,
        rounds_the_logits,
        multiplies_what_does_not_fit,
    ],
    ids=lambda function: function.__name__,
)


def statuses(report) -> dict[str, str]:
    return {item.name: item.status for item in report.passes}


def test_passes_run_in_order_and_are_committed(captured):
    module, x = Attention(bias=True), torch.randn(3, 16)
    result, report = run_passes(captured, passes=(Pass(doubles), Pass(adds_one)))
    assert torch.equal(evaluate(result, module, x), 2 * module(x) + 1)
    assert statuses(report) == {"doubles": "applied", "adds_one": "applied"}
    assert [item.matches for item in report.passes] == [1, 1]
    assert all(item.seconds > 0 for item in report.passes)


def test_the_captured_graph_stays_as_it_is(captured):
    module, x = Attention(bias=True), torch.randn(3, 16)
    before = text_of(captured)
    values = [node.meta.get("val") for node in captured.graph.nodes]
    run_passes(captured, passes=(Pass(doubles), Pass(raises), Pass(cuts_the_logits)))
    assert text_of(captured) == before
    for node, value in zip(captured.graph.nodes, values, strict=True):
        assert node.meta.get("val") is value
    assert torch.equal(evaluate(captured, module, x), module(x))


def test_no_passes_are_no_change(captured):
    result, report = run_passes(captured, passes=())
    assert text_of(result) == text_of(captured)
    assert report.passes == []


@BROKEN
def test_an_optional_pass_that_fails_is_rolled_back_and_named(captured, broken, caplog):
    module, x = Attention(bias=True), torch.randn(3, 16)
    passes = (Pass(doubles), Pass(broken), Pass(adds_one))
    with caplog.at_level(logging.WARNING, logger="fastgen"):
        result, report = run_passes(captured, passes=passes)
    name = broken.__name__
    assert statuses(report) == {"doubles": "applied", name: "rolled back", "adds_one": "applied"}
    failed = report.passes[1]
    assert failed.matches == 0
    ((where, why),) = failed.refused
    assert where == "the whole graph"
    assert why.partition(":")[0].endswith(("Error", "Exception")), why
    ours = [record for record in caplog.records if record.name == "fastgen"]
    assert [record.levelname for record in ours] == ["WARNING"]
    assert name in ours[0].getMessage()
    assert result.merges == []
    assert torch.equal(evaluate(result, module, x), 2 * module(x) + 1)


@BROKEN
def test_a_required_pass_that_fails_is_the_callers_error(captured, broken):
    before = text_of(captured)
    with pytest.raises(Exception, match=r".") as raised:
        run_passes(captured, passes=(Pass(doubles), Pass(broken, required=True)))
    if broken is raises:
        assert isinstance(raised.value.__cause__ or raised.value, KeyError)
        assert "nothing like this" in str(raised.value)
    assert text_of(captured) == before


def test_two_failing_passes_are_both_named(captured):
    passes = (Pass(cuts_the_logits), Pass(doubles), Pass(rounds_the_logits), Pass(raises))
    result, report = run_passes(captured, passes=passes)
    assert statuses(report) == {
        "cuts_the_logits": "rolled back",
        "doubles": "applied",
        "rounds_the_logits": "rolled back",
        "raises": "rolled back",
    }
    module, x = Attention(bias=True), torch.randn(3, 16)
    assert torch.equal(evaluate(result, module, x), 2 * module(x))


def test_reasons_of_refused_sites_are_kept(captured):
    def refuses(captured):
        report = PassReport("refuses")
        report.refuse("linear", "is tied")
        return report

    _, report = run_passes(captured, passes=(Pass(refuses),))
    assert report.passes[0].refused == [("linear", "is tied")]
    assert report.to_dict()["passes"][0]["refused"] == [("linear", "is tied")]


def test_every_fake_value_is_made_anew(captured):
    """A pass may leave wrong values behind; what comes out is what the graph really makes."""

    def widens(captured):
        append(captured, aten.to.dtype, torch.float64)
        append(captured, aten.to.dtype, torch.float32)
        return PassReport("widens", matches=1)

    result, _ = run_passes(captured, passes=(Pass(widens),))
    narrow = output_of(result).args[0]
    assert narrow.args[0].meta["val"].dtype == torch.float64
    assert narrow.meta["val"].dtype == torch.float32


@pytest.mark.parametrize("name", OPTIONAL)
def test_an_optional_pass_is_switched_off_by_name(captured, name):
    _, report = run_passes(captured, (name,))
    cpu = torch.device("cpu")
    expected = {item.name: "applied" if item.runs_on(cpu) else "not for cpu" for item in PASSES}
    assert statuses(report) == {**expected, name: "off"}
    assert next(item.matches for item in report.passes if item.name == name) == 0


def test_switched_off_is_not_run(captured):
    result, report = run_passes(captured, ("raises",), passes=(Pass(doubles), Pass(raises)))
    assert statuses(report) == {"doubles": "applied", "raises": "off"}
    assert result.merges == []


@pytest.mark.parametrize("name", [*REQUIRED, "no_such_pass", ""])
def test_only_optional_passes_can_be_switched_off(captured, name):
    with pytest.raises(ValueError, match=f"passes_off may name merge_linears.*got {name!r}"):
        run_passes(captured, (name,))


def test_the_passes_are_named_for_their_files():
    for item in PASSES:
        assert item.run.__module__ == f"fastgen.passes.{item.name}"
    assert len({item.name for item in PASSES}) == len(PASSES)
    assert set(REQUIRED) == {"canonicalize", "insert_paged_cache"}


def test_the_real_passes_report_their_matches(captured):
    result, report = run_passes(captured)
    matches = {item.name: item.matches for item in report.passes}
    assert matches["merge_linears"] == 1
    assert matches["insert_paged_cache"] == 1
    assert len(result.merges) == 2, "weights and biases"


@BROKEN
def test_planted_pass_that_is_not_rolled_back_would_be_seen(captured, broken):
    """Committed as it is, each of the broken passes would be a broken graph or another function."""
    module, x = Attention(bias=True), torch.randn(3, 16)
    expected = module(x)
    try:
        broken(captured)
    except KeyError:
        pass  # it has changed the graph before it raised
    try:
        result = evaluate(captured, module, x)
    except Exception:
        return
    assert result.dtype != expected.dtype or not torch.equal(result, expected)
