"""Implementations that say they are batch invariant: a row's bits, whatever rows are beside it."""

from __future__ import annotations

import pytest
import torch
from fastgen.kernels import cpu, implementations
from fastgen.kernels.packing import pack, why_not_tiles
from kernel_helpers import force, randn, settings_are_restored  # noqa: F401 - a fixture for all

pytestmark = pytest.mark.skipif(cpu.why_missing() is not None, reason=str(cpu.why_missing()))
TILES = why_not_tiles(torch.empty(1, 32, dtype=torch.bfloat16))
needs_tiles = pytest.mark.skipif(TILES is not None, reason=f"no layout of our own here: {TILES}")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
# fp32 is the same at all levels.
KINDS = pytest.mark.parametrize(
    ("dtype", "level"),
    [(torch.float32, "generic"), *((torch.bfloat16, level) for level in cpu.ISA_LEVELS)],
    ids=["fp32", *(f"bf16-{level}" for level in cpu.ISA_LEVELS)],
)
NUM_ROWS = 67


def invariant(op: str):
    """The function of an op that is chosen where batch invariance is asked for."""
    (found,) = [item for item in implementations(op) if item.batch_invariant]
    return found.function


def assert_rows_are_alike(function, *inputs: torch.Tensor) -> None:
    """Rows [67, ...] alone, in parts, at other addresses and by more threads give equal bits."""

    def results(first: int, last: int, shift: int = 0) -> list[torch.Tensor]:
        moved = []
        for given in inputs:
            part = given[first:last]
            memory = part.new_empty(part.numel() + shift)[shift:]
            moved.append(memory.view(part.shape).copy_(part))
        made = function(*moved)
        return list(made) if isinstance(made, tuple) else [made]

    expected = results(0, NUM_ROWS)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for size in (1, 2, 3, 5, 16, 17, 33, 64, NUM_ROWS):
            for first in {0, 7, 31, NUM_ROWS - size} if size < 33 else {0, NUM_ROWS - size}:
                made = results(first, first + size, shift=size % 4)
                for result, whole in zip(made, expected, strict=True):
                    assert torch.equal(result, whole[first : first + size]), (threads, size, first)


@DTYPES
@pytest.mark.parametrize("cast_first", [False, True], ids=["offset", "cast first"])
@pytest.mark.parametrize("width", [1, 15, 64, 83, 896])
def test_norms(width, cast_first, dtype):
    settings = (randn(width, dtype=dtype), 1e-6, 0.0, cast_first)
    norm, add_norm = invariant("fastgen::rms_norm"), invariant("fastgen::add_rms_norm")
    rows = randn(NUM_ROWS, width, dtype=dtype), randn(NUM_ROWS, width, dtype=dtype, seed=1)
    assert_rows_are_alike(lambda x: norm(x, *settings), rows[0])
    assert_rows_are_alike(lambda x, r: add_norm(x, r, *settings), *rows)


@DTYPES
@pytest.mark.parametrize("width", [1, 15, 64, 83])
def test_gated_activations(width, dtype):
    rows = randn(NUM_ROWS, width, dtype=dtype), randn(NUM_ROWS, width, dtype=dtype, seed=1)
    assert_rows_are_alike(invariant("fastgen::silu_mul"), *rows)
    gelu = invariant("fastgen::gelu_mul")
    assert_rows_are_alike(lambda gate, up: gelu(gate, up, True), *rows)


@DTYPES
@pytest.mark.parametrize("rotary", [6, 32])
def test_rope(rotary, dtype):
    rope = invariant("fastgen::rope")
    heads = randn(NUM_ROWS, 4, 36, dtype=dtype), randn(NUM_ROWS, 2, 36, dtype=dtype, seed=1)
    tables = randn(NUM_ROWS, rotary, dtype=dtype), randn(NUM_ROWS, rotary, dtype=dtype, seed=3)
    for interleaved in (False, True):
        assert_rows_are_alike(lambda *a: rope(*a, interleaved), *heads, *tables)  # noqa: B023


@DTYPES
@pytest.mark.parametrize("turned", [False, True], ids=["by input", "by output"])
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (33, 83), (64, 896)], ids=str)
def test_row_linear(shape, turned, dtype):
    linear = invariant("fastgen::row_linear")
    weight = randn(*shape, dtype=dtype)
    weight = weight.t().contiguous().t() if turned else weight
    bias = randn(shape[0], dtype=dtype)
    rows = randn(NUM_ROWS, shape[1], dtype=dtype, seed=1)
    assert_rows_are_alike(lambda x: linear(x, weight, bias), rows)


@DTYPES
def test_experts_give_a_row_the_same_however_many_they_have(dtype):
    linear = invariant("fastgen::row_grouped_linear")
    weight = randn(3, 40, 33, dtype=dtype)
    rows = randn(NUM_ROWS, 40, dtype=dtype, seed=1)
    alone = [
        linear(rows, weight, torch.tensor(ends)) for ends in ([67] * 3, [0, 67, 67], [0, 0, 67])
    ]
    mixed = linear(rows, weight, torch.tensor([20, 21, 60]))
    expected = torch.cat([alone[0][:20], alone[1][20:21], alone[2][21:60], torch.zeros(7, 33)])
    assert torch.equal(mixed, expected.to(dtype))


@needs_tiles
@pytest.mark.parametrize("level", cpu.ISA_LEVELS[1:])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_packed_linears(gated, level):
    force(level)
    weight = randn(2 * 33, 352, dtype=torch.bfloat16)
    packed = pack(weight, "gated_tiles") if gated else pack(weight)
    if gated:
        linear, own = invariant("fastgen::packed_gated_linear"), (packed, None, 33, "silu")
    else:
        linear, own = invariant("fastgen::packed_linear"), (packed, None, 66)
    rows = randn(NUM_ROWS, 352, dtype=torch.bfloat16, seed=1)
    assert_rows_are_alike(lambda x: linear(x, *own), rows)


def attend(function, query, key, value, chunks, beside=0, **settings):
    """Attention of one sequence that comes in these chunks, with one-token sequences beside it."""
    num_blocks = 1 + -(-len(query) // 16) + beside
    caches = [torch.full((num_blocks, key.shape[1], 16, part.shape[2]), float("nan")).to(key.dtype)
              for part in (key, value)]  # fmt: skip
    others = torch.arange(beside)
    table = torch.zeros(1 + beside, num_blocks, dtype=torch.int32)
    table[0, : num_blocks - 1 - beside] = torch.arange(beside + 1, num_blocks)
    table[1:, 0] = others + 1
    outputs, start = [], 0
    for chunk in chunks:
        own = torch.arange(start, start + chunk)
        rows = torch.cat([own, others])
        slots = torch.cat([(beside + 1) * 16 + own, (others + 1) * 16])
        starts = torch.tensor([0, *range(chunk, chunk + beside + 1)], dtype=torch.int32)
        lengths = torch.tensor([start + chunk] + [1] * beside, dtype=torch.int32)
        made = function(
            *(part[rows] for part in (query, key, value)),
            *caches,
            slots,
            table,
            starts,
            lengths,
            query.shape[2] ** -0.5,
            **{"window": 0, "softcap": 0.0, "sinks": None, **settings},
        )
        outputs.append(made[:chunk])
        start += chunk
    return torch.cat(outputs)


LENGTH = 600  # three stretches of slots


# Chunks of a prompt that comes in these, and how many single tokens are beside it.
WAYS = (
    ([LENGTH], 5),
    ([300, 300], 0),
    ([599, 1], 0),
    ([1] * 90 + [510], 0),
    ([77, 1, 1, 200, 3, 1, 300, 17], 31),
)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param({}, id="plain"),
        pytest.param({"window": 70}, id="window"),
        pytest.param({"window": 300, "softcap": 5.0}, id="window-softcap"),
        pytest.param({"sinks": randn(6)}, id="sinks"),
        pytest.param({"chunk": 70}, id="chunk"),
        pytest.param({"alibi_slopes": 2.0 ** -torch.arange(1, 7)}, id="alibi"),
        pytest.param(
            {"chunk": 270, "window": 100, "alibi_slopes": 2.0 ** -torch.arange(1, 7)},
            id="chunk-window-alibi",
        ),
    ],
)
@KINDS
def test_attention(dtype, level, kind):
    force(level)
    function = invariant("fastgen::paged_attention")
    query = randn(LENGTH, 6, 40, dtype=dtype)
    key, value = randn(LENGTH, 2, 40, dtype=dtype, seed=1), randn(LENGTH, 2, 24, dtype=dtype)
    whole = attend(function, query, key, value, [LENGTH], **kind)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for chunks, beside in WAYS:
            made = attend(function, query, key, value, chunks, beside, **kind)
            assert torch.equal(made, whole), (threads, chunks[:3], beside)


@KINDS
def test_latent_attention(dtype, level):
    """40 heads share the latents of a token, more rows than are multiplied at a time."""
    force(level)
    heads, rank, rope, nope, v_width = 40, 24, 8, 12, 10
    weight = randn(heads * (nope + v_width), rank, dtype=dtype) * 0.3
    query = randn(LENGTH, heads, nope + rope, dtype=dtype)
    latents = randn(LENGTH, 1, rank + rope, dtype=dtype, seed=1)
    function = invariant("fastgen::paged_latent_attention")

    def latent_attention(query, latents, _, cache, _cache, *batch, window, **others):
        latent, k_rope = latents[:, 0].split([rank, rope], dim=-1)
        return function(query, latent, k_rope, weight, cache, *batch, window)

    given = query, latents, latents
    whole = attend(latent_attention, *given, [LENGTH])
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for chunks, beside in WAYS[1:3] + WAYS[4:]:
            made = attend(latent_attention, *given, chunks, beside)
            assert torch.equal(made, whole), (threads, chunks[:3], beside)


def test_attention_that_splits_is_not_invariant():
    """What the tests above would see: a sequence alone is cut into parts, for the other thread."""
    split = next(i for i in implementations("fastgen::paged_attention") if i.name == "cpu").function
    torch.set_num_threads(2)
    query, key = randn(LENGTH, 4, 40), randn(LENGTH, 1, 40, seed=1)
    in_steps = attend(split, query, key, key, [LENGTH - 1, 1])
    assert not torch.equal(in_steps, attend(split, query, key, key, [LENGTH]))
