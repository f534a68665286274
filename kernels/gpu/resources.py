"""What each kernel takes of a card, found by compiling it for that card, which need not be there.

Registers and stack come from the machine code itself (`cuobjdump`, which Triton brings along); a
stack that is not empty means that registers were spilled.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import triton

from . import gated_activation, paged_attention, rms_norm, rope_store_kv
from .launch import Card, Launch
from .tiles import HEAD_SIZES

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# A step of the example: tokens, sequences, KV heads, heads of each, blocks of the cache.
_TOKENS, _SEQS, _KV_HEADS, _GROUP, _BLOCKS, _BLOCK_SIZE = 512, 4, 4, 4, 64, 16
_HIDDEN, _INTERMEDIATE = 2048, 8192


@dataclass(frozen=True)
class Resources:
    """Of one kernel on one card. stack_bytes: spilled, per thread. tensor_cores: "wgmma", "mma" or
    "" if it uses none. shared_bytes: of one block.
    """

    name: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    num_warps: int
    tensor_cores: str


def launches(card: Card) -> Iterator[tuple[str, Launch]]:
    """An example of each launch of the decision table, and of the other kernels, by name."""
    for dtype_name, dtype in _DTYPES.items():

        def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        for head_dim in HEAD_SIZES:
            end = f"{head_dim}-{dtype_name}"
            query = empty(_TOKENS, _KV_HEADS * _GROUP, head_dim)
            key = empty(_TOKENS, _KV_HEADS, head_dim)
            cache = empty(_BLOCKS, _KV_HEADS, _BLOCK_SIZE, head_dim)
            table = empty(_SEQS, _BLOCKS, dtype=torch.int32)
            starts, lens = empty(_SEQS + 1, dtype=torch.int32), empty(_SEQS, dtype=torch.int32)
            found = paged_attention.launches_of(
                *(query, key, key, cache, cache, empty(*query.shape), table, starts, lens),
                *(1.0, 0, 0.0, None, card),
            )
            names = ("flash_attention", "paged_prefill", "paged_decode")
            for name, launch in zip(names, found, strict=True):
                yield f"{name}-{end}", launch
        hidden = empty(_TOKENS, _HIDDEN)
        norm = rms_norm.launch_of(hidden, hidden, empty(_HIDDEN), hidden, hidden, 1e-6, 0.0, True)
        wide = empty(_TOKENS, _INTERMEDIATE)
        gated = gated_activation.launch_of(wide, wide, wide, "silu")
        assert norm is not None
        assert gated is not None
        yield f"rms_norm-{dtype_name}", norm
        yield f"gated_activation-{dtype_name}", gated
        heads, kv_heads = empty(_TOKENS, 16, 128), empty(_TOKENS, 4, 128)
        pages, angles = empty(_BLOCKS, 4, _BLOCK_SIZE, 128), empty(_TOKENS, 128)
        slots = empty(_TOKENS, dtype=torch.int64)
        yield (
            f"rope_store_kv-{dtype_name}",
            rope_store_kv.launch_of(
                *(heads, kv_heads, kv_heads, angles, angles, False),
                *(empty(*heads.shape), empty(*kv_heads.shape), pages, pages, slots),
            ),
        )


def resources_of(name: str, launch: Launch, card: Card) -> Resources:
    """Compile a launch for a card and read what it takes. Raises: what Triton raises."""
    compiled = launch.compile(card)
    ptx = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [_cuobjdump(), "--dump-resource-usage", file.name],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    registers, stack = re.search(r"REG:(\d+).*?STACK:(\d+)", usage, re.DOTALL).groups()  # pyright: ignore
    used = "wgmma" if "wgmma.mma_async" in ptx else "mma" if "mma.sync" in ptx else ""
    used = "tcgen05" if "tcgen05.mma" in ptx else used
    return Resources(
        name, int(registers), int(stack), compiled.metadata.shared, launch.num_warps, used
    )


def _cuobjdump() -> str:
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    return str(folder / "cuobjdump")
