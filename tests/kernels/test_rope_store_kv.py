"""`fastgen::rope_store_kv`: the rotation of `fastgen::rope`, and what is in the pages then."""

from __future__ import annotations

import pytest
import torch
from fastgen.kernels.rope import rope_reference
from kernel_helpers import DTYPES, assert_accurate, call, every_implementation, randn
from test_rope import rotate_fp64, tables

OP = "fastgen::rope_store_kv"
LAYOUTS = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])


def arguments(num_tokens=21, heads=(7, 1), sizes=(80, 48), dtype=torch.float32, **changes):
    """Tokens in slots here and there, the last one not stored; pages start as NaN."""
    (num_heads, num_kv_heads), (head_dim, v_head_dim) = heads, sizes
    interleaved, rotary_dim = changes.get("interleaved", False), changes.pop("rotary_dim", 64)
    block_size, num_blocks = changes.pop("block_size", 16), 6
    _, cos, sin = tables(num_tokens, rotary_dim, interleaved, changes.pop("table_dtype", dtype))
    used = torch.randperm((num_blocks - 1) * block_size)[:num_tokens] + block_size
    used[-1] = -1
    return {
        "query": randn(num_tokens, num_heads, head_dim, dtype=dtype),
        "key": randn(num_tokens, num_kv_heads, head_dim, dtype=dtype, seed=1),
        "value": randn(num_tokens, num_kv_heads, v_head_dim, dtype=dtype, seed=2),
        "cos": cos,
        "sin": sin,
        "interleaved": interleaved,
        "key_cache": torch.full((num_blocks, num_kv_heads, block_size, head_dim), torch.nan).to(
            dtype
        ),
        "value_cache": torch.full((num_blocks, num_kv_heads, block_size, v_head_dim), torch.nan).to(
            dtype
        ),
        "slot_mapping": used,
        **changes,
    }


def check(name, given) -> None:
    rotated = call(OP, name, **given)
    expected = rope_reference(*(given[k] for k in ("query", "key", "cos", "sin", "interleaved")))
    for output, peer, source in zip(rotated, expected, (given["query"], given["key"]), strict=True):
        exact = rotate_fp64(source, given["cos"], given["sin"], given["interleaved"])
        assert_accurate(output, peer, exact)
        assert output.is_contiguous()
    block_size = given["key_cache"].shape[2]
    stored = torch.zeros(given["key_cache"].shape[0], block_size, dtype=torch.bool)
    for token, slot in enumerate(given["slot_mapping"].tolist()):
        if slot < 0:
            continue
        block, offset = divmod(slot, block_size)
        stored[block, offset] = True
        assert torch.equal(given["key_cache"][block, :, offset], rotated[1][token])
        assert torch.equal(given["value_cache"][block, :, offset], given["value"][token])
    for cache in (given["key_cache"], given["value_cache"]):
        others = cache.transpose(1, 2)[1:][~stored[1:]]  # but for the null block
        assert others.isnan().all(), "a slot was written that is no token's"


@DTYPES
@LAYOUTS
@pytest.mark.parametrize("num_tokens", [1, 63])
@pytest.mark.parametrize(
    ("heads", "sizes", "rotary_dim"),
    [((7, 1), (64, 64), 64), ((14, 2), (80, 80), 32), ((3, 3), (80, 48), 80)],
    ids=str,
)
@every_implementation(OP)
def test_rotated_and_stored(name, heads, sizes, rotary_dim, num_tokens, interleaved, dtype):
    check(
        name,
        arguments(num_tokens, heads, sizes, dtype, rotary_dim=rotary_dim, interleaved=interleaved),
    )


@pytest.mark.parametrize("block_size", [16, 32, 64])
@every_implementation(OP)
def test_block_sizes_and_wide_tables(name, block_size):
    check(name, arguments(block_size=block_size, dtype=torch.bfloat16, table_dtype=torch.float32))


@every_implementation(OP)
def test_slices_of_one_projection(name):
    merged = randn(21, 14 + 2 * 2, 80, dtype=torch.bfloat16)
    given = arguments(heads=(14, 2), sizes=(80, 80), dtype=torch.bfloat16)
    given |= {"query": merged[:, :14], "key": merged[:, 14:16], "value": merged[:, 16:]}
    check(name, given)


@every_implementation(OP)
def test_a_repeated_step_gives_the_same_pages(name):
    given = arguments()
    call(OP, name, **given)
    before = given["key_cache"].clone(), given["value_cache"].clone()
    call(OP, name, **given)
    for cache, old in zip((given["key_cache"], given["value_cache"]), before, strict=True):
        assert torch.equal(cache[1:].nan_to_num(7.0), old[1:].nan_to_num(7.0))


def test_the_op_passes_opcheck():
    given = arguments()
    for name in ("key_cache", "value_cache"):
        given[name].zero_()
    torch.library.opcheck(torch.ops.fastgen.rope_store_kv.default, tuple(given.values()))


def test_a_wrong_slot_would_be_found():
    """A kernel that stores each token where the one before it belongs."""
    given = arguments()
    right = given["slot_mapping"].clone()
    given["slot_mapping"] = right.roll(1)
    call(OP, "reference", **given)
    given["slot_mapping"] = right
    block, offset = divmod(int(right[0]), 16)
    assert not torch.equal(given["value_cache"][block, :, offset], given["value"][0])
