"""A recorded sequence of kernel calls, run at once.

The implementations of ops are recorded by running them on `Value`s: descriptions of tensors whose
first dimension may be a number that is not known yet. What they would pass to the library becomes
the program. A run fills in sizes and addresses and enters C++ once, so that Python costs nothing
between two kernels, where it would run with cold caches: a step streams every weight through them.

Results that only the program reads lie in one workspace, at places that are free by then.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from . import isa, library

_ALIGNMENT = 64


class NotRecordableError(Exception):
    """Something that a program cannot express; str() says what."""


def _refuses(what: str) -> Callable[..., Any]:
    def refuse(*_: Any) -> Any:
        raise NotRecordableError(what)

    return refuse


@dataclass(frozen=True, eq=False)
class Number:
    """constant + factor * scalar, where scalar is a number that each run reads anew.

    Whatever would hold for some sizes only, as most comparisons, raises NotRecordableError.
    """

    constant: int
    factor: int
    scalar: int

    def __add__(self, other: int) -> Number:
        _need_int(other)
        return Number(self.constant + other, self.factor, self.scalar)

    def __mul__(self, other: int) -> Number:
        _need_int(other)
        return Number(self.constant * other, self.factor * other, self.scalar)

    def __floordiv__(self, other: int) -> Number:
        _need_int(other)
        if self.constant % other or self.factor % other:
            raise NotRecordableError("a quotient that is not whole for every size")
        return Number(self.constant // other, self.factor // other, self.scalar)

    __radd__, __rmul__ = __add__, __mul__

    def __eq__(self, other: object) -> bool:
        return same(self, other) or self._decide()

    __hash__ = None  # pyright: ignore
    _decide = _refuses("a decision that depends on a size")
    __bool__ = __lt__ = __le__ = __gt__ = __ge__ = _decide
    __int__ = __index__ = __float__ = _decide
    _compute = _refuses("arithmetic of a size other than +, * and //")
    __sub__ = __rsub__ = __neg__ = __rfloordiv__ = __truediv__ = __rtruediv__ = _compute
    __mod__ = __rmod__ = __divmod__ = __pow__ = _compute


def same(first: Any, second: Any) -> bool:
    """Whether two numbers are equal for every size."""
    return _parts(first) == _parts(second)


def _parts(number: Any) -> tuple[Any, int, int]:
    if not isinstance(number, Number):
        return number, 0, 0
    return number.constant, number.factor, number.scalar if number.factor else 0


def _need_int(value: Any) -> None:
    if not isinstance(value, int):
        raise NotRecordableError("arithmetic of two sizes")


@dataclass(eq=False)
class Memory:
    """Where a value lies.

    external: Which of the tensors given to a run it is; None if the program makes it.
    num_bytes: Its size, if the program makes it.
    """

    external: int | None = None
    num_bytes: int | Number = 0


@dataclass(frozen=True)
class Pointer:
    memory: Memory
    offset_bytes: int


@dataclass(frozen=True, eq=False)
class Value:
    """What the implementations of ops ask of a tensor; shape and strides in elements."""

    memory: Memory
    shape: tuple[Any, ...]
    strides: tuple[Any, ...]
    dtype: torch.dtype
    recorder: Recorder
    offset: int = 0

    def dim(self) -> int:
        return len(self.shape)

    def stride(self, dim: int | None = None) -> Any:
        return self.strides if dim is None else self.strides[dim]

    def numel(self) -> Any:
        return math.prod(self.shape)

    def data_ptr(self) -> Pointer:
        return Pointer(self.memory, self.offset * self.dtype.itemsize)

    def is_contiguous(self) -> bool:
        return all(
            (isinstance(size, int) and size == 1) or same(stride, expected)  # or is never used
            for size, stride, expected in zip(
                self.shape, self.strides, _contiguous(self.shape), strict=True
            )
        )

    def _is_in_order(self) -> bool:
        """Whether a tensor like this one is contiguous, as torch lays it out."""
        sizes = zip(self.shape, self.strides, strict=True)
        strides = [stride for size, stride in sizes if not (isinstance(size, int) and size == 1)]
        return all(isinstance(stride, int) for stride in strides) and all(
            outer > inner for outer, inner in itertools.pairwise((*strides, 0))
        )

    def contiguous(self) -> Value:
        if not self.is_contiguous():
            raise NotRecordableError("a copy of a strided value")
        return self

    def new_empty(self, shape: Sequence[Any], dtype: torch.dtype | None = None) -> Value:
        return self.recorder.new_empty(tuple(shape), dtype or self.dtype)

    def float(self) -> Value:
        if self.dtype != torch.float32:
            raise NotRecordableError("a conversion")
        return self

    def __getattr__(self, name: str) -> Any:
        raise NotRecordableError(f"{name} of a tensor")

    @classmethod
    def __torch_function__(cls, function: Any, _: Any, args: Any, kwargs: Any = None) -> Any:
        if function is torch.empty_like and not kwargs and args[0]._is_in_order():
            return args[0].new_empty(args[0].shape)
        raise NotRecordableError(f"torch.{function.__name__}")

    _compute = _refuses("arithmetic of tensors")
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = _compute
    __neg__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = _compute
    __getitem__ = __iter__ = __len__ = _refuses("indexing of a tensor")

    def as_strided(self, size: Sequence[Any], stride: Sequence[Any], offset: int) -> Value:
        return Value(self.memory, tuple(size), tuple(stride), self.dtype, self.recorder, offset)


@dataclass(frozen=True)
class Source:
    """Where a scalar is read: a size of a tensor given to a run."""

    tensor: int
    dim: int


# What an argument of a kernel may be, by its letter.
_KINDS: dict[str, tuple[type, ...]] = {
    "p": (Pointer, type(None)),
    "i": (int, Number),
    "b": (int, Number),
    "d": (int, float),
}


class Recorder:
    """Takes the calls of kernels. Scalar 0 is the number of threads."""

    def __init__(self) -> None:
        self.num_threads = Number(0, 1, 0)
        self.sources: list[Source] = []
        self.externals: list[Value] = []
        self.calls: list[tuple[str, str, tuple]] = []
        self._scalars: dict[Any, Number] = {}

    @contextlib.contextmanager
    def attempt(self) -> Iterator[None]:
        """What raises NotRecordableError in here leaves nothing behind."""
        lists = self.sources, self.externals, self.calls
        lengths, scalars = [len(items) for items in lists], dict(self._scalars)
        try:
            yield
        except NotRecordableError:
            for items, length in zip(lists, lengths, strict=True):
                del items[length:]
            self._scalars = scalars
            raise

    def function(self, name: str, arguments: str) -> Callable[..., int]:
        def record(*values: Any) -> int:
            for letter, value in zip(arguments, values, strict=True):
                if not isinstance(value, _KINDS[letter]):
                    raise NotRecordableError(f"{value!r} as an argument {letter!r} of {name}")
            self.calls.append((name, arguments, values))
            return 0  # what a kernel returns that takes its arguments

        return record

    def known(self, key: Any) -> Number:
        if key not in self._scalars:
            raise NotRecordableError("a number that is no size of a tensor that is given")
        return self._scalars[key]

    def external(
        self, shape: Sequence[Any], strides: Sequence[Any] | None, dtype: torch.dtype
    ) -> Value:
        """The next of the tensors that are given to a run; None: contiguous, as every run checks.

        Sizes are ints or what names them everywhere. Strides are ints or sizes: they are not read
        in a run, because that of a single element may be any number.
        """
        index = len(self.externals)
        sizes: list[Any] = []
        for dim, size in enumerate(shape):
            if not isinstance(size, int) and str(size) not in self._scalars:
                self.sources.append(Source(index, dim))
                self._scalars[str(size)] = Number(0, 1, len(self.sources))
            sizes.append(size if isinstance(size, int) else self._scalars[str(size)])
        if strides is None:
            steps = _contiguous(sizes)
        else:
            steps = tuple(
                1  # never used
                if isinstance(size, int) and size == 1
                else stride
                if isinstance(stride, int)
                else self.known(str(stride))
                for size, stride in zip(sizes, strides, strict=True)
            )
        value = Value(Memory(external=index), tuple(sizes), steps, dtype, self)
        self.externals.append(value)
        return value

    def new_empty(self, shape: tuple[Any, ...], dtype: torch.dtype) -> Value:
        numel, *strides = _contiguous((1, *shape))  # the stride of what comes before it
        memory = Memory(num_bytes=numel * dtype.itemsize)
        return Value(memory, shape, tuple(strides), dtype, self)


def _contiguous(shape: Sequence[Any]) -> tuple[Any, ...]:
    """The strides of a contiguous tensor."""
    strides: list[Any] = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, size * strides[0])
    return tuple(strides[: len(shape)])


@dataclass(frozen=True)
class Tables:
    """A program as data: calls of kernels, and where each of their arguments comes from.

    names, first_words: For each call its function, and its first word. words: constant, factor,
    scalar, address. Addresses: nothing, the workspace, externals, made. workspace: Its bytes as
    constant, scalar, factor. made: Memories that results lie in.
    """

    names: tuple[str, ...]
    first_words: tuple[int, ...]
    words: tuple[tuple[int, int, int, int], ...]
    sources: tuple[Source, ...]
    externals: tuple[Value, ...]
    workspace: tuple[int, int, int]
    made: tuple[Memory, ...]
    results: tuple[Value, ...]


@dataclass
class _Slot:
    num_bytes: int | Number
    free: bool = True


class Program:
    """The recorded calls, ready to run.

    Args:
        recorder: What was recorded. results: Values that a run returns, in memory of their own.
    """

    def __init__(self, recorder: Recorder, results: Sequence[Value]) -> None:
        self.__name__, self.__module__ = f"program_{id(self)}", "fastgen.programs"  # torch.fx asks
        self.num_calls = len(recorder.calls)
        self._recorder = recorder
        self._results = results
        if any(value.memory.external is not None for value in results):
            raise NotRecordableError("a result that lies in a tensor that is given")
        # Addresses: nothing, the workspace, the tensors that are given, the results.
        kept = list(dict.fromkeys(value.memory for value in results))
        first = 2 + len(recorder.externals)
        self._address = {memory: first + i for i, memory in enumerate(kept)}
        self._plan_workspace()
        self._encode()
        self._tensors: tuple[torch.Tensor, ...] = ()
        self._scalars = [0] * (1 + len(recorder.sources))  # of the last run
        self._sizes_of = [
            {size.scalar for size in (*value.shape, *value.strides) if isinstance(size, Number)}
            for value in recorder.externals
        ]
        self._addresses = np.zeros(first + len(kept), np.int64)
        self._workspace = torch.empty(0, dtype=torch.uint8)

    def _plan_workspace(self) -> None:
        """Give each made value a slot of its size that is free from its first use to its last."""
        last_use: dict[Memory, int] = {}
        for index, (_, _, arguments) in enumerate(self._recorder.calls):
            for value in arguments:
                if isinstance(value, Pointer):
                    last_use[value.memory] = index
        slots: list[_Slot] = []
        place: dict[Memory, _Slot] = {}
        for index, (_, _, arguments) in enumerate(self._recorder.calls):
            used = [value.memory for value in arguments if isinstance(value, Pointer)]
            for memory in used:
                if memory.external is None and memory not in self._address and memory not in place:
                    fitting = (s for s in slots if s.free and same(s.num_bytes, memory.num_bytes))
                    slot = next(fitting, None)
                    if slot is None:
                        slot = _Slot(memory.num_bytes)
                        slots.append(slot)
                    slot.free = False
                    place[memory] = slot
            for memory in used:
                if memory in place and last_use[memory] == index:
                    place[memory].free = True
        starts: dict[int, tuple[int, dict[int, int]]] = {}
        constant, factors = 0, dict[int, int]()
        for slot in slots:
            starts[id(slot)] = constant, dict(factors)
            size = slot.num_bytes
            if isinstance(size, int):
                constant += _aligned(size)
            else:
                constant += _aligned(size.constant)
                factors[size.scalar] = factors.get(size.scalar, 0) + _aligned(size.factor)
        if len(factors) > 1:
            raise NotRecordableError("results whose sizes follow different numbers")
        scalar, factor = next(iter(factors.items()), (0, 0))
        self._workspace_size = constant, scalar, factor
        self._start = {memory: starts[id(slot)] for memory, slot in place.items()}

    def _encode(self) -> None:
        """Each argument as constant + factor * scalar + address."""
        isa()  # chosen before the first kernel runs
        rows: list[tuple[int, int, int, int]] = []
        calls: list[int] = []
        for name, letters, arguments in self._recorder.calls:
            function = getattr(library(), f"{name}_call")
            calls += [ctypes.cast(function, ctypes.c_void_p).value or 0, len(rows)]
            rows += [
                self._word(letter, value) for letter, value in zip(letters, arguments, strict=True)
            ]
        self._calls = np.array(calls, np.int64)
        constants, factors, scalars, addresses = zip(*rows, strict=True)
        self._constants = np.array(constants, np.int64)
        self._factors = np.array(factors, np.int64)
        self._scalar_of = np.array(scalars, np.intp)
        self._address_of = np.array(addresses, np.intp)

    def _word(self, letter: str, value: Any) -> tuple[int, int, int, int]:
        match value:
            case None:
                return 0, 0, 0, 0
            case Pointer(memory, offset):
                if memory.external is not None:
                    return offset, 0, 0, 2 + memory.external
                if memory in self._address:
                    return offset, 0, 0, self._address[memory]
                constant, factors = self._start[memory]
                scalar, factor = next(iter(factors.items()), (0, 0))
                return offset + constant, factor, scalar, 1
            case Number(constant, factor, scalar):
                return constant, factor, scalar, 0
            case _ if letter == "d":
                return struct.unpack("q", struct.pack("d", value))[0], 0, 0, 0
        return int(value), 0, 0, 0

    def tables(self) -> Tables:
        """What a run goes by, for who runs it without Python."""
        columns = self._constants, self._factors, self._scalar_of, self._address_of
        return Tables(
            names=tuple(f"{name}_call" for name, _, _ in self._recorder.calls),
            first_words=tuple(self._calls[1::2].tolist()),
            words=tuple(zip(*(column.tolist() for column in columns), strict=True)),
            sources=tuple(self._recorder.sources),
            externals=tuple(self._recorder.externals),
            workspace=self._workspace_size,
            made=tuple(self._address),
            results=tuple(self._results),
        )

    def __call__(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the calls on these tensors, in the order in which their memories were recorded."""
        scalars = [torch.get_num_threads()]
        scalars += [tensors[at.tensor].shape[at.dim] for at in self._recorder.sources]
        self._take(tensors, scalars)
        addresses = self._addresses
        constant, scalar, factor = self._workspace_size
        needed = constant + factor * scalars[scalar]
        if needed > self._workspace.numel():
            self._workspace = torch.empty(needed, dtype=torch.uint8)
        addresses[1] = self._workspace.data_ptr()
        made = {}
        for memory, address in self._address.items():
            made[memory] = torch.empty(evaluate(memory.num_bytes, scalars), dtype=torch.uint8)
            addresses[address] = made[memory].data_ptr()
        words = np.array(scalars, np.int64)[self._scalar_of]
        words *= self._factors
        words += self._constants
        words += addresses[self._address_of]
        failed = _run_program()(self._calls.ctypes.data, self.num_calls, words.ctypes.data)
        if failed:
            name = self._recorder.calls[failed - 1][0]
            raise ValueError(f"{name} refused its arguments: a table names what is not there")
        return tuple(
            made[value.memory]
            .view(value.dtype)
            .as_strided(
                [evaluate(size, scalars) for size in value.shape],
                [evaluate(stride, scalars) for stride in value.strides],
                value.offset,
            )
            for value in self._results
        )

    def _take(self, tensors: tuple[torch.Tensor, ...], scalars: list[int]) -> None:
        """Note where tensors lie; one that the last run had, as most, lies where it lay."""
        known, self._tensors = self._tensors, ()  # nothing is known if one does not fit
        before, self._scalars = self._scalars, scalars
        changed = {
            i for i, (old, new) in enumerate(zip(before, scalars, strict=True)) if old != new
        }
        assert len(tensors) == len(self._sizes_of), f"{len(tensors)} tensors are given"
        for index, tensor in enumerate(tensors):
            is_known = bool(known) and tensor is known[index]
            if not is_known:
                self._addresses[2 + index] = tensor.data_ptr()
            if not is_known or not changed.isdisjoint(self._sizes_of[index]):
                _check(tensor, self._recorder.externals[index], scalars)
        self._tensors = tensors

    def forget(self) -> None:
        """Hold nothing of the last run: its tensors may lie elsewhere now."""
        self._tensors = ()
        self._workspace = torch.empty(0, dtype=torch.uint8)


def _check(tensor: torch.Tensor, value: Value, scalars: Sequence[int]) -> None:
    """A tensor must be as it was recorded: the kernels trust its dtype, sizes and strides."""
    shape = [evaluate(size, scalars) for size in value.shape]
    strides = [evaluate(stride, scalars) for stride in value.strides]
    found, expected = (tensor.dtype, *tensor.shape), (value.dtype, *shape)
    assert found == expected, f"a tensor is {found}, not {expected}"
    for size, stride, recorded in zip(shape, tensor.stride(), strides, strict=True):
        assert size <= 1 or stride == recorded or not tensor.numel(), (
            f"a tensor {shape} has the strides {list(tensor.stride())}, not {strides}"
        )


def evaluate(number: int | Number, scalars: Sequence[int]) -> int:
    if isinstance(number, Number):
        return number.constant + number.factor * scalars[number.scalar]
    return number


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


@functools.cache
def _run_program() -> Callable[..., int]:
    function = library().run_program
    function.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
    function.restype = ctypes.c_int64
    return function
