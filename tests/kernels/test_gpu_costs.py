"""FLOPs and bytes of the Triton kernels by formula, against counting."""

from __future__ import annotations

import pytest
import torch
from fastgen.kernels.gpu import (
    flash_attention,
    gated_activation,
    paged_attention,
    rms_norm,
    rope_store_kv,
)

BF16 = torch.bfloat16


def empty(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def nbytes(*tensors: torch.Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("lengths", [[1], [5, 1, 12], [64]], ids=str)
def test_flops_of_attention(lengths):
    """Two per multiplication and addition of each query with each key it sees."""
    pairs = sum(1 for length in lengths for query in range(length) for _ in range(query + 1))
    assert flash_attention.flops(14, 64, 48, lengths) == pairs * 14 * (2 * 64 + 2 * 48)


def test_bytes_of_attention():
    query, key, value = empty(17, 14, 64), empty(17, 2, 64), empty(17, 2, 48)
    counted = nbytes(query, key, value, empty(17, 14, 48))
    assert flash_attention.bytes_moved(14, 2, 64, 48, 2, [5, 12]) == counted


def test_bytes_of_a_decode_step():
    read = nbytes(empty(100 + 7, 2, 64), empty(100 + 7, 2, 48))
    assert paged_attention.decode_bytes(2, 64, 48, 2, [100, 7]) == read


@pytest.mark.parametrize("with_residual", [False, True], ids=["norm", "norm-of-a-sum"])
def test_bytes_of_a_norm(with_residual):
    rows = empty(17, 896)
    moved = nbytes(*[rows] * (4 if with_residual else 2), empty(896))
    assert rms_norm.bytes_moved(17, 896, 2, with_residual) == moved


def test_bytes_of_a_gated_activation():
    assert gated_activation.bytes_moved(17, 4864, 2) == nbytes(*[empty(17, 4864)] * 3)


def test_bytes_of_rope_and_cache_write():
    query, key, value = empty(17, 14, 64), empty(17, 2, 64), empty(17, 2, 48)
    tables = empty(17, 32, dtype=torch.float32), empty(17, 32, dtype=torch.float32)
    # each read once; the query written once, the key to its result and its page, the value to its
    counted = nbytes(query, key, value, *tables) + nbytes(query, key, key, value)
    assert rope_store_kv.bytes_moved(17, 14, 2, 64, 48, 32, 2, 4) == counted
