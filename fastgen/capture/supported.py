"""Which models can be captured, seen before they are: their kind, layers, RoPE, hooks, lengths."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedModelError
from ..fingerprint import hooked_modules
from .attention import ATTENTION_NAME

# Kinds of layers, by the names that configurations give them, that attend to all earlier tokens, to
# a window of them or to those of one chunk, and keep nothing else. Which, the masks say.
_LAYER_KINDS = {"full_attention", "sliding_attention", "chunked_attention", "attention"}

# Where configurations say how long a sequence may get.
_LENGTH_FIELDS = (
    "max_position_embeddings",
    "max_target_positions",
    "max_seq_len",
    "seq_length",
)


def selects_rows(model: Any) -> bool:
    """Whether a model computes the logits of some tokens only; if not, its head is made to."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def takes_positions(model: Any) -> bool:
    """Whether positions can be given to a model; if not, it numbers the columns of a call."""
    return "position_ids" in inspect.signature(model.forward).parameters


def longest_sequence(model: Any) -> int | None:
    """Tokens that a sequence may have, or None if the model does not say."""
    return min((limit for limit, _ in _length_limits(model)), default=None)


def why_not_longer(model: Any) -> str:
    """What ends the longest sequence."""
    return min(_length_limits(model))[1]


def _length_limits(model: Any) -> list[tuple[int, str]]:
    """Limits of a sequence's length, and why they are.

    Up to a length that they name, frequencies that follow the largest position stay as they were
    made, and sequences share calls. Beyond it they depend on what shares the call.
    """
    config = model.config.get_text_config()
    named = (getattr(config, name, None) for name in _LENGTH_FIELDS)
    length = next((length for length in named if isinstance(length, int)), None)
    limits: list[tuple[Any, str]] = [(length, "the model's limit")]
    for _, module, kind, _, layer_type in _changing_ropes(model):
        if kind == "longrope":
            parameters: Any = module.config.rope_parameters  # pyright: ignore
            parameters = parameters[layer_type] if layer_type else parameters
            limit = parameters["original_max_position_embeddings"]
        else:
            limit = module.original_max_seq_len
        limits.append((limit, f"beyond it, RoPE of type {kind!r} takes other frequencies"))
    return [(limit, why) for limit, why in limits if isinstance(limit, int)]


def check_model(model: Any, *, shapes_only: bool = False) -> None:
    """Raise UnsupportedModelError unless `model` is a decoder-only LM on one real device.

    shapes_only: it may be on the meta device.
    """
    from transformers import PreTrainedModel

    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"fastgen.optimize needs a transformers PreTrainedModel, got {name}"
        )
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(f"{name} is an encoder-decoder model; only decoders generate")
    if not model.can_generate():
        raise UnsupportedModelError(f"{name} has no language modelling head to generate with")
    devices = Counter(parameter.device for parameter in model.parameters())
    if not shapes_only and any(device.type == "meta" for device in devices):
        raise UnsupportedModelError(
            f"{name} has {devices[torch.device('meta')]} parameters on the meta device (offloaded "
            "or not loaded); load all of them into memory first"
        )
    if len(devices) > 1:
        raise UnsupportedModelError(
            f"{name} is split over {', '.join(map(str, devices))}; put it on one device first"
        )
    _check_layer_kinds(model)
    _check_rope(model)
    if not selects_rows(model) and not isinstance(model.get_output_embeddings(), nn.Linear):
        raise UnsupportedModelError(
            f"{name}.forward takes no logits_to_keep and has no single linear head, so that it "
            "would compute the logits of every token of a prompt"
        )
    if hooked := hooked_modules(model):
        raise UnsupportedModelError(
            f"forward hooks or replaced forwards on {', '.join(hooked[:3])} would be skipped; "
            "remove them first"
        )
    if model.config._attn_implementation == ATTENTION_NAME:
        raise UnsupportedModelError(
            f"{name} has attn_implementation={ATTENTION_NAME!r}, which is for capture only"
        )


def _check_layer_kinds(model: Any) -> None:
    """Refuse layers that are no plain attention (recurrent, convolutional, indexed)."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    others: dict[str, list[int]] = {}
    for layer, kind in enumerate(kinds or ()):
        if kind not in _LAYER_KINDS:
            others.setdefault(kind, []).append(layer)
    if others:
        listed = ", ".join(f"{kind} (layers {layers})" for kind, layers in others.items())
        raise UnsupportedModelError(
            f"{type(model).__name__} has layers of a kind that is not understood: {listed}"
        )


def _changing_ropes(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, str, str | None]]:
    """Rotary embeddings whose frequencies follow the largest position of a call.

    Of each: name, module, kind, the prefix of its buffers, the kind of layers that it is for.
    """
    for name, module in model.named_modules():
        kinds = getattr(module, "rope_type", None)
        for layer_type, kind in (kinds if isinstance(kinds, dict) else {None: kinds}).items():
            if isinstance(kind, str) and ("dynamic" in kind or kind == "longrope"):
                yield name, module, kind, f"{layer_type}_" if layer_type else "", layer_type


def _check_rope(model: nn.Module) -> None:
    """Refuse frequencies that change with length if those of short sequences are not kept."""
    for name, module, kind, prefix, _ in _changing_ropes(model):
        buffers = dict(module.named_buffers(recurse=False))
        if not {f"{prefix}inv_freq", f"{prefix}original_inv_freq"} <= set(buffers):
            raise UnsupportedModelError(
                f"{name} is RoPE of type {kind!r}, whose frequencies depend on the longest "
                "sequence of a call, and does not keep those of short sequences"
            )


def keep_short_frequencies(clone: nn.Module) -> dict[str, str]:
    """Let RoPE that changes with length be what it is for short sequences.

    Returns: buffers that are read -> the live model's buffers that they are. Of the two names of
        one tensor torch.export may take either.
    """
    read = {}
    for name, module, _, prefix, layer_type in list(_changing_ropes(clone)):
        changing, kept = f"{prefix}inv_freq", f"{prefix}original_inv_freq"
        module.register_buffer(changing, module.get_buffer(kept), persistent=False)
        kinds: Any = module.rope_type
        module.rope_type = {**kinds, layer_type: "default"} if layer_type else "default"  # pyright: ignore
        read[f"{name}.{changing}"] = f"{name}.{kept}"
    return read
