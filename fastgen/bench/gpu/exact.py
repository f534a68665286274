"""What kernels are held against: formulas in fp64, and how far from them a kernel may be."""

from __future__ import annotations

from typing import Any

import torch

# A formula of the same dtype rounds a few times: one that is further off computes something else,
# and would allow anything.
_PEER_ROUNDINGS = 32


def accurate(output: torch.Tensor, peer: torch.Tensor, exact: torch.Tensor) -> dict[str, Any]:
    """Error against fp64 <= 2 x (error of a formula of the same dtype + eps x max).

    Returns: the largest error and what is allowed. Raises: AssertionError if it is exceeded, or
    shape or dtype are others.
    """
    assert output.shape == exact.shape, f"shape {list(output.shape)}, not {list(exact.shape)}"
    assert output.dtype == peer.dtype, f"{output.dtype}, not {peer.dtype}"
    assert bool(output.isfinite().all()), "something that holds no number was read"
    rounding = float(torch.finfo(output.dtype).eps * exact.abs().max())
    peers = float((peer.double() - exact).abs().max())
    assert peers <= _PEER_ROUNDINGS * rounding, f"the formula it is held against is off {peers:.2e}"
    allowed = 2 * (peers + rounding)
    error = float((output.double() - exact).abs().max())
    assert error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}"
    return {"error": error, "allowed": allowed}


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of the last queries of a sequence; shapes as in `fastgen::attention`."""
    num_queries, num_heads = query.shape[:2]
    num_keys, num_kv_heads = key.shape[:2]
    groups = torch.arange(num_heads, device=key.device) // (num_heads // num_kv_heads)
    keys, values = key.double()[:, groups], value.double()[:, groups]
    scores = torch.einsum("qhd,khd->hqk", query.double(), keys) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    places = torch.arange(num_keys, device=key.device)
    distance = places[num_keys - num_queries :, None] - places
    hidden = (distance < 0) | (distance >= (window or num_keys))
    scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        column = sinks.double()[:, None, None].expand(-1, num_queries, 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., :num_keys]
    return torch.einsum("hqk,khd->qhd", weights, values)


def rms_norm(
    input: torch.Tensor, weight: torch.Tensor | None, eps: float, weight_offset: float
) -> torch.Tensor:
    hidden = input.double()
    hidden = hidden / (hidden.square().mean(-1, keepdim=True) + eps).sqrt()
    return hidden if weight is None else hidden * (weight.double() + weight_offset)


def gated(activation: str, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """activation: "silu", "gelu" or "gelu_tanh"."""
    gate = gate.double()
    if activation == "silu":
        share = torch.sigmoid(gate)
    elif activation == "gelu":
        share = 0.5 * (1 + torch.erf(gate / 2**0.5))
    else:
        share = 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)))
    return gate * share * up.double()


def rotated(
    heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """Pairs of [num_tokens, num_heads, head_dim] turned by [num_tokens, rotary_dim] tables."""
    size = cos.shape[1]
    places = torch.arange(size, device=heads.device)
    if interleaved:
        partner, first = places ^ 1, places % 2 == 0
    else:
        partner, first = (places + size // 2) % size, places < size // 2
    sign = torch.where(first, -1.0, 1.0).double()
    source = heads.double()
    turned = source[..., :size] * cos.double()[:, None]
    turned = turned + source[..., partner] * (sin.double() * sign)[:, None]
    return torch.cat((turned, source[..., size:]), dim=-1)
