"""torch.compile(backend="fastgen"): anybody's code computes what it computed, rewritten or not."""

from __future__ import annotations

import gc
import logging
import tomllib
from collections import Counter
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fastgen.passes import PassReport, run_passes
from fastgen.passes.pipeline import Pass
from tiny_models import VOCAB, left_padded, prompts, tiny_model
from torch import nn

import fastgen
from fastgen import backend
from fastgen.backend import BACKEND_PASSES, fastgen_backend, reports
from fastgen.capture import PackedForward, capture

EPS = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()
    backend._warn_once.cache_clear()
    _older[:] = reports()  # Dynamo holds on to what came after a graph break
    yield
    torch._dynamo.reset()


_older: list[backend.GraphReport] = []


def new_reports() -> list[backend.GraphReport]:
    """The reports of the test that runs."""
    return [report for report in reports() if all(report is not older for older in _older)]


def moe():
    """Without windows, which the backend leaves to torch's own attention."""
    return tiny_model("qwen2_moe", use_sliding_window=False, layer_types=["full_attention"] * 2)


MODELS = {name: lambda name=name: tiny_model(name) for name in ("llama", "qwen2", "gpt2")}
MODELS["moe"] = moe
EACH_MODEL = pytest.mark.parametrize("name", sorted(MODELS))


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(2, VOCAB, shape, generator=torch.Generator().manual_seed(0))


def in_fp64(model):
    if hasattr(model.config, "num_experts"):
        model.set_experts_implementation("eager")  # the grouped one has no fp64
    return model.double()


def assert_as_close_as_eager(output, plain, exact):
    """Twice eager's distance from fp64, and one rounding of the largest logit."""
    bound = 2 * ((plain - exact).abs().max() + EPS * exact.abs().max())
    assert (output - exact).abs().max() <= bound


def matches(report, name: str = "replace_sdpa") -> int:
    return sum(item.matches for item in report.report.passes if item.name == name)


def attend(x: torch.Tensor, **kwargs) -> torch.Tensor:
    """Causal attention of [tokens, 64] to itself, in 4 heads: something to rewrite."""
    heads = x.view(1, -1, 4, 16).transpose(1, 2)
    return F.scaled_dot_product_attention(heads, heads, heads, **({"is_causal": True} | kwargs))


# How it is found.


def test_the_name_finds_it():
    assert "fastgen" in torch._dynamo.list_backends()
    assert torch._dynamo.lookup_backend("fastgen") is fastgen_backend


def test_the_entry_point_is_declared():
    root = Path(__file__).parent.parent
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    declared = project["entry-points"]["torch_dynamo_backends"]
    (installed,) = entry_points(group="torch_dynamo_backends", name="fastgen")
    assert declared == {"fastgen": installed.value}
    assert installed.load() is fastgen_backend


# Models.


@EACH_MODEL
@pytest.mark.parametrize("use_cache", [False, True])
def test_logits_are_those_of_the_model(name, use_cache):
    model = MODELS[name]()
    compiled = torch.compile(model, backend="fastgen", fullgraph=True)
    ids = tokens(1, 13)
    with torch.no_grad():
        plain = model(ids, use_cache=use_cache).logits
        got = compiled(ids, use_cache=use_cache).logits
        exact = in_fp64(model)(ids, use_cache=use_cache).logits
    assert_as_close_as_eager(got, plain, exact)
    (report,) = new_reports()
    assert report.unrewritten is None
    assert matches(report) == 2
    assert report.report.kernels["fastgen::attention"]["sdpa"]["calls"] == 2


@EACH_MODEL
def test_logits_of_a_padded_batch_are_those_of_the_model(name):
    """Nothing is certain about the mask: attention stays what it was."""
    model = MODELS[name]()
    ids, mask = left_padded(prompts(5, 9, 7))
    with torch.no_grad():
        plain = model(ids, attention_mask=mask).logits
        got = torch.compile(model, backend="fastgen")(ids, attention_mask=mask).logits
        exact = in_fp64(model)(ids, attention_mask=mask).logits
    seen = mask.bool()  # what a padded position computes is nobody's
    bound = 2 * ((plain - exact)[seen].abs().max() + EPS * exact[seen].abs().max())
    assert (got - exact)[seen].abs().max() <= bound
    assert sum(map(matches, new_reports())) == 0
    assert "a batch of 3 sequences" in str(new_reports()[0])


@EACH_MODEL
def test_gradients_are_those_of_the_model(name):
    model = MODELS[name]().train()
    compiled = torch.compile(model, backend="fastgen")
    ids = tokens(2, 9)
    gradients = []
    for call in (model, compiled):
        torch.manual_seed(0)  # gpt2 drops
        model.zero_grad()
        loss = call(ids, labels=ids).loss
        loss.backward()
        gradients.append([loss, *(parameter.grad for parameter in model.parameters())])
    for plain, got in zip(*gradients, strict=True):
        assert torch.equal(plain, got)
    assert all("requires gradients" in report.unrewritten for report in new_reports())


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_generate_with_a_compiled_forward(name, cache):
    model = MODELS[name]()
    ids, mask = left_padded(prompts(5, 9))
    calls = [{"inputs": ids[1:]}, {"inputs": ids, "attention_mask": mask}]
    fixed = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": cache}
    plain = [model.generate(**call, **fixed) for call in calls]
    model.forward = torch.compile(model.forward, backend="fastgen")
    for call, expected in zip(calls, plain, strict=True):
        assert torch.equal(model.generate(**call, **fixed), expected)
    assert sum(map(matches, new_reports())) == 2  # the prompt that is alone


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_an_optimised_model(name):
    """Its merged weights are seen through the parameters."""
    model = tiny_model(name)
    ids = tokens(1, 11)
    with torch.no_grad():
        plain, exact = model(ids).logits, in_fp64(tiny_model(name))(ids).logits
        fastgen.optimize(model)
        compiled = torch.compile(model, backend="fastgen")
        assert_as_close_as_eager(compiled(ids).logits, plain, exact)
        model.lm_head.weight.mul_(2)
        assert_as_close_as_eager(compiled(ids).logits, 2 * plain, 2 * exact)
    assert matches(new_reports()[0]) == 2
    fastgen.restore(model)


# One dialect.


def takes_everything(node) -> bool:
    everything = (0, torch.iinfo(torch.int64).max)
    return node.target is torch.ops.aten.slice.Tensor and node.args[2:] == everything


@pytest.mark.parametrize("name", ["llama", "qwen2", "moe"])
def test_both_ways_in_give_the_same_ops(name):
    """capture's torch.export and Dynamo agree in every op once attention is found."""
    model = MODELS[name]()
    dynamo = []

    def look(graph_module, example_inputs):
        captured = backend._retrace(graph_module)
        dynamo.append(run_passes(captured, passes=BACKEND_PASSES[:2])[0])
        return graph_module.forward

    packed = torch.arange(8), torch.arange(8), torch.tensor([1, 4, 6])
    with torch.no_grad():
        torch.compile(PackedForward(model), backend=look, fullgraph=True)(*packed)
    exported = run_passes(capture(model), passes=BACKEND_PASSES[:2])[0]
    # Where the number of tokens varies, sizes are computed, and a slice of all of them is kept.
    exported, traced = (
        Counter(
            str(node.target)
            for node in graph.graph.nodes
            if node.op == "call_function"
            and isinstance(node.meta["val"], torch.Tensor)
            and not takes_everything(node)
        )
        for graph in (exported, dynamo[0])
    )
    assert exported == traced
    assert traced["fastgen.attention.default"] == 2


# Code of all kinds.


class WithBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return attend(self.linear(x)), self.calls * 1.0, self.linear.weight


def cnn():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5)
    )


def many_outputs(x):
    return x, None, 3, attend(x), x, x[1:], "text", {"key": [attend(x)]}


def copy_of_an_input(x):
    return attend(x), x * 1.0


def written_input(x):
    x.add_(1)
    return attend(x)


def written_between(x):
    before = attend(x)
    x.mul_(2)
    return before + attend(x)


def written_slice(x):
    x[:2] = 1.0
    return attend(x)


def written_cache(x):
    cache = torch.zeros(9, 64)
    cache[:6] = x
    return attend(cache[:6]), cache


def constants(x):
    return torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]).add_(x[0, 0]), attend(x)


def random_numbers(x):
    return F.dropout(x, 0.5), attend(x), torch.rand(3)


def unused_random_numbers(x):
    torch.rand(3)
    return attend(x)


def graph_break(x):
    first = attend(x)
    torch._dynamo.graph_break()
    return attend(first.transpose(1, 2).reshape(-1, 64))


def number_of_the_data(x):
    return attend(x) * x.sum().item()


def rows_of_the_data(x):
    return attend(x[x[:, 0] > x[:, 1]])


def without_gradients_inside(x):
    with torch.no_grad():
        first = attend(x)
    return first, attend(2 * x)


def with_gradients_inside(x):
    with torch.enable_grad():
        weight = torch.ones(64, requires_grad=True)
        return attend(x * weight)


def autocast_inside(x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return attend(x @ x.T @ x)


def inference_inside(x):
    with torch.inference_mode():
        return attend(x).clone()


def vmapped(x):
    return torch.vmap(torch.sin)(x), attend(x)


def without_tensors():
    return torch.ones(3) + 1


# name -> what is compiled, its inputs, attentions rewritten without gradients
X = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
CODE = {
    "attention": (lambda: attend, (X,), 1),
    "bf16": (lambda: attend, (X.bfloat16(),), 1),
    "fp64": (lambda: attend, (X.double(),), 0),
    "buffer": (WithBuffer, (X,), 1),
    "sequential": (lambda: nn.Sequential(nn.Linear(64, 8), nn.ReLU()), (X,), 0),
    "cnn, training": (cnn, (torch.ones(2, 1, 5, 5),), 0),
    "cnn, evaluation": (lambda: cnn().eval(), (torch.ones(2, 1, 5, 5),), 0),
    "many outputs": (lambda: many_outputs, (X,), 2),
    "copy of an input": (lambda: copy_of_an_input, (X,), 0),
    "written input": (lambda: written_input, (X,), 1),
    "written between": (lambda: written_between, (X,), 0),
    "written slice": (lambda: written_slice, (X,), 1),
    "written cache": (lambda: written_cache, (X,), 1),
    "constants": (lambda: constants, (X,), 1),
    "random numbers": (lambda: random_numbers, (X,), 1),
    "unused random numbers": (lambda: unused_random_numbers, (X,), 0),
    "graph break": (lambda: graph_break, (X,), 2),
    "number of the data": (lambda: number_of_the_data, (X,), 1),
    "rows of the data": (lambda: rows_of_the_data, (X,), 1),
    "without gradients inside": (lambda: without_gradients_inside, (X,), 2),
    "with gradients inside": (lambda: with_gradients_inside, (X,), 0),
    "autocast inside": (lambda: autocast_inside, (X,), 0),
    "inference inside": (lambda: inference_inside, (X,), 0),
    "vmap": (lambda: vmapped, (X,), 0),
    "no tensors": (lambda: without_tensors, (), 0),
}


def results(function, inputs):
    """Everything that a call leaves behind: outputs, inputs, random numbers."""
    inputs = tuple(x.clone() for x in inputs)
    torch.manual_seed(0)
    outputs = function(*inputs)
    leaves, structure = torch.utils._pytree.tree_flatten(outputs)
    aliases = [next((i for i, x in enumerate(inputs) if x is leaf), None) for leaf in leaves]
    return leaves, inputs, structure, aliases, torch.get_rng_state()


def assert_same(plain, compiled):
    (leaves, inputs, structure, aliases, state), (got, got_inputs, *got_rest) = plain, compiled
    assert [structure, aliases] == got_rest[:2]
    assert torch.equal(state, got_rest[2])
    for a, b in zip([*leaves, *inputs], [*got, *got_inputs], strict=True):
        assert type(a) is type(b)
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(a, b, check_stride=True)
            assert a.requires_grad == b.requires_grad
            assert a.is_inference() == b.is_inference()
        else:
            assert a == b


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("gradients", ["enabled", "no_grad", "inference_mode"])
@pytest.mark.parametrize("name", sorted(CODE))
def test_code_of_all_kinds(name, gradients):
    make, inputs, attentions = CODE[name]
    if (name, gradients) == ("inference inside", "inference_mode"):
        pytest.skip("the same as without")
    torch.manual_seed(0)
    plain = make()
    torch.manual_seed(0)
    compiled = torch.compile(make(), backend="fastgen")
    context = {
        "enabled": torch.enable_grad,
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
    }[gradients]
    with context():
        for _ in range(2):
            assert_same(results(plain, inputs), results(compiled, inputs))
    if gradients == "no_grad":
        assert (
            sum(matches(item) for item in new_reports() if item.unrewritten is None) == attentions
        )


def test_under_autocast_nothing_is_rewritten():
    compiled = torch.compile(lambda x: attend(x @ x.T @ x), backend="fastgen")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(compiled(X), attend(X @ X.T @ X))
    assert new_reports()[0].unrewritten == "autocast is on"


def test_parameters_may_be_frozen_and_thawed():
    module = WithBuffer()
    compiled = torch.compile(module, backend="fastgen")
    for frozen in (False, True, False):
        module.requires_grad_(not frozen)
        out = compiled(X)[0]
        torch.testing.assert_close(out, module(X)[0])
        assert out.requires_grad == (not frozen)
    assert [item.unrewritten is None for item in new_reports()] == [False, True]


def test_an_input_that_is_returned_is_the_input():
    x = X.clone()
    with torch.no_grad():
        out = torch.compile(lambda x: (x, attend(x)), backend="fastgen")(x)[0]
    assert out is x


# Sizes and numbers that vary.


@pytest.mark.parametrize("dynamic", [None, True])
def test_varying_lengths_end_in_one_graph(dynamic):
    model, exact = tiny_model("llama"), in_fp64(tiny_model("llama"))
    compiled = torch.compile(model, backend="fastgen", dynamic=dynamic)
    with torch.no_grad():
        for length in (5, 6, 7, 12, 33, 8):
            ids = tokens(1, length)
            assert_as_close_as_eager(compiled(ids).logits, model(ids).logits, exact(ids).logits)
    assert len(new_reports()) <= 2
    assert all(matches(report) == 2 for report in new_reports())


def test_a_size_that_is_marked_dynamic_is_compiled_once():
    compiled = torch.compile(attend, backend="fastgen")
    with torch.no_grad():
        for length in (5, 6, 7, 12):
            x = torch.randn(length, 64)
            torch._dynamo.mark_dynamic(x, 0)
            torch.testing.assert_close(compiled(x), attend(x))
    (report,) = new_reports()
    assert matches(report) == 1


def test_sizes_of_one_and_of_none():
    compiled = torch.compile(attend, backend="fastgen")
    with torch.no_grad():
        for length in (6, 1, 0, 7):
            x = torch.randn(length, 64)
            torch.testing.assert_close(compiled(x), attend(x))


def test_a_number_that_varies_is_compiled_twice():
    compiled = torch.compile(lambda x, number: attend(x) * number, backend="fastgen")
    with torch.no_grad():
        for number in (1.0, 2.0, 3.5, 4.5, 5.5):
            torch.testing.assert_close(compiled(X, number), attend(X) * number)
    assert len(new_reports()) <= 2
    assert all(matches(report) == 1 for report in new_reports())


def test_a_number_that_was_taken_for_fixed_is_guarded():
    """The scale of attention must be a number; where it varies, it is compiled anew or refused."""
    compiled = torch.compile(lambda x, s: attend(x, scale=s), backend="fastgen", dynamic=True)
    with torch.no_grad():
        for scale in (0.5, 0.25, 0.125, 0.5):
            torch.testing.assert_close(compiled(X, scale), attend(X, scale=scale))


# What is said.


def broken(captured) -> PassReport:
    raise RuntimeError("planted")


def test_a_rewrite_that_fails_leaves_the_graph_and_warns_once(monkeypatch, caplog):
    monkeypatch.setattr(backend, "BACKEND_PASSES", (Pass(broken, required=True),))
    compiled = torch.compile(attend, backend="fastgen")
    with torch.no_grad(), caplog.at_level(logging.WARNING, "fastgen"):
        assert torch.equal(compiled(X), attend(X))
        assert torch.equal(compiled(X[:5]), attend(X[:5]))
    assert len(new_reports()) == 2
    assert "planted" in new_reports()[0].unrewritten
    assert len(caplog.records) == 1
    assert "planted" in caplog.text


def test_one_line_per_graph(caplog):
    with torch.no_grad(), caplog.at_level(logging.INFO, "fastgen"):
        torch.compile(lambda x: (attend(x), attend(x, is_causal=False)), backend="fastgen")(X)
    (record,) = caplog.records
    assert record.levelname == "INFO"
    line = record.getMessage()
    assert line == str(new_reports()[0])
    for part in (
        "graph 0/0 rewritten",
        "replace_sdpa 1;",
        "fastgen::attention x 1: sdpa",
        "replace_sdpa refused 1: neither a mask nor is_causal",
    ):
        assert part in line


def test_reports_go_with_their_graphs():
    with torch.no_grad():
        torch.compile(attend, backend="fastgen")(X)
    assert len(new_reports()) == 1
    torch._dynamo.reset()
    gc.collect()
    assert new_reports() == []


def test_passes_are_switched_off_by_name():
    options = {"passes_off": ["replace_sdpa"]}
    with torch.no_grad():
        torch.compile(attend, backend="fastgen", options=options)(X)
    assert [
        item.status for item in new_reports()[0].report.passes if item.name == "replace_sdpa"
    ] == ["off"]
    assert new_reports()[0].unrewritten


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"options": {"pack": True}}, "options may hold passes_off; got 'pack'"),
        ({"options": {"passes_off": ["merge_linears"]}}, "passes_off may name replace_sdpa"),
        ({"options": {"passes_off": ["canonicalize"]}}, "passes_off may name replace_sdpa"),
        ({"mode": "max-autotune"}, "no modes; got mode='max-autotune'"),
    ],
)
def test_unknown_settings_raise(settings, message):
    compiled = torch.compile(attend, backend="fastgen", **settings)
    with pytest.raises(Exception, match=message):
        compiled(X)


def test_called_by_hand():
    graph = torch.fx.symbolic_trace(lambda x: x + 1)
    assert torch.equal(fastgen_backend(graph, [X])(X), X + 1)
