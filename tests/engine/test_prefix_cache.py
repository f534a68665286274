"""Blocks that requests share: what is found, what must not be, and that no token changes.

Tokens are compared with transformers' (`expected`): a prompt with a part of its continuation goes
on as the prompt alone does, which gives prompts that begin alike at any length.
"""

from __future__ import annotations

import hashlib

import pytest
import torch
from engine_helpers import (  # noqa: F401 - the fixtures are used by name
    BLOCK_BYTES,
    Boom,
    core_of,
    expected_fixture,
    gated_fixture,
    greedy,
    make_engine_fixture,
    model_fixture,
    raise_once,
    within,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import prompts, tiny_model

from fastgen import SamplingParams
from fastgen.engine import engine as engine_module
from fastgen.engine.block_pool import BlockPool
from fastgen.engine.lockstep import LockstepGroup
from fastgen.engine.prefix_cache import block_digests, root_digest
from fastgen.engine.request import Request


def run(engine, row: list[int], max_tokens: int = 1, **fields):
    (output,) = within(lambda: engine.generate([row], greedy(max_tokens), **fields))
    assert output.error is None
    return output


def cached(engine, row: list[int], **fields) -> int:
    """How many tokens of a prompt are found; it is in the cache afterwards."""
    return run(engine, row, **fields).metrics.num_cached_tokens


def run_request(core, request: Request) -> Request:
    core.submit(request)
    assert request.done.wait(20)
    return request


# What is found.


@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 32, 33, 48, 100])
@pytest.mark.parametrize("block_size", [16, 32])
def test_full_blocks_are_found_and_the_rest_is_computed(make_engine, length, block_size):
    """Of a prompt that is found completely only the last token is computed."""
    engine = make_engine(block_size=block_size, poisoned=True)
    (row,) = prompts(length)
    first = run(engine, row, 5)
    assert engine.metrics().computed_tokens == length + 4
    again = run(engine, row, 5)
    found = length // block_size * block_size
    assert first.metrics.num_cached_tokens == 0
    assert again.metrics.num_cached_tokens == found
    assert again.token_ids == first.token_ids
    metrics = engine.metrics()
    assert metrics.computed_tokens == length + 4 + max(1, length - found) + 4
    assert (metrics.prefix_tokens, metrics.prefix_cache_hit_tokens) == (2 * length, found)
    assert metrics.prefix_cache_hit_rate == found / (2 * length)
    assert metrics.num_cached_blocks == (length + 4) // block_size
    assert metrics.num_free_blocks == metrics.num_blocks


@pytest.mark.parametrize("differs_at", [0, 1, 15, 16, 31, 32, 47])
def test_a_prompt_is_found_up_to_where_it_differs(make_engine, differs_at):
    engine = make_engine(poisoned=True)
    (row,) = prompts(48)
    run(engine, row)
    other = [*row]
    other[differs_at] ^= 1
    assert cached(engine, other) == differs_at // 16 * 16


def test_generated_tokens_are_found(make_engine, expected):
    rows, tokens = expected
    engine = make_engine(poisoned=True)
    assert run(engine, rows[1], 33).token_ids == tokens[1][:33]  # 16 + 32 are in the cache
    computed = engine.metrics().computed_tokens
    output = run(engine, rows[1] + tokens[1][:32], 2)
    assert output.metrics.num_cached_tokens == 48
    assert output.token_ids == tokens[1][32:34]
    assert engine.metrics().computed_tokens == computed + 2


@pytest.mark.parametrize(("length", "computed"), [(32, 32 + 1 + 1), (40, 40 + 8 + 8), (9, 27)])
def test_requests_of_one_step_share(make_engine, length, computed):
    engine = make_engine(poisoned=True)
    (row,) = prompts(length)
    outputs = within(engine.generate, [row] * 3, greedy(1))
    assert len({tuple(output.token_ids) for output in outputs}) == 1
    metrics = engine.metrics()
    assert (metrics.engine_steps, metrics.computed_tokens) == (1, computed)
    assert metrics.num_cached_blocks == length // 16


def test_requests_that_come_while_a_prompt_is_computed_share_what_is_done(make_engine, gated):
    engine = make_engine(max_num_batched_tokens=20, poisoned=True)
    (row,) = prompts(60)
    gate = gated(engine)
    first = engine.submit(row, greedy(30))
    gate.wait()
    gate.step()  # 20 of 60; the next 20 stand at the gate
    second = engine.submit(row, greedy(30))
    gate.open()
    outputs = [within(engine.result, request) for request in (first, second)]
    assert outputs[0].token_ids == outputs[1].token_ids
    assert outputs[1].metrics.num_cached_tokens == 48


def test_lockstep_rows_and_requests_share(make_engine, expected):
    rows, tokens = expected
    engine = make_engine(poisoned=True)
    core = core_of(engine)
    made = [Request(rows[3], greedy(20)) for _ in range(3)]

    def drive() -> list[list[int]]:
        columns = []
        with LockstepGroup(core, made) as group:
            for step in range(20):
                columns.append(group.next_logits().argmax(-1).tolist())
                if step < 19:
                    group.feed(columns[-1])
        return [list(column) for column in zip(*columns, strict=True)]

    assert within(drive) == [tokens[3][:20]] * 3
    assert [request.num_cached_tokens for request in made] == [0, 32, 32]
    assert cached(engine, rows[3] + tokens[3][:15]) == 48


def test_generate_with_scores_shares_and_gives_the_same_scores(model, make_engine, expected):
    engine = make_engine(poisoned=True)
    plain = tiny_model("qwen2")
    ids = torch.tensor([expected[0][5]] * 2)
    fields = {
        "max_new_tokens": 8,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    want = plain.generate(ids, **fields)
    for _ in range(2):
        out = within(lambda: model.generate(ids, **fields))
        assert torch.equal(out.sequences, want.sequences)
        for own, other in zip(out.scores, want.scores, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)
    assert engine.metrics().prefix_cache_hit_tokens == 3 * 32


def test_right_padded_rows_share_and_ask_their_query(model, make_engine, expected):
    """The query token is not stored: neither the first call nor the next may find its block."""
    engine = make_engine(poisoned=True)
    plain = tiny_model("qwen2")
    row = expected[0][3][:32]
    ids = torch.tensor([[*row, 0], [*row[:20], *[0] * 13], [*row, 5]])
    mask = torch.tensor([[1] * 32 + [0], [1] * 20 + [0] * 13, [1] * 33])
    fields = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
    want = plain.generate(ids, **fields)
    for _ in range(3):
        assert torch.equal(within(lambda: model.generate(ids, **fields)), want)
    assert engine.metrics().prefix_cache_hit_tokens > 0


@pytest.mark.parametrize("shift", [0, 5])
def test_outputs_at_other_positions_are_not_found(make_engine, expected, shift):
    """Keys depend on positions: the digest of a block says nothing of a shift within it."""
    rows, tokens = expected
    engine = make_engine(poisoned=True)
    core = core_of(engine)
    request = Request(rows[1], greedy(40), first_output_position=16 + shift)
    run_request(core, request)
    assert core.metrics().num_cached_blocks == (1 if shift else (16 + 39) // 16)
    again = Request(rows[1], greedy(40), first_output_position=16 + shift)
    assert run_request(core, again).output_token_ids == request.output_token_ids
    output = run(engine, rows[1] + tokens[1][:20], 10)
    assert output.token_ids == tokens[1][20:30]
    assert output.metrics.num_cached_tokens == (16 if shift else 32)


# What must not be found.


def check_apart(engine, change) -> None:
    """After `change` nothing that was computed before is found, and the new blocks are."""
    (row,) = prompts(40)
    assert cached(engine, row) == 0
    assert cached(engine, row) == 32
    change()
    assert cached(engine, row) == 0
    assert cached(engine, row) == 32


def begin_epoch(engine) -> None:
    within(core_of(engine).begin_epoch, 1)
    assert engine.metrics().num_cached_blocks == 0


def other_graph(engine) -> None:
    core_of(engine).compiled.graph_id += 1000


@pytest.mark.parametrize("change", [begin_epoch, other_graph])
def test_epochs_and_graphs_are_apart(make_engine, change):
    engine = make_engine()
    check_apart(engine, lambda: change(engine))


@pytest.mark.parametrize("planted", ["epoch", "graph", "forgets"])
def test_planted_root_is_found(make_engine, monkeypatch, planted):
    wrong = {
        "epoch": lambda epoch, graph, salt: root_digest(0, graph, salt),
        "graph": lambda epoch, graph, salt: root_digest(epoch, 0, salt),
        "forgets": root_digest,
    }[planted]
    monkeypatch.setattr(engine_module, "root_digest", wrong)
    monkeypatch.setattr(BlockPool, "forget_all", lambda self: None)
    engine = make_engine()
    change = other_graph if planted == "graph" else begin_epoch
    with pytest.raises(AssertionError):
        check_apart(engine, lambda: change(engine))


def test_salts_are_apart(make_engine):
    engine = make_engine()
    (row,) = prompts(40)
    for salt in (None, "", "None", "a", "b"):
        assert cached(engine, row, cache_salt=salt) == 0
        assert cached(engine, row, cache_salt=salt) == 32
    request = engine.submit(row, greedy(1), cache_salt="a")
    assert within(engine.result, request).metrics.num_cached_tokens == 32


@torch.no_grad()
def test_changed_weights_give_new_tokens(model, make_engine, expected):
    rows, tokens = expected
    engine = make_engine(poisoned=True)
    assert run(engine, rows[3], 10).token_ids == tokens[3][:10]
    weight = model.model.layers[0].self_attn.k_proj.weight
    before = weight.clone()
    try:
        weight.mul_(-2)
        within(core_of(engine).begin_epoch, 1)
        changed = run(engine, rows[3], 10).token_ids
        assert changed != tokens[3][:10]
        unshared = run(make_engine(prefix_cache=False), rows[3], 10).token_ids
        assert changed == unshared
    finally:
        weight.copy_(before)


def test_switched_off(make_engine, expected):
    rows, tokens = expected
    engine = make_engine(prefix_cache=False, poisoned=True)
    for _ in range(2):
        outputs = within(engine.generate, [rows[3]] * 2, greedy(10))
        assert [output.token_ids for output in outputs] == [tokens[3][:10]] * 2
    metrics = engine.metrics()
    assert (metrics.num_cached_blocks, metrics.prefix_cache_hit_tokens) == (0, 0)
    assert metrics.prefix_cache_hit_rate == 0.0
    assert metrics.computed_tokens == 4 * (33 + 9)


def test_metrics_of_an_engine_that_did_nothing(make_engine):
    assert make_engine().metrics().prefix_cache_hit_rate == 0.0


# Memory.


def test_the_least_recently_used_is_given_up_first(make_engine):
    engine = make_engine(kv_cache_memory_bytes=9 * BLOCK_BYTES, poisoned=True)
    old, used, new = (prompts(n, seed=n)[0] for n in (48, 49, 64))
    assert [cached(engine, row) for row in (used, old, used)] == [0, 0, 48]
    # 8 blocks: used 3, old 3. The next one takes the two others, and two of old, the last first.
    assert cached(engine, new) == 0
    assert engine.metrics().num_cached_blocks == 8
    assert cached(engine, used[:48]) == 48
    assert cached(engine, old[:17]) == 16


def test_a_full_cache_holds_nobody_up(make_engine, expected):
    """All blocks are published and idle; new requests take them."""
    rows, tokens = expected
    engine = make_engine(kv_cache_memory_bytes=9 * BLOCK_BYTES, poisoned=True)
    for seed in range(6):
        run(engine, prompts(100, seed=seed)[0])
    assert engine.metrics().num_cached_blocks >= 6
    outputs = within(engine.generate, rows, greedy(40))
    assert [output.token_ids for output in outputs] == tokens


def test_release_forgets(model, make_engine):
    engine = make_engine()
    check_apart(engine, lambda: within(core_of(engine).release_cache))


# Failing, cancelled and preempted requests.


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_failing_step_leaves_nothing_behind(make_engine, gated, expected, steps):
    rows, tokens = expected
    engine = make_engine(max_num_batched_tokens=16, poisoned=True)
    gate = gated(engine)
    request = engine.submit(rows[5], greedy(5))
    gate.wait()
    if steps:
        gate.step(steps)
    gate._run = raise_once(gate._run, Boom("no luck"))
    gate.open()
    assert within(engine.result, request).finish_reason == "error"
    assert engine.metrics().num_cached_blocks == 0
    output = run(engine, rows[5], 40)
    assert output.metrics.num_cached_tokens == 0
    assert output.token_ids == tokens[5]


def test_planted_trust_in_a_failing_step_is_found(make_engine, gated, expected, monkeypatch):
    monkeypatch.setattr(BlockPool, "forget", lambda self, blocks: None)
    rows, tokens = expected
    engine = make_engine()
    gate = gated(engine)
    core = core_of(engine)
    core._mailbox.call(lambda: core._runner.kv_cache.poison(range(1, 50)))  # pyright: ignore
    gate._run = raise_once(gate._run, Boom("no luck"))
    request = engine.submit(rows[5], greedy(5))
    gate.open()
    assert within(engine.result, request).finish_reason == "error"
    (output,) = within(engine.generate, [rows[5]], greedy(40))
    assert output.token_ids != tokens[5], "what nobody computed was not read"


def test_failing_request_beside_one_that_shares_its_blocks(make_engine, expected, monkeypatch):
    """The blocks are forgotten under the other one's hands; it goes on, and publishes the rest."""
    rows, tokens = expected
    engine = make_engine(poisoned=True)
    nothing = SamplingParams(max_tokens=5, allowed_token_ids=[1], bad_words=[[1]])
    outputs = within(
        engine.generate, [rows[5], rows[5], rows[5]], [nothing, greedy(40), greedy(40)]
    )
    assert [output.finish_reason for output in outputs] == ["error", "length", "length"]
    assert [output.token_ids for output in outputs[1:]] == [tokens[5]] * 2
    for _ in range(2):
        assert run(engine, rows[5] + tokens[5][:10], 30).token_ids == tokens[5][10:]


def test_cancelled_request_leaves_what_it_computed(make_engine, gated, expected):
    rows, tokens = expected
    engine = make_engine(max_num_batched_tokens=20, poisoned=True)
    gate = gated(engine)
    request = engine.submit(rows[5], greedy(5))
    gate.wait()
    gate.open_once_posted(lambda: engine.cancel(request))
    output = run(engine, rows[5], 40)
    assert output.metrics.num_cached_tokens == 16, "20 of 40 tokens were computed"
    assert output.token_ids == tokens[5]


WORKLOADS = {
    "default": {},
    "tiny-pool": {"kv_cache_memory_bytes": 9 * BLOCK_BYTES, "max_num_batched_tokens": 50},
    "tiny-pool-chunks": {"kv_cache_memory_bytes": 9 * BLOCK_BYTES, "max_num_batched_tokens": 7},
    "one-at-a-time": {"max_num_seqs": 1},
}


@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize("prefix_cache", [True, False], ids=["shared", "alone"])
def test_tokens_are_equal_with_and_without_sharing(make_engine, expected, workload, prefix_cache):
    """Prompts that begin alike at many lengths, in every freed block NaN; fp32 tokens are equal."""
    rows, tokens = expected
    engine = make_engine(prefix_cache=prefix_cache, **WORKLOADS[workload], poisoned=True)
    jobs = [
        (row + own[:known], own[known:])
        for row, own in zip(rows, tokens, strict=True)
        for known in (0, 1, 15, 16, 17, 32)
    ]
    for part in (jobs[::2], jobs[1::2], jobs):
        params = [greedy(len(rest)) for _, rest in part]
        outputs = within(engine.generate, [row for row, _ in part], params)
        assert [output.token_ids for output in outputs] == [rest for _, rest in part]
    metrics = engine.metrics()
    assert (metrics.prefix_cache_hit_tokens > 0) == prefix_cache
    assert (metrics.preemptions > 0) == workload.startswith("tiny-pool")
    assert metrics.num_free_blocks == metrics.num_blocks


def test_sampled_tokens_are_equal_with_and_without_sharing(make_engine, expected):
    rows = [row + own[:17] for row, own in zip(*expected, strict=True)] * 2
    params = [
        SamplingParams(max_tokens=15, temperature=1.2, seed=seed) for seed in range(len(rows))
    ]
    with_sharing = within(make_engine(poisoned=True).generate, rows, params)
    without = within(make_engine(prefix_cache=False).generate, rows, params)
    assert [o.token_ids for o in with_sharing] == [o.token_ids for o in without]


# Digests.


def digests(ids: list[int], block_size: int = 4, root: bytes | None = b"root", **fields):
    request = Request(ids, greedy(5), **fields)
    request.cache_root = root
    return block_digests(request, len(ids), block_size)


def test_digests_are_a_chain_of_sha256():
    first, second = digests(list(range(8)))
    ids = [i.to_bytes(8, "little") for i in range(8)]
    assert first == hashlib.sha256(b"root" + b"".join(ids[:4])).digest()
    assert second == hashlib.sha256(first + b"".join(ids[4:])).digest()


def test_digests_of_full_blocks_only():
    assert [len(digests([1] * length)) for length in (0, 3, 4, 7, 8)] == [0, 0, 1, 1, 2]
    assert digests([1] * 8, root=None) == []


@settings(deadline=None, max_examples=100)
@given(
    ids=st.lists(st.integers(0, 2**31 - 1), min_size=8, max_size=24),
    at=st.integers(0, 23),
    other=st.integers(0, 2**31 - 1),
)
def test_every_token_and_its_place_count(ids, at, other):
    """A change is seen by its block and all after it, and by none before."""
    at %= len(ids) // 4 * 4
    changed = [*ids]
    changed[at] = other if other != ids[at] else other ^ 1
    swapped = [*ids]
    swapped[at], swapped[0] = swapped[0], swapped[at]
    for variant, first in ((changed, at), (swapped, 0)):
        if variant == ids:
            continue
        for block, (own, old) in enumerate(zip(digests(variant), digests(ids), strict=True)):
            assert (own == old) == (block < first // 4)


def test_no_two_prefixes_collide():
    """Blocks of equal tokens after different ones, and all roots."""
    roots = [root_digest(e, g, s) for e in (0, 1, 11) for g in (0, 1, 11) for s in (None, "", "1")]
    seen: dict[bytes, tuple] = {}
    for root in roots:
        for a in range(4):
            for b in range(4):
                ids = [a, a, b, b, 1, 1, 1, 1]
                for length, digest in zip((4, 8), digests(ids, root=root), strict=True):
                    key = (root, *ids[:length])
                    assert seen.setdefault(digest, key) == key
    assert len(seen) == len(roots) * 16 * 2


def test_digests_grow_with_the_output_and_are_kept():
    request = Request([1, 2, 3], greedy(20))
    request.cache_root = b"root"
    assert block_digests(request, 3, 4) == []
    request.output_token_ids += [4, 5, 6, 7, 8]
    assert block_digests(request, 8, 4) == digests([1, 2, 3, 4, 5, 6, 7, 8])
    assert block_digests(request, 7, 4) == digests([1, 2, 3, 4])
    assert request.block_digests == digests([1, 2, 3, 4, 5, 6, 7, 8])


def test_digests_of_shifted_outputs_end_with_the_prompt():
    request = Request([1, 2, 3, 4, 5], greedy(20), first_output_position=9)
    request.cache_root = b"root"
    request.output_token_ids += [6, 7, 8, 9]
    assert block_digests(request, 9, 4) == digests([1, 2, 3, 4])
