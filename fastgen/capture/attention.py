"""What transformers calls for attention and masks while a model is captured.

Attention is found by registration: every call goes to the function registered as "fastgen", which
emits one `fastgen::attention`. Masks are found the same way: the registered mask function emits a
marker that names the kind of mask. Models that write their attention themselves look up nothing but
the mask function, and are given the same marker as a mask of numbers, as they expect it.
"""

from __future__ import annotations

import contextlib
import inspect
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedModelError
from .mask_marker import mask_marker

ATTENTION_NAME = "fastgen"
# For models with attention code of their own.
OWN_ATTENTION_NAME = "fastgen_own"

# Passed through to attention by the models, and without effect on a forward without a cache:
# positions have been applied by RoPE, the rest says what to return.
_IGNORED_KWARGS = {
    "position_ids",
    "cache_position",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "logits_to_keep",
}

# What the attention that the captured model would use without fastgen does not look at.
_lost: ContextVar[frozenset[str]] = ContextVar("lost", default=frozenset())


def _attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls for attention while a graph is captured.

    query: [1, num_heads, num_tokens, head_dim]; returns [1, num_tokens, num_heads, v_head_dim].
    """
    where = f"attention of layer {getattr(module, 'layer_idx', '?')}"
    for name, given in kwargs.items():
        if given is not None and name not in _IGNORED_KWARGS:
            raise UnsupportedModelError(f"{where}: {name}={given!r} is not understood")
    if dropout:
        raise UnsupportedModelError(f"{where}: dropout={dropout} is active in evaluation mode")
    if is_causal is False or (is_causal is None and getattr(module, "is_causal", True) is False):
        raise UnsupportedModelError(f"{where}: is_causal=False; only causal attention is supported")
    layer_idx = getattr(module, "layer_idx", None)
    if not isinstance(layer_idx, int):
        raise UnsupportedModelError(f"{where}: layer_idx={layer_idx!r}, an int is needed")
    if attention_mask is None:
        raise UnsupportedModelError(f"{where}: no mask was made, so that causality is not known")
    softcap = None if "softcap" in _lost.get() else softcap
    s_aux = None if "s_aux" in _lost.get() else s_aux
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = torch.ops.fastgen.attention(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        attention_mask,
        scale,
        sliding_window or 0,
        softcap or 0.0,
        s_aux,
        layer_idx,
    )
    return output.unsqueeze(0), None


def _lost_arguments(own: str) -> frozenset[str]:
    """What transformers' own attention of a model takes and does not look at, by trying it.

    Its sdpa drops what it does not know: soft capping, in releases that let Gemma 2 use it.
    """
    from transformers import AttentionInterface

    if own != "sdpa":
        return frozenset()
    sdpa, one, lost = AttentionInterface()["sdpa"], torch.ones(1, 1, 1, 1), set()
    for name, value in (("softcap", 1.0), ("s_aux", torch.zeros(1))):
        if name not in inspect.signature(sdpa).parameters:
            with contextlib.suppress(ValueError):  # newer ones say that they cannot
                sdpa(nn.Module(), one, one, one, None, **{name: value})
                lost.add(name)
    return frozenset(lost)


def _mask_forward(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Any,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """What transformers calls to make a mask while a graph is captured.

    Some models make masks that no attention here reads (a decoder's for its encoder), so that one
    which is not understood is refused only where it is read.
    """
    kind, size = _kind_of_mask(mask_function)
    if kind is None:
        unread = torch.ones((batch_size, kv_length), dtype=torch.bool, device=kwargs.get("device"))
        return mask_marker(unread, _mask_name(mask_function), 0)
    if attention_mask is None:
        raise UnsupportedModelError("a mask was made without the padding mask of the call")
    return mask_marker(attention_mask, kind, size)


def _own_mask_forward(
    *args: Any, dtype: torch.dtype = torch.float32, **kwargs: Any
) -> torch.Tensor:
    """A mask to add to the scores, as models with attention code of their own expect it."""
    marker = _mask_forward(*args, **kwargs)
    seen = torch.zeros((), dtype=dtype, device=marker.device)
    return torch.where(marker, seen, torch.finfo(dtype).min)


# Overlays of the causal mask: their name in transformers, and where they keep their size.
_OVERLAYS = {
    "sliding_window_overlay": ("sliding", "sliding_window"),
    "chunked_overlay": ("chunked", "chunk_size"),
}


def _kind_of_mask(mask_function: Any) -> tuple[str | None, int]:
    """What the marker says of a mask; the kind is None if it is not understood."""
    from transformers import masking_utils

    if mask_function is masking_utils.causal_mask_function:
        return "causal", 0
    if not mask_function.__qualname__.startswith("and_masks.<locals>"):
        return None, 0
    parts = inspect.getclosurevars(mask_function).nonlocals.get("mask_functions", ())
    others = [part for part in parts if part is not masking_utils.causal_mask_function]
    if len(parts) != 2 or len(others) != 1:
        return None, 0
    maker, _, made = others[0].__qualname__.partition(".<locals>")
    if not made or maker not in _OVERLAYS:
        return None, 0
    kind, size = _OVERLAYS[maker]
    return kind, int(inspect.getclosurevars(others[0]).nonlocals[size])


def _mask_name(mask_function: Any) -> str:
    """What to call a mask function in an error: its parts too, if it is made of others."""
    name = getattr(mask_function, "__qualname__", repr(mask_function)).split(".<locals>")[0]
    if name in ("and_masks", "or_masks"):
        parts = inspect.getclosurevars(mask_function).nonlocals.get("mask_functions", ())
        name += f"({', '.join(map(_mask_name, parts))})"
    return name


def register() -> None:
    """Make transformers know both names; nothing is looked up under them but by a capture."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    for name in (ATTENTION_NAME, OWN_ATTENTION_NAME):  # of a composite, some parts may ask for it
        AttentionInterface.register(name, _attention_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, _mask_forward)
    AttentionMaskInterface.register(OWN_ATTENTION_NAME, _own_mask_forward)


def set_attention(clone: Any) -> bool:
    """Let a copy call fastgen's attention; if it calls its own code, let it ask for masks alone.

    Returns: whether it calls fastgen's.
    """
    text_config = clone.config.get_text_config()
    own = text_config._attn_implementation
    _lost.set(_lost_arguments(own))
    if own == "eager":  # which looks at masks, not at flags
        for module in clone.modules():
            if getattr(module, "is_causal", None) is False:
                module.is_causal = True
    for part in clone.modules():  # itself, or its language model: an image tower may forbid all
        is_text = getattr(part, "config", None) is text_config
        if (part is clone or is_text) and hasattr(part, "set_attn_implementation"):
            if part._can_set_attn_implementation():  # asked first: it would warn
                part.set_attn_implementation(ATTENTION_NAME)
            if text_config._attn_implementation == ATTENTION_NAME:
                return True
    # No public way: set_attn_implementation leaves classes alone that write their attention. The
    # configurations are the copy's own.
    for module in clone.modules():
        if (config := getattr(module, "config", None)) is not None:
            config._attn_implementation_internal = OWN_ATTENTION_NAME
    return False
