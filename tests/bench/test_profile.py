"""bench --profile on a tiny model: what is counted, and that nothing is left behind."""

import types

import pytest
import torch
from tiny_models import prompts, tiny_model

import fastgen
from fastgen.bench import profile
from fastgen.bench.workloads import Workload
from fastgen.engine import delivery

MACHINE = {"read_gb_per_s": 10.0, "gemm_tflop_per_s": 1.0}


@pytest.fixture(name="model")
def model_fixture():
    model = tiny_model("llama")
    model.generation_config.eos_token_id = None
    yield model
    if fastgen.api.lookup(model) is not None:
        fastgen.restore(model)


def requests(*lengths: int, num_tokens: int) -> list[tuple[list[int], int]]:
    return [(row, num_tokens) for row in prompts(*lengths)]


def test_parts_add_up_and_costs_are_those_of_the_workload(model, monkeypatch):
    monkeypatch.setattr(profile, "measure_machine", lambda device, dtype: MACHINE)
    result = profile.profile_workload(model, Workload("w", requests(20, 33, num_tokens=4)), 16, 1)
    decode, prompt, whole = result["decode"], result["prompt"], result["workload"]
    assert (prompt["steps"], prompt["tokens"]) == (1, 53)
    assert (decode["steps"], decode["tokens"]) == (3, 6)
    assert (whole["steps"], whole["tokens"]) == (4, 59)
    for row in (decode, prompt, whole):
        assert sum(row["parts"].values()) == pytest.approx(row["seconds"])
        assert all(spent > 0 for part, spent in row["parts"].items() if part != "outside steps")
        in_ops = sum(row["ops"].values())
        assert in_ops == pytest.approx(sum(row["parts"][part] for part in profile.KERNELS))
    assert whole["parts"]["GEMM"] == pytest.approx(
        decode["parts"]["GEMM"] + prompt["parts"]["GEMM"]
    )
    assert result["overhead"] == pytest.approx(result["seconds"] / result["plain_seconds"] - 1)

    body, head, width = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96), 64 * 128, 4 * 32
    assert whole["roofline"]["GEMM"]["flops"] == 2 * (59 * body + 8 * head)
    assert decode["roofline"]["GEMM"]["streamed_bytes"] == 3 * 4 * (body + head)
    pairs = sum(range(1, 24)) + sum(range(1, 37))  # the last token of each is never computed
    assert whole["roofline"]["attention"]["flops"] == 2 * 2 * pairs * width
    seen = sum(length + step for length in (20, 33) for step in (1, 2, 3))
    assert decode["roofline"]["attention"]["streamed_bytes"] == 2 * seen * 2 * 32 * 4
    assert fastgen.api.lookup(model) is None, "the model must be restored"


def test_a_roofline_is_bound_by_what_takes_longer():
    cost = profile.Cost(flops=4_000_000_000, streamed_bytes=30_000_000, activation_bytes=10_000_000)
    line = profile.roofline(cost, 0.008, MACHINE)
    assert line["flops_per_byte"] == 100
    assert line["gflop_per_s"] == pytest.approx(500)
    assert line["gb_per_s"] == pytest.approx(5)
    assert line["compute_share"] == pytest.approx(0.5)
    assert line["bandwidth_share"] == pytest.approx(0.5)
    assert line["bound_by"] == "bandwidth"
    assert profile.roofline(profile.Cost(5_000_000_000, 1), 1, MACHINE)["bound_by"] == "compute"
    assert profile.roofline(profile.Cost(), 0.0, MACHINE)["gflop_per_s"] == 0


def test_records_are_what_the_batches_hold(model, monkeypatch):
    """Chunks, prefix hits and last tokens that are asked again, by the tensors of each step."""
    batches = []
    build = profile.build_batch

    def noted(*args):
        batches.append(build(*args))
        return batches[-1]

    monkeypatch.setattr(profile, "build_batch", noted)
    fastgen.optimize(model, max_num_batched_tokens=24)
    core = fastgen.api.require(model).engine()
    (row,) = prompts(48)
    with fastgen.Engine(model) as engine:
        params = fastgen.SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
        first = engine.generate([row, row[:20]], params)
        fastgen.release_cache(model)
        engine.generate([[1, 2]], params)
        watched = profile.WatchedForward(core.compiled)
        with profile.watching(core, watched) as records:
            again = engine.generate([row, row[:20]], params)
            engine.generate([row], params)  # all of it is in the cache by now
    assert [out.token_ids for out in again] == [out.token_ids for out in first]
    assert len(records) == len(batches) > 5
    asked_again = False
    for record, batch in zip(records, batches, strict=True):
        new = batch.query_start_loc.diff().tolist()
        expected = tuple(zip(new, batch.seq_lens.tolist(), strict=True))
        assert record.step.sequences == expected
        assert record.step.num_tokens == len(batch.input_ids)
        assert record.step.num_rows == len(batch.logits_indices)
        assert record.total_s > record.forward_s > sum(record.nodes) > 0
        asked_again |= bool((batch.slot_mapping == -1).any())
    assert asked_again
    kinds = [record.kind for record in records]
    assert kinds[:3] == [profile.PROMPT] * 3, "48 + 20 tokens by 24 are three steps"
    assert kinds[3] == profile.DECODE


def test_nothing_is_left_behind(model):
    fastgen.optimize(model)
    core = fastgen.api.require(model).engine()
    sample = delivery.sample
    with fastgen.Engine(model) as engine:
        params = fastgen.SamplingParams(max_tokens=2, temperature=0.0)
        engine.generate([[1, 2, 3]], params)
        runner, forward = core._runner, core.compiled._forward
        watching = profile.watching(core, profile.WatchedForward(core.compiled))
        with pytest.raises(RuntimeError, match="planted"), watching:
            raise RuntimeError("planted")
        assert core._runner is runner
        assert core.compiled._forward == forward
        assert delivery.sample is sample
        assert "_step" not in vars(core)
        assert "schedule" not in vars(core._scheduler)
        assert engine.generate([[1, 2, 3]], params)[0].finish_reason == "length"


def test_a_device_whose_calls_return_early_is_refused():
    model = types.SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="return before the work is done"):
        profile.profile_workload(model, Workload("w", []), 16, 1)
