"""The requests that bench makes."""

import pytest

from fastgen.bench.workloads import WORKLOADS, block_waste, make_workload


@pytest.mark.parametrize("name", sorted(WORKLOADS))
@pytest.mark.parametrize("max_len", [16, 300, 32768])
def test_every_request_fits_the_model(name, max_len):
    workload = make_workload(name, 100, max_len, seed=0)
    assert workload.requests
    for prompt, length in workload.requests:
        assert prompt
        assert length >= 1
        assert len(prompt) + length <= max_len
        assert all(0 <= token_id < 100 for token_id in prompt)


@pytest.mark.parametrize("name", sorted(WORKLOADS))
def test_a_seed_gives_the_same_requests(name):
    first, again, other = (make_workload(name, 1000, 4096, seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_mixed_is_log_normal_within_its_limits():
    workload = make_workload("mixed", 100, 32768, seed=0)
    prompts = sorted(len(prompt) for prompt, _ in workload.requests)
    outputs = sorted(length for _, length in workload.requests)
    assert len(prompts) == 32
    assert 16 <= prompts[0] < 110 < prompts[-1] <= 512
    assert 16 <= outputs[0] < 72 < outputs[-1] <= 256


def test_prefix_shares_512_tokens_and_no_more():
    workload = make_workload("prefix", 1000, 32768, seed=0)
    prompts = [prompt for prompt, _ in workload.requests]
    assert len(prompts) == 16
    assert all(prompt[:512] == prompts[0][:512] for prompt in prompts)
    assert len({tuple(prompt[512:]) for prompt in prompts}) == 16
    assert {length for _, length in workload.requests} == {32}


def test_prefill_prompts_share_nothing_and_run_one_by_one():
    workload = make_workload("prefill", 1000, 32768, seed=0)
    (first, _), (second, _) = workload.requests
    assert (len(first), len(second)) == (1024, 2048)
    assert first[:16] != second[:16]
    assert workload.sequential


def test_a_part_is_seeded_and_of_the_whole():
    workload = make_workload("mixed", 100, 32768, seed=0)
    part = workload.part(8)
    assert len(part.requests) == 8
    assert part == workload.part(8)
    assert all(request in workload.requests for request in part.requests)
    assert workload.part(32) is workload


def test_waste_grows_with_the_block():
    waste = list(block_waste(make_workload("mixed", 100, 32768, seed=0)).values())
    assert 0 < waste[0] < waste[1] < waste[2] < 0.5
