"""A rewritten graph compiled ahead of time by AOTInductor, once for all lengths.

Weights, caches and all metadata of a batch are inputs of the program, in the graph's order, with
sizes that no code was specialised on: the archive holds no weight, and a cache is written where it
lies. Kernels stay calls of this package's: each is an op that the program calls by its name.
"""

from __future__ import annotations

import ctypes
import json
import re
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

from ..compiled import choose_kernels
from ..errors import ArtifactError, UnsupportedModelError
from ..fold_views import fold_views
from ..inductor import OPTIONS, opaque, opaque_module
from ..kernels import cpu, implementations
from ..kernels.cpu.build import instruction_sets
from ..native_code import compile_programs
from ..passes import CapturedGraph
from .aot_programs import MAX_CALLS, is_expressible, replace_programs
from .archive import check_archive, write_archive

FORMAT = 1
_KEY = "fastgen"  # of our own part of the metadata


@dataclass(frozen=True)
class Input:
    """What a program takes for an input: a size that may vary is named, equal ones alike.

    stride: None: contiguous.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    stride: tuple[int, ...] | None


@torch.inference_mode(False)  # what is compiled in it fails outside
@torch.no_grad()
def compile_aot(graph: CapturedGraph, path: Path) -> None:
    """Compile a graph after the passes and write the program; it runs on processors like this one.

    Args:
        graph: On the CPU; its kernels are not chosen yet.
        path: The archive, `*.pt2`; replaced if it is there.
    Raises: UnsupportedModelError if the graph cannot be compiled, or not on this machine.
    """
    device = graph.output_value().device
    if device.type != "cpu":
        raise UnsupportedModelError(
            f"programs are compiled ahead of time for CPUs, this model is on {device.type}; "
            'export it with program="direct"'
        )
    if graph.deterministic:
        raise UnsupportedModelError(
            "deterministic=True: Inductor chooses sums by the shapes of the batch; "
            'export it with program="direct"'
        )
    lowered = graph.copy()
    choose_kernels(lowered)
    written = _written_inputs(lowered)
    fold_views(lowered.graph)
    programs, _ = compile_programs(lowered.graph, fewest=1, most=MAX_CALLS)
    if not all(map(is_expressible, programs)):
        raise UnsupportedModelError(
            "a run of kernels has no result, or tensors of many dimensions, which AOTInductor's "
            'code cannot call; export it with program="direct"'
        )
    module, examples = opaque_module(lowered)
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    shims, functions = replace_programs(module.graph, {inputs[index] for index in written})
    if functions:
        example: Any = examples[0]
        with example.fake_mode:
            examples.append(torch.empty(1 + len(functions), dtype=torch.int64))
    module.recompile()
    metadata = {_KEY: json.dumps(_description(lowered, functions))}
    output = next(node for node in module.graph.nodes if node.op == "output")
    if not isinstance(output.args[0], tuple):  # as AOTInductor wants it
        output.args = ((output.args[0],),)
        module.recompile()
    with tempfile.TemporaryDirectory() as folder:
        options = {
            **OPTIONS,
            "aot_inductor.package": True,
            "aot_inductor.output_path": folder,
            "aot_inductor.metadata": metadata,
            "aot_inductor.custom_ops_to_c_shims": shims,
            "aot_inductor.enable_line_tables": False,
        }
        try:
            import torch._inductor as inductor  # 1 s, for those who use it

            files: Any = inductor.aot_compile(module, tuple(examples), options=options)
        except Exception as error:
            lines = str(error).strip().splitlines()
            raise UnsupportedModelError(
                f"torch's AOTInductor cannot compile the graph ({type(error).__name__}: "
                f'{lines[0] if lines else ""}); export it with program="direct"'
            ) from error
        write_archive(files, path)


def _written_inputs(lowered: CapturedGraph) -> set[int]:
    """The numbers of the inputs that kernels write into."""
    written: set[fx.Node] = set()
    for node in lowered.graph.nodes:
        if (kernel := node.meta.get("kernel")) is None:
            continue
        schema = getattr(torch.ops.fastgen, kernel.op.removeprefix("fastgen::")).default._schema
        for argument, given in zip(schema.arguments, node.args, strict=False):
            if argument.is_write:
                fx.map_arg(given, written.add)
    return {index for index, node in enumerate(lowered.placeholders()) if node in written}


def _description(lowered: CapturedGraph, functions: Sequence[str]) -> dict[str, Any]:
    """What `load_aot` has to know before it may open the archive.

    functions: Of the library, which the code calls by their addresses.
    """
    kernels = {
        (kernel.op, kernel.name)
        for node in lowered.graph.nodes
        if (kernel := node.meta.get("kernel")) is not None and node.target is kernel.function
    }
    return {
        "format": FORMAT,
        "torch": _torch_version(),
        "device": lowered.output_value().device.type,
        "isa": cpu.isa() if cpu.why_missing() is None else "none",
        "instruction_sets": sorted(instruction_sets()),
        "kernels": sorted(kernels),
        "functions": list(functions),
        "inputs": [asdict(item) for item in _inputs(lowered)],
        "num_outputs": len(lowered.outputs()),
    }


def _inputs(graph: CapturedGraph) -> list[Input]:
    found = []
    for node in graph.placeholders():
        spec, value = graph.inputs[node.name], node.meta["val"]
        shape = tuple(
            size
            if isinstance(size, int)
            else f"cache {dim}"  # all caches share them
            if spec.kind == "cache"
            else str(size)
            for dim, size in enumerate(value.shape)
        )
        fixed = all(isinstance(size, int) for size in shape)
        stride = tuple(value.stride()) if fixed and not value.is_contiguous() else None
        dtype = str(value.dtype).removeprefix("torch.")
        found.append(Input(f"{spec.kind} {spec.target}", dtype, shape, stride))
    return found


def _torch_version() -> str:
    return torch.__version__.partition("+")[0]


def load_aot(path: Path, device: torch.device | str = "cpu") -> AotProgram:
    """Load a program; nothing of the file is opened before its members and metadata are checked.

    Raises: ArtifactError for a file that is no program, or none for this device, processor,
        version of torch or of this package.
    """
    found = check_archive(path)
    try:
        description = json.loads(found[_KEY])
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
    if description["torch"] != _torch_version():
        raise ArtifactError(
            f"{path} is compiled for torch {description['torch']}, this is {_torch_version()}; "
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
