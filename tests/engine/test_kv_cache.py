"""The cache tensors: shapes, reading scattered blocks, poison, and how much memory there is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from fastgen.passes import CacheSpec
from fastgen.passes.insert_paged_cache import LayerCache

from fastgen.engine import kv_cache
from fastgen.engine.block_pool import NULL_BLOCK
from fastgen.engine.kv_cache import KVCache, block_bytes, free_memory_bytes

CPU = torch.device("cpu")


def layer(num_kv_heads=2, head_dim=8, v_head_dim=8, dtype=torch.float32) -> LayerCache:
    return LayerCache("kv", num_kv_heads, head_dim, v_head_dim, dtype, window=0)


MIXED = CacheSpec((layer(), layer(7, 80, 96, torch.bfloat16), layer(1, 4, 12, torch.float16)))


def numbered_cache(num_blocks: int = 9, block_size: int = 4) -> KVCache:
    """Every element is its own number, the slots' in the order of the tensor's dimensions."""
    cache = KVCache(CacheSpec((layer(), layer(3, 2, 5))), num_blocks, block_size, CPU)
    for tensor in cache.tensors.values():
        tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape))
    return cache


def check_read(cache: KVCache, read, block_ids: list[int], length: int) -> None:
    """`read` of every tensor, slot by slot."""
    for role in ("key", "value"):
        for index in range(len(cache.spec.layers)):
            tensor = cache.tensors[f"{role}:{index}"]
            actual = read(role, index, block_ids, length)
            assert actual.shape == (tensor.shape[1], length, tensor.shape[3])
            for slot in range(length):
                block, offset = block_ids[slot // cache.block_size], slot % cache.block_size
                assert torch.equal(actual[:, slot], tensor[block, :, offset]), (role, index, slot)


def test_shapes_and_dtypes_of_every_layer():
    cache = KVCache(MIXED, num_blocks=5, block_size=16, device=CPU)
    shapes = {name: (tuple(t.shape), t.dtype) for name, t in cache.tensors.items()}
    assert shapes == {
        "key:0": ((5, 2, 16, 8), torch.float32),
        "value:0": ((5, 2, 16, 8), torch.float32),
        "key:1": ((5, 7, 16, 80), torch.bfloat16),
        "value:1": ((5, 7, 16, 96), torch.bfloat16),
        "key:2": ((5, 1, 16, 4), torch.float16),
        "value:2": ((5, 1, 16, 12), torch.float16),
    }
    assert all(tensor.is_contiguous() for tensor in cache.tensors.values())


@pytest.mark.parametrize("block_size", [16, 32, 64])
def test_bytes(block_size):
    per_token = 4 * 2 * 16 + 2 * 7 * 176 + 2 * 1 * 16
    assert block_bytes(MIXED, block_size) == per_token * block_size
    cache = KVCache(MIXED, num_blocks=3, block_size=block_size, device=CPU)
    assert cache.nbytes == 3 * block_bytes(MIXED, block_size)


def test_null_block_is_zero_in_memory_that_was_used():
    """New memory from the system is zero anyway: the test must not depend on it."""
    for _ in range(20):
        filled = [torch.full((3, 2, 4, 8), 7.0) for _ in range(2)]
        del filled
        cache = KVCache(CacheSpec((layer(),)), num_blocks=3, block_size=4, device=CPU)
        assert all((tensor[NULL_BLOCK] == 0).all() for tensor in cache.tensors.values())


@pytest.mark.parametrize("length", [1, 3, 4, 5, 11, 12])
def test_read_scattered_blocks(length):
    cache = numbered_cache()
    check_read(cache, cache.read, [7, 2, 5][: -(-length // 4)], length)


def test_read_ignores_blocks_past_the_length():
    cache = numbered_cache()
    check_read(cache, cache.read, [7, 2, 5], 4)


def test_read_nothing():
    assert numbered_cache().read("key", 1, [], 0).shape == (3, 0, 2)


def test_read_is_a_copy():
    cache = numbered_cache()
    read = cache.read("value", 0, [3, 1], 6)
    before = read.clone()
    cache.tensors["value:0"].zero_()
    assert torch.equal(read, before)
    cache = numbered_cache()
    expected = cache.tensors["value:0"].clone()
    cache.read("value", 0, [3, 1], 6).zero_()
    assert torch.equal(cache.tensors["value:0"], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_poison_fills_these_blocks_and_no_other(dtype):
    cache = KVCache(CacheSpec((layer(dtype=dtype),)), num_blocks=6, block_size=4, device=CPU)
    for tensor in cache.tensors.values():
        tensor.fill_(1)
    cache.poison([4, 2])
    for tensor in cache.tensors.values():
        assert tensor[[2, 4]].isnan().all()
        assert (tensor[[0, 1, 3, 5]] == 1).all()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_large_cache_is_address_space_until_it_is_written():
    spec = CacheSpec((layer(8, 128, 128),))
    wanted = free_memory_bytes(CPU) // 2  # what an engine takes at most
    before = resident_bytes()
    cache = KVCache(spec, wanted // block_bytes(spec, 16), 16, CPU)
    assert cache.nbytes > wanted // 2
    assert resident_bytes() - before < cache.nbytes // 4, "the cache was touched"


# Free memory.


def test_free_memory_is_positive_and_within_the_machine():
    free = free_memory_bytes(CPU)
    assert free > 0
    total = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemTotal:")
    )
    assert free <= total


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Write files that stand for the system's, by their absolute path."""

    def fake_path(path: str) -> Path:
        return tmp_path / path.lstrip("/")

    monkeypatch.setattr(kv_cache, "Path", fake_path)

    def write(**files: str) -> None:
        names = {
            "meminfo": "/proc/meminfo",
            "limit": "/sys/fs/cgroup/memory.max",
            "used": "/sys/fs/cgroup/memory.current",
            "stat": "/sys/fs/cgroup/memory.stat",
        }
        for name, text in files.items():
            fake_path(names[name]).parent.mkdir(parents=True, exist_ok=True)
            fake_path(names[name]).write_text(text)

    return write


MEMINFO = "MemTotal:       100000 kB\nMemFree:         1000 kB\nMemAvailable:   80000 kB\n"


def test_free_memory_without_a_container(machine):
    machine(meminfo=MEMINFO)
    assert free_memory_bytes(CPU) == 80000 * 1024


def test_free_memory_in_a_container_without_a_limit(machine):
    machine(meminfo=MEMINFO, limit="max\n", used="12345\n")
    assert free_memory_bytes(CPU) == 80000 * 1024


@pytest.mark.parametrize(
    ("used", "free"), [(0, 1000), (400, 600), (1000, 0), (1001, 0)], ids=lambda value: str(value)
)
def test_free_memory_within_a_containers_limit(machine, used, free):
    machine(meminfo=MEMINFO, limit="1000\n", used=f"{used}\n", stat="anon 0\ninactive_file 0\n")
    assert free_memory_bytes(CPU) == free


def test_a_containers_page_cache_is_free_memory(machine):
    """memory.current counts cached file pages, which the kernel gives up first: a container that
    has just read a checkpoint would seem to have no memory at all."""
    machine(
        meminfo=MEMINFO,
        limit="1000\n",
        used="1000\n",
        stat="anon 300\nfile 700\ninactive_anon 0\nactive_file 100\ninactive_file 600\n",
    )
    assert free_memory_bytes(CPU) >= 600


def test_free_memory_without_proc(machine):
    assert free_memory_bytes(CPU) > 0


# Planted mistakes.


def test_planted_transposition_is_found():
    cache = numbered_cache()

    def forgets_to_transpose(role, index, block_ids, length):
        pages = cache.tensors[f"{role}:{index}"][block_ids]
        return pages.reshape(pages.shape[1], -1, pages.shape[3])[:, :length]

    with pytest.raises(AssertionError):
        check_read(cache, forgets_to_transpose, [7, 2, 5], 12)


def test_planted_wrong_block_is_found():
    cache = numbered_cache()

    def sorts_blocks(role, index, block_ids, length):
        return cache.read(role, index, sorted(block_ids), length)

    with pytest.raises(AssertionError):
        check_read(cache, sorts_blocks, [7, 2, 5], 12)
