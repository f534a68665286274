"""Beam search and beam sampling on the engine equal transformers' own, value for value."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import poison
from tiny_models import VOCAB, NativeTokens, left_padded, prompts
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)

import fastgen
from fastgen.engine.kv_cache import KVCache
from fastgen.engine.scheduler import Scheduler

pytestmark = pytest.mark.usefixtures("graphs_of_the_session")
TOKENIZER = AutoTokenizer.from_pretrained(Path(__file__).parents[1] / "examples" / "demo_model")
ALL = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
NOISE = {"rtol": 1e-4, "atol": 1e-4}  # of two fp32 forwards of these models


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
    metrics = fastgen.api.require(fast).engine().metrics()
    assert metrics.num_free_blocks == metrics.num_blocks, "a block is left"
    return expected, got


def assert_same(expected, got):
    """Outputs of one class, with the same keys, shapes, dtypes and values."""
    assert type(expected) is type(got)
    if isinstance(expected, torch.Tensor):
        assert (expected.dtype, expected.device) == (got.dtype, got.device)
        assert torch.equal(expected, got), f"{expected}\n{got}"
        return
    assert list(expected.keys()) == list(got.keys())
    assert_same(expected.sequences, got.sequences)
    assert_same(expected.beam_indices, got.beam_indices)
    for key in ("sequences_scores", "scores", "logits"):
        assert_close(expected[key], got[key]) if key in expected else None


def assert_close(expected, got):
    if isinstance(expected, tuple):
        assert len(expected) == len(got)
        expected, got = torch.stack(expected), torch.stack(got)
    assert expected.dtype == got.dtype == torch.float32
    torch.testing.assert_close(got, expected, **NOISE)


def beams(num_beams=4, num_tokens=24, **options):
    return {"num_beams": num_beams, "max_new_tokens": num_tokens, "do_sample": False, **options}


def batch(pair, num_tokens=24):
    """Three ragged prompts, left-padded, and two tokens that end some beams early."""
    ids, mask = left_padded(prompts(5, 12, 33))
    made = pair[0].generate(ids, attention_mask=mask, **beams(num_tokens=num_tokens))
    ends = [int(made[0, ids.shape[1] + 3]), int(made[2, ids.shape[1] + 9])]
    return {"inputs": ids, "attention_mask": mask, "eos_token_id": ends, "pad_token_id": 0}


@pytest.mark.parametrize("length", [1, 15, 16, 17, 40])
@pytest.mark.parametrize("sampled", [False, True], ids=["search", "sampled"])
def test_one_prompt(pair, length, sampled):
    ids = torch.tensor(prompts(length))
    assert_same(*both(pair, ids, **beams(do_sample=sampled, num_return_sequences=3, **ALL)))


@pytest.mark.parametrize("early_stopping", [True, False, "never"], ids=str)
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0, 2.5], ids=str)
@pytest.mark.parametrize("sampled", [False, True], ids=["search", "sampled"])
def test_ended_beams(pair, early_stopping, length_penalty, sampled):
    expected, got = both(
        pair,
        **batch(pair),
        **beams(early_stopping=early_stopping, length_penalty=length_penalty, do_sample=sampled),
        num_return_sequences=2,
        **ALL,
    )
    assert_same(expected, got)
    if not sampled and length_penalty < 2:  # above, the longest win
        assert (expected.beam_indices < 0).any(), "no beam has ended early: the test shows nothing"


@pytest.mark.parametrize("num_beams", [2, 3, 8])
def test_number_of_beams(pair, num_beams):
    assert_same(*both(pair, **batch(pair), **beams(num_beams, **ALL)))


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.4},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[5], [6, 7]]},
        {"min_new_tokens": 12},
        {"temperature": 0.7, "top_k": 9, "top_p": 0.9, "do_sample": True},
        {"renormalize_logits": True, "do_sample": True, "typical_p": 0.8},
        {"forced_eos_token_id": 5},
        {"max_length": 40, "max_new_tokens": None},
        {"exponential_decay_length_penalty": (3, 1.2)},
        {"sequence_bias": [[[9], 2.0]]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_built_in_processors(pair, options):
    options = beams(num_beams=3, num_tokens=16, **ALL) | options
    assert_same(*both(pair, **batch(pair), **options))


@pytest.mark.parametrize("num_ends", [0, 1, 3])
def test_number_of_end_tokens(pair, num_ends):
    """With each of them one more candidate per beam is looked at."""
    ends = {"eos_token_id": [11, 22, 33][:num_ends], "pad_token_id": 4} if num_ends else {}
    ids = torch.tensor(prompts(9, 9))
    assert_same(*both(pair, ids, **beams(do_sample=True, **ends, **ALL)))


@pytest.mark.parametrize("keys", [{}, {"output_scores": True}, {"output_logits": True}], ids=str)
def test_keys_of_the_output(pair, keys):
    options = beams(num_tokens=6, return_dict_in_generate=True, **keys)
    assert_same(*both(pair, torch.tensor(prompts(9)), **options))


def test_tensor_alone(pair):
    assert_same(*both(pair, **batch(pair), **beams(num_return_sequences=4)))


def test_settings_of_the_generation_config(pair):
    config = GenerationConfig(num_beams=3, max_new_tokens=9, length_penalty=0.3, pad_token_id=0)
    assert_same(*both(pair, torch.tensor(prompts(9)), generation_config=config))


@pytest.mark.parametrize("num_beams", [VOCAB // 2 - 1, VOCAB // 2 + 1, VOCAB + 5])
@pytest.mark.parametrize("num_tokens", [1, 4])
def test_more_candidates_than_words(pair, num_beams, num_tokens):
    """Beams that are alike and count for nothing are chosen in the first step."""
    options = beams(num_beams, num_tokens, num_return_sequences=3, **ALL)
    assert_same(*both(pair, torch.tensor(prompts(9)), **options))


@pytest.mark.parametrize("side", ["left", "right", "hole"])
def test_masked_batch(pair, side):
    ids, mask = torch.tensor(prompts(20, 20)), torch.ones(2, 20, dtype=torch.long)
    mask[0, {"left": slice(0, 6), "right": slice(15, 20), "hole": slice(5, 9)}[side]] = 0
    assert_same(*both(pair, ids, attention_mask=mask, **beams(**ALL)))


# What users write.


class Seen(LogitsProcessor):
    """Remembers what it is shown, and writes into it."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append(input_ids.clone())
        scores[:, 7] -= 1.0
        return scores


class StopAt(StoppingCriteria):
    def __init__(self, token):
        self.token, self.seen = token, []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append((input_ids.clone(), None if scores is None else len(scores)))
        return input_ids[:, -1] == self.token


@pytest.mark.parametrize("keys", [{}, ALL], ids=["tensor", "dict"])
def test_processors_and_criteria_see_what_transformers_shows(pair, keys):
    ids, mask = left_padded(prompts(5, 12))
    made = pair[0].generate(ids, attention_mask=mask, **beams())
    seen, outputs = [], []
    for model in pair:
        processor, criterion = Seen(), StopAt(int(made[0, 20]))
        outputs.append(
            model.generate(
                ids,
                attention_mask=mask,
                logits_processor=LogitsProcessorList([processor]),
                stopping_criteria=StoppingCriteriaList([criterion]),
                **beams(**keys),
            )
        )
        seen.append((processor.seen, criterion.seen))
    assert not fastgen.api.require(pair[1]).fallbacks
    assert_same(*outputs)
    assert len(seen[0][0]) > 3
    for theirs, ours in zip(seen[0][0], seen[1][0], strict=True):
        assert torch.equal(theirs, ours)
    for theirs, ours in zip(seen[0][1], seen[1][1], strict=True):
        assert torch.equal(theirs[0], ours[0])
        assert theirs[1] == ours[1]


def test_max_time_ends_all_beams(pair):
    criteria = StoppingCriteriaList([MaxTimeCriteria(max_time=-1.0)])
    expected, got = both(pair, torch.tensor(prompts(8)), stopping_criteria=criteria, **beams())
    assert_same(expected, got)
    assert expected.shape[1] == 9


def test_stop_strings_end_beams(pair):
    made = pair[0].generate(torch.tensor(prompts(9)), **beams())
    stop = TOKENIZER.decode(made[0, 15:16])
    asked = {"stop_strings": stop, "tokenizer": TOKENIZER, "pad_token_id": 0}
    assert_same(*both(pair, torch.tensor(prompts(9)), **beams(**asked, **ALL)))


def test_prefix_allowed_tokens(pair):
    def allowed(_, ids):
        return [t for t in range(2, VOCAB) if (t + len(ids)) % 3 == 0]

    assert_same(*both(pair, **batch(pair), **beams(**ALL), prefix_allowed_tokens_fn=allowed))


def test_processor_that_raises_fails_only_its_call(optimized):
    class Broken(LogitsProcessor):
        def __call__(self, input_ids, scores):
            if input_ids.shape[1] > 10:
                raise ZeroDivisionError("mine")
            return scores

    ids = torch.tensor(prompts(8))
    expected = optimized.generate(ids, **beams())
    with pytest.raises(ZeroDivisionError, match="mine"):
        optimized.generate(ids, logits_processor=LogitsProcessorList([Broken()]), **beams())
    metrics = fastgen.api.require(optimized).engine().metrics()
    assert metrics.num_free_blocks == metrics.num_blocks
    assert torch.equal(optimized.generate(ids, **beams()), expected)


# The returned cache.


@pytest.mark.parametrize("num_tokens", [1, 2, 9])
def test_the_cache_holds_the_beams_that_would_have_gone_on(pair, num_tokens):
    ids, mask = left_padded(prompts(5, 12))
    options = beams(num_tokens=num_tokens, return_dict_in_generate=True)
    expected, got = both(pair, ids, attention_mask=mask, **options)
    assert type(got.past_key_values) is type(expected.past_key_values)
    new = torch.ones(8, num_tokens - 1, dtype=torch.long)
    visible = torch.cat([mask.repeat_interleave(4, dim=0), new], dim=1).bool()
    for ours, theirs in zip(
        got.past_key_values.layers, expected.past_key_values.layers, strict=True
    ):
        for a, b in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            assert a.shape == b.shape
            torch.testing.assert_close(a.transpose(1, 2)[visible], b.transpose(1, 2)[visible])


def test_the_cache_can_be_continued(pair):
    """One more forward from either cache gives the same logits."""
    ids = torch.tensor(prompts(6))
    outputs = both(pair, ids, **beams(num_tokens=8, return_dict_in_generate=True))
    tokens = torch.tensor([[3], [9], [3], [9]])
    with torch.no_grad():
        logits = [pair[0](tokens, past_key_values=out.past_key_values).logits for out in outputs]
    torch.testing.assert_close(*logits, **NOISE)


# Other schedules.


@pytest.mark.parametrize(
    "fields", [{"max_num_batched_tokens": 7}, {"prefix_cache": False}, {"block_size": 32}], ids=str
)
def test_schedules(model, fields):
    ids, mask = left_padded(prompts(5, 12, 33))
    expected = model.generate(ids, attention_mask=mask, **beams(num_tokens=40))
    fastgen.optimize(model, **fields)
    poison(model)
    with NativeTokens(model):
        assert_same(expected, model.generate(ids, attention_mask=mask, **beams(num_tokens=40)))


def test_the_prompt_is_computed_once(optimized):
    optimized.generate(torch.tensor(prompts(40)), **beams(num_beams=5, num_tokens=3))
    metrics = fastgen.api.require(optimized).engine().metrics()
    assert metrics.computed_tokens == 40 + 2 * 5
    assert metrics.prompt_tokens == 40


def test_explain_counts_forks(optimized):
    assert "copied on write" not in str(fastgen.explain(optimized))
    optimized.generate(torch.tensor(prompts(40)), **beams())
    metrics = fastgen.api.require(optimized).engine().metrics()
    assert 0 < metrics.block_copies <= metrics.forks
    line = f"{metrics.forks} rows went on from another row's blocks, {metrics.block_copies} blocks"
    assert line in str(fastgen.explain(optimized))


# What transformers' own loop is left to do, and its errors.


@pytest.mark.parametrize(
    ("fields", "options"),
    [({"max_num_seqs": 7}, {}), ({"kv_cache_memory_bytes": 9 * 16 * 512}, {"num_beams": 4})],
    ids=["max_num_seqs", "pool"],
)
def test_beams_that_do_not_fit_together(model, fields, options):
    ids, options = torch.tensor(prompts(4, 4)), beams(num_tokens=20) | options
    expected = model.generate(ids, **options)
    fastgen.optimize(model, **fields)
    assert_same(expected, model.generate(ids, **options))
    (reason,) = fastgen.api.require(model).fallbacks
    assert "8 rows" in reason
    assert "fit" in reason


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_beams": 0}, "num_beams=0"),
        ({"num_beams": -2}, "num_beams=-2"),
        ({"num_beams": 2.0}, "num_beams=2.0"),
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}, "num_beam_groups=2"),
        ({"num_beams": 2, "force_words_ids": [[5]]}, "force_words_ids is set"),
        ({"num_beams": 2, "low_memory": True}, "low_memory=True"),
        ({"num_beams": 1, "penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha=0.6"),
        ({"num_beams": 2, "streamer": TextStreamer(None)}, "a streamer with beams"),
        ({"num_beams": 2, "num_return_sequences": 3}, None),
        ({"num_beams": 2, "length_penalty": "long"}, None),
        ({"num_beams": 2, "eos_token_id": list(range(VOCAB)), "pad_token_id": 0}, None),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_errors_are_transformers_own(model, options, reason):
    arguments = {"max_new_tokens": 6, "do_sample": False, **options}
    ids = torch.tensor(prompts(6))
    with pytest.raises(Exception) as expected:
        model.generate(ids, **arguments)
    fastgen.optimize(model)
    with pytest.raises(type(expected.value)) as got:
        model.generate(ids, **arguments)
    assert str(got.value) == str(expected.value)
    assert list(fastgen.api.require(model).fallbacks) == ([reason] if reason else [])


def test_a_beam_search_of_the_models_own(optimized, monkeypatch):
    def own(self, input_ids, **_):
        return input_ids

    monkeypatch.setattr(type(optimized), "_beam_search", own)
    ids = torch.tensor(prompts(6))
    assert torch.equal(optimized.generate(ids, **beams(2)), ids.repeat(2, 1))
    assert "of its own" in str(fastgen.api.require(optimized).fallbacks)


# Mistakes planted.


def other_output(pair):
    expected, got = both(pair, **batch(pair), **beams(**ALL))
    with pytest.raises(AssertionError):
        assert_same(expected, got)


def test_planted_rows_that_all_go_on_from_themselves_are_seen(pair, monkeypatch):
    fork = Scheduler.fork

    def from_itself(self, requests, parents):
        first = any(request.needs_fork for request in requests)
        fork(self, requests, parents if first else range(len(requests)))

    monkeypatch.setattr(Scheduler, "fork", from_itself)
    other_output(pair)


def test_planted_block_without_a_copy_is_seen(pair, monkeypatch):
    monkeypatch.setattr(KVCache, "copy_blocks", lambda *_: None)
    other_output(pair)
