"""Models that write their attention themselves: exact once proven, refused by name otherwise."""

from __future__ import annotations

import functools
import sys

import pytest
import torch
import transformers
from capture_helpers import assert_untouched, photograph
from conftest import poison
from every_model.building import tiny_model as every_model_of
from tiny_models import VOCAB, WINDOW, NativeTokens, greedy_alone, left_padded, tiny_model
from torch import nn

import fastgen
from fastgen import Engine, SamplingParams, UnsupportedModelError
from fastgen.capture import capture
from fastgen.capture.packing_check import check_logits

NUM_TOKENS = 20
LENGTHS = (5, 16, 31)
_TEXT = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
_GPT = {**_TEXT, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}
_BERT = {**_TEXT, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_BERT |= {"intermediate_size": 96, "max_position_embeddings": 512, "is_decoder": True}
_FALCON = {k: v for k, v in _BERT.items() if k not in ("intermediate_size", "is_decoder")}
_BART = {**_TEXT, "d_model": 64, "decoder_layers": 2, "decoder_attention_heads": 4}
_BART |= {"decoder_ffn_dim": 96, "max_position_embeddings": 512, "is_decoder": True}
_BART |= {"is_encoder_decoder": False, "encoder_layers": 2, "decoder_start_token_id": 1}
_XGLM = {**_TEXT, "d_model": 64, "num_layers": 2, "attention_heads": 4, "ffn_dim": 96}

# Class, fields; how to make the weights large enough is the same for all.
MODELS: dict[str, tuple[str, dict]] = {
    "gptj": ("GPTJForCausalLM", {**_GPT, "rotary_dim": 8}),
    "codegen": ("CodeGenForCausalLM", {**_GPT, "rotary_dim": 8}),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        {**_TEXT, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "window_size": WINDOW}
        | {"max_position_embeddings": 512, "attention_types": [[["global", "local"], 1]]},
    ),
    "gpt_neox_japanese": (
        "GPTNeoXJapaneseForCausalLM",
        _FALCON | {"intermediate_multiple_size": 2},
    ),
    "openai-gpt": ("OpenAIGPTLMHeadModel", _GPT),
    "falcon": ("FalconForCausalLM", _FALCON),
    "falcon-sequential": ("FalconForCausalLM", _FALCON | {"parallel_attn": False}),
    "falcon-heads": ("FalconForCausalLM", _FALCON | {"multi_query": False, "bias": True}),
    "falcon-40b": (
        "FalconForCausalLM",
        _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "bloom": ("BloomForCausalLM", {**_TEXT, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "bloom-6-heads": ("BloomForCausalLM", {**_TEXT, "hidden_size": 96, "n_layer": 2, "n_head": 6}),
    "mpt": ("MptForCausalLM", {**_TEXT, "d_model": 64, "n_layers": 2, "n_heads": 4}),
    "mpt-6-heads": ("MptForCausalLM", {**_TEXT, "d_model": 96, "n_layers": 2, "n_heads": 6}),
    "xglm": ("XGLMForCausalLM", {**_XGLM, "max_position_embeddings": 512}),
    "megatron-bert": ("MegatronBertForCausalLM", _BERT),
    "rembert": ("RemBertForCausalLM", _BERT | {"input_embedding_size": 32}),
    "bart": ("BartForCausalLM", _BART),
    "pegasus": ("PegasusForCausalLM", _BART),
}
QUICK = ("gpt_neo", "falcon-40b", "bloom-6-heads", "bart")
ALIBI = ("bloom", "bloom-6-heads", "mpt", "mpt-6-heads")


def build(name: str, **fields):
    class_name, own = MODELS[name]
    cls = getattr(transformers, class_name)
    torch.manual_seed(0)
    config = cls.config_class(**{**own, **fields})
    config.max_seq_len = 512  # MPT's name for it
    config.seq_length = 512  # Bloom's, in the configurations of its checkpoints
    model = cls(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
            else:
                parameter.normal_(0, 0.3)
    model.generation_config = transformers.GenerationConfig(pad_token_id=0, bos_token_id=1)
    return model


@functools.cache
def answers(name: str) -> tuple[list[list[int]], list[list[int]]]:
    return greedy_alone(build(name), *LENGTHS, num_tokens=NUM_TOKENS)


def attentions(captured) -> list:
    target = torch.ops.fastgen.attention.default
    return [node for node in captured.graph.nodes if node.target is target]


NAMES = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow, id=name) for name in MODELS
]


@pytest.mark.parametrize("name", NAMES)
def test_generate_is_exact_alone_and_left_padded(name):
    rows, expected = answers(name)
    model = fastgen.optimize(build(name))
    poison(model)
    for row, tokens in zip(rows, expected, strict=True):
        with NativeTokens(model, NUM_TOKENS):
            out = model.generate(torch.tensor([row]), max_new_tokens=NUM_TOKENS, do_sample=False)
        assert out[0, len(row) :].tolist() == tokens
    ids, mask = left_padded(rows)
    with NativeTokens(model, NUM_TOKENS * len(rows)):
        out = model.generate(ids, attention_mask=mask, max_new_tokens=NUM_TOKENS, do_sample=False)
    assert out[:, ids.shape[1] :].tolist() == expected


@pytest.mark.parametrize("name", NAMES)
def test_chunks_and_preemption_are_exact(name):
    rows, expected = answers(name)
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0)
    with Engine(build(name), max_num_batched_tokens=7) as engine:
        poison(engine.model)
        assert [out.token_ids for out in engine.generate(rows, params)] == expected
        per_block = fastgen.api.require(engine.model).compiled.spec.bytes_per_token * 16
    num_blocks = 1 + -(-(max(LENGTHS) + NUM_TOKENS) // 16)
    with Engine(build(name), kv_cache_memory_bytes=num_blocks * per_block) as small:
        outputs = small.generate(rows, params)
    assert [out.token_ids for out in outputs] == expected
    assert sum(out.metrics.num_preemptions for out in outputs) > 0


@pytest.mark.parametrize("name", ["gptj", "gpt_neo", "mpt"])
def test_what_was_found(name):
    model = build(name)
    before = photograph(model)
    nodes = attentions(captured := capture(model))
    assert_untouched(model, before)
    assert [node.args[8] for node in nodes] == [0, 1]
    assert [node.args[5] for node in nodes] == ([0, WINDOW] if name == "gpt_neo" else [0, 0])
    assert [node.args[4] for node in nodes] == ([1.0, 1.0] if name == "gpt_neo" else [0.25, 0.25])
    slopes = [value for key, value in captured.constants.items() if key.startswith("alibi")]
    assert len(slopes) == (2 if name in ALIBI else 0)
    for found in slopes:
        torch.testing.assert_close(found, 2.0 ** -torch.tensor([2.0, 4.0, 6.0, 8.0]))
    assert not any("softmax" in str(node.target) for node in captured.graph.nodes)


def test_half_precision_is_understood():
    """GPT-J casts queries and keys up before the product; Bloom's bias is rounded as its scores."""
    for name in ("gptj", "bloom"):
        found = attentions(capture(build(name).to(torch.bfloat16)))
        assert {node.meta["val"].dtype for node in found} == {torch.bfloat16}


def test_falcons_alibi_is_refused_for_its_rounding():
    """It is rounded to bf16 at every position, in fp32 models, too."""
    with pytest.raises(UnsupportedModelError, match=r"layer 0.*bias is rounded to less than"):
        capture(build("falcon", alibi=True, multi_query=False))


def test_another_way_for_long_sequences_is_refused():
    torch.manual_seed(0)
    config = transformers.BigBirdConfig(**{**_BERT, "max_position_embeddings": 2048})
    with pytest.raises(UnsupportedModelError, match=r"something else for sequences .* than 704"):
        capture(transformers.BigBirdForCausalLM(config).eval())


# Near misses: GPT-J with another formula.


def not_causal(self, query, key, value, attention_mask=None):
    return torch.softmax(query @ key.transpose(-1, -2), -1) @ value, None


def other_dimension(self, query, key, value, attention_mask=None):
    return torch.softmax(query @ key.transpose(-1, -2) + attention_mask, -2) @ value, None


def dropout(self, query, key, value, attention_mask=None):
    weights = torch.softmax(query @ key.transpose(-1, -2) + attention_mask, -1)
    return nn.functional.dropout(weights, 0.1, training=True) @ value, None


def bias_that_is_not_alibi(self, query, key, value, attention_mask=None):
    scores = query @ key.transpose(-1, -2) + attention_mask
    places = torch.arange(scores.shape[-1])
    return torch.softmax(scores - 0.1 * places[None] ** 2, -1) @ value, None


def bias_by_tokens(self, query, key, value, attention_mask=None):
    scores = query @ key.transpose(-1, -2) + attention_mask
    return torch.softmax(scores + key[..., 0].unsqueeze(-2), -1) @ value, None


def softcap(self, query, key, value, attention_mask=None):
    scores = torch.tanh(query @ key.transpose(-1, -2))
    return torch.softmax(scores + attention_mask, -1) @ value, None


def clipped(self, query, key, value, attention_mask=None):
    scores = query @ key.transpose(-1, -2) + attention_mask
    return torch.softmax(torch.maximum(scores, torch.tensor(-6.0)), -1) @ value, None


def weights_that_do_not_sum_to_one(self, query, key, value, attention_mask=None):
    weights = torch.softmax(query @ key.transpose(-1, -2) + attention_mask, -1)
    return (weights * 2) @ value, None


def heads_of_their_own_scale(self, query, key, value, attention_mask=None):
    scale = torch.arange(1.0, 5.0)[:, None, None]
    return torch.softmax(query @ key.transpose(-1, -2) * scale + attention_mask, -1) @ value, None


def mixed_up_scores(self, query, key, value, attention_mask=None):
    scores = (query @ key.transpose(-1, -2)).transpose(-1, -2) + attention_mask
    return torch.softmax(scores, -1) @ value, None


def strided_mask(self, query, key, value, attention_mask=None):
    """Every other key."""
    places = torch.arange(query.shape[-2])
    seen = (places[:, None] - places[None]) % 2 == 0
    scores = torch.where(seen, query @ key.transpose(-1, -2), -1e9)
    return torch.softmax(scores + attention_mask, -1) @ value, None


def values_transformed_before(self, query, key, value, attention_mask=None):
    """Taken: it is attention over other values."""
    weights = torch.softmax(query @ key.transpose(-1, -2) + attention_mask, -1)
    return weights @ torch.tanh(value), None


NEAR_MISSES = {
    not_causal: "neither what a causal mask",
    other_dimension: "dimension -2",
    dropout: "dropout of 0.1",
    bias_that_is_not_alibi: "not ALiBi",
    bias_by_tokens: "joins the scores",
    softcap: "tanh",
    clipped: "neither what a causal mask",
    weights_that_do_not_sum_to_one: "mul.Tensor between the softmax and the values",
    heads_of_their_own_scale: "not scaled by one number",
    mixed_up_scores: "transpose",
    strided_mask: "neither what a causal mask",
}


@pytest.mark.parametrize(
    ("formula", "reason"), NEAR_MISSES.items(), ids=[f.__name__ for f in NEAR_MISSES]
)
def test_near_misses_are_refused_by_name(formula, reason, monkeypatch):
    monkeypatch.setattr(transformers.models.gptj.modeling_gptj.GPTJAttention, "_attn", formula)
    model = build("gptj")
    before = photograph(model)
    with pytest.raises(UnsupportedModelError, match=f"layer 0, which .*{reason}"):
        capture(model)
    assert_untouched(model, before)


def test_values_may_be_anything(monkeypatch):
    cls = transformers.models.gptj.modeling_gptj.GPTJAttention
    monkeypatch.setattr(cls, "_attn", values_transformed_before)
    assert len(attentions(capture(build("gptj")))) == 2


# The model itself is the last judge.


def plain_forward(model):
    return lambda ids: model(ids[None], position_ids=torch.arange(len(ids))[None]).logits[0]


@pytest.mark.parametrize(
    "plant",
    [
        pytest.param((4, 0.26), id="scale"),
        pytest.param((5, 9), id="window"),
        pytest.param((8, 0, 3), id="chunk"),
    ],
)
@torch.no_grad()
def test_a_planted_wrong_match_is_caught(plant):
    model = build("gptj")
    captured = capture(model)
    check_logits(model, captured, plain_forward(model), 12)
    node = attentions(captured)[1]
    index, *values = plant
    node.args = (*node.args[:index], *values, *node.args[index + len(values) :])
    captured.module.recompile()
    with pytest.raises(UnsupportedModelError, match="computes other logits than GPTJForCausalLM"):
        check_logits(model, captured, plain_forward(model), 12)


def test_capture_compares_every_model_with_itself(monkeypatch):
    """Also one whose attention was found by registration: here its graph is given another scale."""

    def wrong(captured, *_):
        for node in attentions(captured):
            node.args = (*node.args[:4], 0.9, *node.args[5:])
        captured.module.recompile()

    monkeypatch.setattr(sys.modules["fastgen.capture.capturing"], "check_mutations", wrong)
    with pytest.raises(UnsupportedModelError, match="computes other logits than LlamaForCausalLM"):
        capture(tiny_model("llama"))


def test_an_image_tower_with_attention_of_its_own_is_left_alone():
    """It forbids transformers to set the attention of the whole; the language model allows it."""
    captured = capture(every_model_of("got_ocr2"))
    assert len(attentions(captured)) == 2
