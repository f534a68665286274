"""FLOPs and bytes of ops, next to counts by hand."""

import pytest
from fastgen.passes import run_passes
from tiny_models import tiny_model

from fastgen.capture import capture
from fastgen.compiled import compile_graph
from fastgen.costs import Cost, Sizes, Step, node_cost, num_keys, num_seen, op_name


@pytest.mark.parametrize("chunk", [0, 1, 8, 40, 100])
@pytest.mark.parametrize("window", [0, 1, 5, 12, 100])
@pytest.mark.parametrize(("new", "length"), [(1, 1), (1, 40), (7, 7), (7, 40), (40, 40), (12, 13)])
def test_pairs_and_keys_are_those_of_a_mask(new, length, window, chunk):
    seen = [
        [
            key
            for key in range(query + 1)
            if (not window or query - key < window)
            and (not chunk or key // chunk == query // chunk)
        ]
        for query in range(length - new, length)
    ]
    assert num_seen(new, length, window, chunk) == sum(map(len, seen))
    assert num_keys(new, length, window, chunk) == len({key for keys in seen for key in keys})


def costs_of(model, step: Step) -> dict[str, Cost]:
    graph, _ = run_passes(capture(model))
    sizes, costs = Sizes(graph.placeholders(), list(graph.inputs.values()), step), {}
    for node in graph.graph.nodes:
        if node.op == "call_function":
            op = op_name(node, {})
            costs[op] = costs.get(op, Cost()) + node_cost(op, node, sizes)
    return costs


def test_a_dense_model_costs_its_weights_and_its_keys():
    # hidden 64, 4 heads of 16 over 2 KV heads, intermediate 96, vocab 128, 2 layers, fp32
    model = tiny_model("llama")
    costs = costs_of(model, Step(num_tokens=6, num_rows=2, sequences=((1, 9), (5, 7))))
    body = 2 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 96)
    linear, attention = costs["aten::linear"], costs["fastgen::paged_attention"]
    assert linear.flops == 2 * (6 * body + 2 * 64 * 128)
    assert linear.streamed_bytes == 4 * (body + 64 * 128)
    # in and out: q, k, v (merged) 64 + 128; o 64 + 64; gate and up 64 + 192; down 96 + 64; head
    rows = 2 * 6 * (192 + 128 + 256 + 160) + 2 * (64 + 128)
    assert linear.activation_bytes == 4 * rows
    assert attention.flops == 2 * 2 * (9 + 3 + 4 + 5 + 6 + 7) * 4 * 32
    assert attention.streamed_bytes == 2 * (9 + 7) * 2 * 32 * 4
    assert attention.activation_bytes == 2 * 6 * 4 * (2 * 64 + 2 * 64)
    assert not any(cost.flops or cost.bytes for op, cost in costs.items() if op not in (
        "aten::linear", "fastgen::paged_attention"
    ))  # fmt: skip


@pytest.mark.parametrize(("num_tokens", "touched"), [(1, 2), (3, 4)])
def test_of_experts_no_more_are_read_than_tokens_can_reach(num_tokens, touched):
    step = Step(num_tokens, 1, ((num_tokens, num_tokens),))
    # In fp32, for which torch has no grouped product under export.
    grouped = costs_of(tiny_model("mixtral"), step)["fastgen::grouped_mm"]
    expert = 3 * 64 * 96  # 2 layers, 2 of 4 experts per token
    assert grouped.flops == 2 * 2 * num_tokens * 2 * expert
    assert grouped.streamed_bytes == 2 * touched * expert * 4


def test_logits_that_nobody_wants_cost_nothing():
    model = tiny_model("llama")
    none, one = (costs_of(model, Step(4, rows, ((4, 4),)))["aten::linear"] for rows in (0, 1))
    assert one.streamed_bytes - none.streamed_bytes == 4 * 64 * 128
    assert one.flops - none.flops == 2 * 64 * 128


def test_lowered_nodes_keep_their_sizes():
    """What the profile looks at is the graph after kernels were chosen."""
    compiled = compile_graph(capture(tiny_model("llama")))
    module = compiled._forward.__self__
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    sizes = Sizes(placeholders, list(compiled.inputs.values()), Step(6, 2, ((6, 6),)))
    output = next(node for node in module.graph.nodes if node.op == "output")
    assert sizes.shape(output.args[0]) == (2, 128)


def test_latents_cost_the_cheaper_way_and_their_weight():
    # 2 layers of 4 heads of 8 + 8 and 12, a latent of 16, fp32. The first sequence is absorbed: it
    # has 9 pairs; the second, of 40 new tokens, is expanded: it has 820.
    step = Step(num_tokens=41, num_rows=2, sequences=((1, 9), (40, 40)))
    cost = costs_of(tiny_model("deepseek_v3"), step)["fastgen::paged_latent_attention"]
    weight = 4 * (8 + 12) * 16
    absorbed, expanded = weight + 9 * 4 * (2 * 16 + 8), 40 * weight + 820 * 4 * (16 + 12)
    assert cost.flops == 2 * 2 * (absorbed + expanded)
    assert cost.streamed_bytes == 2 * 4 * (weight + (9 + 40) * (16 + 8))
    rows = 4 * 16 + 4 * 12 + 2 * (16 + 8)  # queries, results, latents in and stored
    assert cost.activation_bytes == 2 * 4 * 41 * rows
