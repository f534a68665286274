"""Programs that aot_compiler.py compiled, loaded: nothing of torch's compiler is needed.

An archive says of itself what it was compiled for and with, and that is compared with what is here
before its library is opened. Kernels that are no part of it are this package's: functions of the
C++ library by their addresses, the others as ops that the program calls by their names.
"""

from __future__ import annotations

import ctypes
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import ArtifactError
from ..kernels import cpu, implementations
from ..kernels.cpu.build import instruction_sets
from ..passes import CapturedGraph
from .archive import check_archive

FORMAT = 1
DESCRIPTION = "fastgen"  # our own part of the metadata


@dataclass(frozen=True)
class Input:
    """What a program takes for an input: a size that may vary is named, equal ones alike.

    stride: None: contiguous.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    stride: tuple[int, ...] | None


def torch_version() -> str:
    return torch.__version__.partition("+")[0]


def load_aot(path: Path, device: torch.device | str = "cpu") -> AotProgram:
    """Load a program; nothing of the file is opened before its members and metadata are checked.

    Raises: ArtifactError for a file that is no program, or none for this device, processor,
        version of torch or of this package.
    """
    found = check_archive(path)
    try:
        description = json.loads(found[DESCRIPTION])
        number = description["format"]
        if number != FORMAT:
            raise ArtifactError(
                f"{path} has the format {number}, this fastgen reads {FORMAT}; export it again"
            )
        _check_machine(path, description, torch.device(device))
        inputs = [Input(**_tuples(item)) for item in description["inputs"]]
        num_outputs = description["num_outputs"]
        kernels = [(op, name) for op, name in description["kernels"]]
        functions = description["functions"]
        addresses = [_address(path, name) for name in functions]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"{path}: the program's description is damaged: {error}") from error
    for op, name in kernels:
        _register(path, op, name)
    try:
        loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", True, 1, -1)  # pyright: ignore
    except RuntimeError as error:
        raise ArtifactError(f"{path} cannot be loaded: {error}") from error
    return AotProgram(loader.boxed_run, inputs, num_outputs, addresses)


def _tuples(item: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in item.items()}


def _check_machine(path: Path, description: dict[str, Any], device: torch.device) -> None:
    again = "export it again here"
    if description["device"] != device.type:
        raise ArtifactError(
            f"{path} is compiled for {description['device']}, asked for is {device.type}; {again}"
        )
    if description["torch"] != torch_version():
        raise ArtifactError(
            f"{path} is compiled for torch {description['torch']}, this is {torch_version()}; "
            f"{again}"
        )
    if lacking := sorted(set(description["instruction_sets"]) - instruction_sets()):
        raise ArtifactError(
            f"{path} is compiled for a processor that has {', '.join(lacking)}, "
            f"this one has not; {again}"
        )
    needed = description["isa"]
    if needed == "none":
        return
    if (why := cpu.why_missing()) is not None:
        raise ArtifactError(f"{path} needs fastgen's C++ kernels: {why}")
    if cpu.ISA_LEVELS.index(cpu.isa()) < cpu.ISA_LEVELS.index(needed):
        raise ArtifactError(
            f"{path} is compiled for kernels that use {needed}, here they use {cpu.isa()}; {again}"
        )


def _register(path: Path, op: str, name: str) -> None:
    """Make a kernel an op, by the name under which the program calls it."""
    try:
        kernel = next(kernel for kernel in implementations(op) if kernel.name == name)
    except (KeyError, StopIteration):
        raise ArtifactError(
            f"{path} calls the kernel {name!r} of {op}, which this fastgen has not; export it again"
        ) from None
    from ..inductor import opaque  # with what defines ops, for those who have such kernels

    opaque(kernel)


def _address(path: Path, name: str) -> int:
    """Where a function of the C++ library lies."""
    function = getattr(cpu.library(), name, None) if re.fullmatch(r"\w+_call", name) else None
    if function is None:
        raise ArtifactError(
            f"{path} calls {name!r}, which fastgen's C++ library here has not; export it again"
        )
    return ctypes.cast(function, ctypes.c_void_p).value or 0


class AotProgram:
    """A loaded program: it takes what the graph takes, in that order, and gives what it gives.

    One thread at a time may call it. Of tensors that the last call had, too, the checks are not
    repeated; `forget` lets go of them.
    """

    def __init__(
        self, run: Any, inputs: Sequence[Input], num_outputs: int, addresses: Sequence[int]
    ) -> None:
        self.inputs = tuple(inputs)
        self._kernels = torch.tensor([0, *addresses])  # how many threads, where the kernels are
        self._run, self._num_outputs = run, num_outputs
        self._known: list[Any] = [None] * len(self.inputs)
        self._sizes: dict[str, int] = {}

    def __call__(self, *tensors: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Run one step. Raises: ValueError for a tensor that the program was not compiled for."""
        if len(tensors) != len(self.inputs):
            raise ValueError(f"the program takes {len(self.inputs)} tensors, got {len(tensors)}")
        new = [i for i, tensor in enumerate(tensors) if tensor is not self._known[i]]
        if new:
            self._check(tensors, new)
        given = list(tensors)
        if len(self._kernels) > 1:
            self._kernels.numpy()[0] = torch.get_num_threads()
            given.append(self._kernels)
        results = self._run(given)
        return results[0] if self._num_outputs == 1 else tuple(results)

    def check_inputs(self, graph: CapturedGraph) -> None:
        """Raise ArtifactError unless it was compiled from a graph with such inputs."""
        names = [f"{spec.kind} {spec.target}" for spec in graph.inputs.values()]
        if [item.name for item in self.inputs] != names:
            raise ArtifactError("the compiled program takes other inputs than the graph")

    def forget(self) -> None:
        """Hold no tensor of the last call."""
        self._known = [None] * len(self.inputs)
        self._sizes = {}

    def _check(self, tensors: Sequence[torch.Tensor], new: list[int]) -> None:
        """The code trusts dtypes, sizes and strides."""
        sizes = dict(self._sizes)
        given = {
            name: size
            for i in new
            for name, size in zip(self.inputs[i].shape, tensors[i].shape, strict=False)
            if isinstance(name, str)
        }
        sizes.update(given)
        changed = {name for name, size in given.items() if self._sizes.get(name) != size}
        self._known = [None] * len(self.inputs)  # nothing is known if one does not fit
        for i, item in enumerate(self.inputs):
            if i in new or not changed.isdisjoint(item.shape):
                _check_tensor(item, tensors[i], sizes)
        self._known, self._sizes = list(tensors), sizes


def _check_tensor(item: Input, tensor: torch.Tensor, sizes: dict[str, int]) -> None:
    shape = [sizes.get(size, -1) if isinstance(size, str) else size for size in item.shape]
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype != item.dtype or list(tensor.shape) != shape or tensor.device.type != "cpu":
        raise ValueError(
            f"{item.name} must be {shape} {item.dtype} on the CPU, "
            f"got {list(tensor.shape)} {dtype} on {tensor.device.type}"
        )
    if item.stride is None:
        fits = tensor.is_contiguous()
    else:
        fits = all(
            size <= 1 or step == wanted
            for size, step, wanted in zip(shape, tensor.stride(), item.stride, strict=True)
        )
    if not fits:
        wanted = "contiguous" if item.stride is None else f"with the strides {list(item.stride)}"
        raise ValueError(f"{item.name} must be {wanted}, has the strides {list(tensor.stride())}")
