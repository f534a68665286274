"""A transformers model becomes one graph that computes its logits, or is refused by name."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from capture_helpers import (
    assert_untouched,
    attentions,
    pass_to_attention,
    photograph,
    windowed_qwen2,
)
from conftest import PAIR
from fastgen.passes import BATCH_INPUTS, run_passes
from tiny_models import has_clear_margin, prompts, tiny_model

import fastgen
from fastgen.capture import capture
from fastgen.compiled import compile_graph
from fastgen.engine.batch import ForwardBatch
from fastgen.engine.kv_cache import KVCache
from fastgen.live import LiveWeights

BLOCK_SIZE = 16


class Forward:
    """A captured model run by hand: one sequence in blocks 1, 2, ... of a cache full of NaN."""

    def __init__(self, model, passes_off=()) -> None:
        self.compiled = compile_graph(capture(model), passes_off)
        self.weights = LiveWeights(model)
        self.weights.attach(self.compiled.merges)
        self.compiled.bind(self.weights.resolve(self.compiled.weight_inputs))
        self.clear()

    def clear(self) -> None:
        self.cache = KVCache(self.compiled.spec, 20, BLOCK_SIZE, torch.device("cpu"))
        self.cache.poison(range(1, 20))

    def run(self, token_ids: list[int], start: int = 0, rows: list[int] | None = None):
        """Compute token_ids at positions start, start + 1, ...; logits of `rows` of them."""
        num_tokens = len(token_ids)
        positions = torch.arange(start, start + num_tokens)
        if rows is None:
            rows = list(range(num_tokens))
        batch = ForwardBatch(
            input_ids=torch.tensor(token_ids),
            positions=positions,
            slot_mapping=BLOCK_SIZE + positions,
            query_start_loc=torch.tensor([0, num_tokens], dtype=torch.int32),
            seq_lens=torch.tensor([start + num_tokens], dtype=torch.int32),
            block_table=torch.arange(1, 20, dtype=torch.int32)[None],
            logits_indices=torch.tensor(rows, dtype=torch.int64),
        )
        with torch.inference_mode():
            return self.compiled(batch, self.cache)


def assert_logits(ours, model, token_ids, rows=slice(None)):
    """Error against the model in fp64 <= 2 x (error of transformers in fp32 + eps x max)."""
    ids = torch.tensor([token_ids])
    with torch.no_grad():
        plain = model(ids).logits[0, rows]
        exact = copy.deepcopy(model).double()(ids).logits[0, rows]
    assert ours.shape == plain.shape
    assert ours.dtype == plain.dtype
    eps = torch.finfo(torch.float32).eps
    allowed = 2 * ((plain - exact).abs().max() + eps * exact.abs().max())
    error = (ours - exact).abs().max()
    assert error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}"


@pytest.fixture(scope="module", params=PAIR)
def pair(request):
    """A plain model and the captured forward of an equal one."""
    return tiny_model(request.param), Forward(tiny_model(request.param))


@pytest.fixture(scope="module", params=PAIR)
def captured_model(request):
    """A model and its graph, for tests that only look."""
    model = tiny_model(request.param)
    return model, capture(model)


# The graph.


def test_one_attention_per_layer_with_the_models_numbers(captured_model):
    _, captured = captured_model
    assert captured.num_layers == 2
    assert [node.args[8] for node in attentions(captured)] == [0, 1]
    for node in attentions(captured):
        query, key, value, mask, scale, window, softcap, sinks, _ = node.args
        shapes = [tuple(arg.meta["val"].shape[1:]) for arg in (query, key, value)]
        assert shapes == [(4, 16), (2, 16), (2, 16)]
        assert (mask, scale, window, softcap, sinks) == (None, 0.25, 0, 0.0, None)


def test_every_input_is_named(captured_model):
    model, captured = captured_model
    assert list(captured.inputs) == [node.name for node in captured.placeholders()]
    by_kind: dict[str, list[str]] = {}
    for spec in captured.inputs.values():
        by_kind.setdefault(spec.kind, []).append(spec.target)
    assert tuple(by_kind.pop("batch")) == BATCH_INPUTS
    assert set(by_kind.pop("parameter")) == {name for name, _ in model.named_parameters()}
    assert set(by_kind.pop("buffer")) == {name for name, _ in model.named_buffers()}
    assert set(by_kind.pop("constant", ())) <= set(captured.constants)
    assert not by_kind


def test_the_graph_is_one_flat_graph_after_the_passes(captured_model):
    graph, report = run_passes(captured_model[1])
    assert {node.op for node in graph.graph.nodes} == {"placeholder", "call_function", "output"}
    assert not list(graph.module.children())
    assert {item.status for item in report.passes} == {"applied", "not for cpu"}
    kinds = {spec.kind for spec in graph.inputs.values()}
    assert kinds == {"parameter", "merged", "buffer", "batch", "cache"}


def test_tokens_and_rows_are_dynamic_and_independent(captured_model):
    _, captured = captured_model
    values = [captured.placeholder("batch", name).meta["val"] for name in BATCH_INPUTS]
    num_tokens, positions, rows = (str(value.shape[0]) for value in values)
    assert num_tokens == positions != rows
    assert not num_tokens.isdigit()
    assert not rows.isdigit()
    assert tuple(map(str, captured.output_value().shape)) == (rows, "128")


def test_no_marker_of_a_mask_is_left(captured_model):
    _, captured = captured_model
    assert not [node for node in captured.graph.nodes if "mask_marker" in str(node.target)]


def test_the_spec_follows_the_dtype():
    spec = compile_graph(capture(tiny_model("qwen2", dtype=torch.bfloat16))).spec
    assert {(layer.dtype, layer.num_kv_heads, layer.head_dim) for layer in spec.layers} == {
        (torch.bfloat16, 2, 16)
    }


def test_two_captures_give_the_same_graph(captured_model):
    model, first = captured_model
    second = capture(model)
    assert str(first.graph) == str(second.graph)
    assert first.inputs == second.inputs


# What it computes.


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 16, 63, 200])
def test_logits_equal_transformers(pair, num_tokens):
    plain, forward = pair
    (token_ids,) = prompts(num_tokens)
    forward.clear()
    assert_logits(forward.run(token_ids), plain, token_ids)


@pytest.mark.parametrize(
    "steps", [[1] * 20, [17, 1, 1, 1], [5, 2, 13], [16, 16, 1], [100, 1, 99]], ids=str
)
def test_chunks_and_decoding_equal_transformers(pair, steps):
    plain, forward = pair
    (token_ids,) = prompts(sum(steps))
    forward.clear()
    outputs, start = [], 0
    for num_tokens in steps:
        outputs.append(forward.run(token_ids[start : start + num_tokens], start))
        start += num_tokens
    assert_logits(torch.cat(outputs), plain, token_ids)


@pytest.mark.parametrize("rows", [[0], [19], [3, 11], [11, 3, 3, 0], list(range(20))], ids=str)
def test_selected_rows(pair, rows):
    plain, forward = pair
    (token_ids,) = prompts(20)
    forward.clear()
    assert_logits(forward.run(token_ids, rows=rows), plain, token_ids, rows)


def test_a_step_that_samples_nothing_has_no_rows(pair):
    plain, forward = pair
    (token_ids,) = prompts(20)
    forward.clear()
    assert forward.run(token_ids[:19], rows=[]).shape == (0, 128)
    assert_logits(forward.run(token_ids[19:], 19), plain, token_ids, [19])


def test_without_the_optional_passes(model):
    plain = copy.deepcopy(model)
    forward = Forward(model, passes_off=("merge_linears",))
    assert forward.compiled.merges == ()
    (token_ids,) = prompts(33)
    assert_logits(forward.run(token_ids), plain, token_ids)


@pytest.mark.parametrize(
    ("layer_types", "windows"),
    [
        (("full_attention", "sliding_attention"), [0, 8]),
        (("sliding_attention", "full_attention"), [8, 0]),
        (("sliding_attention", "sliding_attention"), [8, 8]),
    ],
    ids=["second", "first", "both"],
)
def test_windows_reach_their_layers(layer_types, windows):
    model = windowed_qwen2(*layer_types)
    plain = copy.deepcopy(model)
    assert [node.args[5] for node in attentions(capture(model))] == windows
    forward = Forward(model)
    assert [layer.window for layer in forward.compiled.spec.layers] == windows
    (token_ids,) = prompts(50)
    outputs = [
        forward.run(token_ids[:40]),
        *(forward.run([token_ids[i]], i) for i in range(40, 50)),
    ]
    assert_logits(torch.cat(outputs), plain, token_ids)


def test_a_mask_with_a_window_that_the_attention_is_not_told_of():
    """qwen2_moe, phimoe and others build a sliding mask and never pass sliding_window."""
    model = windowed_qwen2("full_attention", "sliding_attention")
    plain = copy.deepcopy(model)
    for layer in model.model.layers:
        layer.self_attn.sliding_window = None
    assert [node.args[5] for node in attentions(capture(model))] == [0, 8]
    (token_ids,) = prompts(40)
    assert_logits(Forward(model).run(token_ids), plain, token_ids)


@pytest.mark.parametrize(
    ("row", "hidden"),
    [(0, (0, 12)), (0, (14, 24)), (1, (21, 24)), (1, (8, 12))],
    ids=["left", "right", "right-a-little", "hole"],
)
def test_windows_count_masked_slots_as_transformers_does(row, hidden):
    """A window reaches over slots, masked ones too; in the cache there are only visible ones."""
    model = windowed_qwen2("sliding_attention", "full_attention")
    plain = copy.deepcopy(model)
    ids = torch.tensor(prompts(24, 24))
    mask = torch.ones_like(ids)
    mask[row, slice(*hidden)] = 0
    arguments = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = plain.generate(
        ids, attention_mask=mask, **arguments, output_logits=True, return_dict_in_generate=True
    )
    assert has_clear_margin(expected.logits)
    fastgen.optimize(model)
    assert torch.equal(model.generate(ids, attention_mask=mask, **arguments), expected.sequences)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"output_router_logits": False},
        {"output_router_logits": True},
        {"cache_position": None},
        {"position_bias": None},
    ],
    ids=str,
)
def test_kwargs_that_say_nothing_of_the_attention_are_let_through(kwargs, monkeypatch):
    model = pass_to_attention(monkeypatch, **kwargs)
    assert len(attentions(capture(model))) == 2


def test_planted_window_in_the_wrong_layer_is_seen():
    plain = windowed_qwen2("full_attention", "sliding_attention")
    forward = Forward(windowed_qwen2("sliding_attention", "full_attention"))
    (token_ids,) = prompts(40)
    with pytest.raises(AssertionError, match="error"):
        assert_logits(forward.run(token_ids), plain, token_ids)


def dtypes(captured) -> list:
    values = [node.meta.get("val") for node in captured.graph.nodes]
    return [getattr(value, "dtype", None) for value in values]


def test_the_surroundings_of_the_call_change_nothing(model):
    expected = capture(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = capture(model)
    with torch.enable_grad():
        with_grad = capture(model)
    with torch.inference_mode():
        under_inference_mode = capture(model)
    for captured in (under_autocast, with_grad, under_inference_mode):
        assert str(captured.graph) == str(expected.graph)
        assert dtypes(captured) == dtypes(expected)


# What it leaves behind: nothing.


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_model_is_untouched(model, attention, training):
    model.set_attn_implementation(attention)
    model.train(training)
    model.model.layers[1].mlp.train(not training)
    before, generator = photograph(model), torch.get_rng_state()
    capture(model)
    assert_untouched(model, before)
    assert torch.equal(torch.get_rng_state(), generator)


def test_a_model_in_training_is_captured_in_evaluation():
    model = tiny_model("llama", attention_dropout=0.5)
    plain = copy.deepcopy(model)
    model.train()
    (token_ids,) = prompts(20)
    assert_logits(Forward(model).run(token_ids), plain, token_ids)
    assert model.training


def test_the_graph_does_not_keep_the_model_or_its_weights():
    model = tiny_model("llama")
    captured = capture(model)
    watched = [weakref.ref(model), weakref.ref(model.model.layers[0].mlp.gate_proj.weight)]
    del model
    gc.collect()
    assert [ref() for ref in watched] == [None, None]
    assert len(attentions(captured)) == 2
