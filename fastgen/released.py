"""Weights whose only copy is the packed one: `release_weights`, and the way back.

A released parameter stays the object it was, with its name, shape, dtype, hooks and ties, and
becomes a `ReleasedParameter` by its class, as torch's own uninitialized parameters become plain
ones. Every operation of torch on it, from whatever module or optimizer, comes to its
`__torch_function__`, which raises; so nothing on the modules changes, no hook and no forward that a
copy or a fingerprint of the model would meet. Only what asks for no values is answered, and
`detach`, by which `state_dict` and with it every way of saving takes a weight: it unpacks.

What goes past `__torch_function__` (`torch.tensor(parameter)`) finds one NaN in the place of every
element: a view without memory that nothing can be written into.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from .errors import ReleasedWeightsError
from .kernels.packing import Layout, unpack

WAY_BACK = "fastgen.restore(model) unpacks the weights"
_ATTRIBUTE = "_fastgen_released"
_PATCH_MARK = "_fastgen_unguarded"


@dataclass
class PackedWeight:
    """A packed weight that is the only copy, and how many rows it has unpacked."""

    packed: torch.Tensor
    layout: Layout
    out_features: int

    def plain(self) -> torch.Tensor:
        """[out_features, in_features], contiguous."""
        with torch.inference_mode(False), torch.no_grad():
            return unpack(self.packed, self.layout, self.out_features)

    def rows(self, rows: slice, plain: torch.Tensor | None = None) -> torch.Tensor:
        """Some rows in memory of their own, exactly their size; plain: unpacked before."""
        with torch.inference_mode(False), torch.no_grad():
            part = (self.plain() if plain is None else plain)[rows]
            storage = part.untyped_storage()
            if storage.nbytes() == part.nbytes and part.is_contiguous():
                return part
            return part.clone(memory_format=torch.contiguous_format)


@dataclass
class _Release:
    """What a released parameter knows of its values, and of the copy it last gave away."""

    name: str
    weight: PackedWeight
    rows: slice
    copy: Callable[[], torch.Tensor | None] = field(default=lambda: None)
    counter: torch.Tensor | None = None
    version: int = 0

    @torch.inference_mode(False)
    @torch.no_grad()
    def hand_out(self) -> torch.Tensor:
        """The values; the same memory for all who hold them at once, as tied names do."""
        self.check_copies()
        copy = self.copy()
        if copy is None:
            copy = self.weight.rows(self.rows)
            self.copy = weakref.ref(copy)
            # Keeps the copy's count of changes in place, and not its memory.
            self.counter = copy.detach()
            self.counter.data = copy.new_empty(0)
            self.version = self.counter._version
            return copy
        return copy.detach()

    def check_copies(self) -> None:
        """Raise if somebody wrote into what was given away, which is not the weight."""
        if self.counter is not None and self.counter._version != self.version:
            raise ReleasedWeightsError(
                f"{self.name} was released (release_weights=True), and what its state_dict or "
                "detach() gave was written into; that is a copy, and the model has not changed: "
                f"{WAY_BACK}, which then can be changed"
            )


class ReleasedParameter(nn.Parameter):
    """A parameter without memory."""

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _ANSWERED:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is torch.Tensor.detach:
            return _release_of(args[0]).hand_out()
        names = [_release_of(arg).name for arg in tree_leaves([args, kwargs]) if is_released(arg)]
        is_property = getattr(func, "__name__", "") in ("__get__", "__set__")
        what = getattr(func.__self__ if is_property else func, "__name__", func)  # pyright: ignore
        raise ReleasedWeightsError(
            f"{what} needs the values of {names[0] if names else 'a weight'}, which was released "
            f"(release_weights=True); {WAY_BACK}"
        )

    def _plain(self) -> nn.Parameter:
        release = _release_of(self)
        return nn.Parameter(release.weight.rows(release.rows), self.requires_grad)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        if id(self) not in memo:
            memo[id(self)] = self._plain()
        return memo[id(self)]

    def __reduce_ex__(self, proto: Any) -> Any:
        plain = self._plain()
        vars(plain).update({k: v for k, v in vars(self).items() if k != _ATTRIBUTE})
        return plain.__reduce_ex__(proto)

    def __repr__(self) -> str:  # pyright: ignore
        return f"ReleasedParameter({_release_of(self).name}, {tuple(self.shape)}, {self.dtype})"


# What is asked of a parameter without its values: of properties to get and to set, and methods.
_READ = (
    *("shape", "dtype", "device", "layout", "requires_grad", "grad", "grad_fn", "is_leaf", "ndim"),
    *("nbytes", "itemsize", "_version", "is_meta", "is_cpu", "is_cuda", "is_sparse", "is_nested"),
)
_WRITTEN = ("requires_grad", "grad")
_CALLED = (
    *("size", "dim", "numel", "nelement", "element_size", "is_inference", "requires_grad_"),
    *("is_floating_point", "is_complex"),
)
_ANSWERED = frozenset(
    [getattr(torch.Tensor, name).__get__ for name in _READ]
    + [getattr(torch.Tensor, name).__set__ for name in _WRITTEN]
    + [getattr(torch.Tensor, name) for name in _CALLED]
    + [torch.is_floating_point, torch.is_complex]
)


def is_released(tensor: Any) -> bool:
    return type(tensor) is ReleasedParameter


def packed_of(tensor: Any) -> torch.Tensor | None:
    """The packed weight that a released parameter lies in, or None for another tensor."""
    return _release_of(tensor).weight.packed if is_released(tensor) else None


def _release_of(parameter: Any) -> _Release:
    return vars(parameter)[_ATTRIBUTE]


class ReleasedWeights:
    """The weights of one model that were released, and what stayed although it was packed.

    Parameters are referenced weakly, and hold their packed weight.
    """

    def __init__(self) -> None:
        self.num_bytes = 0
        self.kept: dict[str, tuple[int, str]] = {}  # name -> bytes, why
        self._parameters: list[weakref.ref[nn.Parameter]] = []

    def __bool__(self) -> bool:
        return bool(self._parameters)

    def release(
        self,
        name: str,
        members: Mapping[str, nn.Parameter],
        packed: torch.Tensor,
        layout: Layout,
        others: Mapping[str, torch.Tensor],
    ) -> bool:
        """Let go of the memory of parameters that lie one under another in a packed weight.

        Args:
            name: What is packed. others: All tensors of the model, any of `members` too.
        Returns: False if the weight has to stay; `kept` says why.
        """
        if (why := _why_kept(members, others)) is not None:
            self.keep(name, members, why)
            return False
        num_rows = sum(parameter.shape[0] for parameter in members.values())
        weight, start = PackedWeight(packed, layout, num_rows), 0
        for member, parameter in members.items():
            rows = slice(start, start := start + parameter.shape[0])
            self.num_bytes += parameter.nbytes
            _empty(parameter, _Release(member, weight, rows))
            self._parameters.append(weakref.ref(parameter))
        return True

    def keep(self, name: str, members: Mapping[str, nn.Parameter], why: str) -> None:
        self.kept[name] = sum(parameter.nbytes for parameter in members.values()), why

    def check_copies(self) -> None:
        """Raise ReleasedWeightsError if what state_dict gave away was written into."""
        for reference in self._parameters:
            if is_released(parameter := reference()):
                _release_of(parameter).check_copies()

    def restore(self) -> None:
        """Give every parameter its values, one packed weight at a time."""
        groups: dict[int, list[nn.Parameter]] = {}
        for reference in self._parameters:
            if (parameter := reference()) is not None and is_released(parameter):
                groups.setdefault(id(_release_of(parameter).weight), []).append(parameter)
        self._parameters, self.kept, self.num_bytes = [], {}, 0
        for key in list(groups):
            _fill(groups.pop(key))


def _why_kept(
    members: Mapping[str, nn.Parameter], others: Mapping[str, torch.Tensor]
) -> str | None:
    for name, parameter in members.items():
        if type(parameter) is not nn.Parameter:
            return f"{name} is a {type(parameter).__name__}"
        storage = parameter.untyped_storage()
        for other, tensor in others.items():
            plain = type(tensor) in (torch.Tensor, nn.Parameter)
            if tensor is parameter or not plain:
                continue
            if tensor.untyped_storage().data_ptr() == storage.data_ptr():
                return f"{name} shares its memory with {other}"
        if storage.nbytes() != parameter.nbytes or not parameter.is_contiguous():
            return f"{name} is not all of its memory, or not contiguous"
    return None


@torch.inference_mode(False)
@torch.no_grad()
def _empty(parameter: nn.Parameter, release: _Release) -> None:
    with contextlib.suppress(RuntimeError):  # made under inference_mode: counts nothing
        # A backward through a forward of before would find no weight: so it is refused.
        torch.autograd.graph.increment_version(parameter)
    nothing = torch.full((1,) * parameter.ndim, torch.nan, dtype=parameter.dtype)
    parameter.data = nothing.expand(parameter.shape)
    setattr(parameter, _ATTRIBUTE, release)
    parameter.__class__ = ReleasedParameter


@torch.inference_mode(False)
@torch.no_grad()
def _fill(parameters: list[nn.Parameter]) -> None:
    """Unpack the weight that these parameters lie in."""
    plain = _release_of(parameters[0]).weight.plain()
    for parameter in parameters:
        release = _release_of(parameter)
        values = release.weight.rows(release.rows, plain)
        parameter.__class__ = nn.Parameter
        parameter.data = values
        delattr(parameter, _ATTRIBUTE)


def guard(cls: type) -> None:
    """Make models of a class refuse to be moved, cast or loaded while weights are released.

    Without it they would raise in the midst of it, half of the modules changed. On the class, as
    the patch of generate: a copy of a model has no released weights and is not concerned.
    """
    if getattr(cls._apply, _PATCH_MARK, None) is not None:  # pyright: ignore
        return
    apply, load = cls._apply, cls._load_from_state_dict  # pyright: ignore

    @functools.wraps(apply)
    def _apply(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for name, parameter in self.named_parameters():
            if is_released(parameter):
                raise ReleasedWeightsError(
                    f"the model cannot be moved or cast: {name} was released "
                    f"(release_weights=True); {WAY_BACK}"
                )
        return apply(self, *args, **kwargs)

    @functools.wraps(load)
    def _load_from_state_dict(
        self: nn.Module, state_dict: Mapping[str, Any], prefix: str, *args: Any
    ) -> None:
        for name, parameter in self.named_parameters(remove_duplicate=False):
            if prefix + name in state_dict and is_released(parameter):
                raise ReleasedWeightsError(
                    f"{prefix}{name} cannot be loaded: it was released (release_weights=True); "
                    f"{WAY_BACK}"
                )
        load(self, state_dict, prefix, *args)

    setattr(_apply, _PATCH_MARK, apply)
    cls._apply, cls._load_from_state_dict = _apply, _load_from_state_dict  # pyright: ignore


def unguard(cls: type) -> None:
    """Take the guard away from a class."""
    if getattr(vars(cls).get("_apply"), _PATCH_MARK, None) is not None:
        del cls._apply, cls._load_from_state_dict  # pyright: ignore
