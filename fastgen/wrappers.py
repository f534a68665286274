"""What people put around a model: a PEFT wrapper is seen through, where that changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from .errors import UnsupportedModelError


def unwrap(model: Any) -> Any:
    """The transformers model that a PEFT wrapper runs, or what was given."""
    return model.get_base_model() if _is_peft_wrapper(model) else model


def _is_peft_wrapper(model: Any) -> bool:
    return hasattr(model, "get_base_model") and hasattr(model, "peft_config")


def wrapper_refusal(model: Any) -> str | None:
    """Why the model inside does not compute what the wrapper does, or None.

    So it is with an adapter that is not in the model's modules: a prompt or a prefix that the
    wrapper adds to each call, or one that begins somewhere in the prompt.
    """
    for name, config in model.peft_config.items() if _is_peft_wrapper(model) else ():
        if getattr(config, "is_prompt_learning", False):
            return f"the PEFT adapter {name!r} ({config.peft_type.value}) adds to each call's input"
        if getattr(config, "alora_invocation_tokens", None) is not None:
            return f"the PEFT adapter {name!r} (aLoRA) begins at tokens of the prompt"
    return None


def replaces_inputs(model: Any) -> bool:
    """Whether somebody else prepares this model's inputs, as a wrapper with a learned prompt does.

    PEFT leaves the model's own method behind on the instance; that is none.
    """
    own = vars(model).get("prepare_inputs_for_generation")
    of_class = getattr(type(model), "prepare_inputs_for_generation", None)
    return own is not None and getattr(own, "__func__", None) is not of_class


def copy_of_modules(
    model: Any, share: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor
) -> Any:
    """A model's modules in evaluation mode, over the same memory of parameters and buffers.

    share: What stands for each of them in the copy.
    Raises: UnsupportedModelError if the modules cannot be copied.
    """
    shared = {id(tensor): share(tensor) for tensor in (*model.parameters(), *model.buffers())}
    try:
        return copy.deepcopy(model, shared).eval()
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be copied: {type(error).__name__}: {error}"
        ) from error
