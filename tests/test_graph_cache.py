"""Graphs on disk: a hit computes the same and traces nothing; a damaged file is as good as none."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys

import pytest
import torch
from fastgen.passes import BATCH_INPUTS, CapturedGraph, InputSpec, Report
from tiny_models import NativeTokens, greedy_alone, prompts, tiny_model
from torch import fx

import fastgen
from fastgen import graph_cache
from fastgen.capture import capturing
from fastgen.graph_key import NotCacheableError

SOURCE = "from the graph cache"
CPU = torch.device("cpu")


def source_of(model) -> str:
    return fastgen.api.require(model).graph_source


def no_export(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("torch.export ran")

    monkeypatch.setattr(torch.export, "export", fail)
    monkeypatch.setattr(capturing, "check_packing", fail)
    monkeypatch.setattr(fastgen.graphs, "rewrite", fail)


def optimized_twice(make, monkeypatch):
    """A model that was traced, and another one like it that found the graph on disk."""
    first = fastgen.optimize(make())
    assert source_of(first) == "traced, and cached"
    with monkeypatch.context() as patch:
        no_export(patch)
        second = fastgen.optimize(make())
    assert source_of(second) == SOURCE
    return first, second


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "qwen3_moe"])
def test_a_hit_computes_the_same_and_traces_nothing(family, graphs_on_disk, monkeypatch):
    rows, expected = greedy_alone(tiny_model(family), 5, 30, num_tokens=12)
    first, second = optimized_twice(lambda: tiny_model(family), monkeypatch)
    for row, tokens in zip(rows, expected, strict=True):
        with NativeTokens(second, at_least=12):
            out = second.generate(torch.tensor([row]), max_new_tokens=12, do_sample=False)
        assert out[0, len(row) :].tolist() == tokens
    assert_same_graph(first, second)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "granite", "gpt2", "deepseek_v3"])
def test_other_families_are_cached_too(family, graphs_on_disk, monkeypatch):
    first, second = optimized_twice(lambda: tiny_model(family), monkeypatch)
    assert_same_graph(first, second)


def test_packed_weights_are_cached_too(graphs_on_disk, monkeypatch):
    first, second = optimized_twice(lambda: tiny_model("llama", dtype=torch.bfloat16), monkeypatch)
    assert_same_graph(first, second)


def assert_same_graph(first, second):
    one, other = (fastgen.api.require(model).compiled for model in (first, second))
    assert other.report == one.report  # passes, refusals, kernels chosen anew, facts
    assert other.spec == one.spec
    assert other.inputs == one.inputs
    assert other.merges == one.merges
    assert other.vocab_size == one.vocab_size
    ids = torch.tensor(prompts(9))
    generated = [
        model.generate(ids, max_new_tokens=6, do_sample=False) for model in (first, second)
    ]
    assert torch.equal(*generated)


def test_an_adapter_is_cached(graphs_on_disk, monkeypatch):
    peft = pytest.importorskip("peft")

    def adapted(rank: int = 4):
        torch.manual_seed(3)
        config = peft.LoraConfig(
            r=rank, target_modules=["q_proj", "up_proj"], init_lora_weights=False
        )
        return peft.get_peft_model(tiny_model("llama"), config).eval()

    _, second = optimized_twice(adapted, monkeypatch)
    ids = torch.tensor(prompts(9))
    expected = adapted().generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    with NativeTokens(second):
        out = second.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(out, expected)
    assert source_of(fastgen.optimize(adapted(rank=2))) == "traced, and cached"


FRESH = """
import sys, torch
sys.path.insert(0, "tests")
from tiny_models import prompts, tiny_model
import fastgen, fastgen.api
model = fastgen.optimize(tiny_model("gemma2"))
out = model.generate(torch.tensor(prompts(9)), max_new_tokens=6, do_sample=False)
print(fastgen.api.require(model).graph_source, out.tolist(), sep="|")
"""


def test_a_fresh_process_finds_the_graph(graphs_on_disk):
    said = []
    for seed in ("1", "2"):  # of the hashes that order sets
        child = subprocess.run(
            [sys.executable, "-c", FRESH],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
            cwd=os.path.dirname(os.path.dirname(__file__)),
        )
        said.append(child.stdout.strip().split("|"))
    assert [source for source, _ in said] == ["traced, and cached", SOURCE]
    assert said[0][1] == said[1][1]


def sealed(key: str, data: dict) -> bytes:
    """A file that looks right from the outside."""
    text = json.dumps(data).encode()
    return hashlib.sha256(key.encode() + text).hexdigest().encode() + b"\n" + text


def edited(change):
    def damage(content: bytes, key: str) -> bytes:
        data = json.loads(content.partition(b"\n")[2])
        change(data)
        return sealed(key, data)

    return damage


def first_call(data: dict) -> dict:
    return next(row for row in data["nodes"] if row["op"] == "call_function")


DAMAGE = {
    "empty": lambda content, key: b"",
    "truncated": lambda content, key: content[: len(content) // 2],
    "no-json": lambda content, key: sealed(key, {})[:64] + b"\nnothing",
    "one-byte": lambda content, key: content.replace(b"2.5", b"3.5", 1),
    "not-utf8": lambda content, key: b"\xff\xfe" + content,
    "other-key": lambda content, key: sealed("another", json.loads(content.partition(b"\n")[2])),
    "other-format": edited(lambda data: data.update(format=0)),
    "unknown-op": edited(lambda data: first_call(data).update(target="aten::no_such_op.default")),
    "python-function": edited(lambda data: first_call(data).update(target="os.system")),
    "method-of-an-op": edited(lambda data: first_call(data).update(target="aten::add.overloads")),
    "code-in-a-name": edited(lambda data: data["nodes"][0].update(name="x=print(1)")),
    "code-in-an-argument": edited(
        lambda data: first_call(data).update(kwargs=["dict", {"a=print(1)": 1}])
    ),
    "missing-node": edited(lambda data: data["nodes"].pop(3)),
    "missing-input": edited(lambda data: data["inputs"].pop()),
    "other-kind-of-node": edited(lambda data: first_call(data).update(op="call_method")),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_removed_and_raises_nothing(damage, graphs_on_disk, caplog):
    graph, report = small_graph(), Report(facts={"num_layers": 1})
    graph_cache.store("k", graph, report)
    (path,) = graph_cache.entries()
    assert graph_cache.load("k", CPU) is not None
    path.write_bytes(damage(path.read_bytes(), "k"))
    assert graph_cache.load("k", CPU) is None
    assert not path.exists()
    assert "cannot be used" in caplog.text


def test_a_damaged_file_is_traced_again(graphs_on_disk):
    fastgen.optimize(tiny_model("llama"))
    (path,) = graphs_on_disk.iterdir()
    path.write_bytes(path.read_bytes()[:-20])
    assert source_of(fastgen.optimize(tiny_model("llama"))) == "traced, and cached"
    assert source_of(fastgen.optimize(tiny_model("llama"))) == SOURCE


def small_graph(extra=None, constant: torch.Tensor | None = None) -> CapturedGraph:
    """tokens -> float(tokens) * 2 [+ constant]; `extra` adds a node to the graph."""
    constant = torch.ones(1) if constant is None else constant
    mode = torch._subclasses.FakeTensorMode(shape_env=fx.experimental.symbolic_shapes.ShapeEnv())
    graph = fx.Graph()
    inputs = {}
    for name in BATCH_INPUTS:
        node = graph.placeholder(name)
        node.meta["val"] = mode.from_tensor(torch.zeros(8, dtype=torch.int64), static_shapes=False)
        inputs[node.name] = InputSpec("batch", name)
    tokens = next(iter(graph.nodes))
    held = graph.placeholder("held")
    held.meta["val"] = mode.from_tensor(constant)
    inputs[held.name] = InputSpec("constant", "held")
    aten = torch.ops.aten
    result = graph.call_function(aten.mul.Tensor, (tokens, 2.5))
    result = graph.call_function(aten.add.Tensor, (result, held))
    if extra is not None:
        result = extra(graph, result)
    with mode:
        result.meta["val"] = torch.empty(8)
    graph.output(result)
    return CapturedGraph(
        fx.GraphModule({}, graph), inputs, 1, {"held": constant}, keeps_sequences_apart=True
    )


@pytest.mark.parametrize(
    "constant",
    [
        torch.tensor([1.5, float("nan"), float("-inf")]),
        torch.tensor(3, dtype=torch.int64),
        torch.ones(2, 3, dtype=torch.bfloat16).T,
        torch.zeros(0, dtype=torch.bool),
    ],
    ids=["nan", "scalar", "transposed", "empty"],
)
def test_constants_come_back_bit_equal(constant, graphs_on_disk):
    graph_cache.store("k", small_graph(constant=constant), Report())
    found, _ = graph_cache.load("k", CPU)
    back = found.constants["held"]
    assert back.dtype == constant.dtype
    assert torch.equal(back.nan_to_num(7.0), constant.nan_to_num(7.0))


@pytest.mark.parametrize("number", [float("inf"), float("-inf"), 0.1, -0.0, 2**63 - 1, 1e-45])
def test_numbers_come_back_as_they_were(number, graphs_on_disk):
    def scaled(graph, result):
        return graph.call_function(torch.ops.aten.mul.Tensor, (result, number))

    graph_cache.store("k", small_graph(scaled), Report())
    found, _ = graph_cache.load("k", CPU)
    back = next(node for node in reversed(found.graph.nodes) if node.op == "call_function").args[1]
    assert repr(back) == repr(number)


def test_every_kind_of_argument_comes_back(graphs_on_disk):
    given = {"dtype": torch.float16, "device": CPU, "layout": torch.strided, "pin_memory": False}

    def empty(graph, result):
        graph.call_function(torch.ops.aten.zeros.default, ([2, 3],), given)
        return graph.call_function(torch.ops.aten.add.Tensor, (result, result), {"alpha": 2})

    graph_cache.store("k", small_graph(empty), Report())
    found, _ = graph_cache.load("k", CPU)
    zeros = next(n for n in found.graph.nodes if n.target is torch.ops.aten.zeros.default)
    assert zeros.kwargs == given
    assert zeros.args == ([2, 3],)


def calls_python(graph, result):
    return graph.call_function(torch.nn.functional.relu, (result,))


def takes_an_object(graph, result):
    node = graph.call_function(torch.ops.aten.relu.default, (result,))
    node.kwargs = {"generator": torch.float}
    node.args = (result, range(3))
    return node


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        (lambda: small_graph(calls_python), "is no op"),
        (lambda: small_graph(takes_an_object), "is a range"),
        (lambda: small_graph(constant=torch.zeros(1 << 20)), "takes 4194304 bytes"),
    ],
    ids=["python-function", "object", "large-constant"],
)
def test_what_cannot_be_written_is_refused_by_name(graph, reason, graphs_on_disk):
    with pytest.raises(NotCacheableError, match=reason):
        graph_cache.store("k", graph(), Report())
    assert list(graphs_on_disk.parent.rglob("*.json")) == []


def test_a_graph_that_was_not_proven_is_not_kept(graphs_on_disk):
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))  # the check of the graph says nothing
    fastgen.optimize(model)
    assert "says nothing" in str(fastgen.explain(model))
    assert graph_cache.entries() == []


def test_the_graphs_used_longest_ago_go_first(graphs_on_disk, monkeypatch):
    graph_cache.store("a", small_graph(), Report())
    (path,) = graph_cache.entries()
    monkeypatch.setattr(graph_cache, "MAX_BYTES", int(2.5 * path.stat().st_size))
    graph_cache.store("b", small_graph(), Report())
    for age, name in enumerate(("b", "a")):
        os.utime(graphs_on_disk / f"{name}.json", (age, age))
    assert graph_cache.load("b", CPU) is not None  # used just now
    graph_cache.store("c", small_graph(), Report())
    assert {path.stem for path in graph_cache.entries()} == {"b", "c"}


def test_a_folder_that_cannot_be_used_is_said(graphs_on_disk):
    graphs_on_disk.parent.chmod(0o777)
    model = fastgen.optimize(tiny_model("llama"))
    assert "writable by no other" in str(fastgen.explain(model))
    assert not graphs_on_disk.exists()


def test_it_can_be_switched_off(graphs_on_disk):
    model = fastgen.optimize(tiny_model("llama"), graph_cache=False)
    assert source_of(model) == "traced; graph_cache is off"
    assert not graphs_on_disk.exists()


def test_explain_tells_where_the_time_of_the_start_went(graphs_on_disk, monkeypatch):
    traced, found = optimized_twice(lambda: tiny_model("llama"), monkeypatch)
    found.generate(torch.tensor(prompts(5)), max_new_tokens=2, do_sample=False)
    start = json.loads(fastgen.explain(traced).to_json())["start_seconds"]
    assert {"capture", "packing check", "passes", "weights merged", "weights packed"} < set(start)
    start = json.loads(fastgen.explain(found).to_json())["start_seconds"]
    assert {"graph from cache", "choice of kernels", "first step", "total"} < set(start)
    assert not {"capture", "passes", "packing check"} & set(start)
    assert start["total"] == pytest.approx(sum(start.values()) / 2)
    assert "graph from cache" in str(fastgen.explain(found))
