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
    num_rows, num_prompt = call.prompt_shape
    visible = torch.ones(num_rows, length, dtype=torch.bool, device=call.input_ids.device)
    if call.attention_mask is not None:
        visible[:, :num_prompt] = call.attention_mask.bool()
    entries = call.engine.compiled.spec.entries
    for layer, entry in enumerate(entries):
        if entry in entries[:layer] and not _has_its_own(call.past_key_values, layer):
            continue
        pair = []
        for role in (0, 1):
            first = rows[0][entry][role]
            full = first.new_zeros((num_rows, first.shape[0], length, first.shape[2]))
            for row, kept in enumerate(rows):
                full[row, :, visible[row].to(first.device)] = kept[entry][role]
            pair.append(full)
        call.past_key_values.update(*pair, layer)


def _has_its_own(cache: Any, layer: int) -> bool:
    """Whether transformers' cache keeps keys for a layer that reads those of an earlier one."""
    from transformers.cache_utils import DynamicLayer

    return layer < len(cache.layers) and isinstance(cache.layers[layer], DynamicLayer)
