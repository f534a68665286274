"""What capture does not understand it refuses by name, and leaves the model untouched."""

from __future__ import annotations

import contextlib
import threading

import pytest
import torch
import transformers
from capture_helpers import (
    assert_untouched,
    attentions,
    pass_to_attention,
    photograph,
    windowed_qwen2,
)
from tiny_models import SIZES, tiny_model
from torch import nn
from transformers.models.llama import modeling_llama

import fastgen
from fastgen.capture import capture
from fastgen.errors import UnsupportedModelError


def refused_causal_flag(patch):
    model = tiny_model("llama")
    model.model.layers[1].self_attn.is_causal = False
    return model


def refused_bidirectional_config(patch):
    model = tiny_model("llama")
    model.config.is_causal = False
    return model


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


def refused_written_buffer(patch):
    """What is written follows all tokens of a call."""

    def forward(self, x, position_ids):
        self.inv_freq.mul_(1 + position_ids.max())
        return original(self, x, position_ids)

    original = modeling_llama.LlamaRotaryEmbedding.forward
    patch.setattr(modeling_llama.LlamaRotaryEmbedding, "forward", forward)
    return tiny_model("llama")


def refused_positions_of_its_own(patch):
    """RoPE by the place in the call: right for one prompt alone, wrong from the next token on."""

    def forward(self, x, position_ids):
        return original(self, x, torch.arange(x.shape[1]).unsqueeze(0))

    original = modeling_llama.LlamaRotaryEmbedding.forward
    patch.setattr(modeling_llama.LlamaRotaryEmbedding, "forward", forward)
    return tiny_model("llama")


def refused_token_shift(patch):
    """Each token mixed with its neighbour, as recurrent and convolutional layers do."""

    def forward(self, x):
        return original(self, x + torch.roll(x, 1, dims=1))

    original = modeling_llama.LlamaMLP.forward
    patch.setattr(modeling_llama.LlamaMLP, "forward", forward)
    return tiny_model("llama")


def refused_norm_over_tokens(patch):
    def forward(self, x):
        return original(self, x) / x.abs().amax(dim=1, keepdim=True)

    original = modeling_llama.LlamaMLP.forward
    patch.setattr(modeling_llama.LlamaMLP, "forward", forward)
    return tiny_model("llama")


def refused_window_of_the_cache_alone(patch):
    """Its mask shows all tokens, but in transformers' loop the cache keeps the last 12."""
    config = transformers.MoshiConfig(
        vocab_size=128,
        hidden_size=64,
        ffn_dim=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=16,
        max_position_embeddings=512,
        sliding_window=12,
        pad_token_id=0,
    )
    return transformers.MoshiForCausalLM(config)


def refused_recurrent(patch):
    config = transformers.MambaConfig(vocab_size=128, hidden_size=64, num_hidden_layers=2)
    return transformers.MambaForCausalLM(config)


def refused_hybrid(patch):
    config = transformers.Lfm2Config(**SIZES, layer_types=["conv", "full_attention"])
    return transformers.Lfm2ForCausalLM(config)


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
    """Its ALiBi is rounded to bf16, whatever the model's dtype."""
    config = transformers.FalconConfig(
        vocab_size=128,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        multi_query=False,
        alibi=True,
    )
    return transformers.FalconForCausalLM(config)


def refused_many_heads(patch):
    config = transformers.MusicgenDecoderConfig(
        vocab_size=128,
        hidden_size=64,
        ffn_dim=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_codebooks=2,
    )
    return transformers.MusicgenForCausalLM(config)


def refused_meta_device(patch):
    with torch.device("meta"):
        return tiny_model("llama")


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
    refused_bidirectional_config: r"layer 0: is_causal=False",
    refused_kwarg: r"layer 0: position_bias=1 is not understood",
    refused_tensor_kwarg: r"layer 0: alibi_slopes=.* is not understood",
    refused_false_kwarg: r"layer 0: causal=False is not understood",
    refused_active_dropout: r"layer 0: dropout=0.1 is active",
    refused_or_mask: r"mask function or_masks\(.*refused_or_mask.*\) is neither",
    refused_and_mask: r"mask function and_masks\(.*refused_and_mask.*\) is neither",
    refused_third_mask: r"mask function and_masks\(.*sliding_window_overlay.*refused_third_mask",
    refused_missing_mask: r"layer 0: no mask was made",
    refused_mask_of_its_own: r"mask of layer 0 is computed by the model \(.*logical_not",
    refused_two_windows: r"layer 1 has sliding_window=4 and a mask with window 8",
    refused_window_without_mask: r"layer 0 has sliding_window=8 and a mask with window 0",
    refused_layer_called_twice: r"2 layers, and 4 attentions.*more than one: \[0, 1\]",
    refused_layer_without_attention: r"3 layers, and 2 attentions.*without: \[2\]",
    refused_data_dependent_forward: r"LlamaForCausalLM cannot be traced into one graph",
    refused_written_buffer: r"the forward changes model.rotary_emb.inv_freq as it runs",
    refused_positions_of_its_own: r"does not keep sequences apart",
    refused_token_shift: r"does not keep sequences apart",
    refused_norm_over_tokens: r"does not keep sequences apart",
    refused_window_of_the_cache_alone: r"layer 0 has a mask with window 0, .*cache keeps 12 tokens",
    refused_recurrent: r"Mamba.* kind that is not understood: linear_attention \(layers \[0, 1\]\)",
    refused_hybrid: r"Lfm2.* kind that is not understood: conv \(layers \[0\]\)",
    refused_encoder_decoder: r"T5ForConditionalGeneration is an encoder-decoder",
    refused_encoder: r"BertForMaskedLM has no language modelling head",
    refused_encoder_with_lm_head: r"layer 0: is_causal=False",
    refused_model_without_head: r"LlamaModel has no language modelling head",
    refused_own_attention: r"attention of layer 0, which .* its bias is rounded",
    refused_many_heads: r"MusicgenForCausalLM.forward takes no logits_to_keep and has no single",
    refused_meta_device: r"21 parameters on the meta device",
    refused_partly_on_meta: r"3 parameters on the meta device",
    refused_forward_hook: r"forward hooks or replaced forwards on model.layers.0.mlp",
    refused_forward_pre_hook: r"forward hooks or replaced forwards on model.norm",
    refused_instance_forward: r"forward hooks or replaced forwards on model.norm",
    refused_capture_attention: r"attn_implementation='fastgen'",
}


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
    "build",
    [refused_recurrent, refused_hybrid, refused_own_attention],
    ids=lambda build: build.__name__.removeprefix("refused_"),
)
def test_a_refused_model_generates_as_before(build, monkeypatch):
    model = build(monkeypatch).eval()
    arguments = {"input_ids": torch.tensor([[5, 6, 7]]), "max_new_tokens": 5, "do_sample": False}
    expected = model.generate(**arguments)
    with pytest.raises(UnsupportedModelError, match=REASONS[build]):
        fastgen.optimize(model)
    assert fastgen.api.lookup(model) is None
    assert type(model).generate is transformers.GenerationMixin.generate
    assert torch.equal(model.generate(**arguments), expected)


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
