"""A launch of a Triton kernel as data: to be run, or compiled for a card that is not there.

Triton looks up a kernel by the types, values and alignment of everything it is given, each time.
Here whatever decides which code is compiled is a constant of the launch or a property of a pointer,
so that the key is short and a repeated launch costs a dictionary's look.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import INTERPRETED

_ALIGNMENT = 16  # bytes: what the widest load of a thread needs
_POINTER_TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_compiled: dict[tuple, Any] = {}


@dataclass(frozen=True)
class Card:
    """What the choice of a launch asks of a GPU. capability: 90 is sm_90."""

    capability: int
    num_multiprocessors: int
    shared_memory_bytes: int


# Shared memory that one block may take, by compute capability (CUDA C++ Programming Guide, table
# of technical specifications), and the processors of a card of that kind.
KNOWN_CARDS = {
    "sm_75": Card(75, 40, 64 * 1024),  # T4
    "sm_80": Card(80, 108, 163 * 1024),  # A100
    "sm_89": Card(89, 128, 99 * 1024),  # RTX 4090
    "sm_90": Card(90, 132, 227 * 1024),  # H100
    "sm_100": Card(100, 148, 227 * 1024),  # B200
}


@cache
def card_of(device: torch.device) -> Card:
    """The card a tensor is on; without one (meta, or interpreted on the CPU) an H100."""
    if device.type != "cuda":
        return KNOWN_CARDS["sm_90"]
    found = torch.cuda.get_device_properties(device)
    return Card(
        10 * found.major + found.minor,
        found.multi_processor_count,
        found.shared_memory_per_block_optin,
    )


@dataclass(frozen=True)
class Launch:
    """One launch. The kernel's parameters are the tensors, then the numbers, then the constants.

    kernel: a triton.jit function whose numbers are not specialized. grid: programs along three
    dimensions. tensors: None is a constant of the kernel, too. numbers: ints and floats that may
    be others at the next launch.
    """

    kernel: Any
    grid: tuple[int, int, int]
    tensors: Mapping[str, torch.Tensor | None]
    numbers: Mapping[str, int | float]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 1

    def run(self) -> None:
        """Queue the kernel on the current stream of its tensors' device."""
        if 0 in self.grid:
            return
        arguments = (*self.tensors.values(), *self.numbers.values(), *self.constants.values())
        if INTERPRETED:
            self.kernel[self.grid](*arguments)
            return
        device, pointers = None, []
        for tensor in self.tensors.values():
            if tensor is None:
                pointers.append(None)
            else:
                device = tensor.device
                pointers.append((tensor.dtype, tensor.data_ptr() % _ALIGNMENT == 0))
        constants = tuple(self.constants.values())
        key = (self.kernel, device, *pointers, constants, self.num_warps, self.num_stages)
        found = _compiled.get(key)
        if found is None:
            _compiled[key] = self.kernel[self.grid](*arguments, **self._options())
        else:
            found[self.grid](*arguments)

    def _options(self) -> dict[str, Any]:
        """Fused multiply-add is asked for: Triton's default for it differs between versions."""
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }

    def compile(self, card: Card) -> Any:
        """Triton's compiled kernel for a card, which need not be there. Pointers are aligned."""
        names = list(self.kernel.arg_names)
        signature: dict[str, str] = {}
        constants = dict(self.constants)
        for name, tensor in self.tensors.items():
            if tensor is None:
                constants[name] = None
            else:
                signature[name] = _POINTER_TYPES[tensor.dtype]
        for name, number in self.numbers.items():
            signature[name] = "i32" if isinstance(number, int) else "fp32"
        signature |= dict.fromkeys(constants, "constexpr")
        aligned = {
            (names.index(name),): [["tt.divisibility", _ALIGNMENT]]
            for name, tensor in self.tensors.items()
            if tensor is not None
        }
        source = ASTSource(
            self.kernel,
            {name: signature[name] for name in names},
            {(names.index(name),): value for name, value in constants.items()},
            aligned,
        )
        return triton.compile(
            source,
            target=GPUTarget("cuda", card.capability, 32),
            options=self._options(),
        )


def run_all(launches: list[Launch]) -> None:
    """Queue launches one after another."""
    for launch in launches:
        launch.run()
