"""Memory for packed weights, taken from the system while other things are being done.

The system clears a page when it is first written, which for a model's weights takes longer than
packing them does. A thread asks for all pages at once; meanwhile Python reads the graph.
"""

from __future__ import annotations

import ctypes
import mmap
import threading

import torch

from ..kernels.packing import huge_pages

_HUGE_PAGE_BYTES = 2 << 20
_MADV_HUGEPAGE = 14
_MADV_POPULATE_WRITE = 23  # since Linux 5.14; elsewhere pages come when they are written
_STEP_BYTES = 2 << 20


class Prefault:
    """So many bytes in huge pages, where the system grants them, on their way."""

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes = num_bytes
        self._stop = threading.Event()
        self._memory: mmap.mmap | None = None
        self._thread: threading.Thread | None = None
        madvise = getattr(ctypes.CDLL(None), "madvise", None)
        if not num_bytes or madvise is None:
            return
        self._memory = mmap.mmap(-1, num_bytes + _HUGE_PAGE_BYTES)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._start = -address % _HUGE_PAGE_BYTES
        self._thread = threading.Thread(
            target=_populate,
            args=(madvise, address + self._start, num_bytes, self._stop),
            name="fastgen-prefault",
            daemon=True,
        )
        self._thread.start()

    def take(self, num_bytes: int) -> torch.Tensor:
        """[num_bytes] uint8: the memory, the first time it is asked for; later, or for another
        number, new memory."""
        memory, self._memory = self._memory, None
        if memory is None or num_bytes != self._num_bytes:
            self.cancel()
            return huge_pages(num_bytes)
        assert self._thread is not None
        self._thread.join()
        with torch.inference_mode(False):
            return torch.frombuffer(memory, dtype=torch.uint8)[self._start :][:num_bytes]

    def cancel(self) -> None:
        """Ask for no more pages, and return when none is on its way."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()


def _populate(madvise, address: int, num_bytes: int, stop: threading.Event) -> None:
    whole = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
    madvise(ctypes.c_void_p(address), ctypes.c_size_t(whole), _MADV_HUGEPAGE)
    for done in range(0, whole, _STEP_BYTES):
        part = ctypes.c_size_t(min(_STEP_BYTES, whole - done))
        if stop.is_set() or madvise(ctypes.c_void_p(address + done), part, _MADV_POPULATE_WRITE):
            return
