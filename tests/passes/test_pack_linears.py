"""pack_linears: which linears get a packed copy of their weight."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from fastgen.kernels import CallSite, select
from fastgen.kernels.packing import pack, why_not_packed, why_not_tiles
from fastgen.passes import InputSpec, run_passes
from fastgen.passes.pack_linears import pack_linears, packed_bytes, refusal_to_pack
from tiny_models import tiny_model

import fastgen
from fastgen.capture import capture
from fastgen.compiled import compile_graph

BF16 = torch.bfloat16
pytestmark = pytest.mark.skipif(
    (reason := why_not_packed(torch.empty(1, 32, dtype=BF16))) is not None,
    reason=f"weights are not packed here: {reason}",
)


NAMES = ("input", "weight", "bias", "out_features")
# Whether there is a layout of our own here; else oneDNN packs.
TILES = why_not_tiles(torch.empty(1, 32, dtype=BF16)) is None


def captured(family="qwen2", budget=sys.maxsize, dtype=BF16):
    graph = capture(tiny_model(family, dtype=dtype))
    graph.pack_budget_bytes = budget
    return graph


def report_of(graph, passes_off=()):
    _, report = run_passes(graph, passes_off)
    return next(item for item in report.passes if item.name == "pack_linears")


def linears(graph, target):
    return [node for node in graph.graph.nodes if node.target is target]


def test_every_linear_is_packed_and_none_is_left():
    graph = captured()
    rewritten, _ = run_passes(graph)
    # 2 layers of qkv, o, gate/up and down, and the head.
    gated = linears(rewritten, torch.ops.fastgen.packed_gated_linear.default)
    assert len(gated) == (2 if TILES else 0)
    assert len(linears(rewritten, torch.ops.fastgen.packed_linear.default)) == 9 - len(gated)
    assert linears(rewritten, torch.ops.aten.linear.default) == []
    kinds = [spec.kind for spec in rewritten.inputs.values()]
    assert kinds.count("packed") == 9
    assert not [
        spec
        for spec in rewritten.inputs.values()
        if spec.kind == "merged" and spec.target.endswith("weight")
    ], "the plain merged weights are no inputs any more"
    assert len(rewritten.merges) == 6, "but their plans (4 weights, 2 biases) are"


def test_it_matches_nothing_the_second_time():
    graph = captured()
    assert pack_linears(graph).matches > 0
    again = pack_linears(graph)
    assert (again.matches, again.refused) == (0, [])


def test_a_tied_head_is_packed_beside_its_embedding():
    model = tiny_model("llama", dtype=BF16, tie_word_embeddings=True)
    graph = capture(model)
    graph.pack_budget_bytes = sys.maxsize
    pack_linears(graph)
    (embedding,) = linears(graph, torch.ops.aten.embedding.default)
    shared = graph.inputs[embedding.args[0].name]
    assert shared.kind == "parameter"
    layout = "tiles" if TILES else "onednn"
    assert InputSpec("packed", shared.target, layout) in graph.inputs.values()


def test_a_weight_used_twice_is_packed_once():
    graph = captured()
    linear = linears(graph, torch.ops.aten.linear.default)[-1]
    with graph.graph.inserting_after(linear):
        again = graph.graph.call_function(torch.ops.aten.linear.default, linear.args)
        again.meta = dict(linear.meta)
    with graph.graph.inserting_after(again):
        total = graph.graph.call_function(torch.ops.aten.add.Tensor, (linear, again))
        total.meta = dict(linear.meta)
    linear.replace_all_uses_with(total, lambda user: user is not total)
    before = sum(spec.kind == "parameter" for spec in graph.inputs.values())
    report = pack_linears(graph)
    assert report.matches == len(linears(graph, torch.ops.fastgen.packed_linear.default))
    packed = sum(spec.kind == "packed" for spec in graph.inputs.values())
    assert packed == report.matches - 1 < before


def test_fp32_is_refused():
    report = report_of(captured(dtype=torch.float32))
    assert report.matches == 0
    assert {why for _, why in report.refused} == {"the weight is float32"}


def test_a_computed_weight_is_refused():
    graph = captured()
    linear = linears(graph, torch.ops.aten.linear.default)[0]
    with graph.graph.inserting_before(linear):
        twice = graph.graph.call_function(torch.ops.aten.mul.Tensor, (linear.args[1], 2.0))
        twice.meta = dict(linear.args[1].meta)
    linear.args = (linear.args[0], twice, *linear.args[2:])
    report = pack_linears(graph)
    assert [where for where, why in report.refused if "is computed" in why] == [linear.name]


@pytest.mark.parametrize("budget", [0, 20_000, 60_000])
def test_copies_stay_within_the_budget(budget):
    graph = captured(budget=budget)
    rewritten, reports = run_passes(graph, ("pack_gated_linears",))
    report = next(item for item in reports.passes if item.name == "pack_linears")
    assert packed_bytes(rewritten) <= budget
    assert report.matches + len(report.refused) == 9
    assert report.refused
    assert all("are left for them" in why for _, why in report.refused)
    assert (report.matches > 0) == (budget > 0)


def test_logits_equal_the_plain_ones_to_rounding():
    """The op over packed weights and aten's linear, node by node, on the same input."""
    graph = captured()
    rewritten, _ = run_passes(graph)
    nodes = linears(rewritten, torch.ops.fastgen.packed_linear.default)
    assert len({node.args[3] for node in nodes}) == 2, "outputs of qkv and head, of o and down"
    for node in nodes:
        out_features, in_features = node.args[3], node.args[0].meta["val"].shape[-1]
        generator = torch.Generator().manual_seed(out_features)
        weight = torch.randn(out_features, in_features, generator=generator).to(BF16)
        input = torch.randn(13, in_features, generator=generator).to(BF16)
        arguments = input, pack(weight), None, out_features
        site = CallSite(input.device, dict(zip(NAMES, arguments, strict=True)))
        packed = select("fastgen::packed_linear", site).implementation.function(*arguments)
        torch.testing.assert_close(packed, F.linear(input, weight))


@pytest.mark.parametrize("pack", ["auto", True, False])
def test_the_setting(pack):
    model = fastgen.optimize(tiny_model("qwen2", dtype=BF16), pack=pack)
    compiled = fastgen.api.require(model).compiled
    assert compiled.packs_weights == (pack is not False)
    taken = compiled.report.facts["packed_bytes"]
    linear_bytes = sum(
        module.weight.nbytes for module in model.modules() if isinstance(module, torch.nn.Linear)
    )
    assert taken == (0 if pack is False else linear_bytes)
    fastgen.restore(model)


def test_it_can_be_switched_off_by_name():
    assert report_of(captured(), ("pack_linears",)).status == "off"
    with pytest.raises(ValueError, match="passes_off may name"):
        compile_graph(captured(), ("pack_linear",))


def test_a_copy_counts_with_the_outputs_that_pad_it():
    model = tiny_model("llama", dtype=BF16, vocab_size=100)
    graph = capture(model)
    head = linears(graph, torch.ops.aten.linear.default)[-1].args[1]
    if not TILES:
        pytest.skip("oneDNN's copies are as large as the weight")
    graph.pack_budget_bytes = 128 * 64 * 2 - 1
    assert "takes 16384 bytes, and 16383 are left" in str(refusal_to_pack(graph, head))
    graph.pack_budget_bytes += 1
    assert refusal_to_pack(graph, head) is None


@pytest.mark.skipif(not TILES, reason="there is no layout of our own here")
def test_a_width_without_tiles_goes_to_onednn():
    model = tiny_model("llama", dtype=BF16, intermediate_size=80)
    graph = capture(model)
    graph.pack_budget_bytes = sys.maxsize
    report = pack_linears(graph)
    layouts = {spec.target: spec.layout for spec in graph.inputs.values() if spec.kind == "packed"}
    down = {name for name, layout in layouts.items() if layout == "onednn"}
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert report.refused == []
        assert down == {f"model.layers.{i}.mlp.down_proj.weight" for i in range(2)}
    else:
        assert down == set()
        assert {"80 inputs" in why for _, why in report.refused} == {True}
