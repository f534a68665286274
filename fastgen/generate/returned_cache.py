"""The cache object that generate() returns, filled from the engine's pages."""

from __future__ import annotations

from typing import Any

import torch

from ..engine.engine import EngineCore
from ..engine.request import Request
from .prepared import PreparedCall, TransformersLoop


def check_kinds(model: Any, engine: EngineCore) -> None:
    """Raise TransformersLoop if transformers' cache, which is returned, holds something else.

    Where a model expands what was cached, transformers caches latents, and the engine's cache does
    if `cache_latent` has found them all.
    """
    expanding = sum(hasattr(module, "expand_kv") for module in model.modules())
    if sum(layer.kind == "latent" for layer in engine.compiled.spec.layers) != expanding:
        raise TransformersLoop("transformers' cache holds latents, the engine's does not")


def fill_cache(call: PreparedCall, requests: list[Request], length: int) -> None:
    """Copy the rows' keys and values into the cache object that transformers returns.

    Hidden prompt slots, which nothing ever attends to, are zero.
    """
    if call.past_key_values is None:
        return
    rows = call.engine.read_caches(requests)
    num_rows, num_prompt = call.input_ids.shape
    visible = torch.ones(num_rows, length, dtype=torch.bool, device=call.input_ids.device)
    if call.attention_mask is not None:
        visible[:, :num_prompt] = call.attention_mask.bool()
    for layer in range(len(rows[0])):
        pair = []
        for role in (0, 1):
            first = rows[0][layer][role]
            full = first.new_zeros((num_rows, first.shape[0], length, first.shape[2]))
            for row, layers in enumerate(rows):
                full[row, :, visible[row].to(first.device)] = layers[layer][role]
            pair.append(full)
        call.past_key_values.update(*pair, layer)
