"""The weights of a live model: the memory they share with a graph, and whether they changed."""

from __future__ import annotations

import ctypes
import dataclasses
import enum
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .checksum import checksums, words_of
from .errors import ReleasedWeightsError, UnsupportedModelError
from .kernels.packing import huge_pages, pack, packed_bytes, packed_shape
from .passes import InputSpec, MergePlan
from .released import WAY_BACK, ReleasedWeights, is_released, packed_of


class Change(enum.Enum):
    """What `LiveWeights.check` found."""

    NONE = "none"
    VALUES = "values"  # in place: whoever reads the memory sees them
    MEMORY = "memory"  # a weight is another tensor now, or lies elsewhere: lay out again


_RELEASED = ()  # the memory of a released weight


@dataclass(frozen=True)
class _Watched:
    """A parameter or buffer as it was when it was last looked at."""

    module: str
    attribute: str
    tensor: weakref.ref[torch.Tensor]
    memory: tuple
    version: int | None

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> _Watched:
        module, _, attribute = name.rpartition(".")
        return cls(module, attribute, weakref.ref(tensor), memory_of(tensor), version_of(tensor))


def memory_of(tensor: torch.Tensor) -> tuple:
    """Where a tensor's elements lie; changes when the tensor is moved, cast or reshaped."""
    if is_released(tensor):
        return _RELEASED
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def version_of(tensor: torch.Tensor) -> int | None:
    """torch's count of changes in place; None for a tensor made under inference_mode."""
    try:
        return tensor._version
    except RuntimeError:  # is_inference() forgets it where .data was set
        return None


@dataclass(frozen=True)
class _Merged:
    """A merged weight, and the parameters that lie in it, whatever they are called by now."""

    tensor: torch.Tensor
    members: tuple[weakref.ref[torch.Tensor], ...]
    rows: list[int]

    def holds(self, tensor: torch.Tensor) -> bool:
        start = self.tensor.data_ptr()
        return start <= tensor.data_ptr() < start + self.tensor.nbytes

    def residents(self) -> list[torch.Tensor]:
        """The members that are alive and have not been moved away."""
        alive = [ref() for ref in self.members]
        return [member for member in alive if member is not None and self.holds(member)]


class LiveWeights:
    """The tensors that a graph's weight inputs stand for, in a model that its user may change.

    Merged weights own the memory, and every member parameter is given a storage of its own over
    its part of it, so that no parameter exists twice, every way of saving sees whole tensors, and
    an optimizer step in place reaches the merged weight. Model and parameters are referenced
    weakly.

    Args:
        weight_check: How `check` looks for values that changed without a new version; see Config.
        memory: Gives so many bytes for packed weights: [num_bytes] uint8.
        merges_packed: Whether members lie in one merged weight even if the graph reads only a
            packed copy of it; not worth it where they are pages of a file.
    """

    def __init__(
        self,
        model: nn.Module,
        weight_check: str = "sampled",
        memory: Callable[[int], torch.Tensor] = huge_pages,
        merges_packed: bool = True,
    ) -> None:
        self.weight_check = weight_check
        self._memory, self._merges_packed = memory, merges_packed
        self.released = ReleasedWeights()
        self._model = weakref.ref(model)
        self._plans: dict[str, MergePlan] = {}
        self._merged: dict[MergePlan, _Merged] = {}
        self._watched: list[_Watched] = []
        self._words: list[torch.Tensor] = []
        self._sums: tuple[int, ...] = ()
        self._ids: frozenset[int] = frozenset()
        self._packed: dict[InputSpec, torch.Tensor] = {}
        self._packed_shapes: dict[InputSpec, tuple] = {}

    def attach(self, plans: Iterable[MergePlan], inputs: Iterable[InputSpec] = ()) -> None:
        """Lay out these merged weights and no others, one at a time.

        inputs: Of the graph that reads them.
        A plan that is laid out already, by the same parameters, stays as it is, and so does one
        whose parameters were released. After a failure nothing is laid out or released.
        """
        plans, model, read = tuple(plans), self._require_model(), set(inputs)
        self._plans = {plan.name: plan for plan in plans}
        self._forget()
        try:
            for plan in list(self._merged):
                if plan not in plans or not self._in_place(plan):
                    _split(self._merged.pop(plan), _tensors_of(model))
            for plan in plans:
                released = is_released(model.get_parameter(plan.members[0]))
                unread = not self._merges_packed and InputSpec("merged", plan.name) not in read
                if plan not in self._merged and not (released or unread):
                    self._merged[plan] = _merge(model, plan)
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Give every member and every released parameter memory of its own again."""
        self._forget()
        self.released.restore()
        while self._merged:
            _, merged = self._merged.popitem()
            _split(merged, _tensors_of(self._model()))
            del merged  # before the next is split: one layer at a time exists twice
        _return_free_memory()

    def let_go(self) -> None:
        """Forget the merged weights that no parameter lies in any more, and watch nothing."""
        self._forget()
        for plan, merged in list(self._merged.items()):
            if not merged.residents():
                del self._merged[plan]

    def resolve(
        self, inputs: Iterable[InputSpec], release: bool = False
    ) -> dict[InputSpec, torch.Tensor]:
        """The tensor of each weight input, packed copies made anew; from now on they are watched.

        Args:
            release: Free what is packed, one by one, unless the inputs have it plain, too.
        Raises: UnsupportedModelError for a weight whose values cannot be watched.
        """
        model, inputs = self._require_model(), tuple(inputs)
        found, watched = {}, {}
        to_pack: dict[InputSpec, dict[str, nn.Parameter]] = {}
        merged = {plan.name: merged.tensor for plan, merged in self._merged.items()}
        for spec in inputs:
            match spec.kind:
                case "parameter":
                    watched[spec.target] = model.get_parameter(spec.target)
                    found[spec] = watched[spec.target].detach()
                case "buffer":
                    found[spec] = watched[spec.target] = model.get_buffer(spec.target)
                case "merged":
                    found[spec] = merged[spec.target]
                case "packed":
                    members = self._members(spec.target)
                    watched.update(members)
                    packed = packed_of(next(iter(members.values())))
                    if packed is None:
                        to_pack[spec] = members
                    else:
                        found[spec] = packed
        self._make_room({spec: _joined_form(members) for spec, members in to_pack.items()})
        for spec, members in to_pack.items():
            weight = merged[spec.target] if spec.target in merged else _joined(members)
            found[spec] = pack(weight, spec.layout, self._packed.get(spec))
            del weight
            if release:
                merged.pop(spec.target, None)
                self._release(spec, members, found[spec], inputs)
        for plan in self._merged:
            watched.update((name, model.get_parameter(name)) for name in plan.members)
        self._watch(watched)
        _return_free_memory()
        return found

    def _make_room(self, weights: dict[InputSpec, torch.Tensor]) -> None:
        """Memory for packed copies, one after the other; what there is already serves again."""
        shapes = {spec: tuple(weight.shape) for spec, weight in weights.items()}
        if shapes != self._packed_shapes:
            self._packed, self._packed_shapes = _room_for(weights, self._memory), shapes

    def _members(self, target: str) -> dict[str, nn.Parameter]:
        """The parameters that a packed weight is made from, in its order."""
        plan, model = self._plans.get(target), self._require_model()
        names = (target,) if plan is None else plan.members
        return {name: model.get_parameter(name) for name in names}

    def _release(
        self,
        spec: InputSpec,
        members: dict[str, nn.Parameter],
        packed: torch.Tensor,
        inputs: tuple[InputSpec, ...],
    ) -> None:
        """Free what was packed, if nothing else reads it."""
        model, target = self._require_model(), spec.target
        assert spec.layout is not None
        plain = [model.get_parameter(spec.target) for spec in inputs if spec.kind == "parameter"]
        read = {id(parameter) for parameter in plain} & {id(member) for member in members.values()}
        if read or InputSpec("merged", target) in inputs:
            self.released.keep(target, members, "the graph reads it plain, too, as an embedding")
            return
        if any(other.target == target and other.layout != spec.layout for other in inputs):
            self.released.keep(target, members, "the graph reads it in two layouts")
            return
        everything: dict[str, torch.Tensor] = dict(model.named_buffers(remove_duplicate=False))
        everything.update(model.named_parameters(remove_duplicate=False))
        if (
            self.released.release(target, members, packed, spec.layout, everything)
            and target in self._plans
        ):
            self._merged.pop(self._plans[target], None)

    def _watch(self, tensors: dict[str, torch.Tensor]) -> None:
        self._watched = [_Watched.of(name, tensor) for name, tensor in tensors.items()]
        self._ids = frozenset(map(id, tensors.values()))
        if self.weight_check == "manual":
            return
        whole = {merged.tensor.data_ptr(): merged.tensor for merged in self._merged.values()}
        members = {name for plan in self._merged for name in plan.members}
        for name, tensor in tensors.items():
            if name in members or is_released(tensor):
                continue  # looked at as part of the merged weight, or cannot change
            if type(tensor) not in (torch.Tensor, nn.Parameter):
                raise UnsupportedModelError(
                    f"{name} is a {type(tensor).__name__}, whose values cannot be watched; "
                    'weight_check="manual" leaves that to you'
                )
            whole[tensor.data_ptr()] = tensor
        with torch.inference_mode(False), torch.no_grad():
            every_byte = self.weight_check == "full"
            self._words = [view for t in whole.values() for view in words_of(t, every_byte)]
        self._sums = checksums(self._words)

    def _forget(self) -> None:
        """Watch nothing, and hold nothing that would keep the memory of a weight."""
        self._watched, self._words, self._sums, self._ids = [], [], (), frozenset()
        self._packed, self._packed_shapes = {}, {}

    def check(self, look_at_values: bool = True) -> Change:
        """Whether the weights changed since `resolve`, or the last call that said VALUES.

        Args:
            look_at_values: Also compare checksums, as `weight_check` says.
        Raises: ReleasedWeightsError if a released weight is another tensor now, or somebody wrote
            into a copy of one, which is lost on the model.
        """
        self.released.check_copies()
        change = Change.NONE
        modules = dict(self._require_model().named_modules(remove_duplicate=False))
        for watched in self._watched:
            tensor = _tensor(modules.get(watched.module), watched.attribute)
            if (
                tensor is None
                or tensor is not watched.tensor()
                or memory_of(tensor) != watched.memory
            ):
                if watched.memory == _RELEASED:
                    name = f"{watched.module}.{watched.attribute}"
                    raise ReleasedWeightsError(
                        f"{name} was released (release_weights=True) and is another tensor now: "
                        f"{WAY_BACK}, all but this one"
                    )
                change = Change.MEMORY
            elif change is Change.NONE and version_of(tensor) != watched.version:
                change = Change.VALUES
        if change is Change.NONE and look_at_values and checksums(self._words) != self._sums:
            change = Change.VALUES
        if change is Change.VALUES:
            self.look_again()
        return change

    def look_again(self) -> None:
        """Take the values as they are now for those to compare with."""
        self._watched = [
            dataclasses.replace(watched, version=version_of(tensor))
            for watched in self._watched
            if (tensor := watched.tensor()) is not None
        ]
        self._sums = checksums(self._words)

    def holds_any(self, tensors: Iterable[Any]) -> bool:
        """Whether one of these very tensors is watched."""
        return any(id(tensor) in self._ids for tensor in tensors)

    def _in_place(self, plan: MergePlan) -> bool:
        """Whether the parameters a plan names are those in its merged weight, where they belong."""
        model, merged = self._require_model(), self._merged[plan]
        for name, ref, part in zip(
            plan.members, merged.members, merged.tensor.split(merged.rows), strict=True
        ):
            parameter = model.get_parameter(name)
            if parameter is not ref() or memory_of(parameter) != memory_of(part):
                return False
        return True

    def _require_model(self) -> nn.Module:
        model = self._model()
        assert model is not None, "the model is gone"
        return model


def _room_for(
    sources: dict[InputSpec, torch.Tensor], memory: Callable[[int], torch.Tensor]
) -> dict[InputSpec, torch.Tensor]:
    """Where the packed copies will lie, for layouts whose memory is ours."""
    ours = {spec: weight for spec, weight in sources.items() if spec.layout != "onednn"}
    sizes = [packed_bytes(weight.shape, spec.layout) for spec, weight in ours.items()]
    parts = memory(sum(sizes)).split(sizes) if sizes else ()
    return {
        spec: part.view(weight.dtype).view(packed_shape(weight.shape, spec.layout))
        for (spec, weight), part in zip(ours.items(), parts, strict=True)
    }


def _joined_form(members: dict[str, nn.Parameter]) -> torch.Tensor:
    """What members one above the other are like: a tensor without memory."""
    first, *_ = members.values()
    rows = sum(member.shape[0] for member in members.values())
    return torch.empty((rows, *first.shape[1:]), dtype=first.dtype, device="meta")


@torch.no_grad()
def _joined(members: dict[str, nn.Parameter]) -> torch.Tensor:
    """Members one above the other, for the moment; one alone as it is."""
    first, *others = members.values()
    return torch.cat([first, *others]) if others else first


def _tensor(module: nn.Module | None, attribute: str) -> torch.Tensor | None:
    if module is None:
        return None
    tensor = module._parameters.get(attribute)
    return module._buffers.get(attribute) if tensor is None else tensor


@torch.inference_mode(False)  # parameters must not become inference tensors
@torch.no_grad()
def _merge(model: nn.Module, plan: MergePlan) -> _Merged:
    members = [model.get_parameter(name) for name in plan.members]
    rows = [member.shape[0] for member in members]
    first = members[0]
    merged = torch.empty((sum(rows), *first.shape[1:]), dtype=first.dtype, device=first.device)
    # Through dlpack a part becomes a storage of its own: a slice would drag the whole merged
    # storage along wherever a single parameter is saved.
    parts = [torch.from_dlpack(part) for part in merged.split(rows)]
    for member, part in zip(members, parts, strict=True):
        part.copy_(member)
    for member, part in zip(members, parts, strict=True):
        member.data = part
    return _Merged(merged, tuple(map(weakref.ref, members)), rows)


@torch.inference_mode(False)
@torch.no_grad()
def _split(merged: _Merged, others: Iterable[torch.Tensor]) -> None:
    """Give the members memory of their own; `others` that the user put on a member's go along."""
    fresh: dict[int, torch.UntypedStorage] = {}
    for tensor in (*merged.residents(), *others):
        if type(tensor) not in (torch.Tensor, nn.Parameter) or not merged.holds(tensor):
            continue
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in fresh:
            fresh[storage.data_ptr()] = storage.clone()
        place = tensor.storage_offset(), tensor.shape, tensor.stride()
        tensor.data = tensor.data.new_empty(0).set_(fresh[storage.data_ptr()], *place)


def _return_free_memory() -> None:
    """What the members lay in goes back to the system; glibc keeps it where weights lie between."""
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def _tensors_of(model: nn.Module | None) -> list[torch.Tensor]:
    return [] if model is None else [*model.parameters(), *model.buffers()]
