"""A step's tensors, against hand-computed rows and a token-by-token rederivation."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from fastgen.config import SamplingParams
from fastgen.engine.batch import ForwardBatch, build_batch
from fastgen.engine.block_pool import NULL_BLOCK
from fastgen.engine.request import Request
from fastgen.engine.scheduler import ScheduledRequest, SchedulerOutput

CPU = torch.device("cpu")
DTYPES = {
    "input_ids": torch.int64,
    "positions": torch.int64,
    "slot_mapping": torch.int64,
    "query_start_loc": torch.int32,
    "seq_lens": torch.int32,
    "block_table": torch.int32,
    "logits_indices": torch.int64,
}


def request(prompt: list[int], output: list[int] = [], **fields) -> Request:  # noqa: B006
    made = Request(prompt, SamplingParams(max_tokens=100, temperature=0.0), **fields)
    made.output_token_ids = list(output)
    return made


def step(*scheduled: ScheduledRequest, block_size: int = 4) -> ForwardBatch:
    return build_batch(SchedulerOutput(list(scheduled)), block_size, CPU)


def check_batch(batch: ForwardBatch, scheduled: list[ScheduledRequest], block_size: int) -> None:
    """Derive every entry again, one token at a time, and compare."""
    for name, dtype in DTYPES.items():
        assert getattr(batch, name).dtype == dtype, name
    starts = batch.query_start_loc.tolist()
    assert len(starts) == len(scheduled) + 1
    assert starts[0] == 0
    assert batch.block_table.shape[0] == batch.seq_lens.shape[0] == len(scheduled)
    wanted = []
    for row, item in enumerate(scheduled):
        asked = item.request
        ids = [*asked.prompt_token_ids, *asked.output_token_ids]
        num_prompt = len(asked.prompt_token_ids)
        assert starts[row + 1] - starts[row] == item.num_tokens
        length = item.start + (0 if item.query else item.num_tokens)
        assert batch.seq_lens[row] == length
        num_blocks = len(asked.block_ids)
        assert batch.block_table[row, :num_blocks].tolist() == asked.block_ids
        assert (batch.block_table[row, num_blocks:] == NULL_BLOCK).all()
        for i in range(item.num_tokens):
            token, index = starts[row] + i, item.start + i
            if item.query is not None:
                assert (batch.input_ids[token], batch.positions[token]) == item.query
                assert batch.slot_mapping[token] == -1
                continue
            assert batch.input_ids[token] == ids[index]
            shift = 0
            if index >= num_prompt and asked.first_output_position is not None:
                shift = asked.first_output_position - num_prompt
            assert batch.positions[token] == index + shift
            block = asked.block_ids[index // block_size]
            assert batch.slot_mapping[token] == block * block_size + index % block_size
        if item.samples:
            wanted.append(starts[row + 1] - 1)
    assert starts[-1] == len(batch.input_ids) == len(batch.positions) == len(batch.slot_mapping)
    assert batch.logits_indices.tolist() == wanted


def mixed_step() -> list[ScheduledRequest]:
    """A whole prompt, a decode, a chunk in the middle, a query and a shifted decode."""
    whole = request([10, 11, 12, 13, 14])
    whole.block_ids = [7, 2]
    decode = request([20, 21, 22], [23, 24])
    decode.block_ids = [9, 1]
    chunk = request(list(range(30, 50)))
    chunk.block_ids = [4, 3, 6]
    query = request([60, 61, 62, 63], query_token_id=99, query_position=7, first_output_position=8)
    query.block_ids = [5]
    shifted = request([70, 71], [72, 73], first_output_position=6)
    shifted.block_ids = [8]
    return [
        ScheduledRequest(whole, 0, 5, samples=True),
        ScheduledRequest(decode, 4, 1, samples=True),
        ScheduledRequest(chunk, 6, 4, samples=False),
        ScheduledRequest(query, 4, 1, samples=True, query=(99, 7)),
        ScheduledRequest(shifted, 3, 1, samples=True),
    ]


def test_mixed_step_by_hand():
    batch = step(*mixed_step())
    assert batch.input_ids.tolist() == [10, 11, 12, 13, 14, 24, 36, 37, 38, 39, 99, 73]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 4, 6, 7, 8, 9, 7, 7]
    assert batch.slot_mapping.tolist() == [28, 29, 30, 31, 8, 4, 14, 15, 24, 25, -1, 35]
    assert batch.query_start_loc.tolist() == [0, 5, 6, 10, 11, 12]
    assert batch.seq_lens.tolist() == [5, 5, 10, 4, 4]
    assert batch.block_table.tolist() == [[7, 2, 0], [9, 1, 0], [4, 3, 6], [5, 0, 0], [8, 0, 0]]
    assert batch.logits_indices.tolist() == [4, 5, 10, 11]


def test_mixed_step_token_by_token():
    check_batch(step(*mixed_step()), mixed_step(), block_size=4)


@pytest.mark.parametrize("seed", range(5))
def test_random_steps_token_by_token(seed):
    rng = random.Random(seed)
    block_size = rng.choice([1, 3, 16])
    free = list(range(1, 500))
    rng.shuffle(free)
    scheduled = []
    for _ in range(rng.randint(1, 12)):
        prompt = [rng.randrange(100) for _ in range(rng.randint(1, 40))]
        output = [rng.randrange(100) for _ in range(rng.randint(0, 20))]
        asked = request(prompt, output, first_output_position=rng.choice([None, 0, 3, 50]))
        total = len(prompt) + len(output)
        end = rng.randint(1, total)
        start = rng.randrange(end)
        asked.block_ids = [free.pop() for _ in range(-(-end // block_size))]
        scheduled.append(ScheduledRequest(asked, start, end - start, samples=end == total))
    check_batch(step(*scheduled, block_size=block_size), scheduled, block_size)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 32, 33, 63, 64])
def test_prompt_around_block_boundaries(length):
    block_size = 16
    asked = request(list(range(length)))
    asked.block_ids = [3 * i + 2 for i in range(-(-length // block_size))]
    batch = step(ScheduledRequest(asked, 0, length, samples=True), block_size=block_size)
    assert batch.slot_mapping.tolist() == [
        asked.block_ids[i // block_size] * block_size + i % block_size for i in range(length)
    ]
    assert batch.block_table.shape == (1, len(asked.block_ids))
    assert batch.seq_lens.tolist() == [length]


def test_decode_onto_a_new_block():
    asked = request(list(range(16)), [16])
    asked.block_ids = [5, 2]
    batch = step(ScheduledRequest(asked, 16, 1, samples=True), block_size=16)
    assert batch.slot_mapping.tolist() == [32], "the first slot of the second block"
    assert batch.input_ids.tolist() == batch.positions.tolist() == [16]
    assert batch.seq_lens.tolist() == [17]


def test_chunk_across_prompt_and_output():
    """After a preemption prompt and output are computed together; only the output is shifted."""
    asked = request([1, 2, 3], [4, 5], first_output_position=10)
    asked.block_ids = [1, 2]
    batch = step(ScheduledRequest(asked, 1, 4, samples=True))
    assert batch.input_ids.tolist() == [2, 3, 4, 5]
    assert batch.positions.tolist() == [1, 2, 10, 11]
    assert batch.slot_mapping.tolist() == [5, 6, 7, 8], "slots follow the order, not the positions"


def test_query_token_is_not_stored_and_not_counted():
    asked = request([1, 2, 3, 4], query_token_id=9, query_position=6)
    asked.block_ids = [3]
    batch = step(ScheduledRequest(asked, 4, 1, samples=True, query=(9, 6)))
    assert batch.slot_mapping.tolist() == [-1]
    assert batch.seq_lens.tolist() == [4]
    assert (batch.input_ids.tolist(), batch.positions.tolist()) == ([9], [6])
    assert batch.logits_indices.tolist() == [0]


def test_nothing_to_sample():
    asked = request(list(range(8)))
    asked.block_ids = [1]
    batch = step(ScheduledRequest(asked, 0, 4, samples=False))
    assert batch.logits_indices.shape == (0,)
    assert batch.logits_indices.dtype == torch.int64


def test_large_block_ids_do_not_overflow():
    """A slot is an int64, although the table is int32."""
    asked = request([1])
    asked.block_ids = [2**31 - 1]
    batch = step(ScheduledRequest(asked, 0, 1, samples=True), block_size=64)
    assert batch.slot_mapping.tolist() == [(2**31 - 1) * 64]


@pytest.mark.parametrize("name", DTYPES)
def test_planted_mistake_is_found(name):
    """Any single entry that is off by one must be seen by check_batch."""
    batch = step(*mixed_step())
    for index in range(getattr(batch, name).numel()):
        wrong = getattr(batch, name).clone()
        wrong.view(-1)[index] += 1
        with pytest.raises((AssertionError, IndexError)):
            check_batch(dataclasses.replace(batch, **{name: wrong}), mixed_step(), block_size=4)
