"""Captured decode steps, with a capturer that notes addresses as a CUDA graph does."""

from __future__ import annotations

import pytest
import torch
from engine_helpers import (  # noqa: F401 - the fixtures are used by name
    core_of,
    engine_fixture,
    expected_fixture,
    greedy,
    make_engine_fixture,
    model_fixture,
    within,
)

import fastgen
from fastgen.engine import engine as engine_module
from fastgen.engine.decode_graphs import DecodeGraphs, batch_buckets, table_bytes
from fastgen.engine.memory_plan import PoolSize


class FakeCapturer:
    """Replays by running again, into the memory of the capture, and only if nothing has moved."""

    def __init__(self, core_of_run) -> None:
        self.compiled_of = core_of_run
        self.fails = False

    def capture(self, run):
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        output = torch.full_like(run(), torch.nan)  # a capture computes nothing
        addresses = self.addresses()

        def replay() -> None:
            assert self.addresses() == addresses, "a captured graph was replayed after a move"
            output.copy_(run())

        return replay, output

    def addresses(self) -> list[int]:
        """Of weights and cache."""
        compiled = self.compiled_of()
        slots = {index for index, _ in compiled._batch_slots}
        given = enumerate(compiled._arguments)
        return [value.data_ptr() for index, value in given if index not in slots]


@pytest.fixture
def capturer(monkeypatch):
    """Every engine captures its decode steps, as one on a GPU."""
    known: list[PoolSize] = []
    fake = FakeCapturer(lambda: known[0].compiled)

    def buckets(self):
        known[:] = [self]
        return () if self.config.enforce_eager else batch_buckets(self.config.max_num_seqs)

    monkeypatch.setattr(PoolSize, "buckets", property(buckets))
    monkeypatch.setattr(engine_module, "CudaCapturer", lambda device: fake)
    return fake


def graphs_of(engine) -> DecodeGraphs:
    core = core_of(engine)
    return core._mailbox.call(lambda: core._runner.graphs)  # pyright: ignore


@pytest.mark.parametrize("max_num_seqs", [3, 256])
def test_tokens_are_those_of_transformers(capturer, make_engine, expected, max_num_seqs):
    rows, tokens = expected
    engine = make_engine(max_num_seqs=max_num_seqs)
    for _ in range(2):
        outputs = within(engine.generate, rows, greedy(len(tokens[0])))
        assert [output.token_ids for output in outputs] == tokens
    graphs = graphs_of(engine)
    assert graphs.num_captured >= 1
    assert graphs.num_replayed > graphs.num_captured
    metrics = engine.metrics()
    assert metrics.captured_graphs == graphs.num_captured
    assert metrics.replayed_steps == graphs.num_replayed < metrics.engine_steps
    assert f"{graphs.num_captured} sizes of decode steps captured" in str(
        fastgen.explain(engine.model)
    )
    assert graphs.refusal is None


def test_a_size_is_captured_once(capturer, make_engine, expected):
    rows, tokens = expected
    engine = make_engine()
    for _ in range(3):
        within(engine.generate, rows[:1], greedy(len(tokens[0])))
    assert graphs_of(engine).num_captured == 1


def test_added_rows_reach_no_page(capturer, make_engine, expected):
    """Three sequences fill up to four: what the added one computes is stored nowhere."""
    rows, tokens = expected
    engine = make_engine(poisoned=True)
    outputs = within(engine.generate, rows[:3], greedy(len(tokens[0])))
    assert [output.token_ids for output in outputs] == tokens[:3]
    core = core_of(engine)
    null = core._mailbox.call(lambda: core._runner.kv_cache.tensors["key:0"][0].clone())  # pyright: ignore
    assert not null.any()


def test_moved_weights_are_captured_again(capturer, make_engine, expected):
    rows, tokens = expected
    engine = make_engine()
    within(engine.generate, rows, greedy(len(tokens[0])))
    before = graphs_of(engine).num_captured
    for parameter in engine.model.parameters():
        parameter.data = parameter.data.clone()
    outputs = within(engine.generate, rows, greedy(len(tokens[0])))
    assert [output.token_ids for output in outputs] == tokens
    assert graphs_of(engine).num_captured > before


def test_what_cannot_be_captured_runs_as_it_is(capturer, make_engine, expected, caplog):
    rows, tokens = expected
    capturer.fails = True
    engine = make_engine()
    outputs = within(engine.generate, rows, greedy(len(tokens[0])))
    assert [output.token_ids for output in outputs] == tokens
    graphs = graphs_of(engine)
    assert graphs.num_captured == graphs.num_replayed == 0
    assert "not permitted when stream is capturing" in graphs.refusal
    assert f"not any more: {graphs.refusal}" in str(fastgen.explain(engine.model))
    assert len([r for r in caplog.records if "not captured from now on" in r.message]) == 1


def test_enforce_eager(capturer, make_engine, expected):
    rows, tokens = expected
    engine = make_engine(enforce_eager=True)
    outputs = within(engine.generate, rows, greedy(len(tokens[0])))
    assert [output.token_ids for output in outputs] == tokens
    assert graphs_of(engine) is None


def test_logits_that_are_kept_are_not_written_over(capturer, make_engine, expected, monkeypatch):
    """The result of a step is the caller's own: the next replay leaves it alone."""
    rows, tokens = expected
    engine = make_engine()
    within(engine.generate, rows[:1], greedy(2))
    kept = []
    run = DecodeGraphs.run

    def keeping(self, batch):
        logits = run(self, batch)
        kept.append((logits, logits.clone()))
        return logits

    monkeypatch.setattr(DecodeGraphs, "run", keeping)
    within(engine.generate, rows[:1], greedy(len(tokens[0])))
    assert len(kept) > 2
    assert all(torch.equal(logits, then) for logits, then in kept)


def test_planted_stale_table_is_found(capturer, make_engine, expected, monkeypatch):
    """A replay that does not take over the step's block table gives other tokens."""
    rows, tokens = expected
    engine = make_engine()
    within(engine.generate, rows, greedy(3))
    run = DecodeGraphs.run

    def stale(self, batch):
        before = self._table.clone()
        self._table, batch.block_table = before, torch.zeros_like(batch.block_table)
        return run(self, batch)

    monkeypatch.setattr(DecodeGraphs, "run", stale)
    outputs = within(engine.generate, rows, greedy(len(tokens[0])))
    assert [output.token_ids for output in outputs] != tokens


@pytest.mark.parametrize(
    ("max_num_seqs", "expected_sizes"),
    [
        (1, (1,)),
        (3, (1, 2, 3)),
        (40, (1, 2, 4, 8, 16, 32, 40)),
        (256, (1, 2, 4, 8, *range(16, 129, 16), 160, 192, 224, 256)),
    ],
)
def test_buckets(max_num_seqs, expected_sizes):
    assert batch_buckets(max_num_seqs) == expected_sizes


def test_table_bytes():
    """ids, positions, slots and rows of 8 bytes, starts and lengths of 4, and the table."""
    assert table_bytes(32, 100) == 32 * 4 * 8 + (33 + 32) * 4 + 32 * 100 * 4


def test_config_says_what_it_takes():
    with pytest.raises(ValueError, match="gpu_memory_utilization"):
        fastgen.Config(gpu_memory_utilization=1.5)
    with pytest.raises(ValueError, match="enforce_eager"):
        fastgen.Config(enforce_eager=1)  # pyright: ignore
