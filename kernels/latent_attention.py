"""Attention whose keys and values come from one latent per token: the op of cache_latent.

    [k_nope_h, v_h] = W_h latent
    key_h           = [k_nope_h, k_rope], one rotated k_rope for all heads
    out_h           = attention(query_h, key_h, v_h)

Source: DeepSeek-V2, arXiv:2405.04434 (multi-head latent attention).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .attention import attend_reference
from .registry import register


def expand_latents(
    latent: torch.Tensor, k_rope: torch.Tensor, weight: torch.Tensor, nope: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every head's keys and values of some tokens, as the model itself computes them.

    Args:
        latent: [num_tokens, rank]. k_rope: [num_tokens, rope].
        weight: [num_heads, nope + v_head_dim, rank]. nope: How many of a head's rows make keys.
    Returns: keys [num_tokens, num_heads, nope + rope], values [num_tokens, num_heads, v_head_dim].
    """
    heads = F.linear(latent, weight.flatten(0, 1)).unflatten(-1, weight.shape[:2])
    shared = k_rope.unsqueeze(1).expand(-1, weight.shape[0], -1)
    return torch.cat((heads[..., :nope], shared), dim=-1), heads[..., nope:]


def check_latents(
    query: torch.Tensor, latent: torch.Tensor, k_rope: torch.Tensor, weight: torch.Tensor
) -> int:
    """v_head_dim; ValueError unless heads, latents and the weight fit each other."""
    nope = query.shape[2] - k_rope.shape[1]
    per_head, left = weight.shape[0] // query.shape[1], weight.shape[0] % query.shape[1]
    if left or not 0 < nope < per_head or weight.shape[1] != latent.shape[1]:
        raise ValueError(
            "weight must be [num_heads * (nope + v_head_dim), rank], with nope = head_dim of the "
            f"query - width of k_rope; got {list(weight.shape)} for {query.shape[1]} heads of "
            f"{query.shape[2]}, a latent of {latent.shape[1]} and a k_rope of {k_rope.shape[1]}"
        )
    return per_head - nope


@torch.library.custom_op("fastgen::latent_attention", mutates_args=())
def latent_attention(
    query: torch.Tensor,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    weight: torch.Tensor,
    scale: float,
    window: int,
    layer_idx: int,
) -> torch.Tensor:
    """Causal attention of all tokens of one sequence over keys and values made from latents.

    Args:
        query: [num_tokens, num_heads, nope + rope], fp16/bf16/fp32, the rotated part last.
        latent: [num_tokens, rank]. k_rope: [num_tokens, rope], rotated.
        weight: [num_heads * (nope + v_head_dim), rank]: of each head the rows that make its keys,
            then those that make its values.
        scale, window, layer_idx: as in `attention`.
    Returns: [num_tokens, num_heads, v_head_dim], contiguous, dtype of query. Mutates nothing.
    Raises: ValueError if the shapes do not fit.
    Numerics: keys and values are rounded to the dtype, then as `attention`.
    """
    check_latents(query, latent, k_rope, weight)
    return latent_attention_reference(query, latent, k_rope, weight, scale, window, layer_idx)


@latent_attention.register_fake
def _(query, latent, k_rope, weight, scale, window, layer_idx):
    v_head_dim = check_latents(query, latent, k_rope, weight)
    return query.new_empty((query.shape[0], query.shape[1], v_head_dim))


def latent_attention_reference(query, latent, k_rope, weight, scale, window, layer_idx):
    by_head = weight.unflatten(0, (query.shape[1], -1))
    nope = query.shape[2] - k_rope.shape[1]
    key, value = expand_latents(latent, k_rope, by_head, nope)
    return attend_reference(query, key, value, scale, window, 0.0, None)


register("fastgen::latent_attention", "reference", latent_attention_reference)
