"""The tensors of the paged KV cache, and how large they may be."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ..passes import CacheSpec
from .block_pool import NULL_BLOCK


class KVCache:
    """One key and one value tensor per layer, or one of latents; blocks in dimension 0.

    tensors: "key:<i>" / "value:<i>" -> [num_blocks, num_kv_heads, block_size, head_dim], or
    "latent:<i>", whose one head has the latent and the rotated key side by side. On the CPU this is
    address space only: the system gives a page when it is first written.
    """

    def __init__(
        self, spec: CacheSpec, num_blocks: int, block_size: int, device: torch.device
    ) -> None:
        self.spec, self.num_blocks, self.block_size = spec, num_blocks, block_size
        tensors = {}
        for index, layer in enumerate(spec.layers):
            for role, width in layer.tensors.items():
                shape = (num_blocks, layer.num_kv_heads, block_size, width)
                tensors[f"{role}:{index}"] = torch.empty(shape, dtype=layer.dtype, device=device)
                tensors[f"{role}:{index}"][NULL_BLOCK] = 0
        self.tensors: Mapping[str, torch.Tensor] = tensors

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def read(self, role: str, layer: int, block_ids: Sequence[int], length: int) -> torch.Tensor:
        """A copy of a sequence's keys or values: [num_kv_heads, length, head_dim].

        Where latents are kept the keys are the latents, the values the rotated keys, as
        transformers' caches have them.
        """
        spec = self.spec.layers[layer]
        if spec.kind == "latent":
            cache = self.tensors[f"latent:{layer}"]
            part = slice(spec.head_dim) if role == "key" else slice(spec.head_dim, None)
            cache = cache[..., part]
        else:
            cache = self.tensors[f"{role}:{layer}"]
        pages = cache[torch.tensor(block_ids, dtype=torch.long, device=cache.device)]
        return pages.transpose(0, 1).flatten(1, 2)[:, :length]

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks (source, target): all sources are read before a target is written."""
        sources, targets = torch.tensor(pairs, dtype=torch.long).unbind(1)
        for tensor in self.tensors.values():
            copied = tensor.index_select(0, sources.to(tensor.device))
            tensor.index_copy_(0, targets.to(tensor.device), copied)

    def poison(self, block_ids: Sequence[int]) -> None:
        """Fill blocks with NaN, so that a test sees whoever reads them."""
        for tensor in self.tensors.values():
            tensor[list(block_ids)] = float("nan")


def block_bytes(spec: CacheSpec, block_size: int) -> int:
    return spec.bytes_per_token * block_size


def free_memory_bytes(device: torch.device) -> int:
    """Memory that can be taken on a device now; on the CPU within a container's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(_system_free_bytes(), _container_free_bytes())


def _system_free_bytes() -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        import psutil  # only where the system tells nothing itself; accelerate brings it along

        return psutil.virtual_memory().available


def _container_free_bytes() -> int:
    """What a cgroup (v2) still allows; without one, more than any machine has."""
    unlimited = 1 << 60
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        stat = Path("/sys/fs/cgroup/memory.stat").read_text().split()
    except OSError:
        return unlimited
    # File pages that nobody uses count as used and are given up first.
    idle = int(stat[stat.index("inactive_file") + 1]) if "inactive_file" in stat else 0
    return unlimited if limit == "max" else max(0, int(limit) - max(0, used - idle))
