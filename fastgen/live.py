"""What is watched on a live model: its fingerprint, and the memory its weights live in."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .passes import InputSpec, MergePlan

_SCALARS = (int, float, bool, str, type(None))
# What does not change the function that a module computes in evaluation mode: modes of training,
# the dictionaries that every module has, and a note of transformers' that its hooks are in place.
_IGNORED_ATTRIBUTES = {
    "training",
    "gradient_checkpointing",
    "_output_capturing_hooks_installed",
    *vars(nn.Module()),
}


def hooked_modules(model: nn.Module) -> list[str]:
    """Names of modules with forward hooks or forwards of their own, which a graph would skip.

    transformers' own hooks that collect hidden states are inactive unless asked for, and left out.
    """
    names = []
    for name, module in model.named_modules():
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        foreign = [hook for hook in hooks if not _is_output_capture(hook)]
        if foreign or "forward" in vars(module):
            names.append(name or type(module).__name__)
    return names


def _is_output_capture(hook: Any) -> bool:
    return getattr(hook, "__module__", None) == "transformers.utils.output_capturing"


def fingerprint(model: nn.Module) -> tuple:
    """Everything that a captured graph has frozen: equal fingerprints, same graph.

    Module tree, the code of every forward, plain attributes (scales, epsilons, adapter state),
    hooks, names, shapes, dtypes, devices and ties of parameters and buffers, and the config.
    """
    modules = []
    for name, module in model.named_modules():
        attributes = vars(module)
        modules.append(
            (
                name,
                type(module),
                type(module).forward,
                attributes.get("forward"),
                tuple(id(h) for h in module._forward_hooks.values() if not _is_output_capture(h)),
                tuple(map(id, module._forward_pre_hooks.values())),
                tuple(
                    (key, repr(value))
                    for key, value in attributes.items()
                    if key not in _IGNORED_ATTRIBUTES and _is_plain(value)
                ),
            )
        )
    tensors: dict[int, int] = {}
    named = (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    )
    weights = tuple(
        (name, tensor.shape, tensor.dtype, tensor.device, tensors.setdefault(id(tensor), index))
        for index, (name, tensor) in enumerate(named)
    )
    return tuple(modules), weights, repr(vars(getattr(model, "config", None)))


def _is_plain(value: Any) -> bool:
    """A scalar, or a container of nothing but plain values (a LoRA layer's scales are a dict)."""
    match value:
        case dict():
            return all(map(_is_plain, value)) and all(map(_is_plain, value.values()))
        case list() | tuple() | set() | frozenset():
            return all(map(_is_plain, value))
    return isinstance(value, _SCALARS)


def memory_of(tensor: torch.Tensor) -> tuple:
    """Where a tensor's elements lie; changes when the tensor is replaced, moved or cast."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


class LiveWeights:
    """The tensors that a graph's weight inputs stand for, in a model that its user may change.

    Merged weights own the memory, and every member parameter is given a storage of its own over
    its part of it, so that no parameter exists twice, every way of saving sees whole tensors, and
    an optimizer step in place reaches the merged weight. The model is referenced weakly.
    """

    def __init__(self, model: nn.Module, plans: Iterable[MergePlan]) -> None:
        self._model = weakref.ref(model)
        self._plans = tuple(plans)
        self._merged: dict[str, torch.Tensor] = {}
        self._memory: dict[str, tuple] = {}

    def attach(self) -> None:
        """Lay out the merged weights, one at a time, from the parameters as they are now."""
        model = self._require_model()
        try:
            for plan in self._plans:
                self._merged[plan.name] = _merge(model, plan)
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Give every member parameter memory of its own again; a no-op for a model that is gone."""
        model = self._model()
        for plan in self._plans if model is not None else ():
            merged = self._merged.pop(plan.name, None)
            if merged is not None:
                _split(model, plan, merged)  # pyright: ignore
        self._merged.clear()

    def resolve(self, inputs: Iterable[InputSpec]) -> dict[InputSpec, torch.Tensor]:
        """The tensor of each parameter, buffer or merged input, and note where it lies."""
        model = self._require_model()
        found = {}
        for spec in inputs:
            match spec.kind:
                case "parameter":
                    found[spec] = model.get_parameter(spec.target).detach()
                case "buffer":
                    found[spec] = model.get_buffer(spec.target)
                case "merged":
                    found[spec] = self._merged[spec.target]
        names = {spec.target for spec in found if spec.kind != "merged"}
        names.update(member for plan in self._plans for member in plan.members)
        self._memory = {name: memory_of(_tensor(model, name)) for name in names}
        return found

    def current(self) -> bool:
        """Whether every tensor still lies where `resolve` found it."""
        model = self._require_model()
        try:
            return all(memory_of(_tensor(model, name)) == at for name, at in self._memory.items())
        except AttributeError:
            return False

    def _require_model(self) -> nn.Module:
        model = self._model()
        assert model is not None, "the model is gone"
        return model


def _tensor(model: nn.Module, name: str) -> torch.Tensor:
    module_name, _, attribute = name.rpartition(".")
    return getattr(model.get_submodule(module_name), attribute)


@torch.inference_mode(False)
@torch.no_grad()
def _merge(model: nn.Module, plan: MergePlan) -> torch.Tensor:
    members = [model.get_parameter(name) for name in plan.members]
    rows = [member.shape[0] for member in members]
    first = members[0]
    merged = torch.empty((sum(rows), *first.shape[1:]), dtype=first.dtype, device=first.device)
    for member, part in zip(members, merged.split(rows), strict=True):
        part.copy_(member)
        # Through dlpack the part becomes a storage of its own: a slice would drag the whole
        # merged storage along wherever a single parameter is saved.
        member.data = torch.from_dlpack(part)
    return merged


@torch.inference_mode(False)
@torch.no_grad()
def _split(model: nn.Module, plan: MergePlan, merged: torch.Tensor) -> None:
    start, size = merged.data_ptr(), merged.numel() * merged.element_size()
    for name in plan.members:
        try:
            member = model.get_parameter(name)
        except AttributeError:
            continue  # the user has taken this module out of the model
        if start <= member.data_ptr() < start + size:
            member.data = member.data.clone()
