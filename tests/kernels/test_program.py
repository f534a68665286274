"""Recorded kernels: a program computes, bit for bit, what its kernels do when called one by one."""

from __future__ import annotations

import threading

import pytest
import torch
from fastgen.kernels import cpu
from fastgen.kernels.cpu.program import NotRecordableError, Number, Program, Recorder, same
from fastgen.kernels.gated_activation import silu_mul_cpu
from fastgen.kernels.packed_linear import packed_linear_cpu
from fastgen.kernels.packing import pack, why_not_tiles
from fastgen.kernels.paged_attention import paged_attention_cpu
from fastgen.kernels.rms_norm import add_rms_norm_cpu, rms_norm_cpu
from fastgen.kernels.rope import rope_cpu
from paged_steps import MIXED, Case, Sequence

pytestmark = pytest.mark.skipif(
    cpu.why_missing() is not None, reason=f"no C++ kernels here: {cpu.why_missing()}"
)
WIDTH = 96


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def program_of(function, *layouts) -> Program:
    """Record a function of tensors; layouts: shape (ints and names of sizes) and dtype of each."""
    recorder = Recorder()
    values = [recorder.external(shape, None, dtype) for shape, dtype in layouts]
    with cpu.recording(recorder):
        results = function(*values)
    return Program(recorder, results)


def norm(input, weight):
    return rms_norm_cpu(input, weight, 1e-6, 0.0, False)


def add_norm(input, residual, weight):
    return add_rms_norm_cpu(input, residual, weight, 1e-6, 0.0, False)


ROWS = ("tokens", WIDTH), torch.float32
WEIGHT = (WIDTH,), torch.float32


def rows(num_tokens: int, seed: int = 0) -> torch.Tensor:
    return randn(num_tokens, WIDTH, seed=seed)


def chain(x, weight):
    """Values that are read by two later calls, returned and read, and of which nobody reads one."""
    first = norm(x, weight)
    second, total = add_norm(first, x, weight)
    third, _unread = add_norm(second, first, weight)
    fourth, sum_of_four = add_norm(third, total, weight)
    product = silu_mul_cpu(fourth, third)
    last, _ = add_norm(product, first, weight)
    return second, sum_of_four, last


def assert_equal(found, expected) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert torch.equal(one, other)


SIZES = (5, 1, 63, 64, 2, 100, 1)


@pytest.mark.parametrize("inference", [False, True], ids=["plain", "inference"])
def test_one_program_for_sizes_that_grow_and_shrink(inference):
    program = program_of(chain, ROWS, WEIGHT)
    assert program.num_calls == 6
    weight = randn(WIDTH, seed=9)
    with torch.inference_mode(inference):
        for seed, num_tokens in enumerate(SIZES):
            x = rows(num_tokens, seed)
            assert_equal(program(x, weight), chain(x, weight))
            assert_equal(program(x, weight), chain(x, weight))


def test_values_that_nobody_needs_any_more_give_their_place_away():
    def many(x, weight):
        for _ in range(40):
            x = norm(x, weight)
        return (x,)

    program, x, weight = program_of(many, ROWS, WEIGHT), rows(7), randn(WIDTH)
    assert_equal(program(x, weight), many(x, weight))
    assert program._workspace.numel() == 2 * 7 * WIDTH * 4, "a result and the one before it"


def test_no_kernel_writes_over_what_it_reads():
    """Every row reads the first one: it must be there until the last is written."""

    def spread(x, weight):
        for _ in range(5):
            made = norm(x, weight)
            first_row = made.as_strided((x.shape[0], WIDTH), (0, 1), 0)
            x = silu_mul_cpu(first_row, first_row)
        return (norm(x, None),)

    program = program_of(spread, ROWS, WEIGHT)
    for num_tokens in SIZES:
        given = rows(num_tokens), randn(WIDTH)
        assert_equal(program(*given), spread(*given))


@pytest.mark.parametrize("width", [1, 3, 17, 33], ids=str)
def test_places_begin_at_multiples_of_64_bytes(width):
    """Rows of 12 bytes: the places of values of any number of tokens must not overlap."""

    def several(x, wide):
        made = [norm(x, None), norm(wide, None)]
        made += [silu_mul_cpu(made[0], x), silu_mul_cpu(made[1], wide)]
        return tuple(silu_mul_cpu(made[i + 2], made[i]) for i in (0, 1))

    shape = ("tokens", width), torch.float32
    program = program_of(several, shape, (("tokens", 4 * width), torch.float32))
    for _, factors in program._start.values():
        assert all(factor % 64 == 0 for factor in factors.values())
    for num_tokens in SIZES:
        given = randn(num_tokens, width), randn(num_tokens, 4 * width, seed=1)
        assert_equal(program(*given), several(*given))


def test_results_of_one_fixed_size_beside_those_of_a_scalar():
    def both(x, fixed, weight):
        first, other = norm(fixed, weight), norm(x, weight)
        return silu_mul_cpu(first, norm(first, weight)), silu_mul_cpu(other, norm(other, weight))

    program = program_of(both, ROWS, ((3, WIDTH), torch.float32), WEIGHT)
    for num_tokens in SIZES:
        given = rows(num_tokens), rows(3, 1), randn(WIDTH)
        assert_equal(program(*given), both(*given))


def test_no_tokens_at_all():
    program = program_of(chain, ROWS, WEIGHT)
    assert [list(result.shape) for result in program(rows(0), randn(WIDTH))] == [[0, WIDTH]] * 3


def test_results_are_the_callers():
    """A later run changes nothing that an earlier one returned."""
    program, weight = program_of(chain, ROWS, WEIGHT), randn(WIDTH)
    first = program(rows(4), weight)
    kept = [result.clone() for result in first]
    program(rows(4, 1), weight)
    program.forget()
    program(rows(90, 2), weight)
    assert_equal(first, kept)


def test_views_of_results_and_of_what_stays_inside():
    def split(x, weight):
        whole = norm(x, weight)
        step = (WIDTH, 1)
        left, right = (whole.as_strided((x.shape[0], 32), step, at) for at in (0, 64))
        inner = silu_mul_cpu(left, right)
        return right, silu_mul_cpu(inner, right), whole

    program = program_of(split, ROWS, WEIGHT)
    for num_tokens in SIZES:
        given = rows(num_tokens), randn(WIDTH)
        assert_equal(program(*given), split(*given))
    views = program(rows(4), randn(WIDTH))
    assert views[0].untyped_storage().data_ptr() == views[2].untyped_storage().data_ptr()


def test_heads_of_a_merged_projection_are_normalized():
    def heads(x, weight):
        made = norm(x, None)
        part = made.as_strided((x.shape[0], 3, 16), (WIDTH, 16, 1), 32)
        return norm(part, weight), norm(part, None)

    program = program_of(heads, ROWS, ((16,), torch.float32))
    for num_tokens in SIZES:
        given = rows(num_tokens), randn(16)
        assert_equal(program(*given), heads(*given))


def test_results_of_one_program_feed_the_next():
    program, weight = program_of(chain, ROWS, WEIGHT), randn(WIDTH)
    x, expected = rows(6), rows(6)
    for _ in range(3):
        x, expected = program(x, weight)[2], chain(expected, weight)[2]
        assert torch.equal(x, expected)


def test_tensors_are_found_wherever_they_lie():
    program, x = program_of(chain, ROWS, WEIGHT), rows(4)
    weights = [randn(WIDTH, seed=seed) for seed in range(4)]
    for weight in (*weights, *reversed(weights)):
        assert_equal(program(x, weight), chain(x, weight))
    (weight,) = weights[:1]
    weight.mul_(2)  # in place: it lies where it lay
    assert_equal(program(x, weight), chain(x, weight))
    weight.data = randn(WIDTH, seed=11)
    program.forget()
    assert_equal(program(x, weight), chain(x, weight))


def test_memory_is_given_back():
    program = program_of(chain, ROWS, WEIGHT)
    program(rows(50), randn(WIDTH))
    program.forget()
    assert program._workspace.numel() == 0
    assert program._tensors == ()


WRONG = {
    "dtype": lambda x, weight: (x.bfloat16(), weight),
    "size": lambda x, weight: (x, randn(2 * WIDTH)),
    "strides": lambda x, weight: (randn(5, 2 * WIDTH)[:, ::2], weight),
    "transposed": lambda x, weight: (randn(WIDTH, 5).T, weight),
    "dimensions": lambda x, weight: (x[None], weight),
    "number": lambda x, weight: (x,),
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG.keys())
def test_tensors_that_are_not_as_recorded_are_refused(change):
    program, x, weight = program_of(chain, ROWS, WEIGHT), rows(5), randn(WIDTH)
    for _ in range(2):  # at first, and between runs
        with pytest.raises((AssertionError, IndexError)):
            program(*change(x, weight))
        assert_equal(program(x, weight), chain(x, weight))


def test_sizes_of_one_name_are_equal_in_every_run():
    program = program_of(lambda x, y: (silu_mul_cpu(x, y),), ROWS, ROWS)
    y = rows(5)
    assert_equal(program(rows(5), y), [silu_mul_cpu(rows(5), y)])
    with pytest.raises(AssertionError, match=r"a tensor is .*5, 96"):
        program(rows(6), y)  # the very tensor that fitted before


def test_the_number_of_threads_is_that_of_the_run():

    def with_scratch(x, weight):
        return *chain(x, weight), x.new_empty((cpu.num_threads(), 4))

    program, x, weight = program_of(with_scratch, ROWS, WEIGHT), rows(600), randn(WIDTH)
    for threads in (1, 3, 2, 1):
        torch.set_num_threads(threads)
        *found, scratch = program(x, weight)
        assert_equal(found, chain(x, weight))
        assert list(scratch.shape) == [threads, 4]


def test_two_programs_in_two_threads():
    program, other = (program_of(chain, ROWS, WEIGHT) for _ in range(2))
    wrong = []

    def run(mine: Program, seed: int) -> None:
        weight = randn(WIDTH, seed=seed)
        for step in range(60):
            x = rows(1 + step % 7, seed)
            found = mine(x, weight)
            if not all(map(torch.equal, found, chain(x, weight))):
                wrong.append((seed, step))
            program_of(chain, ROWS, WEIGHT)  # to record is a thread's own, too

    threads = [threading.Thread(target=run, args=each) for each in ((program, 1), (other, 2))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# What is recorded must hold for every size.


def number(recorder: Recorder):
    return recorder.external(("n", 4), None, torch.float32).shape[0]


DECISIONS = {
    "equal": lambda n: n == 1,
    "unequal": lambda n: n != 1,
    "other number": lambda n: n == n + 1,
    "less": lambda n: n < 2,
    "at least": lambda n: n >= 2,
    "at most": lambda n: n <= 2,
    "truth": lambda n: not n,
    "int": int,
    "index": lambda n: [0, 1][n],
    "range": lambda n: range(n),
    "remainder": lambda n: n % 2,
    "minus": lambda n: n - 1,
    "negative": lambda n: -n,
    "quotient": lambda n: n // 2,
    "rounded up": lambda n: -(-n // 2),
    "product": lambda n: n * n,
    "sum": lambda n: n + n,
    "max": lambda n: max(n, 3),
}


@pytest.mark.parametrize("decide", DECISIONS.values(), ids=DECISIONS.keys())
def test_what_depends_on_a_size_is_no_program(decide):
    with pytest.raises(NotRecordableError):
        decide(number(Recorder()))


def test_arithmetic_of_sizes():
    n = number(Recorder())
    assert same((n * 6 + 4) // 2, Number(2, 3, 1))
    assert same(3 * n + 1, Number(1, 3, 1))
    assert same(n * 0 + 5, 5)
    assert n == n * 1
    with pytest.raises(NotRecordableError, match="whole"):
        (n * 3) // 2


UNKNOWN = {
    "device": lambda x: x.device,
    "index": lambda x: x[0],
    "arithmetic": lambda x: x * 2,
    "of torch": lambda x: torch.relu(x),
    "transposed": lambda x: torch.empty_like(x.as_strided((8, 4), (1, 8), 0)),
    "conversion": lambda x: x.bfloat16(),
    "copy": lambda x: x.as_strided((x.shape[0], 4), (8, 1), 0).contiguous(),
    "two sizes": lambda x: x.new_empty((x.shape[0], x.shape[0])),
}


@pytest.mark.parametrize("ask", UNKNOWN.values(), ids=UNKNOWN.keys())
def test_what_a_value_does_not_know_is_no_program(ask):
    recorder = Recorder()
    with pytest.raises(NotRecordableError):
        ask(recorder.external(("n", 8), None, torch.float32))


def test_arguments_of_kernels_are_checked():
    recorder = Recorder()
    n, x = number(recorder), recorder.externals[0]
    for letter, value in (("d", n), ("p", 4711), ("p", n), ("i", 0.5), ("i", None), ("b", x)):
        with pytest.raises(NotRecordableError, match="as an argument"):
            recorder.function("kernel", letter)(value)
    assert not recorder.calls


def test_an_attempt_that_fails_leaves_nothing():
    recorder = Recorder()
    recorder.external(("n", 4), None, torch.float32)

    def fails() -> None:
        with recorder.attempt():
            y = recorder.external(("m", "k"), None, torch.float32)
            recorder.function("kernel", "p")(y.data_ptr())
            y.numel()

    with pytest.raises(NotRecordableError, match="two sizes"):
        fails()
    assert not recorder.calls
    assert len(recorder.externals) == len(recorder.sources) == 1
    with pytest.raises(NotRecordableError, match="no size of a tensor"):
        recorder.known("m")


def test_a_given_tensor_is_no_result():
    with pytest.raises(NotRecordableError, match="a result that lies in a tensor that is given"):
        program_of(lambda x, weight: (norm(x, weight), x), ROWS, WEIGHT)


def test_strides_that_are_no_size_are_refused():
    recorder = Recorder()
    with pytest.raises(NotRecordableError, match="no size of a tensor"):
        recorder.external(("n", 2, 3), ("128*m", 3, 1), torch.float32)
    assert recorder.external((1, 3), ("m", 1), torch.float32).strides == (1, 1)


# Real layers.


@pytest.fixture(name="layer")
def layer_fixture():
    """A layer around paged attention in bf16: (what it is given, the function, its program)."""
    weight = randn(8 * 64, 128, dtype=torch.bfloat16, seed=3)
    if why_not_tiles(weight) is not None:
        pytest.skip(f"packed_linear_cpu is not for this machine: {why_not_tiles(weight)}")
    back = randn(128, 4 * 64, dtype=torch.bfloat16, seed=4)
    packed, packed_back = (pack(each, "tiles") for each in (weight / 12, back / 16))
    scale = torch.rand(128, generator=torch.Generator().manual_seed(5)).bfloat16()
    angles = torch.linspace(0, 3, 200 * 64).view(200, 64)

    def run(x, residual, cos, sin, scale, packed, back, keys, values, slots, table, starts, ends):
        hidden, total = add_norm(x, residual, scale)
        merged = packed_linear_cpu(hidden, packed, None, 8 * 64)
        tokens = x.shape[0]
        query, key, value = (
            merged.as_strided((tokens, heads, 64), (8 * 64, 64, 1), at * 64)
            for heads, at in ((4, 0), (2, 4), (2, 6))
        )
        query, key = rope_cpu(query, key, cos, sin, False)
        attended = paged_attention_cpu(
            query, key, value, keys, values, slots, table, starts, ends, 0.125, 0, 0.0, None
        )
        flat = attended.as_strided((tokens, 4 * 64), (4 * 64, 1), 0)
        return packed_linear_cpu(flat, back, None, 128), total

    def given(case: Case) -> list[torch.Tensor]:
        made = case.arguments
        num_tokens = len(made["slot_mapping"])
        x, residual = (randn(num_tokens, 128, dtype=torch.bfloat16, seed=s) for s in (1, 2))
        tables = [angles[:num_tokens].cos(), angles[:num_tokens].sin()]
        # What nobody computed is NaN in a `Case`, and so are the null block's slots.
        caches = [made[role].clone() for role in ("key_cache", "value_cache")]
        rest = [
            made[name] for name in ("slot_mapping", "block_table", "query_start_loc", "seq_lens")
        ]
        return [x, residual, *tables, scale, packed, packed_back, *caches, *rest]

    bf16, fp32, int32 = torch.bfloat16, torch.float32, torch.int32
    rows, cache = (("tokens", 128), bf16), (("blocks", 2, "block_size", 64), bf16)
    program = program_of(
        run, rows, rows, (("tokens", 64), fp32), (("tokens", 64), fp32), ((128,), bf16),
        (tuple(packed.shape), bf16), (tuple(packed_back.shape), bf16), cache, cache,
        (("tokens",), torch.int64), (("seqs", "width"), int32), (("seqs + 1",), int32),
        (("seqs",), int32),
    )  # fmt: skip
    return given, run, program


STEPS = {
    "mixed": MIXED,
    "prompt": [Sequence(0, 63)],
    "one token": [Sequence(30, 1)],
    "rows": [Sequence(30 + i, 1) for i in range(17)],
    "chunks": [Sequence(100, 37), Sequence(0, 100)],
    "asked again": [Sequence(33, 1, stored=False), Sequence(3, 1)],
}


def case(sequences, block_size: int = 16) -> Case:
    shape = {"heads": (4, 2), "head_dim": 64, "v_head_dim": 64, "dtype": torch.bfloat16}
    return Case(sequences, block_size, **shape)


def bits(tensors) -> list[torch.Tensor]:
    """Integers, so that NaN equals itself."""
    return [tensor.contiguous().view(torch.int16) for tensor in tensors]


def test_a_layer_is_one_program(layer):
    given, run, program = layer
    assert program.num_calls == 5
    for sequences in (*STEPS.values(), *reversed(STEPS.values())):
        for block_size in (16, 32):
            mine, others = (given(case(sequences, block_size)) for _ in range(2))
            found, expected = program(*mine), run(*others)
            assert all(result.isfinite().all() for result in found)
            assert_equal(bits(found), bits(expected))
            assert_equal(bits(mine[7:9]), bits(others[7:9]))


def test_a_kernel_that_refuses_is_named(layer):
    given, run, program = layer
    bad, good = given(case(MIXED)), given(case(MIXED))
    bad[10] = bad[10] + 1000
    with pytest.raises(ValueError, match="paged_attention_bfloat16 refused"):
        program(*bad)
    expected = run(*given(case(MIXED)))
    assert_equal(bits(program(*good)), bits(expected))
