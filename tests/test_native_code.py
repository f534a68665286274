"""Programs in whole models: bit for bit what the graph computes node by node."""

from __future__ import annotations

import functools
import operator

import pytest
import torch
from fastgen.kernels import cpu
from fastgen.kernels.cpu.program import Program
from fastgen.kernels.gated_activation import silu_mul_cpu
from fastgen.kernels.packing import why_not_tiles
from fastgen.kernels.rms_norm import add_rms_norm_cpu, rms_norm_cpu
from tiny_models import prompts, tiny_model
from torch import fx

import fastgen
from fastgen.capture import capture
from fastgen.compiled import CompiledForward, rewrite
from fastgen.engine.batch import ForwardBatch
from fastgen.engine.kv_cache import KVCache
from fastgen.live import LiveWeights
from fastgen.native_code import compile_programs

pytestmark = pytest.mark.skipif(
    cpu.why_missing() is not None or why_not_tiles(torch.empty(32, 32).bfloat16()) is not None,
    reason="the C++ kernels have no bf16 instructions here",
)
CPU = torch.device("cpu")

# Kernels of each program of two layers. What ends a run: gpt_oss' experts, sinks in bf16.
PROGRAMS = {
    "llama": [17],
    "qwen2": [17],
    "qwen3": [21],
    "gemma2": [21],
    "gpt_oss": [],
}


@functools.cache
def forward_of(family: str) -> tuple[torch.nn.Module, CompiledForward, LiveWeights]:
    model = tiny_model(family, dtype=torch.bfloat16)
    captured = capture(model)
    captured.pack_budget_bytes = 1 << 30
    compiled = CompiledForward(*rewrite(captured))
    weights = LiveWeights(model)
    weights.attach(compiled.merges)
    compiled.bind(weights.resolve(compiled.weight_inputs))
    return model, compiled, weights


def cache_of(compiled: CompiledForward, num_blocks: int = 40, block_size: int = 16) -> KVCache:
    cache = KVCache(compiled.spec, num_blocks, block_size, CPU)
    cache.poison(range(1, num_blocks))
    return cache


def batch_of(*sequences: tuple[int, int, int], seed: int = 0, width: int = 8) -> ForwardBatch:
    """(first block, computed tokens, new tokens) of each; all in consecutive blocks of 16."""
    new = [count for _, _, count in sequences]
    positions = [start + i for _, start, count in sequences for i in range(count)]
    slots = [block * 16 + start + i for block, start, count in sequences for i in range(count)]
    ends = torch.tensor(new).cumsum(0)
    return ForwardBatch(
        input_ids=torch.tensor(prompts(sum(new), seed=seed)[0]),
        positions=torch.tensor(positions),
        slot_mapping=torch.tensor(slots),
        query_start_loc=torch.cat([torch.zeros(1, dtype=torch.long), ends]).int(),
        seq_lens=torch.tensor([start + count for _, start, count in sequences]).int(),
        block_table=torch.tensor([list(range(block, block + width)) for block, _, _ in sequences])
        .int()
        .clamp(max=39),
        logits_indices=ends - 1,
    )


STEPS = {
    "prefill": batch_of((1, 0, 37)),
    "two prompts": batch_of((4, 0, 3), (5, 0, 20), seed=1),
    "chunk": batch_of((1, 37, 22), seed=2),
    "mixed": batch_of((4, 3, 1), (5, 20, 1), (7, 0, 30), (1, 59, 5), seed=3),
    "decode": batch_of((4, 4, 1), (5, 21, 1), (7, 30, 1), (1, 64, 1), seed=4),
    "one token": batch_of((4, 5, 1), seed=5),
    "wider table": batch_of((5, 22, 1), (4, 6, 1), seed=6, width=11),
}


def node_by_node(compiled: CompiledForward, batch: ForwardBatch, cache: KVCache) -> torch.Tensor:
    lowered = compiled.lowered
    with_programs = compiled._forward
    compiled._forward = fx.GraphModule(lowered, lowered.graph).forward
    try:
        return compiled(batch, cache)
    finally:
        compiled._forward = with_programs


@pytest.mark.parametrize("inference", [True, False], ids=["inference", "plain"])
@pytest.mark.parametrize("family", PROGRAMS)
def test_logits_are_those_of_the_graph_node_by_node(family, inference):
    _, compiled, _ = forward_of(family)
    compiled._forward.__self__.graph.lint()
    mine, others = cache_of(compiled), cache_of(compiled)
    kept = []
    with torch.inference_mode(inference), torch.no_grad():
        for name, batch in STEPS.items():
            found, expected = compiled(batch, mine), node_by_node(compiled, batch, others)
            assert found.isfinite().all(), name
            assert torch.equal(found, expected), name
            kept.append((name, found, expected))
    for name, found, expected in kept:
        assert torch.equal(found, expected), f"a later step changed the logits of {name}"
    for target, tensor in mine.tensors.items():
        pages = others.tensors[target]
        assert torch.equal(tensor.view(torch.int16), pages.view(torch.int16)), target


@pytest.mark.parametrize("family", PROGRAMS)
def test_how_many_kernels_run_in_programs(family):
    _, compiled, _ = forward_of(family)
    facts = compiled.report.facts
    assert facts["programs"] == PROGRAMS[family]
    kernels = sum(
        getattr(node.target, "recordable", False) for node in compiled.lowered.graph.nodes
    )
    assert sum(facts["programs"]) + sum(facts["not_in_programs"].values()) == kernels


def test_sinks_that_must_be_converted_are_named():
    _, compiled, _ = forward_of("gpt_oss")
    assert compiled.report.facts["not_in_programs"]["paged_attention_cpu: a conversion"] == 2


def test_explain_tells_of_programs():
    model = tiny_model("llama", dtype=torch.bfloat16)
    fastgen.optimize(model)
    explanation = fastgen.explain(model)
    assert "  native        1 program of 17 kernels\n" in str(explanation)
    assert "    from Python 1 x packed_linear_cpu: fewer than 4 kernels" in str(explanation)
    assert explanation.to_dict()["facts"]["programs"] == [17]
    fastgen.restore(model)


def test_weights_and_caches_are_found_where_they_lie_now():
    _, compiled, _ = forward_of("llama")
    batch = STEPS["prefill"]
    first = compiled(batch, cache_of(compiled))
    for _ in range(2):  # another cache
        assert torch.equal(compiled(batch, cache_of(compiled)), first)
    model = tiny_model("llama", seed=1, dtype=torch.bfloat16)
    weights = LiveWeights(model)
    weights.attach(compiled.merges)
    own = compiled._arguments[:]
    try:
        compiled.unbind()
        compiled.bind(weights.resolve(compiled.weight_inputs))
        found = compiled(batch, cache_of(compiled))
        assert not torch.equal(found, first)
        assert torch.equal(found, node_by_node(compiled, batch, cache_of(compiled)))
        with torch.no_grad():  # in place, and packed again into the same memory
            for parameter in model.parameters():
                parameter.neg_()
        compiled.bind(weights.resolve(compiled.weight_inputs))
        again = compiled(batch, cache_of(compiled))
        assert not torch.equal(again, found)
        assert torch.equal(again, node_by_node(compiled, batch, cache_of(compiled)))
    finally:
        compiled._arguments[:] = own
        compiled._forget_addresses()
    assert torch.equal(compiled(batch, cache_of(compiled)), first)


def test_a_weight_whose_memory_moved_is_found_after_bind():
    """The same tensor object over other memory, as `module.to` and `.data =` leave it."""
    _, compiled, _ = forward_of("llama")
    batch, own = STEPS["prefill"], compiled._arguments[:]
    bound = dict(zip(compiled.inputs.values(), own, strict=True))
    moved = {spec: bound[spec].clone() for spec in compiled.weight_inputs if bound[spec].dim() == 1}
    try:
        compiled.bind({**bound, **moved})
        first = compiled(batch, cache_of(compiled))
        for tensor in moved.values():
            tensor.data = tensor * 2
        compiled.bind({**bound, **moved})
        found = compiled(batch, cache_of(compiled))
        assert not torch.equal(found, first)
        assert torch.equal(found, node_by_node(compiled, batch, cache_of(compiled)))
    finally:
        compiled._arguments[:] = own
        compiled._forget_addresses()


def test_a_released_cache_is_let_go():
    _, compiled, _ = forward_of("llama")
    compiled(STEPS["prefill"], cache_of(compiled))
    compiled.release()
    for program in compiled._programs:
        assert program._tensors == ()
        assert program._workspace.numel() == 0


# Graphs by hand: what moves, what stays, what ends a run.


def graph_of(build) -> fx.Graph:
    """A graph over inputs x [6, 32] and weight [32]."""
    graph = fx.Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    x.meta["val"], weight.meta["val"] = torch.zeros(6, 32), torch.zeros(32)

    def call(target, *args, **kwargs):
        node = graph.call_function(target, args, kwargs)
        values = fx.map_arg((args, kwargs), lambda given: given.meta["val"])
        node.meta["val"] = target(*values[0], **values[1])
        return node

    graph.output(build(call, x, weight))
    graph.lint()
    return graph


def compiled_by_hand(build, **limits) -> tuple[list[Program], dict[str, int], list]:
    """Programs of a graph, whose results must be what they were; and the functions it calls."""
    graph = graph_of(build)
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    weight = torch.linspace(1, 2, 32)
    plain = fx.GraphModule({}, graph)
    given = [tensor.clone() for tensor in (x, weight)]
    expected = plain(*given)
    programs, left = compile_programs(graph, **limits)
    graph.lint()
    mine = [x, weight]
    found = fx.GraphModule({}, graph)(*mine)
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))
    assert all(map(torch.equal, mine, given))
    return programs, left, [n.target for n in graph.nodes if n.op == "call_function"]


def norm(call, x, weight=None):
    return call(rms_norm_cpu, x, weight, 1e-6, 0.0, False)


def add_norm(call, x, residual):
    pair = call(add_rms_norm_cpu, x, residual, None, 1e-6, 0.0, False)
    return pair, *(call(operator.getitem, pair, index) for index in (0, 1))


def norms(call, x, count: int):
    for _ in range(count):
        x = norm(call, x)
    return x


def test_short_runs_stay():
    programs, left, _ = compiled_by_hand(lambda call, x, weight: (norms(call, x, 3),))
    assert programs == []
    assert left == {"rms_norm_cpu: fewer than 4 kernels follow each other": 3}


def test_programs_have_as_many_calls_as_they_may():
    programs, left, _ = compiled_by_hand(
        lambda call, x, weight: (norms(call, x, 3), norms(call, x, 2)), fewest=1, most=2
    )
    assert [program.num_calls for program in programs] == [2, 2, 1]
    assert left == {}


def test_what_does_not_depend_on_a_run_comes_before_it():
    def build(call, x, weight):
        other = call(torch.ops.aten.mul.Tensor, x, 3)
        first = norms(call, x, 2)
        scaled = call(torch.ops.aten.mul.Tensor, other, weight)
        return norms(call, call(silu_mul_cpu, first, scaled), 2), scaled

    programs, left, targets = compiled_by_hand(build)
    assert [program.num_calls for program in programs] == [5]
    assert left == {}
    assert targets[:2] == [torch.ops.aten.mul.Tensor] * 2


def test_who_writes_ends_a_run():
    """What the run has read before must not have changed by the time it reads it."""

    def build(call, x, weight):
        before = norm(call, norms(call, x, 3), weight)
        call(torch.ops.aten.mul_.Tensor, weight, 3)
        return (norms(call, norm(call, before, weight), 4),)

    programs, _, targets = compiled_by_hand(build)
    assert [program.num_calls for program in programs] == [4, 5]
    assert targets.index(torch.ops.aten.mul_.Tensor) > 0


def test_who_reads_a_result_ends_a_run():
    def build(call, x, weight):
        first = norms(call, x, 4)
        return norms(call, call(torch.ops.aten.mul.Tensor, first, weight), 4), first

    programs, _, _ = compiled_by_hand(build)
    assert [program.num_calls for program in programs] == [4, 4]


def test_who_reads_what_a_run_was_given_ends_it():
    """A kernel may have written into it, as attention into the cache."""

    @cpu.recordable
    def write(x, target):
        cpu.function("silu_mul_float32", "piipiipiiiiib")(
            x.data_ptr(), 32, 32, x.data_ptr(), 32, 32, target.data_ptr(), 32, 32, 1, 1, 32, 1
        )
        for _ in range(3):
            x = rms_norm_cpu(x, None, 1e-6, 0.0, False)
        return x

    def build(call, x, weight):
        scratch = call(torch.ops.aten.mul.Tensor, weight, 0)
        first = call(write, x, scratch)
        read = call(torch.ops.aten.add.Tensor, scratch, 1)
        return read, norms(call, first, 4)

    programs, _, _ = compiled_by_hand(build)
    assert [program.num_calls for program in programs] == [4, 4]


def test_a_refused_kernel_leaves_nothing_of_it_in_the_run():
    """It was given what is computed after the run's last kernel."""

    def build(call, x, weight):
        first = norms(call, x, 4)
        columns = call(
            torch.ops.aten.clone.default,
            call(torch.ops.aten.t.default, x),
            memory_format=torch.contiguous_format,
        )
        turned = call(torch.ops.aten.t.default, columns)  # a kernel would have to copy it
        product = call(silu_mul_cpu, call(torch.as_strided, first, (6, 32), (32, 1), 0), turned)
        return norms(call, product, 4), first

    programs, left, _ = compiled_by_hand(build)
    assert [program.num_calls for program in programs] == [4, 4]
    assert left == {"silu_mul_cpu: a copy of a strided value": 1}


def test_parts_of_a_tuple_may_be_taken_out_late():
    def build(call, x, weight):
        pair, first, _ = add_norm(call, norms(call, x, 3), x)
        scaled = call(torch.ops.aten.mul.Tensor, first, weight)
        return scaled, call(operator.getitem, pair, 1)

    programs, left, _ = compiled_by_hand(build)
    assert [program.num_calls for program in programs] == [4]
    assert left == {}


def test_arguments_by_name():
    def build(call, x, weight):
        named = call(rms_norm_cpu, x, weight=weight, eps=0.5, weight_offset=1.0, cast_first=False)
        return (norms(call, named, 3),)

    programs, _, _ = compiled_by_hand(build)
    assert [program.num_calls for program in programs] == [4]


def test_results_read_inside_and_outside_and_views_of_them():
    def build(call, x, weight):
        first = norms(call, x, 2)
        half = call(torch.as_strided, first, (6, 16), (32, 1), 16)
        inside = norm(call, call(silu_mul_cpu, half, half))
        return first, half, inside, call(torch.ops.aten.mul.Tensor, half, 2)

    programs, _, _ = compiled_by_hand(build)
    assert [program.num_calls for program in programs] == [4]
