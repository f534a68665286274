"""What a captured graph must show: masks understood, one attention per layer, no side effects."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import fx, nn

from ..errors import UnsupportedModelError
from ..passes import CapturedGraph
from . import mask_marker  # noqa: F401 (registers the op)

_ATTENTION = torch.ops.fastgen.attention.default
_MARKER = torch.ops.fastgen.mask_marker.default


def check_mutations(captured: CapturedGraph) -> None:
    """Refuse a forward that writes into its own parameters or buffers.

    What it writes depends on all tokens of the call (longrope RoPE picks its frequencies by the
    largest position), and here those belong to different sequences.
    """
    for node in captured.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        for argument, value in zip(schema.arguments if schema else (), node.args, strict=False):
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and isinstance(value, fx.Node) and value.name in captured.inputs:
                name = captured.inputs[value.name].target
                raise UnsupportedModelError(f"the forward changes {name} as it runs")


def resolve_masks(captured: CapturedGraph) -> None:
    """Turn the marker that reaches each attention into window or chunk; refuse any other mask."""
    for node in captured.graph.nodes:
        if node.target is not _ATTENTION:
            continue
        marker, layer_idx, given = node.args[3], node.args[8], node.args[5]
        if marker is None:
            continue  # proven to be causal, in own_attention.py
        if marker.target is torch.ops.aten.where.ScalarOther:  # of _own_mask_forward
            marker = marker.args[0]
        if marker.target is not _MARKER:
            raise UnsupportedModelError(
                f"the mask of layer {layer_idx} is computed by the model ({marker.target})"
            )
        kind, size = marker.args[1:]
        if kind not in ("causal", "sliding", "chunked"):
            raise UnsupportedModelError(
                f"layer {layer_idx}: mask function {kind} is neither causal nor a sliding window "
                "nor in chunks"
            )
        window, chunk = (0, size) if kind == "chunked" else (size, 0)
        if given and given != window:
            raise UnsupportedModelError(
                f"layer {layer_idx} has sliding_window={given} and a mask with window {window}"
            )
        settings = (node.args[4], window, *node.args[6:9])
        node.args = (*node.args[:3], None, *settings, *((chunk,) if chunk else ()))
    captured.graph.eliminate_dead_code()
    for node in captured.graph.nodes:
        if node.target is _MARKER:
            raise UnsupportedModelError(f"the mask is read by {[str(user) for user in node.users]}")


def check_layers(model: nn.Module, captured: CapturedGraph) -> None:
    """Every layer must have shown exactly one attention, in the layers' order."""
    order = [node.args[8] for node in captured.graph.nodes if node.target is _ATTENTION]
    found = Counter(order)
    missing = [layer for layer in range(captured.num_layers) if found[layer] == 0]
    if missing or sum(found.values()) != captured.num_layers:
        twice = [layer for layer, count in found.items() if count > 1]
        raise UnsupportedModelError(
            f"{type(model).__name__} has {captured.num_layers} layers, and {sum(found.values())} "
            f"attentions were seen; layers without: {missing}, with more than one: {twice}"
        )
    if order != sorted(order):
        raise UnsupportedModelError(f"{type(model).__name__} runs its layers in the order {order}")


def check_kept_tokens(model: Any, captured: CapturedGraph) -> None:
    """Refuse a layer whose cache, in transformers' loop, forgets tokens that its mask shows.

    generate() then differs from the forward (Moshi has a window in its cache only).
    """
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    for node in captured.graph.nodes:
        if node.target is not _ATTENTION:
            continue
        window, layer_idx, chunk = node.args[5], node.args[8], next(iter(node.args[9:]), 0)
        if layer_idx >= len(cache.layers):
            continue  # it reads the keys of an earlier layer
        kept = getattr(cache.layers[layer_idx], "sliding_window", None)
        if kept and not 0 < (chunk or window) <= kept:
            mask = f"chunks of {chunk}" if chunk else f"window {window}"
            raise UnsupportedModelError(
                f"layer {layer_idx} has a mask with {mask}, and in transformers' loop its cache "
                f"keeps {kept} tokens"
            )
