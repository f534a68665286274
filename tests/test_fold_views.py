"""Chains of views over an op's result become one as_strided, or stay as they are."""

from __future__ import annotations

import pytest
import torch
from fastgen.kernels import cpu
from fastgen.kernels.rms_norm import rms_norm_reference
from tiny_models import tiny_model
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from fastgen.capture import capture
from fastgen.compiled import CompiledForward, rewrite
from fastgen.fold_views import fold_views
from fastgen.graph_cache import load, store

aten = torch.ops.aten


def traced(function, mode: str) -> fx.GraphModule:
    """A function of a norm's result [7, 24], the number of rows symbolic and known in the graph."""

    def over_a_norm(x):
        assert x.shape[1] == 24  # which makes it a number, not a symbol
        return function(torch.ops.fastgen.rms_norm(x, None, 1e-6, 0.0, False))

    module = make_fx(over_a_norm, tracing_mode=mode)(rows(7))
    for node in module.graph.nodes:
        if node.target is torch.ops.fastgen.rms_norm.default:
            node.target = rms_norm_reference  # what the choice of kernels does
    return module


def rows(num_rows: int) -> torch.Tensor:
    return torch.randn(num_rows, 24, generator=torch.Generator().manual_seed(0))


def add_size(graph: fx.Graph, after: fx.Node) -> fx.Node:
    """A node that computes the number of rows."""
    x = next(node for node in graph.nodes if node.op == "placeholder")
    with graph.inserting_after(after):
        size = graph.call_function(aten.sym_size.int, (x, 0))
    size.meta["val"] = x.meta["val"].shape[0]
    return size


def folded(function, mode: str = "symbolic", know_size: bool = True) -> fx.GraphModule:
    """The traced function with its views folded, which computes what it did."""
    module = traced(function, mode)
    if mode == "symbolic" and know_size:
        add_size(module.graph, next(iter(module.graph.nodes)))
    fold_views(module.graph)
    module.graph.lint()
    module.recompile()
    for num_rows in (7,) if mode == "fake" else (7, 5, 12):
        x = rows(num_rows)
        expected = function(rms_norm_reference(x, None, 1e-6, 0.0, False))
        found = module(x)
        assert found.shape == expected.shape
        assert torch.equal(found, expected)
    return module


def targets(module: fx.GraphModule) -> list:
    return [node.target for node in module.graph.nodes if node.op == "call_function"]


def is_folded(module: fx.GraphModule) -> bool:
    made = targets(module)
    views = [each for each in made if str(each).startswith("aten.") and "sym_size" not in str(each)]
    return torch.as_strided in made and not views


FOLDED = {
    "slice-view": lambda x: x[:, 8:16].unflatten(1, (2, 4)),
    "offsets add up": lambda x: x[:, 8:][:, 4:8],
    "rows": lambda x: x[2:][1:],
    "select": lambda x: x[:, 8:].select(1, 3),
    "negative dim": lambda x: x.narrow(-1, 5, 4).transpose(-1, -2),
    "every second": lambda x: x[:, 3::2].transpose(0, 1),
    "transposed, then sliced": lambda x: x.unflatten(1, (4, 6)).transpose(1, 2)[:, 2:],
    "permuted, then selected": lambda x: x.view(-1, 4, 6).permute(2, 0, 1)[3],
    "unsqueezed": lambda x: x[:, 4:8].unsqueeze(0).transpose(1, 2),
    "squeezed": lambda x: x.unsqueeze(0)[:, :, 6:].squeeze(0),
    "reshape of what is contiguous": lambda x: x.reshape(-1, 2, 12)[:, 1],
}


@pytest.mark.parametrize("mode", ["fake", "symbolic"])
@pytest.mark.parametrize("name", FOLDED)
def test_chains_that_are_folded(name, mode):
    module = folded(FOLDED[name], mode)
    assert is_folded(module) == (mode == "fake" or name != "rows"), module.code


def test_a_view_that_others_read_too_does_not_cut_a_chain():
    def both(made, view):
        part = view(aten.slice.Tensor, made, 1, 2)
        turned = view(aten.transpose.int, view(aten.slice.Tensor, part, 1, 3), 0, 1)
        return view(torch.mm, turned, part)

    made = check_by_hand(by_hand(both))
    assert made.count(torch.as_strided) == 2
    assert aten.slice.Tensor not in made


def test_a_size_that_nothing_computes_is_not_made_up():
    assert torch.as_strided not in targets(folded(FOLDED["offsets add up"], know_size=False))


def test_chains_through_negative_indices_stay():
    for function in (
        lambda x: x[:, 4:].select(1, -1).unsqueeze(0),
        lambda x: torch.ops.aten.slice.Tensor(x, 1, -8).transpose(0, 1),
    ):
        assert torch.as_strided not in targets(folded(function))


def test_a_view_of_another_dtype_is_not_seen_through():
    module = folded(lambda x: x.view(torch.int32)[:, 4:][:, 2:])
    assert torch.as_strided not in targets(module)


def test_views_of_what_is_given_or_made_by_torch_stay():
    for function in (lambda x: (x + 1)[:, 4:][:, 2:], lambda x: x.expand(3, -1, -1)[1:][:, 2:]):
        assert torch.as_strided not in targets(folded(function))


def by_hand(build) -> fx.Graph:
    """A graph over a kernel's result [6, 8] with real tensors as its values."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.zeros(6, 8)
    made = graph.call_function(rms_norm_reference, (x, None, 1e-6, 0.0, False))
    made.meta["val"] = torch.zeros(6, 8)

    def view(target, *args, **kwargs):
        node = graph.call_function(target, args, kwargs)
        values = fx.map_arg((args, kwargs), lambda given: given.meta["val"])
        node.meta["val"] = target(*values[0], **values[1])
        return node

    graph.output(build(made, view))
    return graph


def check_by_hand(graph: fx.Graph) -> list:
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    expected = fx.GraphModule({}, graph)(x)
    fold_views(graph)
    graph.lint()
    assert torch.equal(fx.GraphModule({}, graph)(x), expected)
    return [node.target for node in graph.nodes]


def test_a_reshape_that_copies_is_left_alone():
    def copied(made, view):
        flat = view(aten.reshape.default, view(aten.slice.Tensor, made, 1, 2, 4), [-1])
        return view(aten.slice.Tensor, flat, 0, 3)

    made = check_by_hand(by_hand(copied))
    assert torch.as_strided not in made
    assert aten.reshape.default in made


def test_arguments_by_name_are_not_overlooked():
    graph = by_hand(
        lambda made, view: view(
            aten.transpose.int, view(aten.slice.Tensor, made, 1, start=3, end=7), 0, 1
        )
    )
    assert torch.as_strided not in check_by_hand(graph)


def test_arguments_that_are_left_out():
    graph = by_hand(
        lambda made, view: view(
            aten.slice.Tensor, view(aten.slice.Tensor, view(aten.slice.Tensor, made), 1), 0, 2
        )
    )
    assert torch.as_strided in check_by_hand(graph)


def test_a_size_is_used_where_it_is_known_already():
    """Of two nodes that compute one size, the one before the view."""

    module = traced(FOLDED["offsets add up"], "symbolic")
    nodes = list(module.graph.nodes)
    add_size(module.graph, nodes[0])
    late = add_size(module.graph, nodes[-2])
    nodes[-1].args = ((nodes[-1].args[0], late),)
    fold_views(module.graph)
    module.graph.lint()
    module.recompile()
    assert torch.as_strided in targets(module)
    assert module(rows(9))[0].shape == (9, 4)


def test_kernels_stay_even_if_nobody_reads_their_results():
    """Some write into what they are given, of which torch.fx knows nothing."""
    graph = by_hand(lambda made, view: view(aten.slice.Tensor, made, 1, 3))
    made = next(node for node in graph.nodes if node.target is rms_norm_reference)
    with graph.inserting_after(made):
        graph.call_function(rms_norm_reference, made.args)
    fold_views(graph)
    assert [node.target for node in graph.nodes].count(rms_norm_reference) == 2


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_traced_and_cached_graphs_fold_alike(family, graphs_on_disk):
    captured = capture(tiny_model(family, dtype=torch.bfloat16))
    captured.pack_budget_bytes = 1 << 30
    graph, report = rewrite(captured)
    graph.keeps_sequences_apart = True
    store("key", graph, report)
    found = load("key", torch.device("cpu"))
    assert found is not None
    traced, cached = CompiledForward(graph, report), CompiledForward(*found)
    both = [
        [
            (str(node.target), node.args[3] if node.target is torch.as_strided else None)
            for node in compiled.lowered.graph.nodes
            if node.op == "call_function"
        ]
        for compiled in (traced, cached)
    ]
    assert both[0] == both[1]
    if cpu.why_missing() is None:
        assert traced.report.facts["programs"] == cached.report.facts["programs"]
        assert any(target == str(torch.as_strided) for target, _ in both[0])
