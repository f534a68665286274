"""The soak: a small one is well; what each of its checks is for is found when it is planted."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
from tiny_models import prompts, tiny_model

from fastgen.bench.soak import samples
from fastgen.bench.soak.ledger import Ledger
from fastgen.bench.soak.orders import WEIGHTS, Conduct, make_order
from fastgen.bench.soak.run import Setting, soak
from fastgen.bench.soak.samples import LEAST_SAMPLES, MAX_GROWTH_BYTES, block_faults, memory_growth
from fastgen.cli import soak as command
from fastgen.cli.main import main
from fastgen.config import SamplingParams
from fastgen.engine import engine as engine_module
from fastgen.engine.block_pool import BlockPool
from fastgen.engine.request import Request
from fastgen.engine.scheduler import Scheduler
from fastgen.outputs import TokenEvent

SMALL = Setting(
    num_requests=90, num_checked=60, num_callers=32, callers_per_loop=4, max_num_seqs=8,
    max_queue=16, num_blocks=36,
)  # fmt: skip
FEW = replace(SMALL, num_requests=40, num_checked=20)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(autouse=True)
def cached_graphs(graphs_of_the_session):
    """The soak captures the model each time."""


class Tokenizer:
    """One printable character per token id."""

    bos_token_id = None

    def decode(self, ids, skip_special_tokens=False):
        return "".join(chr(0x100 + token_id) for token_id in ids)


def orders(count: int, seed: int = 0):
    return [make_order(index, seed, 128, 512, 0.5) for index in range(count)]


# The orders.


def test_an_order_depends_on_its_seed_and_place_alone():
    assert orders(50) == [make_order(i, 0, 128, 512, 0.5) for i in reversed(range(50))][::-1]
    assert orders(50, seed=1) != orders(50)


def test_every_conduct_is_ordered_and_prompts_form_trees():
    some = orders(2000)
    assert {order.conduct for order in some} == set(WEIGHTS) == set(Conduct)
    beginnings = Counter(tuple(order.prompt[:16]) for order in some if len(order.prompt) >= 48)
    assert sum(count for _, count in beginnings.most_common(4)) > 1000
    assert all(len(o.prompt) + o.params.max_tokens <= 512 for o in some)
    assert any(len(o.prompt) > 256 for o in some), "none is chunked"


# The whole of it.


@pytest.fixture(scope="module")
def result(model):
    return soak(model, Tokenizer(), SMALL)


def test_all_is_well(result):
    assert result["violations"] == []
    assert sum(result["finished"].values()) >= SMALL.num_requests - result["given_up"]
    assert result["finished"].keys() >= {"length", "cancelled"}
    assert result["queue_full"] > 0
    assert result["preemptions"] > 0
    assert result["compared"]["whole"] > 20
    assert result["blocks"]["free_at_the_end"] == result["blocks"]["total"] == 35


@pytest.mark.parametrize(("violations", "code"), [([], 0), (["planted"], 1)])
def test_the_command(model, result, violations, code, monkeypatch, capsys):
    result = {**result, "violations": violations, "num_violations": len(violations)}
    monkeypatch.setattr(command, "load_model", lambda *_: (model, None))
    monkeypatch.setattr(command, "soak", lambda *_: result)
    assert main(["soak"]) == code
    text = capsys.readouterr().out
    for needed in ("as the engine counts", "TTFT ms: p50", "free at the end"):
        assert needed in text
    assert ("all was well" in text) == (not violations)
    assert ("VIOLATION: planted" in text) == bool(violations)
    assert main(["soak", "--json"]) == code
    assert json.loads(capsys.readouterr().out)["violations"] == violations


def test_the_arguments(model, monkeypatch):
    settings = []

    def note(model, tokenizer, setting, progress):
        progress(1)
        settings.append(setting)
        raise ValueError("enough")

    monkeypatch.setattr(command, "load_model", lambda *_: (model, None))
    monkeypatch.setattr(command, "soak", note)
    assert main(["soak", "--requests", "7", "--seed", "3", "--checked", "2"]) == 1
    assert main(["soak"]) == 1
    assert settings == [Setting(num_requests=7, seed=3, num_checked=2), Setting()]


@pytest.mark.slow
def test_a_neighbour_that_changes_tokens_is_found(model, monkeypatch):
    """Rows of a step that are exchanged, which no engine test may let through either."""
    deliver = engine_module.deliver

    def exchanging(*args):
        delivered = deliver(*args)
        delivered.token_ids[:2] = reversed(delivered.token_ids[:2])
        return delivered

    monkeypatch.setattr(engine_module, "deliver", exchanging)
    result = soak(model, Tokenizer(), FEW)
    assert any("alone" in text for text in result["violations"])


@pytest.mark.slow
def test_a_block_that_is_lost_is_found(model, monkeypatch):
    free, lost = BlockPool.free, []

    def forgetful(self, blocks):
        if len(blocks) > 1 and not lost:
            lost.append(blocks.pop())
        free(self, blocks)

    monkeypatch.setattr(BlockPool, "free", forgetful)
    result = soak(model, Tokenizer(), FEW)
    assert any("1 blocks are left" in text for text in result["violations"])
    assert any("other blocks than the pool" in text for text in result["violations"])


def test_no_requests_are_refused():
    with pytest.raises(ValueError, match="at least one request, got 0"):
        Setting(num_requests=0)


# The checks.


def test_memory():
    few, flat = [100] * (LEAST_SAMPLES - 1), [100 << 20] * 100
    assert memory_growth(few)["is_flat"] is None
    assert memory_growth(flat)["is_flat"] is True
    grown = [(100 << 20) + place * MAX_GROWTH_BYTES // 50 for place in range(100)]
    assert memory_growth(grown)["is_flat"] is False
    assert memory_growth([*flat[:99], 1 << 40])["is_flat"] is True, "one sample is no growth"


def running(num_blocks: int = 9) -> tuple[Scheduler, Request]:
    scheduler = Scheduler(
        BlockPool(num_blocks), block_size=16, max_num_seqs=4, max_num_batched_tokens=64
    )
    request = Request(prompts(40)[0], SamplingParams(max_tokens=4))
    scheduler.add(request)
    scheduler.schedule()
    return scheduler, request


def test_blocks_in_order():
    scheduler, request = running()
    assert len(request.block_ids) == 3
    assert block_faults(scheduler) == []


def lose(scheduler, request):
    scheduler.pool._freed.append(scheduler.pool._next_fresh)


def take_another(scheduler, request):
    request.block_ids[0] = 8


def share(scheduler, request):
    scheduler.running.append(Request([1], SamplingParams(), block_ids=[request.block_ids[0]]))
    scheduler.pool._holders[request.block_ids[0]] += 1


def wait_with_a_block(scheduler, request):
    scheduler.add(Request([1], SamplingParams(), block_ids=[8]))


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (lose, "6 blocks are free and 3 in use, of 8"),
        (take_another, "hold other blocks than the pool has given out"),
        (share, "in two hands"),
        (wait_with_a_block, "a request that waits holds blocks"),
    ],
)
def test_blocks_out_of_order(fault, found):
    scheduler, request = running()
    fault(scheduler, request)
    assert any(found in text for text in block_faults(scheduler))


def ended(conduct: Conduct, reason: str, read: list[int] | None, final: str | None) -> list[str]:
    """Violations of an order with tokens 1, 2, 3."""
    ledger = Ledger()
    order = next(o for o in orders(2000) if o.conduct is conduct and o.params.n == 1)
    request = Request([1], order.params, output_token_ids=[1, 2, 3])
    request.end(reason)
    request.done.set()
    events = None
    if read is not None:
        events = [TokenEvent([token], "") for token in read]
        events += [TokenEvent([], "", final)] if final else []
    ledger.ended(order, request, events)
    return ledger.violations


@pytest.mark.parametrize(
    ("conduct", "reason", "read", "final", "found"),
    [
        (Conduct.READS, "length", [1, 2, 3], "length", None),
        (Conduct.WAITS, "stop", None, None, None),
        (Conduct.IS_KILLED, "cancelled", [1, 2], None, None),
        (Conduct.HAS_A_DEADLINE, "deadline", None, None, None),
        (Conduct.READS, "cancelled", [1, 2, 3], "cancelled", "ended by 'cancelled'"),
        (Conduct.CANCELS_MIDWAY, "deadline", [1], None, "ended by 'deadline'"),
        (Conduct.WAITS, "error", None, None, "ended by 'error'"),
        (Conduct.READS, "length", [1, 3], None, "not what was generated"),
        (Conduct.READS, "length", [1, 2], "length", "read to"),
        (Conduct.READS, "length", [1, 2, 3], "stop", "read to"),
    ],
)
def test_ends(conduct, reason, read, final, found):
    violations = ended(conduct, reason, read, final)
    assert [found in text for text in violations] == ([True] if found else [])


def test_the_engine_counts_what_was_seen():
    ledger = Ledger()
    ledger.reasons[Conduct.READS].update({"length": 3})
    ledger.reasons[Conduct.IS_KILLED].update({"cancelled": 2})
    ledger.num_unseen = 1
    ledger.check_against({"length": 3, "cancelled": 3})
    assert ledger.violations == []
    for finished in ({"length": 2, "cancelled": 2}, {"length": 3, "cancelled": 4}, {}):
        before = ledger.num_violations
        ledger.check_against(finished)
        assert ledger.num_violations > before


@pytest.mark.slow
def test_an_engine_that_dies_is_found(model, monkeypatch):
    """Others take its place, and the end is still told."""
    schedule, calls = Scheduler.schedule, []

    def failing(self):
        calls.append(1)
        if len(calls) == 30:
            raise KeyError("planted")
        return schedule(self)

    monkeypatch.setattr(Scheduler, "schedule", failing)
    result = soak(model, Tokenizer(), FEW)
    assert any("thread has ended" in text for text in result["violations"])


@pytest.mark.slow
def test_a_growing_memory_is_a_violation(model, monkeypatch):
    sizes = iter(range(0, 1 << 50, MAX_GROWTH_BYTES))
    monkeypatch.setattr(samples, "rss_bytes", lambda: next(sizes))
    monkeypatch.setattr(samples, "LEAST_SAMPLES", 4)
    monkeypatch.setattr(samples, "PERIOD_S", 0.005)
    result = soak(model, Tokenizer(), FEW)
    assert any("memory grew" in text for text in result["violations"])
