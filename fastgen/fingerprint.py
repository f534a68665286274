"""The fingerprint of a live model: everything that a captured graph has frozen."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

SCALARS = (int, float, bool, str, type(None))
# What does not change the function that a module computes in evaluation mode: modes of training,
# the dictionaries that every module has, and notes of libraries that they have been here.
IGNORED_ATTRIBUTES = frozenset(
    {
        "training",
        "gradient_checkpointing",
        "_output_capturing_hooks_installed",
        "_is_accelerate_prepared",
        *vars(nn.Module()),
    }
)
# Forward hooks that change no value: transformers' collect hidden states where they are asked for,
# and gradient checkpointing marks the output of the embedding as differentiable.
_OUTPUT_CAPTURE = "transformers.utils.output_capturing"
_GRADIENT_MARKS = {
    (
        "transformers.modeling_utils",
        "PreTrainedModel.enable_input_require_grads.<locals>.make_inputs_require_grads",
    ),
    (
        "peft.peft_model",
        "PeftModel._prepare_model_for_gradient_checkpointing.<locals>.make_inputs_require_grad",
    ),
}


def marks_gradients(hook: Any) -> bool:
    """Whether a forward hook does nothing but `output.requires_grad_(True)`."""
    where = getattr(hook, "__module__", None), getattr(hook, "__qualname__", None)
    return where in _GRADIENT_MARKS


def _is_harmless(hook: Any) -> bool:
    return getattr(hook, "__module__", None) == _OUTPUT_CAPTURE or marks_gradients(hook)


def places_inputs(module: nn.Module) -> bool:
    """Whether a module's own forward is accelerate's, and only moves inputs to the one device."""
    attributes = vars(module)
    function = getattr(attributes.get("forward"), "func", None)
    where = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if where != ("accelerate.hooks", "add_hook_to_module.<locals>.new_forward"):
        return False
    hook = attributes.get("_hf_hook")
    for each in getattr(hook, "hooks", (hook,)):
        kind = type(each)
        if (kind.__module__, kind.__name__) != ("accelerate.hooks", "AlignDevicesHook"):
            return False
        if each.offload:  # pyright: ignore
            return False
    before = attributes.get("_old_forward")
    return getattr(before, "__func__", None) is type(module).forward


def _own_forward(module: nn.Module) -> Any:
    """A forward of this very module that does not do what its class says, or None."""
    own = vars(module).get("forward")
    return None if own is None or places_inputs(module) else own


def hooked_modules(model: nn.Module) -> list[str]:
    """Names of modules with forward hooks or forwards of their own, which a graph would skip."""
    names = []
    if _global_hooks():
        names.append("every module (torch.nn.modules.module)")
    for name, module in model.named_modules():
        if _foreign_hooks(module) or _own_forward(module) is not None:
            names.append(name or type(module).__name__)
    return names


def _foreign_hooks(module: nn.Module) -> list[Any]:
    if not module._forward_hooks and not module._forward_pre_hooks:
        return []
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return [hook for hook in hooks if not _is_harmless(hook)]


def _global_hooks() -> tuple[Any, ...]:
    registry = nn.modules.module
    return (
        *registry._global_forward_hooks.values(),
        *registry._global_forward_pre_hooks.values(),
    )


def fingerprint(model: nn.Module) -> tuple:
    """Everything that a captured graph has frozen: equal fingerprints, same graph. Hashable.

    Module tree, the code of every forward, plain attributes (scales, epsilons, adapter state),
    hooks, names, shapes, dtypes, devices and ties of parameters and buffers, and the config.
    It holds no module and no tensor.
    """
    modules, weights = [], []
    ties: dict[int, int] = {}  # one number for each tensor, and one for each storage
    for name, module in model.named_modules(remove_duplicate=False):
        attributes = vars(module)
        own = _own_forward(module)
        modules.append(
            (
                name,
                type(module),
                type(module).forward,
                None if own is None else id(own),  # itself, it would hold the model
                tuple(map(id, _foreign_hooks(module))),
                tuple(
                    [
                        (key, repr(value))
                        for key, value in attributes.items()
                        if key not in IGNORED_ATTRIBUTES and _is_plain(value)
                    ]
                ),
            )
        )
        for tensors in (module._parameters, module._buffers):
            weights.extend(
                (
                    key,
                    type(t),
                    t.shape,
                    t.dtype,
                    t.device,
                    t.is_inference(),
                    ties.setdefault(id(t), len(ties)),
                    ties.setdefault(storage_of(t), len(ties)),
                )
                for key, t in tensors.items()
                if t is not None
            )
        weights.append(None)  # the end of a module
    return (
        tuple(modules),
        tuple(weights),
        tuple(map(id, _global_hooks())),
        repr(vars(model.config) if hasattr(model, "config") else None),  # pyright: ignore
    )


def storage_of(tensor: torch.Tensor) -> int:
    """Where a tensor's storage lies; subclasses may have none, and stand for themselves."""
    if type(tensor) in (torch.Tensor, nn.Parameter):
        return tensor.untyped_storage().data_ptr()
    return id(tensor)


def _is_plain(value: Any) -> bool:
    """A scalar, or a container of nothing but plain values (a LoRA layer's scales are a dict)."""
    if isinstance(value, SCALARS):
        return True
    if isinstance(value, torch.Tensor | nn.Module):
        return False
    match value:
        case dict():
            return all(map(_is_plain, value)) and all(map(_is_plain, value.values()))
        case list() | tuple() | set() | frozenset():
            return all(map(_is_plain, value))
    return False
