"""Memory that is on its way: as large as asked, given once, whoever is in a hurry."""

from __future__ import annotations

import pytest
import torch

from fastgen.artifact.prefault import Prefault


@pytest.mark.parametrize("num_bytes", [1, 4096, 5 << 20, (5 << 20) + 13])
def test_it_is_memory(num_bytes):
    memory = Prefault(num_bytes).take(num_bytes)
    assert (memory.dtype, memory.shape) == (torch.uint8, (num_bytes,))
    assert memory.data_ptr() % (2 << 20) == 0
    memory.fill_(7)
    assert memory.sum() == 7 * num_bytes


def test_it_outlives_who_asked_for_it():
    memory = Prefault(4 << 20).take(4 << 20)
    memory.fill_(3)
    torch.empty(4 << 20, dtype=torch.uint8).fill_(1)
    assert memory.unique().tolist() == [3]


def test_it_is_given_once():
    prefault = Prefault(1 << 20)
    first, second = prefault.take(1 << 20), prefault.take(1 << 20)
    first.fill_(1)
    second.fill_(2)
    assert first.unique().tolist() == [1]


def test_another_size_gets_other_memory():
    assert len(Prefault(1 << 20).take(2 << 20)) == 2 << 20
    assert len(Prefault(0).take(1 << 20)) == 1 << 20


def test_it_can_be_cancelled():
    prefault = Prefault(256 << 20)
    prefault.cancel()
    prefault.cancel()
    assert prefault._thread is not None
    assert not prefault._thread.is_alive()
