"""model.generate() on the engine equals transformers' own, token for token and class for class."""

import threading

import pytest
import torch
from conftest import poison
from tiny_models import NativeTokens, greedy_alone, left_padded, prompts, tiny_model
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)

import fastgen

pytestmark = pytest.mark.usefixtures("graphs_of_the_session")
GREEDY = {"do_sample": False, "max_new_tokens": 24}


def both(pair, *args, **kwargs):
    """The same call on a plain and on an optimised model, the second native; RNG set alike."""
    plain, fast = pair
    torch.manual_seed(7)
    expected = plain.generate(*args, **kwargs)
    after = torch.rand(2)
    with NativeTokens(fast):
        torch.manual_seed(7)
        got = fast.generate(*args, **kwargs)
        assert torch.equal(torch.rand(2), after), "the RNG was left in another state"
    return expected, got


def assert_same(expected, got):
    assert type(expected) is type(got)
    assert expected.dtype == got.dtype
    assert expected.device == got.device
    assert torch.equal(expected, got), f"{expected}\n{got}"


# One prompt, and every way of asking for it.


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 32, 33, 100])
def test_greedy_alone(pair, length):
    plain, fast = pair
    rows, expected = greedy_alone(plain, length, num_tokens=48)
    with NativeTokens(fast, at_least=48):
        got = fast.generate(torch.tensor(rows), do_sample=False, max_new_tokens=48)
    assert got[:, length:].tolist() == expected


@pytest.mark.parametrize("as_keyword", [False, True], ids=["positional", "keyword"])
def test_input_ids_either_way(pair, as_keyword):
    ids = torch.tensor(prompts(9))
    arguments = ((), {"input_ids": ids}) if as_keyword else ((ids,), {})
    assert_same(*both(pair, *arguments[0], **arguments[1], **GREEDY))


@pytest.mark.parametrize("limit", [{"max_length": 30}, {"max_new_tokens": 5}, {}], ids=str)
def test_length_limits(pair, limit):
    assert_same(*both(pair, torch.tensor(prompts(9)), do_sample=False, **limit))


def test_no_input_starts_from_bos(pair):
    assert_same(*both(pair, do_sample=False, max_new_tokens=6))


# Batches.


def test_ragged_left_padded_batch_equals_each_prompt_alone(pair):
    plain, fast = pair
    rows, expected = greedy_alone(plain, 3, 17, 40, num_tokens=48)
    ids, mask = left_padded(rows)
    with NativeTokens(fast, at_least=3 * 48):
        got = fast.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=48)
    assert got[:, 40:].tolist() == expected


@pytest.mark.parametrize("side", ["left", "right", "hole"])
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_masked_batch(pair, side, sampled):
    ids, mask = torch.tensor(prompts(20, 20, 20)), torch.ones(3, 20, dtype=torch.long)
    hidden = {"left": slice(0, 6), "right": slice(15, 20), "hole": slice(5, 9)}[side]
    mask[0, hidden] = 0
    expected, got = both(
        pair, ids, attention_mask=mask, max_new_tokens=20, do_sample=sampled, top_k=30
    )
    assert_same(expected, got)


def test_mask_inferred_from_the_pad_token(pair):
    ids, _ = left_padded(prompts(5, 12))
    assert_same(*both(pair, ids, **GREEDY))


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_end_tokens_pad_the_rows_that_finish_early(pair, sampled):
    ids = torch.tensor(prompts(8, 8, 8, 8))
    plain = pair[0].generate(ids, **GREEDY)
    eos = [int(plain[0, 10]), int(plain[2, 20])]
    expected, got = both(
        pair, ids, max_new_tokens=24, do_sample=sampled, eos_token_id=eos, pad_token_id=0
    )
    assert_same(expected, got)
    if not sampled:
        assert (expected == 0).any(), "no row has ended early: the test shows nothing"


def test_more_rows_than_the_token_budget(model):
    ids = torch.tensor(prompts(*[30] * 6))
    expected = model.generate(ids, **GREEDY)
    fastgen.optimize(model, max_num_batched_tokens=32)
    with NativeTokens(model):
        assert_same(expected, model.generate(ids, **GREEDY))


def test_lockstep_rows_over_several_steps(model):
    """The rows of a sampled batch are computed in different steps and still sampled together."""
    ids = torch.tensor(prompts(*[30] * 6))
    options = {"do_sample": True, "max_new_tokens": 8}
    torch.manual_seed(1)
    expected = model.generate(ids, **options)
    fastgen.optimize(model, max_num_batched_tokens=50)
    with NativeTokens(model):
        torch.manual_seed(1)
        assert_same(expected, model.generate(ids, **options))


def test_lockstep_rows_that_do_not_fit_together_run_transformers_loop(model):
    fastgen.optimize(model, max_num_seqs=2)
    model.generate(torch.tensor(prompts(4, 4, 4)), do_sample=True, max_new_tokens=4)
    (reason,) = fastgen.api.require(model).fallbacks
    assert "3 rows" in reason
    assert "fit" in reason


# Sampling, processors, criteria: lockstep.


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.8},
        {"num_return_sequences": 3},
        {"repetition_penalty": 1.4},
        {"min_p": 0.1, "temperature": 1.5},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[5], [6, 7]]},
        {"min_new_tokens": 10, "eos_token_id": 3},
    ],
    ids=str,
)
def test_sampling_equals_transformers(pair, options):
    ids, mask = left_padded(prompts(5, 12))
    expected, got = both(
        pair, ids, attention_mask=mask, do_sample=True, max_new_tokens=16, **options
    )
    assert_same(expected, got)


@pytest.mark.parametrize(
    "option", [{"repetition_penalty": 1.4}, {"no_repeat_ngram_size": 2}], ids=str
)
def test_greedy_with_built_in_processors(pair, option):
    ids, mask = left_padded(prompts(5, 12))
    assert_same(*both(pair, ids, attention_mask=mask, **GREEDY, **option))


class Forbid(LogitsProcessor):
    """Forbids the last token of each row; sees the whole left-padded input_ids."""

    def __init__(self):
        self.shapes = []

    def __call__(self, input_ids, scores):
        self.shapes.append(tuple(input_ids.shape))
        return scores.scatter(1, input_ids[:, -1:], float("-inf"))


class StopRowAt(StoppingCriteria):
    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] == self.token


def test_user_processor_sees_what_transformers_shows(pair):
    plain, fast = pair
    ids, mask = left_padded(prompts(5, 12))
    seen = Forbid(), Forbid()
    options = {"attention_mask": mask, **GREEDY}
    expected = plain.generate(ids, logits_processor=LogitsProcessorList([seen[0]]), **options)
    with NativeTokens(fast):
        got = fast.generate(ids, logits_processor=LogitsProcessorList([seen[1]]), **options)
    assert_same(expected, got)
    assert seen[0].shapes == seen[1].shapes


def test_user_criterion_keeps_real_tokens_after_the_end(pair):
    ids = torch.tensor(prompts(8, 8))
    token = int(pair[0].generate(ids, **GREEDY)[0, 14])
    criteria = StoppingCriteriaList([StopRowAt(token)])
    assert_same(*both(pair, ids, stopping_criteria=criteria, **GREEDY))


def test_max_time_is_a_criterion_like_any_other(pair):
    criteria = StoppingCriteriaList([MaxTimeCriteria(max_time=-1.0)])
    expected, got = both(pair, torch.tensor(prompts(8)), stopping_criteria=criteria, **GREEDY)
    assert_same(expected, got)
    assert expected.shape[1] == 9


def test_processor_that_raises_fails_only_its_call(optimized):
    class Broken(LogitsProcessor):
        def __call__(self, input_ids, scores):
            if input_ids.shape[1] > 10:
                raise ZeroDivisionError("mine")
            return scores

    ids = torch.tensor(prompts(8))
    expected = optimized.generate(ids, **GREEDY)
    with pytest.raises(ZeroDivisionError, match="mine"):
        optimized.generate(ids, logits_processor=LogitsProcessorList([Broken()]), **GREEDY)
    metrics = fastgen.api.require(optimized).engine().metrics()
    assert metrics.num_free_blocks == metrics.num_blocks
    assert torch.equal(optimized.generate(ids, **GREEDY), expected)


# Return classes.


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_dict_output(pair, sampled):
    ids, mask = left_padded(prompts(5, 12))
    expected, got = both(
        pair,
        ids,
        attention_mask=mask,
        do_sample=sampled,
        max_new_tokens=8,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    assert type(expected) is type(got)
    assert list(expected.keys()) == list(got.keys())
    assert_same(expected.sequences, got.sequences)
    for ours, theirs in ((got.scores, expected.scores), (got.logits, expected.logits)):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert a.dtype == b.dtype == torch.float32
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert type(got.past_key_values) is type(expected.past_key_values)
    visible = torch.cat([mask, torch.ones(2, 7, dtype=torch.long)], dim=1).bool()
    for a, b in zip(got.past_key_values.layers, expected.past_key_values.layers, strict=True):
        assert a.keys.shape == b.keys.shape
        for ours, theirs in ((a.keys, b.keys), (a.values, b.values)):
            ours, theirs = ours.transpose(1, 2)[visible], theirs.transpose(1, 2)[visible]
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_the_returned_cache_can_be_continued(pair):
    plain, fast = pair
    ids = torch.tensor(prompts(6))
    expected = plain.generate(ids, do_sample=False, max_new_tokens=20)
    first = fast.generate(ids, do_sample=False, max_new_tokens=8, return_dict_in_generate=True)
    rest = fast.generate(
        first.sequences, past_key_values=first.past_key_values, do_sample=False, max_new_tokens=12
    )
    assert torch.equal(rest, expected)


def test_inference_mode_gives_an_inference_tensor(optimized):
    ids = torch.tensor(prompts(6))
    with torch.inference_mode():
        assert optimized.generate(ids, **GREEDY).is_inference()
    assert not optimized.generate(ids, **GREEDY).is_inference()


# Streamers.


class Recorder:
    def __init__(self):
        self.calls = []

    def put(self, value):
        self.calls.append((tuple(value.shape), value.flatten().tolist()))

    def end(self):
        self.calls.append("end")


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_streamer_gets_the_same_calls(pair, rows, sampled):
    plain, fast = pair
    ids = torch.tensor(prompts(*[7] * rows))
    recorders = Recorder(), Recorder()
    options = {"do_sample": sampled, "max_new_tokens": 9}
    torch.manual_seed(3)
    plain.generate(ids, streamer=recorders[0], **options)
    with NativeTokens(fast):
        torch.manual_seed(3)
        fast.generate(ids, streamer=recorders[1], **options)
    assert recorders[0].calls == recorders[1].calls


def test_streamer_that_raises_fails_only_its_call(optimized):
    class Broken(Recorder):
        def put(self, value):
            super().put(value)
            if len(self.calls) == 4:
                raise KeyboardInterrupt

    ids = torch.tensor(prompts(7))
    with pytest.raises(KeyboardInterrupt):
        optimized.generate(ids, streamer=Broken(), **GREEDY)
    metrics = fastgen.api.require(optimized).engine().metrics()
    assert metrics.num_free_blocks == metrics.num_blocks
    assert optimized.generate(ids, **GREEDY).shape == (1, 31)


# Chunked prefill, preemption, block boundaries.


@pytest.mark.parametrize("budget", [1, 7, 16, 64])
def test_chunked_prefill(model, budget):
    rows, expected = greedy_alone(model, 50, 33, 5, num_tokens=20)
    ids, mask = left_padded(rows)
    fastgen.optimize(model, max_num_batched_tokens=budget)
    poison(model)
    with NativeTokens(model):
        got = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=20)
    assert got[:, 50:].tolist() == expected


@pytest.mark.parametrize("block_size", [16, 32, 64])
def test_preempted_rows_start_over_and_give_the_same_tokens(model, block_size):
    rows, expected = greedy_alone(model, 30, 31, 32, 33, num_tokens=48)
    fastgen.optimize(model, block_size=block_size)
    per_block = fastgen.explain(model).spec.bytes_per_token * block_size
    fastgen.restore(model)
    blocks = 1 + 2 * -(-82 // block_size)  # about two of the four rows at full length
    fastgen.optimize(model, block_size=block_size, kv_cache_memory_bytes=blocks * per_block)
    poison(model)
    ids, mask = left_padded(rows)
    with NativeTokens(model):
        got = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=48)
    metrics = fastgen.api.require(model).engine().metrics()
    assert metrics.preemptions > 0, "nothing was preempted: the test shows nothing"
    assert got[:, 33:].tolist() == expected


@pytest.mark.parametrize("end", [16, 32, 48, 49])
def test_ends_at_a_block_boundary(pair, end):
    plain, fast = pair
    rows, expected = greedy_alone(plain, 11, num_tokens=end - 11)
    with NativeTokens(fast):
        got = fast.generate(torch.tensor(rows), do_sample=False, max_length=end)
    assert got[:, 11:].tolist() == expected


# What transformers' own loop is left to do.


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"low_memory": True}, "low_memory=True"),
        ({"use_cache": False}, "use_cache=False"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
        ({"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens=2"),
        ({"cache_implementation": "static"}, "cache_implementation='static'"),
        ({"position_ids": torch.arange(6)[None]}, "position_ids"),
        ({"max_new_tokens": 600}, "max_model_len"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_transformers_loop_by_name(optimized, caplog, options, reason):
    ids = torch.tensor(prompts(6))
    arguments = {"do_sample": False, "max_new_tokens": 6, **options}
    got = [optimized.generate(ids, **arguments) for _ in range(2)]
    fallbacks = fastgen.api.require(optimized).fallbacks
    assert sum(fallbacks.values()) == 2
    assert reason in str(dict(fallbacks))
    warnings = [r for r in caplog.records if r.name == "fastgen" and "transformers' loop" in r.msg]
    assert len(warnings) == 1, "one warning per reason"
    assert reason in warnings[0].getMessage()
    fastgen.restore(optimized)
    expected = optimized.generate(ids, **arguments)
    sequences = [getattr(out, "sequences", out) for out in (*got, expected)]
    assert torch.equal(sequences[0], sequences[2])
    assert torch.equal(sequences[1], sequences[2])


def test_autocast_runs_transformers_loop(optimized):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        optimized.generate(torch.tensor(prompts(6)), **GREEDY)
    assert list(fastgen.api.require(optimized).fallbacks) == ["autocast is on"]


def test_training_with_dropout_runs_transformers_loop(optimized):
    optimized.train()
    optimized.config.attention_dropout = 0.1
    optimized.generate(torch.tensor(prompts(6)), **GREEDY)
    (reason,) = fastgen.api.require(optimized).fallbacks
    assert "attention_dropout" in reason
    assert optimized.training


def test_train_mode_without_dropout_is_native_and_kept(model):
    model.train()
    expected = model.generate(torch.tensor(prompts(6)), **GREEDY)
    fastgen.optimize(model)
    with NativeTokens(model):
        assert_same(expected, model.generate(torch.tensor(prompts(6)), **GREEDY))
    assert model.training


@pytest.mark.parametrize(
    "arguments",
    [
        {"inputs": torch.tensor([1, 2, 3])},
        {"inputs": torch.zeros((1, 0), dtype=torch.long)},
        {"inputs": torch.tensor([[1, 2, 500]])},
        {"inputs": torch.tensor([[1, 2]]), "no_such_argument": 1},
        {"inputs": torch.tensor([[1, 2]]), "max_new_tokens": 0},
        {"inputs": torch.tensor([[1, 2]]), "temperature": -1.0, "do_sample": True},
    ],
    ids=["1-D", "empty", "id beyond vocabulary", "typo", "no tokens", "temperature"],
)
def test_bad_input_raises_what_transformers_raises(model, arguments):
    with pytest.raises(Exception) as expected:
        model.generate(**arguments)
    fastgen.optimize(model)
    with pytest.raises(type(expected.value)):
        model.generate(**arguments)
    assert model.generate(torch.tensor([[1, 2]]), max_new_tokens=3).shape == (1, 5)


# Threads.


def test_concurrent_calls_equal_serial_ones(optimized):
    rows = prompts(4, 9, 20, 33, 7, 15)
    serial = [optimized.generate(torch.tensor([row]), **GREEDY) for row in rows]
    results: list = [None] * len(rows)

    def work(index):
        results[index] = optimized.generate(torch.tensor([rows[index]]), **GREEDY)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(rows))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    for expected, got in zip(serial, results, strict=True):
        assert_same(expected, got)


def test_two_models_of_one_class(family):
    one, two = tiny_model(family, seed=1), tiny_model(family, seed=2)
    ids = torch.tensor(prompts(9))
    expected = one.generate(ids, **GREEDY), two.generate(ids, **GREEDY)
    assert not torch.equal(*expected)
    fastgen.optimize(one)
    with NativeTokens(one):
        got = one.generate(ids, **GREEDY), two.generate(ids, **GREEDY)
    fastgen.optimize(two)
    again = one.generate(ids, **GREEDY), two.generate(ids, **GREEDY)
    for want, have, have_again in zip(expected, got, again, strict=True):
        assert torch.equal(want, have)
        assert torch.equal(want, have_again)


def test_a_planted_mistake_is_seen(pair, monkeypatch):
    """The comparison of this file can fail: positions off by one after a block boundary."""
    from fastgen.engine import runner

    build_batch = runner.build_batch

    def off_by_one(*args):
        batch = build_batch(*args)
        batch.positions += batch.positions >= 16
        return batch

    monkeypatch.setattr(runner, "build_batch", off_by_one)
    expected, got = both(pair, torch.tensor(prompts(12)), **GREEDY)
    assert not torch.equal(expected, got)
