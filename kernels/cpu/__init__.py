"""The C++ implementations of ops: the sources, how they are built, and how tensors are passed."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

import torch

from ..registry import CallSite
from .build import MissingLibraryError, library, why_missing

__all__ = [
    "ISA_LEVELS",
    "Kernel",
    "MissingLibraryError",
    "Recorder",
    "function",
    "isa",
    "library",
    "num_threads",
    "recordable",
    "recording",
    "refuses",
    "why_missing",
]

Function = TypeVar("Function", bound=Callable)

_LETTERS = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "d": ctypes.c_double, "b": ctypes.c_int}
_DTYPES = (torch.float32, torch.bfloat16)


# What the kernels may use of the processor, each more than the one before it (isa.h).
ISA_LEVELS = ("generic", "avx512_bf16", "amx")


@functools.cache
def isa() -> str:
    """The instructions that the kernels use: the best there are, or fewer, as FASTGEN_CPU_ISA says.

    Raises: MissingLibraryError. ValueError for a level that is unknown or not to be had here.
    """
    highest = ISA_LEVELS[library().highest_isa()]
    level = os.environ.get("FASTGEN_CPU_ISA") or highest
    if level not in ISA_LEVELS[: ISA_LEVELS.index(highest) + 1]:
        raise ValueError(
            f"FASTGEN_CPU_ISA must be one of {ISA_LEVELS}, at most {highest} on this machine, "
            f"got {level!r}"
        )
    library().set_isa(ISA_LEVELS.index(level))
    return level


class Recorder(Protocol):
    """Takes calls of kernels instead of the library, while a program is recorded."""

    num_threads: Any

    def function(self, name: str, arguments: str) -> Callable[..., Any]: ...


class _Recording(threading.local):
    """Who takes the calls of kernels in this thread, if not the library."""

    recorder: Recorder | None = None


_recording = _Recording()


@contextlib.contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Let a recorder take the kernel calls of this thread."""
    _recording.recorder = recorder
    try:
        yield
    finally:
        _recording.recorder = None


def recordable(implementation: Function) -> Function:
    """Mark an implementation whose kernel calls depend on shapes and addresses only.

    It does nothing but call kernels, on tensors it is given or makes with `new_empty`, and asks
    of tensors only what a `program.Value` knows.
    """
    implementation.recordable = True  # pyright: ignore
    return implementation


def num_threads() -> int:
    """How many threads a kernel may use."""
    recorder = _recording.recorder
    return torch.get_num_threads() if recorder is None else recorder.num_threads


def function(name: str, arguments: str, returns: str | None = None) -> Callable[..., Any]:
    """A function of the library; its arguments as letters: pointer, integer, double, bool or int.

    returns: The letter of what it returns, None for nothing.

    Raises: MissingLibraryError.
    """
    recorder = _recording.recorder
    if recorder is not None:
        return recorder.function(name, arguments)
    return _function(name, arguments, returns)


@functools.cache
def _function(name: str, arguments: str, returns: str | None) -> Callable[..., Any]:
    isa()  # chosen before the first kernel runs
    found = getattr(library(), name)
    found.argtypes = [_LETTERS[letter] for letter in arguments]
    found.restype = None if returns is None else _LETTERS[returns]
    return found


class Kernel:
    """A function of the library per dtype: `Kernel(name, arguments)[dtype]` is name_dtype."""

    def __init__(self, name: str, arguments: str, returns: str | None = None) -> None:
        self.name, self.arguments, self.returns = name, arguments, returns
        self._found: dict[torch.dtype, Callable[..., Any]] = {}

    def __getitem__(self, dtype: torch.dtype) -> Callable[..., Any]:
        found = self._found.get(dtype)
        if found is None or _recording.recorder is not None:
            name = f"{self.name}_{str(dtype).removeprefix('torch.')}"
            found = function(name, self.arguments, self.returns)
            if _recording.recorder is None:
                self._found[dtype] = found
        return found


def refuses(call: CallSite, *tensors: str) -> str | None:
    """Why the C++ kernels cannot take a call: its device, the dtype of its tensors, no library."""
    if call.device.type != "cpu":
        return f"the tensors are on {call.device.type}"
    for name in tensors:
        tensor = call.args[name]
        if tensor is not None and tensor.dtype not in _DTYPES:
            return f"{name} is {str(tensor.dtype).removeprefix('torch.')}"
    return why_missing()
