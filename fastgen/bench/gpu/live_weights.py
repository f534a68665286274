"""Of section `equality`: the engine reads the model's own weights, and gives them back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ... import api
from .findings import Finding, checked
from .tiny_models import prompt, tiny_model

LENGTH = 33
# Logits of two orders of the same sums differ by roundings of the largest one.
_ROUNDINGS = 64


def run(device: str) -> Iterator[Finding]:
    torch.backends.cuda.matmul.allow_tf32 = False
    yield checked("merged weights are the parameters", _shared, device)
    yield checked("logits follow a step of fused AdamW", _after_a_step, device)
    yield checked("restore gives bit-equal logits", _restored, device)


def _shared(device: str) -> dict[str, Any]:
    model = tiny_model("llama", device)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    api.optimize(model)
    merged = list(api.require(model).weights._merged.values())
    for layer in model.model.layers:
        attention = layer.self_attn
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            assert any(one.holds(projection.weight) for one in merged), "not in a merged weight"
    details: dict[str, Any] = {"merged_weights": len(merged), "weight_bytes": weights}
    if device == "cuda":
        grown = torch.cuda.memory_allocated() - before
        assert grown < weights / 4, f"{grown} bytes more for {weights} bytes of weights"
        details["grown_bytes"] = grown
    api.restore(model)
    return details


def _after_a_step(device: str) -> dict[str, Any]:
    model = tiny_model("llama", device)
    ids = torch.tensor([prompt(LENGTH, 0)], device=device)
    api.optimize(model)
    before = _next_logits(model, ids)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    after = _next_logits(model, ids)
    assert not api.require(model).fallbacks, "transformers' loop made the logits"
    api.restore(model)
    with torch.no_grad():
        expected = model(ids).logits[:, -1]
    allowed = _ROUNDINGS * torch.finfo(torch.float32).eps * float(expected.abs().max())
    moved, error = (float((logits - expected).abs().max()) for logits in (before, after))
    assert error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}"
    assert moved > 100 * allowed, f"the step moved the logits by {moved:.2e} only"
    return {"error": error, "allowed": allowed, "moved": moved}


def _next_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    out = model.generate(
        ids,
        max_new_tokens=1,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.logits[0]


def _restored(device: str) -> dict[str, Any]:
    model = tiny_model("llama", device)
    ids = torch.tensor([prompt(LENGTH, 1)], device=device)
    with torch.no_grad():
        before = model(ids).logits
        api.optimize(model)
        _next_logits(model, ids)
        api.restore(model)
        after = model(ids).logits
    assert torch.equal(before, after), f"off by {float((before - after).abs().max()):.2e}"
    return {}
