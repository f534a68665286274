"""What becomes of each kind of operation in a graph that must be batch invariant."""

import pytest
import torch
import torch.nn.functional as F
from fastgen.kernels.cpu import why_missing
from fastgen.passes import CapturedGraph, InputSpec
from torch import nn

from fastgen import UnsupportedModelError
from fastgen.fix_batch_shapes import ByRow, fix_batch_shapes

pytestmark = pytest.mark.skipif(why_missing() is not None, reason=str(why_missing()))

ROWS = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
WEIGHT = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
WIDE = ROWS.new_tensor(range(60)).view(5, 3, 4) / 60
IDS = torch.tensor([0, 2, 1, 1, 3])


def graph_of(function, *given: torch.Tensor) -> CapturedGraph:
    """The function's graph; tensors of 5 rows have any number of them."""

    class Model(nn.Module):
        def forward(self, *args):
            return function(*args)

    rows = torch.export.Dim("rows", min=2)
    shapes = tuple({0: rows} if len(tensor) == 5 else None for tensor in given)
    exported = torch.export.export(Model(), given, dynamic_shapes=(shapes,))
    module = exported.graph_module
    names = [node.name for node in module.graph.nodes if node.op == "placeholder"]
    inputs = {name: InputSpec("batch", name) for name in names}
    return CapturedGraph(module, inputs, num_layers=0, deterministic=True)


def targets(graph: CapturedGraph) -> list:
    return [node.target for node in graph.graph.nodes if node.op == "call_function"]


def assert_same_values(function, graph: CapturedGraph, *given: torch.Tensor) -> None:
    """On any number of rows."""
    for count in (1, 2, 5):
        part = [tensor[:count] if len(tensor) == 5 else tensor for tensor in given]
        (made,) = graph.module(*part)
        torch.testing.assert_close(made, function(*part))
        assert made.stride() == function(*part).stride()


EXACT = {
    "arithmetic": (lambda x, y: (x + y * 2 - 1) / y, ROWS, ROWS + 9),
    "moves": (lambda x: x.view(-1, 2, 3).transpose(1, 2).reshape(-1, 6)[:, :4], ROWS),
    "comparisons": (lambda x: torch.where(x > 0, x.clamp(max=1), -x), ROWS),
    "largest of a row": (lambda x: x.topk(2, dim=-1).values + x.amax(-1, keepdim=True), ROWS),
    "the larger of two": (lambda x, y: torch.max(x, y), ROWS, ROWS.flip(0)),
    "embedding": (lambda ids, weight: F.embedding(ids, weight), IDS, WEIGHT),
    "sums of integers": (lambda ids: ids.cumsum(0), IDS),
    "bits of a mask": (lambda ids: (ids > 1) & (ids < 3), IDS),
    "one number to many places": (
        lambda x, ids: x.scatter(1, ids[:, None], 7.0), ROWS, IDS,
    ),
    "complex numbers are moved": (
        lambda x: torch.view_as_real(torch.view_as_complex(x.view(-1, 3, 2))), ROWS,
    ),
    "to the places of the largest": (
        lambda x: torch.zeros_like(x).scatter(1, x.topk(2).indices, x.topk(2).values), ROWS,
    ),
    "nothing of the batch": (lambda ids, w: F.embedding(ids, w.exp().softmax(0)), IDS, WEIGHT),
}  # fmt: skip


@pytest.mark.parametrize("case", EXACT.values(), ids=EXACT)
def test_what_is_exact_stays(case):
    function, *given = case
    graph = graph_of(function, *given)
    before = targets(graph)
    assert fix_batch_shapes(graph) == {}
    assert targets(graph) == before
    assert_same_values(function, graph, *given)


BY_ROW = {
    "cos": (lambda x: x.cos(), ROWS),
    "silu": (lambda x: F.silu(x), ROWS),
    "pow": (lambda x: x.pow(3), ROWS),
    "softmax": (lambda x: x.softmax(-1), ROWS),
    "mean": (lambda x: x.mean(-1, keepdim=True), ROWS),
    "sum": (lambda x: x.sum(1), WIDE),
    "layer_norm": (lambda x: F.layer_norm(x, (6,)), ROWS),
    "add": (lambda x, y: torch.add(x, y, alpha=3), ROWS, ROWS + 1),
    "bmm": (lambda x: torch.bmm(x, x.transpose(1, 2)), WIDE),
    "polar": (lambda x, y: torch.polar(x, y), ROWS, ROWS + 1),
    "mul": (lambda x, y: x * y, torch.complex(ROWS, ROWS + 1), torch.complex(ROWS, ROWS - 1)),
}


@pytest.mark.parametrize("name", BY_ROW)
def test_what_works_on_rows_runs_by_row(name):
    function, *given = BY_ROW[name]
    graph = graph_of(function, *given)
    assert fix_batch_shapes(graph) == {f"aten::{name}": 1}
    assert sum(isinstance(target, ByRow) for target in targets(graph)) == 1
    assert_same_values(function, graph, *given)


def test_a_row_is_always_laid_out_alike():
    """Of a transposed tensor too, and the result lies in memory as it did before."""
    seen = []

    def function(x):
        return x.transpose(1, 2).cos()

    graph = graph_of(function, WIDE)
    fix_batch_shapes(graph)
    (by_row,) = [target for target in targets(graph) if isinstance(target, ByRow)]
    by_row._function = lambda x: seen.append((x.shape, x.stride())) or x.cos()
    assert_same_values(function, graph, WIDE)
    assert set(seen) == {((1, 4, 3), (12, 3, 1))}


LINEARS = {
    "linear": (F.linear, ROWS, WEIGHT, WEIGHT[:, 0]),
    "linear without bias": (F.linear, ROWS, WEIGHT),
    "mm": (torch.mm, ROWS, WEIGHT.t().contiguous()),
    "matmul": (lambda x, w: x @ w.t(), WIDE[:, :, :3], WEIGHT[:, :3]),
    "addmm": (torch.addmm, WEIGHT[:, 0], ROWS, WEIGHT.t().contiguous()),
}


@pytest.mark.parametrize("case", LINEARS.values(), ids=LINEARS)
def test_linear_layers_become_row_linears(case):
    function, *given = case
    graph = graph_of(function, *given)
    assert fix_batch_shapes(graph) == {}
    assert torch.ops.fastgen.row_linear.default in targets(graph)
    assert_same_values(function, graph, *given)


REFUSED = {
    "aten::cumsum": (lambda x: x.cumsum(0), ROWS),
    "aten::mean": (lambda x: x - x.mean(0), ROWS),
    "aten::softmax": (lambda x: x.softmax(0), ROWS),
    "aten::max": (lambda x: x / x.max(), ROWS),
    "aten::sort": (lambda x: x.sort(0).values, ROWS),
    "aten::matmul": (lambda x: x @ x.t() @ x, ROWS),
    "aten::index_add": (lambda x, ids: WEIGHT.index_add(0, ids, x), ROWS, IDS),
    "aten::index_put": (lambda x, ids: x.index_put((ids,), x, accumulate=True), ROWS, IDS),
    "aten::scatter": (lambda x, ids: x.scatter(1, ids[:, None] * 0, x), ROWS, IDS),
    "aten::sigmoid_": (lambda x: x.clone().sigmoid_(), ROWS),
    "aten::renorm": (lambda x: x.renorm(2, 0, 1.0), ROWS),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_may_mix_rows_is_refused_by_name(name):
    function, *given = REFUSED[name]
    with pytest.raises(UnsupportedModelError, match=f"deterministic=True .*{name}"):
        fix_batch_shapes(graph_of(function, *given))


def test_a_fastgen_op_without_a_kernel_runs_its_reference_by_row_or_is_refused():
    half = ROWS.half()  # of which there are no C++ kernels

    def norm(x):
        return torch.ops.fastgen.rms_norm(x, None, 1e-6, 0.0, False)

    graph = graph_of(norm, half)
    assert fix_batch_shapes(graph) == {"fastgen::rms_norm": 1}
    assert_same_values(norm, graph, half)

    def attend(x):
        heads = x.view(-1, 2, 3)
        return torch.ops.fastgen.attention(heads, heads, heads, None, 1.0, 0, 0.0, None, 0)

    with pytest.raises(UnsupportedModelError, match=r"fastgen::attention: .*reference: its result"):
        fix_batch_shapes(graph_of(attend, ROWS))


WIDTHS = (64, 896, 4864)
AT_ONCE = {
    "cos": (torch.cos, WIDTHS),
    "gelu": (F.gelu, WIDTHS),
    "gelu by tanh": (lambda x: F.gelu(x, approximate="tanh"), WIDTHS),
    "pow": (lambda x: x.pow(3), WIDTHS),
    "rsqrt": (lambda x: x.abs().rsqrt(), WIDTHS),
    "sigmoid": (torch.sigmoid, WIDTHS),
    "silu": (F.silu, WIDTHS),
    "sin": (torch.sin, WIDTHS),
    "tanh": (torch.tanh, WIDTHS),
    "layer_norm": (lambda x: F.layer_norm(x, x.shape[-1:]), (33, 768)),
    "mean": (lambda x: x.mean(-1, keepdim=True), (33, 768)),
    "softmax": (lambda x: x.softmax(-1), (4, 33, 768)),
    "sum": (lambda x: x.sum(-1), (4, 33, 768)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", AT_ONCE)
def test_rows_that_run_at_once_are_as_alone(name, dtype):
    function, widths = AT_ONCE[name]
    for width in widths:
        given = torch.randn(203, width, generator=torch.Generator().manual_seed(0)).to(dtype)
        graph = graph_of(function, given[:5])
        fix_batch_shapes(graph)
        (by_row,) = [target for target in targets(graph) if isinstance(target, ByRow)]
        assert by_row.at_once == 32767 // width
        (several,) = graph.module(given)
        by_row.at_once = 1
        assert torch.equal(several, *graph.module(given))
        assert torch.equal(several[7:90], *graph.module(given[7:90]))


def test_rows_whose_ends_are_computed_otherwise_run_one_by_one():
    for function, *given in (BY_ROW["cos"], BY_ROW["add"], BY_ROW["sum"], BY_ROW["bmm"]):
        graph = graph_of(function, *given)
        fix_batch_shapes(graph)
        (by_row,) = [target for target in targets(graph) if isinstance(target, ByRow)]
        assert by_row.at_once == 1
