"""CapturedGraph: what its inputs mean, and copies that leave the original alone.

`lift`, `evaluate` and `Attention` are also what the tests of single passes build their graphs with.
"""

from __future__ import annotations

import pytest
import torch
from fastgen.kernels import attention
from fastgen.kernels.packing import pack
from fastgen.passes import CapturedGraph, InputSpec, MergePlan
from fastgen.passes.graph import fake_mode_of
from torch import fx, nn
from torch.export.graph_signature import InputKind

KINDS = {
    InputKind.PARAMETER: "parameter",
    InputKind.BUFFER: "buffer",
    InputKind.CONSTANT_TENSOR: "constant",
    InputKind.USER_INPUT: "batch",
}


def lift(
    module: nn.Module, *example: torch.Tensor, refusals: dict[str, str] | None = None
) -> CapturedGraph:
    """A little module as capture would hand it over; the first input's tokens are dynamic."""
    tokens = {0: torch.export.Dim("num_tokens", min=2)}
    program = torch.export.export(
        module, example, dynamic_shapes=[tokens, *[None] * (len(example) - 1)], strict=False
    )
    graph_module = program.graph_module
    output = next(node for node in graph_module.graph.nodes if node.op == "output")
    output.args = (output.args[0][0],)
    inputs = {
        spec.arg.name: InputSpec(KINDS[spec.kind], spec.target or spec.arg.name)
        for spec in program.graph_signature.input_specs
    }
    module = fx.GraphModule(graph_module, graph_module.graph)
    return CapturedGraph(module, inputs, 1, dict(program.constants), refusals or {})


def evaluate(captured: CapturedGraph, module: nn.Module, *batch: torch.Tensor) -> torch.Tensor:
    """Run a graph on real numbers; merged weights are concatenated, packed ones packed here."""
    captured.module.recompile()
    plans = {plan.name: plan for plan in captured.merges}
    given = iter(batch)
    values = []
    for spec in captured.inputs.values():
        match spec.kind:
            case "parameter":
                values.append(module.get_parameter(spec.target))
            case "buffer":
                values.append(module.get_buffer(spec.target))
            case "constant":
                values.append(captured.constants[spec.target])
            case "merged" | "packed":
                plan = plans.get(spec.target)
                members = (spec.target,) if plan is None else plan.members
                weight = torch.cat([module.get_parameter(name) for name in members])
                values.append(weight if spec.kind == "merged" else pack(weight, spec.layout))
            case _:
                values.append(next(given))
    with torch.no_grad():
        return captured.module(*values)


class Attention(nn.Module):
    """Four heads of 4 over two KV heads, as a model's layer would call the op."""

    def __init__(self, layer_idx: int = 0, bias: bool = False) -> None:
        super().__init__()
        self.q = nn.Linear(16, 16, bias=bias)
        self.k = nn.Linear(16, 8, bias=bias)
        self.v = nn.Linear(16, 8, bias=bias)
        self.o = nn.Linear(16, 16, bias=False)
        self.layer_idx = layer_idx

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o(self.attend(self.q(x), self.k(x), self.v(x)))

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        heads = (tensor.unflatten(-1, (-1, 4)) for tensor in (query, key, value))
        output = attention(*heads, None, 0.5, 0, 0.0, None, self.layer_idx)
        return output.flatten(-2)


def text_of(captured: CapturedGraph) -> tuple:
    nodes = [
        (node.op, node.name, str(node.target), str(node.args)) for node in captured.graph.nodes
    ]
    return nodes, dict(captured.inputs), list(captured.merges)


@pytest.fixture
def captured() -> CapturedGraph:
    return lift(Attention(bias=True), torch.randn(5, 16))


def test_inputs_name_every_placeholder_in_order(captured):
    assert list(captured.inputs) == [node.name for node in captured.placeholders()]
    assert [spec.kind for spec in captured.inputs.values()] == ["parameter"] * 7 + ["batch"]
    assert captured.inputs["p_q_weight"] == InputSpec("parameter", "q.weight")


def test_a_copy_computes_the_same_and_shares_constants(captured):
    module, x = Attention(bias=True), torch.randn(3, 16)
    copy = captured.copy()
    copy.graph.lint()
    assert text_of(copy) == text_of(captured)
    assert torch.equal(evaluate(copy, module, x), evaluate(captured, module, x))
    assert copy.constants is captured.constants
    assert copy.parameter_refusals is captured.parameter_refusals
    assert copy.num_layers == captured.num_layers


def test_changing_a_copy_leaves_the_original(captured):
    before = text_of(captured)
    values = {node.name: node.meta["val"] for node in captured.graph.nodes if node.op != "output"}
    copy = captured.copy()
    copy.merges.append(MergePlan("a+b", ("a", "b")))
    linear = next(n for n in copy.graph.nodes if n.target is torch.ops.aten.linear.default)
    linear.replace_all_uses_with(linear.args[0])
    linear.meta["val"] = None
    copy.graph.eliminate_dead_code()
    copy.remove_unused_inputs()
    copy.add_input("more", InputSpec("batch", "more"), copy.placeholders()[-1].meta["val"])
    assert text_of(captured) == before
    assert text_of(copy) != before
    for node in captured.graph.nodes:
        if node.op != "output":
            assert node.meta["val"] is values[node.name]


def test_a_copy_keeps_every_fake_value(captured):
    for old, new in zip(captured.graph.nodes, captured.copy().graph.nodes, strict=True):
        if old.op != "output":
            assert new.meta["val"] is old.meta["val"]
            assert new.meta is not old.meta
    assert captured.copy().output_value() is captured.output_value()


def test_a_copy_names_its_inputs_whatever_they_are_called():
    """torch.fx gives a node another name on the way if its own is one of Python's builtins."""

    class Module(nn.Linear):
        def forward(self, input):
            return super().forward(input)

    captured = lift(Module(16, 16), torch.randn(5, 16))
    for copy in (captured.copy(), captured.copy().copy()):
        assert list(copy.inputs) == [node.name for node in copy.placeholders()]
        assert list(copy.inputs.values()) == list(captured.inputs.values())


def test_placeholder_is_found_by_meaning(captured):
    assert captured.placeholder("parameter", "v.bias").name == "p_v_bias"
    assert captured.placeholder("batch", "x").name == "x"
    with pytest.raises(KeyError, match=r"no batch input 'v\.bias'"):
        captured.placeholder("batch", "v.bias")


def test_added_inputs_come_last_in_the_order_they_were_added(captured):
    value = captured.placeholders()[-1].meta["val"]
    old = list(captured.inputs)
    for name in ("slot_mapping", "block_table"):
        node = captured.add_input(name, InputSpec("batch", name), value)
        assert node.meta["val"] is value
    assert list(captured.inputs) == [*old, "slot_mapping", "block_table"]
    assert list(captured.inputs) == [node.name for node in captured.placeholders()]
    captured.graph.lint()
    captured.module.recompile()


def test_added_inputs_of_one_name_are_told_apart(captured):
    value = captured.placeholders()[-1].meta["val"]
    first = captured.add_input("more", InputSpec("batch", "first"), value)
    second = captured.add_input("more", InputSpec("batch", "second"), value)
    assert captured.placeholder("batch", "first") is first
    assert captured.placeholder("batch", "second") is second
    captured.graph.lint()
    captured.module.recompile()  # a SyntaxError if two arguments have one name


def test_unused_weights_are_removed_and_batch_inputs_stay(captured):
    linear = next(n for n in captured.graph.nodes if n.target is torch.ops.aten.linear.default)
    value = captured.placeholder("batch", "x").meta["val"]
    captured.add_input("positions", InputSpec("batch", "positions"), value)
    captured.add_input("key_cache_0", InputSpec("cache", "key:0"), value)
    captured.add_input("merged_1", InputSpec("merged", "a+b"), value)
    captured.add_input("merged_2", InputSpec("merged", "c+d"), value)
    used = captured.placeholder("merged", "c+d")
    captured.merges = [MergePlan("a+b", ("a", "b")), MergePlan("c+d", ("c", "d"))]
    with captured.graph.inserting_after(linear):
        total = captured.graph.call_function(torch.ops.aten.add.Tensor, (linear, used))
    linear.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
    output = next(node for node in captured.graph.nodes if node.op == "output")
    output.args = (total,)
    captured.graph.eliminate_dead_code()
    captured.remove_unused_inputs()
    assert list(captured.inputs.values()) == [
        InputSpec("parameter", "q.weight"),
        InputSpec("parameter", "q.bias"),
        InputSpec("batch", "x"),
        InputSpec("batch", "positions"),
        InputSpec("cache", "key:0"),
        InputSpec("merged", "c+d"),
    ]
    assert list(captured.inputs) == [node.name for node in captured.placeholders()]
    assert captured.merges == [MergePlan("c+d", ("c", "d"))]
    captured.graph.lint()


def test_output_value_is_the_fake_tensor_of_the_logits(captured):
    value = captured.output_value()
    assert isinstance(value, torch._subclasses.FakeTensor)
    assert value.shape[1] == 16
    assert not isinstance(value.shape[0], int), "tokens must stay dynamic"


def test_fake_mode_is_the_one_the_graph_was_traced_in(captured):
    assert fake_mode_of(captured.placeholders()) is captured.output_value().fake_mode
    with pytest.raises(AssertionError, match="no fake tensors"):
        fake_mode_of([])


def test_lifted_graph_computes_what_the_module_computes():
    module, x = Attention(bias=True), torch.randn(7, 16)
    captured = lift(module, torch.randn(5, 16))
    assert torch.equal(evaluate(captured, module, x), module(x))


def test_planted_changed_graph_is_seen():
    module, x = Attention(bias=True), torch.randn(7, 16)
    captured = lift(module, torch.randn(5, 16))
    linear = next(n for n in captured.graph.nodes if n.target is torch.ops.aten.linear.default)
    linear.args = linear.args[:2]  # the bias is lost
    assert not torch.equal(evaluate(captured, module, x), module(x))
