"""`fastgen::attention` against an fp64 attention that is written out here."""

from __future__ import annotations

import sys

import pytest
import torch
from fastgen.kernels import CallSite, implementations
from fastgen.kernels import attention as attention_op
from fastgen.kernels.attention import attend_reference, attend_sdpa

kernel_file = sys.modules["fastgen.kernels.attention"]  # the package's name is the op

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
HEADS = [(7, 1), (14, 2), (3, 3)]  # GQA 7 over one and over two KV heads, GQA 1


def dense_attention(
    query,
    key,
    value,
    scale,
    window=0,
    softcap=0.0,
    sinks=None,
    chunk=0,
    alibi_slopes=None,
    *,
    dtype,
):
    """The formula in `dtype`, every head with keys of its own; queries are the last positions."""
    num_queries, num_heads, num_keys = query.shape[0], query.shape[1], key.shape[0]
    kv_heads = torch.arange(num_heads) // (num_heads // key.shape[1])
    query, key, value = query.to(dtype), key[:, kv_heads].to(dtype), value[:, kv_heads].to(dtype)
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    distance = torch.arange(num_keys - num_queries, num_keys)[:, None] - torch.arange(num_keys)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(dtype)[:, None, None] * distance
    scores[:, (distance < 0) | (distance >= (window or num_keys))] = -torch.inf
    if chunk:
        chunks = torch.arange(num_keys).div(chunk, rounding_mode="floor")
        scores[:, chunks[num_keys - num_queries :, None] != chunks] = -torch.inf
    largest = scores.amax(-1, keepdim=True)
    weights = (scores - largest).exp()
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + (sinks.to(dtype)[:, None, None] - largest).exp()
    return torch.einsum("hqk,khd->qhd", weights / total, value)


def assert_accurate(output, query, key, value, *args, **settings):
    """Error against fp64 <= 2 x (error of the fp32 formula rounded to the dtype + eps x max)."""
    exact = dense_attention(query, key, value, *args, **settings, dtype=torch.float64)
    plain = dense_attention(query, key, value, *args, **settings, dtype=torch.float32)
    assert output.shape == exact.shape
    assert output.dtype == query.dtype
    peer = (plain.to(query.dtype).double() - exact).abs().max()
    allowed = 2 * (peer + torch.finfo(query.dtype).eps * exact.abs().max())
    error = (output.double() - exact).abs().max()
    assert error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}"


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors this small only wait for each other's threads on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tensors(num_tokens, heads=(7, 1), head_dim=64, v_head_dim=None, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    num_heads, num_kv_heads = heads
    shapes = [
        (num_tokens, num_heads, head_dim),
        (num_tokens, num_kv_heads, head_dim),
        (num_tokens, num_kv_heads, v_head_dim or head_dim),
    ]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def run(name, query, key, value, scale, window=0, softcap=0.0, sinks=None, **settings):
    """Run the op itself ("op") or one implementation; skip what an implementation refuses."""
    arguments = {
        "query": query,
        "key": key,
        "value": value,
        "mask": None,
        "scale": scale,
        "window": window,
        "softcap": softcap,
        "sinks": sinks,
        "layer_idx": 0,
        **settings,
    }
    if name == "op":
        return attention_op(**arguments)
    chosen = next(item for item in implementations("fastgen::attention") if item.name == name)
    if (why := chosen.refuses(CallSite(query.device, arguments))) is not None:
        pytest.skip(f"{name} refuses: {why}")
    return chosen.function(**arguments)


IMPLEMENTATIONS = pytest.mark.parametrize(
    "name", ["op", *(item.name for item in implementations("fastgen::attention"))]
)


@DTYPES
@pytest.mark.parametrize("num_tokens", [1, 63, 100])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("heads", HEADS, ids=lambda heads: "{}q{}kv".format(*heads))
@IMPLEMENTATIONS
def test_equals_fp64(name, heads, head_dim, num_tokens, dtype):
    query, key, value = tensors(num_tokens, heads, head_dim, dtype=dtype)
    output = run(name, query, key, value, head_dim**-0.5)
    assert_accurate(output, query, key, value, head_dim**-0.5)


SLOPES = 2.0 ** -torch.linspace(0, 8, 14)

VARIANTS = [
    pytest.param({"window": 1}, id="window-1"),
    pytest.param({"window": 16}, id="window-16"),
    pytest.param({"window": 63}, id="window-all"),
    pytest.param({"window": 500}, id="window-larger"),
    pytest.param({"scale": 0.7}, id="scale"),
    pytest.param({"softcap": 2.0}, id="softcap"),
    pytest.param({"sinks": torch.linspace(-1, 3, 14)}, id="sinks"),
    pytest.param(
        {"window": 7, "softcap": 5.0, "sinks": torch.linspace(-1, 3, 14)}, id="all-together"
    ),
    pytest.param({"chunk": 1}, id="chunk-1"),
    pytest.param({"chunk": 16}, id="chunk-16"),
    pytest.param({"chunk": 63}, id="chunk-all"),
    pytest.param({"chunk": 20, "window": 7}, id="chunk-window"),
    pytest.param({"alibi_slopes": SLOPES}, id="alibi"),
    pytest.param({"alibi_slopes": SLOPES, "chunk": 20, "window": 7}, id="alibi-chunk-window"),
    pytest.param(
        {"alibi_slopes": SLOPES, "softcap": 5.0, "sinks": torch.linspace(-1, 3, 14), "chunk": 20},
        id="alibi-softcap-sinks-chunk",
    ),
]


@DTYPES
@pytest.mark.parametrize("variant", VARIANTS)
@IMPLEMENTATIONS
def test_variants_equal_fp64(name, variant, dtype):
    query, key, value = tensors(63, (14, 2), 80, v_head_dim=48, dtype=dtype)
    arguments = {"scale": 80**-0.5, **variant}
    output = run(name, query, key, value, **arguments)
    assert_accurate(output, query, key, value, **arguments)


@DTYPES
@IMPLEMENTATIONS
def test_strided_inputs_equal_contiguous_ones(name, dtype):
    """Slices of one merged projection, and heads before tokens: what graphs really hand over."""
    num_tokens, head_dim = 63, 80
    merged = tensors(num_tokens, (18, 18), head_dim, dtype=dtype)[0]
    query, key = merged[:, :14], merged[:, 14:16]
    value = merged.transpose(0, 1).contiguous().transpose(0, 1)[:, 16:]
    assert not any(tensor.is_contiguous() for tensor in (query, key, value))
    output = run(name, query, key, value, 0.1, window=20)
    assert_accurate(output, query, key, value, 0.1, window=20)
    copies = (tensor.contiguous() for tensor in (query, key, value))
    again = run(name, *copies, 0.1, window=20)
    assert_accurate(again, query, key, value, 0.1, window=20)


@IMPLEMENTATIONS
def test_output_is_contiguous_and_inputs_stay(name):
    query, key, value = tensors(63, (14, 2), v_head_dim=48)
    before = [tensor.clone() for tensor in (query, key, value)]
    assert run(name, query, key, value, 0.1).is_contiguous()
    for tensor, old in zip((query, key, value), before, strict=True):
        assert torch.equal(tensor, old)


@IMPLEMENTATIONS
def test_later_tokens_change_nothing(name):
    query, key, value = tensors(63, (14, 2))
    output = run(name, query, key, value, 0.1)
    for tensor in (query, key, value):
        tensor[40:] = 3.0
    changed = run(name, query, key, value, 0.1)
    assert torch.equal(changed[:40], output[:40])
    assert not torch.equal(changed[40:], output[40:])


@DTYPES
@pytest.mark.parametrize(("num_queries", "window"), [(1, 0), (1, 9), (30, 0), (30, 9), (63, 0)])
@pytest.mark.parametrize("attend", [attend_reference, attend_sdpa], ids=["reference", "sdpa"])
def test_queries_are_the_last_tokens_of_their_keys(attend, num_queries, window, dtype):
    query, key, value = tensors(63, (14, 2), 80, v_head_dim=48, dtype=dtype)
    query = query[-num_queries:]
    rest = () if attend is attend_sdpa else (0.0, None)
    output = attend(query, key, value, 0.1, window, *rest)
    assert_accurate(output, query, key, value, 0.1, window)


@DTYPES
@pytest.mark.parametrize("num_queries", [1, 30, 63])
@pytest.mark.parametrize(
    "settings", [{"chunk": 20}, {"alibi_slopes": SLOPES, "chunk": 40}], ids=str
)
@pytest.mark.parametrize("attend", [attend_reference, attend_sdpa], ids=["reference", "sdpa"])
def test_chunks_and_distances_count_from_the_first_key(attend, settings, num_queries, dtype):
    query, key, value = tensors(63, (14, 2), 80, v_head_dim=48, dtype=dtype)
    query = query[-num_queries:]
    rest = () if attend is attend_sdpa else (0.0, None)
    output = attend(query, key, value, 0.1, 0, *rest, **settings)
    assert_accurate(output, query, key, value, 0.1, **settings)


@pytest.mark.parametrize("attend", [attend_reference, attend_sdpa], ids=["reference", "sdpa"])
@pytest.mark.parametrize("rows_per_tile", [1, 7, 62])
def test_tiles_of_biased_scores_equal_one_tile(monkeypatch, rows_per_tile, attend):
    rest = () if attend is attend_sdpa else (0.0, None)
    query, key, value = tensors(63, (14, 2), 80, v_head_dim=48)
    monkeypatch.setattr(kernel_file, "MAX_SCORES", 14 * 63 * rows_per_tile)
    output = attend(query[13:], key, value, 0.1, 20, *rest, 30, SLOPES)
    assert_accurate(output, query[13:], key, value, 0.1, 20, chunk=30, alibi_slopes=SLOPES)


@pytest.mark.parametrize("name", ["triton"])
@pytest.mark.parametrize(
    "setting", [{"chunk": 4}, {"alibi_slopes": SLOPES}], ids=["chunk", "alibi"]
)
def test_implementations_that_know_neither_say_so(setting, name):
    query, key, value = tensors(9, (14, 2))
    arguments = {"query": query, "key": key, "value": value, "slot_mapping": query, **setting}
    for op in ("fastgen::attention", "fastgen::paged_attention"):
        for item in implementations(op):
            if item.name == name:
                assert item.refuses(CallSite(query.device, arguments)) == next(iter(setting))


@pytest.mark.parametrize("rows_per_tile", [1, 7, 62])
def test_tiles_of_queries_equal_one_tile(monkeypatch, rows_per_tile):
    sinks = torch.linspace(-1, 3, 14)
    query, key, value = tensors(63, (14, 2), 80, v_head_dim=48)
    whole = attend_reference(query[13:], key, value, 0.1, 20, 5.0, sinks)
    monkeypatch.setattr(kernel_file, "MAX_SCORES", 14 * 63 * rows_per_tile)
    tiled = attend_reference(query[13:], key, value, 0.1, 20, 5.0, sinks)
    for output in (whole, tiled):
        assert_accurate(output, query[13:], key, value, 0.1, 20, 5.0, sinks)


def test_scores_larger_than_a_tile_are_cut_one_query_at_a_time(monkeypatch):
    query, key, value = tensors(9)
    monkeypatch.setattr(kernel_file, "MAX_SCORES", 1)
    output = attend_reference(query, key, value, 0.1, 0, 0.0, None)
    assert_accurate(output, query, key, value, 0.1)


def test_no_queries_give_no_rows():
    query, key, value = tensors(9)
    assert attend_reference(query[:0], key, value, 0.1, 0, 0.0, None).shape == (0, 7, 64)


def test_a_mask_tensor_is_refused():
    query, key, value = tensors(9)
    with pytest.raises(ValueError, match="takes no mask"):
        attention_op(query, key, value, torch.ones(9, 9), 0.1, 0, 0.0, None, 0)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        pytest.param([(3, 5, 8), (3, 2, 8), (3, 2, 8)], "multiple of num_kv_heads", id="5q2kv"),
        pytest.param([(3, 4, 8), (3, 2, 8), (3, 1, 8)], "multiple of num_kv_heads", id="2k1v"),
        pytest.param([(3, 4, 8), (3, 2, 16), (3, 2, 16)], "head_dim of query", id="head_dim"),
    ],
)
def test_heads_that_do_not_fit_are_refused(shapes, message, device):
    query, key, value = (torch.ones(shape, device=device) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        attention_op(query, key, value, None, 0.1, 0, 0.0, None, 0)


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param((0, 0.0, None), id="plain"),
        pytest.param((4, 2.0, torch.zeros(14)), id="window-softcap-sinks"),
        pytest.param((0, 0.0, None, 3, 4, torch.ones(14)), id="chunk-alibi"),
    ],
)
def test_opcheck(variant):
    query, key, value = tensors(9, (14, 2), 16, v_head_dim=8)
    strided = query.transpose(0, 1).contiguous().transpose(0, 1)
    window, softcap, sinks, layer_idx, *rest = (*variant, 3)[:6]
    arguments = (strided, key, value, None, 0.25, window, softcap, sinks, layer_idx, *rest)
    torch.library.opcheck(torch.ops.fastgen.attention.default, arguments)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        pytest.param({"window": 15}, {"window": 16}, id="window-off-by-one"),
        pytest.param({"softcap": 0.0}, {"softcap": 5.0}, id="softcap-dropped"),
        pytest.param({"sinks": None}, {"sinks": torch.linspace(-1, 3, 14)}, id="sinks-dropped"),
        pytest.param({"scale": 0.11}, {"scale": 0.1}, id="scale"),
        pytest.param({"chunk": 21}, {"chunk": 20}, id="chunk-off-by-one"),
        pytest.param({"chunk": 0}, {"chunk": 60}, id="chunk-dropped"),
        pytest.param(
            {"alibi_slopes": SLOPES.roll(1)}, {"alibi_slopes": SLOPES}, id="slopes-of-other-heads"
        ),
        pytest.param({}, {"alibi_slopes": SLOPES}, id="slopes-dropped"),
    ],
)
@DTYPES
def test_planted_mistakes_are_seen(wrong, right, dtype):
    query, key, value = tensors(63, (14, 2), 80, dtype=dtype)
    output = run("op", query, key, value, **{"scale": 0.1, **wrong})
    with pytest.raises(AssertionError, match="error"):
        assert_accurate(output, query, key, value, **{"scale": 0.1, **right})


def test_planted_heads_in_the_wrong_group_are_seen():
    query, key, value = tensors(63, (14, 2), 80)
    interleaved = query.view(63, 7, 2, 80).transpose(1, 2).reshape(63, 14, 80)
    output = run("op", interleaved, key, value, 0.1)
    with pytest.raises(AssertionError, match="error"):
        assert_accurate(output, query, key, value, 0.1)
