"""A transformers model becomes one graph that computes its logits, or is refused by name."""

from __future__ import annotations

import contextlib
import copy
import gc
import threading
import weakref

import pytest
import torch
import transformers
from fastgen.passes import BATCH_INPUTS, run_passes
from tiny_models import FAMILIES, has_clear_margin, prompts, tiny_model
from torch import nn
from transformers.models.llama import modeling_llama

import fastgen
from fastgen.capture import capture
from fastgen.compiled import compile_graph
from fastgen.engine.batch import ForwardBatch
from fastgen.engine.kv_cache import KVCache
from fastgen.errors import UnsupportedModelError
from fastgen.live import LiveWeights

ATTENTION = torch.ops.fastgen.attention.default
BLOCK_SIZE = 16
SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
}


def windowed_qwen2(*layer_types: str, window: int = 8):
    config = transformers.Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=window, layer_types=list(layer_types)
    )
    torch.manual_seed(0)
    return transformers.Qwen2ForCausalLM(config).eval()


def attentions(captured) -> list:
    return [node for node in captured.graph.nodes if node.target is ATTENTION]


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


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def pair(request):
    """A plain model and the captured forward of an equal one."""
    return tiny_model(request.param), Forward(tiny_model(request.param))


@pytest.fixture(scope="module", params=sorted(FAMILIES))
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
    assert [item.status for item in report.passes] == ["applied"] * len(report.passes)
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


def test_softcap_scale_and_windows_of_gemma2():
    config = transformers.Gemma2Config(
        **SIZES,
        head_dim=16,
        query_pre_attn_scalar=40,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=5.0,
        sliding_window=8,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = transformers.Gemma2ForCausalLM(config).eval()
    plain = copy.deepcopy(model)
    numbers = [node.args[4:8] for node in attentions(capture(model))]
    assert numbers == [(40**-0.5, 8, 2.0, None), (40**-0.5, 0, 2.0, None)]
    (token_ids,) = prompts(40)
    assert_logits(Forward(model).run(token_ids), plain, token_ids)


def test_sinks_and_routers_of_gpt_oss():
    config = transformers.GptOssConfig(
        **SIZES,
        head_dim=16,
        num_local_experts=2,
        num_experts_per_tok=1,
        sliding_window=8,
        layer_types=["full_attention", "sliding_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = transformers.GptOssForCausalLM(config).eval()
    plain = copy.deepcopy(model)
    plain.set_experts_implementation("eager")  # grouped products know no fp64
    captured = capture(model)
    assert [node.args[5] for node in attentions(captured)] == [0, 8]
    sinks = [captured.inputs[node.args[7].name].target for node in attentions(captured)]
    assert sinks == [f"model.layers.{layer}.self_attn.sinks" for layer in (0, 1)]
    (token_ids,) = prompts(40)
    assert_logits(Forward(model).run(token_ids), plain, token_ids)


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


# What is refused.


def refused_causal_flag(patch):
    model = tiny_model("llama")
    model.model.layers[1].self_attn.is_causal = False
    return model


def refused_bidirectional_config(patch):
    model = tiny_model("llama")
    model.config.is_causal = False
    return model


def pass_to_attention(patch, **kwargs):
    original = modeling_llama.LlamaAttention.forward

    def forward(self, *args, **given):
        return original(self, *args, **given, **kwargs)

    patch.setattr(modeling_llama.LlamaAttention, "forward", forward)
    return tiny_model("llama")


def refused_kwarg(patch):
    return pass_to_attention(patch, position_bias=1)


def refused_tensor_kwarg(patch):
    return pass_to_attention(patch, alibi_slopes=torch.ones(4))


def refused_false_kwarg(patch):
    """Not None and not understood: False may switch off what nobody here switches off."""
    return pass_to_attention(patch, causal=False)


def refused_active_dropout(patch):
    """A model that drops probabilities in evaluation mode too."""

    def get_interface(interface, *_):
        return lambda *args, **given: interface["fastgen"](*args, **{**given, "dropout": 0.1})

    patch.setattr(transformers.AttentionInterface, "get_interface", get_interface)
    return tiny_model("llama")


def refused_or_mask(patch):
    original = modeling_llama.create_causal_mask

    def create(*args, **kwargs):
        return original(*args, **kwargs, or_mask_function=lambda b, h, q, k: k < 4)

    patch.setattr(modeling_llama, "create_causal_mask", create)
    return tiny_model("llama")


def refused_and_mask(patch):
    original = modeling_llama.create_causal_mask

    def create(*args, **kwargs):
        return original(*args, **kwargs, and_mask_function=lambda b, h, q, k: k % 2 == 0)

    patch.setattr(modeling_llama, "create_causal_mask", create)
    return tiny_model("llama")


def refused_third_mask(patch):
    """Causal, sliding and one more: the two that are known do not make up for the third."""
    masks = transformers.masking_utils
    three = masks.and_masks(
        masks.sliding_window_overlay(8), masks.causal_mask_function, lambda b, h, q, k: k > 0
    )

    def create(*, inputs_embeds, attention_mask, **_):
        mask = masks.ALL_MASK_ATTENTION_FUNCTIONS["fastgen"]
        length = inputs_embeds.shape[1]
        return mask(1, length, length, mask_function=three, attention_mask=attention_mask)

    patch.setattr(modeling_llama, "create_causal_mask", create)
    return tiny_model("llama")


def refused_chunked_mask(patch):
    patch.setattr(
        modeling_llama,
        "create_causal_mask",
        transformers.masking_utils.create_chunked_causal_mask,
    )
    model = tiny_model("llama")
    model.config.attention_chunk_size = 8
    return model


def refused_missing_mask(patch):
    patch.setattr(modeling_llama, "create_causal_mask", lambda *args, **kwargs: None)
    return tiny_model("llama")


def refused_mask_of_its_own(patch):
    original = modeling_llama.create_causal_mask

    def create(*args, **kwargs):
        return original(*args, **kwargs).logical_not()

    patch.setattr(modeling_llama, "create_causal_mask", create)
    return tiny_model("llama")


def refused_two_windows(patch):
    model = windowed_qwen2("full_attention", "sliding_attention")
    model.model.layers[1].self_attn.sliding_window = 4
    return model


def refused_window_without_mask(patch):
    model = windowed_qwen2("full_attention", "sliding_attention")
    model.model.layers[0].self_attn.sliding_window = 8
    return model


def refused_layer_called_twice(patch):
    original = modeling_llama.LlamaDecoderLayer.forward

    def forward(self, hidden_states, **kwargs):
        return original(self, original(self, hidden_states, **kwargs), **kwargs)

    patch.setattr(modeling_llama.LlamaDecoderLayer, "forward", forward)
    return tiny_model("llama")


def refused_layer_without_attention(patch):
    model = tiny_model("llama")
    model.config.num_hidden_layers = 3
    return model


def refused_data_dependent_forward(patch):
    original = modeling_llama.LlamaMLP.forward

    def forward(self, x):
        return original(self, x) if x.sum() > 0 else x

    patch.setattr(modeling_llama.LlamaMLP, "forward", forward)
    return tiny_model("llama")


def refused_dynamic_rope(patch):
    """Frequencies that depend on the largest position of a call: packed sequences share a call."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, rope_parameters=rope))


def refused_longrope(patch):
    """The same without a branch: torch.where over the largest position, copied into a buffer."""
    rope = {
        "rope_type": "longrope",
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
        "rope_theta": 1e4,
        "original_max_position_embeddings": 64,
        "factor": 8.0,
    }
    config = transformers.Phi3Config(
        **SIZES, pad_token_id=0, original_max_position_embeddings=64, rope_parameters=rope
    )
    return transformers.Phi3ForCausalLM(config)


def refused_encoder_decoder(patch):
    config = transformers.T5Config(
        vocab_size=128, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2
    )
    return transformers.T5ForConditionalGeneration(config)


SMALL_BERT = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def refused_encoder(patch):
    return transformers.BertForMaskedLM(transformers.BertConfig(**SMALL_BERT))


def refused_encoder_with_lm_head(patch):
    return transformers.BertLMHeadModel(transformers.BertConfig(**SMALL_BERT))


def refused_model_without_head(patch):
    return transformers.LlamaModel(transformers.LlamaConfig(**SIZES))


def refused_own_attention(patch):
    config = transformers.GPTJConfig(
        vocab_size=128, n_embd=64, n_layer=2, n_head=4, rotary_dim=8, n_positions=64
    )
    return transformers.GPTJForCausalLM(config)


def refused_no_position_ids(patch):
    config = transformers.BloomConfig(vocab_size=128, hidden_size=64, n_layer=2, n_head=4)
    return transformers.BloomForCausalLM(config)


def refused_meta_device(patch):
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))


def refused_partly_on_meta(patch):
    model = tiny_model("llama")
    model.model.layers[1].mlp.to("meta")
    return model


def refused_forward_hook(patch):
    model = tiny_model("llama")
    model.model.layers[0].mlp.register_forward_hook(lambda *args: None)
    return model


def refused_forward_pre_hook(patch):
    model = tiny_model("llama")
    model.model.norm.register_forward_pre_hook(lambda *args: None)
    return model


def refused_instance_forward(patch):
    model = tiny_model("llama")
    model.model.norm.forward = model.model.norm.forward
    return model


def refused_capture_attention(patch):
    model = tiny_model("llama")
    model.config._attn_implementation = "fastgen"
    return model


REASONS = {
    refused_causal_flag: r"layer 1: is_causal=False",
    refused_bidirectional_config: r"mask function bidirectional_mask_function",
    refused_kwarg: r"layer 0: position_bias=1 is not understood",
    refused_tensor_kwarg: r"layer 0: alibi_slopes=.* is not understood",
    refused_false_kwarg: r"layer 0: causal=False is not understood",
    refused_active_dropout: r"layer 0: dropout=0.1 is active",
    refused_or_mask: r"mask function or_masks.<locals>.or_mask",
    refused_and_mask: r"mask function and_masks.<locals>.and_mask",
    refused_third_mask: r"mask function and_masks.<locals>.and_mask",
    refused_chunked_mask: r"mask function and_masks.<locals>.and_mask",
    refused_missing_mask: r"layer 0: no mask was made",
    refused_mask_of_its_own: r"mask of layer 0 is computed by the model \(.*logical_not",
    refused_two_windows: r"layer 1 has sliding_window=4 and a mask with window 8",
    refused_window_without_mask: r"layer 0 has sliding_window=8 and a mask with window 0",
    refused_layer_called_twice: r"2 layers, and 4 attentions.*more than one: \[0, 1\]",
    refused_layer_without_attention: r"3 layers, and 2 attentions.*without: \[2\]",
    refused_data_dependent_forward: r"LlamaForCausalLM cannot be traced into one graph",
    refused_dynamic_rope: r"LlamaForCausalLM cannot be traced into one graph",
    refused_longrope: r"model.rotary_emb.inv_freq",
    refused_encoder_decoder: r"T5ForConditionalGeneration is an encoder-decoder",
    refused_encoder: r"BertForMaskedLM has no language modelling head",
    refused_encoder_with_lm_head: r"mask function bidirectional_mask_function",
    refused_model_without_head: r"LlamaModel has no language modelling head",
    refused_own_attention: r"GPTJForCausalLM has attention code of its own",
    refused_no_position_ids: r"BloomForCausalLM.forward takes no position_ids",
    refused_meta_device: r"21 parameters on the meta device",
    refused_partly_on_meta: r"3 parameters on the meta device",
    refused_forward_hook: r"forward hooks or replaced forwards on model.layers.0.mlp",
    refused_forward_pre_hook: r"forward hooks or replaced forwards on model.norm",
    refused_instance_forward: r"forward hooks or replaced forwards on model.norm",
    refused_capture_attention: r"attn_implementation='fastgen'",
}


def photograph(model) -> dict:
    """Everything of a model that a capture could touch."""
    tensors = model.state_dict(keep_vars=True)
    hooks = [(m._forward_hooks.copy(), m._forward_pre_hooks.copy()) for m in model.modules()]
    return {
        "config": repr(vars(model.config)),
        "config object": id(model.config),
        "attention": model.config._attn_implementation,
        "generation config": repr(model.generation_config) if model.can_generate() else None,
        "modules": {name: (id(module), type(module)) for name, module in model.named_modules()},
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "training": [module.training for module in model.modules()],
        "tensors": {name: (id(t), t.data_ptr(), t._version) for name, t in tensors.items()},
        "values": {
            name: t.detach().clone() for name, t in tensors.items() if t.device.type != "meta"
        },
        "hooks": hooks,
        "gradients": [p.requires_grad for p in model.parameters()],
    }


def assert_untouched(model, before):
    after = photograph(model)
    values, old = after.pop("values"), before.pop("values")
    assert after == before
    assert values.keys() == old.keys()
    assert all(torch.equal(values[name], old[name]) for name in values)


@pytest.mark.parametrize(
    ("build", "reason"), REASONS.items(), ids=[f.__name__.removeprefix("refused_") for f in REASONS]
)
def test_refused_by_name_and_untouched(build, reason, monkeypatch):
    model = build(monkeypatch)
    before = photograph(model)
    with pytest.raises(UnsupportedModelError, match=reason):
        capture(model)
    assert_untouched(model, before)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Linear(3, 3), "needs a transformers PreTrainedModel, got Linear"),
        (None, "needs a transformers PreTrainedModel, got NoneType"),
        ("gpt2", "needs a transformers PreTrainedModel, got str"),
    ],
    ids=["module", "none", "name"],
)
def test_what_is_no_model_is_refused(model, reason):
    with pytest.raises(UnsupportedModelError, match=reason):
        capture(model)


def test_a_peft_wrapper_is_not_captured_itself():
    class PeftModel(nn.Module):
        """What a wrapper of PEFT's looks like from outside."""

        def __init__(self, base):
            super().__init__()
            self.base_model, self.peft_config = base, {"default": object()}

        def get_base_model(self):
            return self.base_model

    wrapper = PeftModel(tiny_model("llama"))
    with pytest.raises(UnsupportedModelError, match="PreTrainedModel, got PeftModel"):
        capture(wrapper)
    assert len(attentions(capture(wrapper.get_base_model()))) == 2


def test_an_attribute_that_cannot_be_copied_is_no_other_error():
    """Users hang locks, loggers and activations on their models."""
    model = tiny_model("llama")
    model.lock = threading.Lock()
    before = photograph(model)
    with contextlib.suppress(UnsupportedModelError):
        assert len(attentions(capture(model))) == 2
    assert_untouched(model, before)


def test_a_graph_that_cannot_be_rewritten_is_refused_as_an_unsupported_model(monkeypatch):
    """Capture lets an enabled autocast through, the passes do not; optimize says it by name."""
    original = modeling_llama.LlamaMLP.forward

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return original(self, x).float()

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", forward)
    model = tiny_model("llama")
    before = photograph(model)
    with pytest.raises(UnsupportedModelError, match="autocast"):
        fastgen.optimize(model)
    assert_untouched(model, before)


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
    config = transformers.LlamaConfig(**SIZES, attention_dropout=0.5)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    plain = copy.deepcopy(model).eval()
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
