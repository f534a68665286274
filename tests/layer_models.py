"""Tiny models whose layers are not all alike, and what transformers makes of prompts.

Layers that read the keys of others, chunks, RoPE that changes with length. Weights are scaled so
that tokens vary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import transformers
from conftest import poison
from tiny_models import SIZES, NativeTokens, greedy_alone

from fastgen import Engine

WINDOW = 12
NUM_TOKENS = 40
BLOCK_SIZE = 16
# Within a block, at its end, past it, and beyond every window; 8 with 40 ends on a block.
LENGTHS = (5, 8, 16, 17, 40)

_WINDOW_AND_FULL = ["sliding_attention", "full_attention"]
_GEMMA = {
    "head_dim": 16,
    "sliding_window": WINDOW,
    "vocab_size_per_layer_input": 128,
    "hidden_size_per_layer_input": 8,
    "tie_word_embeddings": False,
}
# Tokens up to which RoPE that changes with length is what it was; the longest test needs 80.
THRESHOLD = 80
_LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
    "long_factor": [4.0, 3.5, 3.0, 2.5, 2.0, 1.5, 1.2, 1.1],
    "rope_theta": 1e4,
    "original_max_position_embeddings": THRESHOLD,
    "factor": 8.0,
}

# Model class, and the fields in which its configuration differs from SIZES.
MODELS: dict[str, tuple[str, dict]] = {
    "gemma3n_text": (
        "Gemma3nForCausalLM",
        {
            **_GEMMA,
            "num_hidden_layers": 5,
            "num_kv_shared_layers": 2,
            "layer_types": [*_WINDOW_AND_FULL, *_WINDOW_AND_FULL, "sliding_attention"],
            "altup_num_inputs": 2,
            "laurel_rank": 8,
            "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0, 0.5],
        },
    ),
    "gemma4_text": (
        "Gemma4ForCausalLM",
        {
            **_GEMMA,
            "num_hidden_layers": 6,
            "num_kv_shared_layers": 2,
            "layer_types": _WINDOW_AND_FULL * 3,
            "global_head_dim": 32,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
        },
    ),
    "gemma4_unified_text": (
        "Gemma4UnifiedForCausalLM",
        {
            **_GEMMA,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 1,
            "layer_types": _WINDOW_AND_FULL * 2,
            "global_head_dim": 32,
        },
    ),
    "llama4_text": (
        "Llama4ForCausalLM",
        {
            "head_dim": 16,
            "attention_chunk_size": WINDOW,
            "no_rope_layers": [1, 0, 1],
            "num_hidden_layers": 3,
            "floor_scale": 5,  # the scale of queries changes every five tokens
            "attn_scale": 1.0,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "intermediate_size_mlp": 96,
        },
    ),
    "phi3-longrope": (
        "Phi3ForCausalLM",
        {"original_max_position_embeddings": THRESHOLD, "rope_parameters": _LONGROPE},
    ),
    "llama-longrope": ("LlamaForCausalLM", {"rope_parameters": _LONGROPE}),
    "llama-dynamic": (
        "LlamaForCausalLM",
        {
            "max_position_embeddings": THRESHOLD,
            "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
        },
    ),
    "gemma3_text-dynamic": (
        "Gemma3ForCausalLM",
        {
            "head_dim": 16,
            "sliding_window": WINDOW,
            "layer_types": _WINDOW_AND_FULL,
            "max_position_embeddings": THRESHOLD,
            "tie_word_embeddings": False,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e6},
            },
        },
    ),
}


QUICK_MODELS = ("gemma3n_text", "llama4_text", "phi3-longrope")


def layer_model(name: str, **fields):
    """A model in evaluation mode; fields change its configuration."""
    class_name, own = MODELS[name]
    model_class = getattr(transformers, class_name)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**{**SIZES, **own, **fields}))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
            if ".post_" in parameter_name and "layernorm" in parameter_name and "gemma" in name:
                parameter.add_(8)  # else the scaled embedding outweighs the layers
    return model.eval()


@dataclass(frozen=True)
class Answers:
    """Prompts, and transformers' greedy tokens for each alone."""

    rows: list[list[int]]
    expected: list[list[int]]


def answers_of(name: str, *lengths: int, num_tokens: int = NUM_TOKENS, **fields) -> Answers:
    return Answers(*greedy_alone(layer_model(name, **fields), *lengths, num_tokens=num_tokens))


@contextlib.contextmanager
def engine_of(name: str, model_fields: dict | None = None, **fields) -> Iterator[Engine]:
    """An engine over a model of its own, with NaN in every freed block; all it makes is native."""
    with Engine(layer_model(name, **(model_fields or {})), **fields) as engine:
        poison(engine.model)
        with NativeTokens(engine.model):
            yield engine
