"""Every argument of generate() and field of its configuration does what the table says of it."""

import warnings
from pathlib import Path

import pytest
import torch
from tiny_models import NativeTokens, prompts, tiny_model
from transformers import (
    AutoTokenizer,
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    MinLengthLogitsProcessor,
    StopStringCriteria,
    TextStreamer,
    WatermarkingConfig,
)

import fastgen
from fastgen.generate.support import ARGUMENTS, FIELDS, By, markdown, rows_without_a_name

ROOT = Path(__file__).parents[1]
TOKENIZER = AutoTokenizer.from_pretrained(ROOT / "examples" / "demo_model")
IDS = torch.tensor(prompts(9, 9))
ONE = IDS[:1]
SAMPLED = {"do_sample": True}
BEAMS = {"num_beams": 2}


def eos(pair) -> dict:
    """An end token that greedy search meets."""
    out = pair[0].generate(IDS, do_sample=False, max_new_tokens=12)
    return {"eos_token_id": int(out[0, -3]), "pad_token_id": 0}


class Puts(TextStreamer):
    """What a streamer is told; equal if two were told the same."""

    def __init__(self):
        self.told = []

    def put(self, value):
        self.told.append(value.tolist())

    def end(self):
        self.told.append("end")


# By name: arguments of a call that sets it. What needs the models gets the pair.
ARGUMENT_CASES = {
    "inputs": lambda pair: {"inputs": IDS},
    "input_ids": lambda pair: {"inputs": None, "input_ids": IDS},
    "attention_mask": lambda pair: {"attention_mask": torch.tensor([[0, 0] + [1] * 7, [1] * 9])},
    "generation_config": lambda pair: {
        "generation_config": GenerationConfig(max_new_tokens=5, pad_token_id=0)
    },
    "logits_processor": lambda pair: {
        "logits_processor": [MinLengthLogitsProcessor(12, torch.tensor([3]))]
    },
    "stopping_criteria": lambda pair: {"stopping_criteria": [StopStringCriteria(TOKENIZER, "e")]},
    "prefix_allowed_tokens_fn": lambda pair: {
        "prefix_allowed_tokens_fn": lambda row, ids: [int(ids[-1]) // 2 + 1, 7 + row]
    },
    "streamer": lambda pair: {"streamer": Puts()},
    "tokenizer": lambda pair: {"tokenizer": TOKENIZER},
    "assistant_tokenizer": lambda pair: {"assistant_tokenizer": TOKENIZER},
    "trust_remote_code": lambda pair: {"trust_remote_code": False},
    "synced_gpus": lambda pair: {"synced_gpus": True},
    "assistant_model": lambda pair: {"inputs": ONE, "assistant_model": pair[0]},
    "negative_prompt_ids": lambda pair: {"negative_prompt_ids": IDS[:, :3], "guidance_scale": 1.5},
    "negative_prompt_attention_mask": lambda pair: {
        "negative_prompt_ids": IDS[:, :3],
        "negative_prompt_attention_mask": torch.ones(2, 3, dtype=torch.long),
        "guidance_scale": 1.5,
    },
    "custom_generate": lambda pair: {
        "custom_generate": lambda model, input_ids, **_: input_ids + 1,
    },
    "past_key_values": lambda pair: {"past_key_values": DynamicCache(config=pair[0].config)},
    "inputs_embeds": lambda pair: {
        "inputs": None,
        "inputs_embeds": pair[0].get_input_embeddings()(IDS).detach(),
    },
}

FIELD_CASES = {
    "max_length": {"max_length": 14, "max_new_tokens": None},
    "max_new_tokens": {"max_new_tokens": 4},
    "min_length": lambda pair: {"min_length": 20, **eos(pair)},
    "min_new_tokens": lambda pair: {"min_new_tokens": 12, **eos(pair)},
    "max_time": {"max_time": 600.0},
    "stop_strings": {"stop_strings": ["e", "zz"], "tokenizer": TOKENIZER, "pad_token_id": 0},
    "eos_token_id": eos,
    "do_sample": SAMPLED,
    "num_return_sequences": {**SAMPLED, "num_return_sequences": 3},
    "pad_token_id": lambda pair: {**eos(pair), "pad_token_id": 5},
    "bos_token_id": {"bos_token_id": 3},
    "temperature": {**SAMPLED, "temperature": 0.4},
    "top_k": {**SAMPLED, "top_k": 3},
    "top_p": {**SAMPLED, "top_p": 0.5},
    "min_p": {**SAMPLED, "min_p": 0.2},
    "top_h": {**SAMPLED, "top_h": 0.4},
    "typical_p": {**SAMPLED, "typical_p": 0.5},
    "epsilon_cutoff": {**SAMPLED, "epsilon_cutoff": 0.02},
    "eta_cutoff": {**SAMPLED, "eta_cutoff": 0.02},
    "repetition_penalty": {"repetition_penalty": 3.0},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 3.0},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": [[i] for i in range(2, 60)]},
    "renormalize_logits": {**SAMPLED, "top_k": 9, "renormalize_logits": True},
    "forced_bos_token_id": {"inputs": IDS[:, :1], "forced_bos_token_id": 7},
    "forced_eos_token_id": {"forced_eos_token_id": 7},
    "remove_invalid_values": {"remove_invalid_values": True},
    "exponential_decay_length_penalty": lambda pair: {
        "exponential_decay_length_penalty": (2, 1.5),
        **eos(pair),
    },
    "suppress_tokens": {"suppress_tokens": list(range(2, 60))},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(2, 100))},
    "sequence_bias": {"sequence_bias": [[[7], 50.0]]},
    "watermarking_config": {"watermarking_config": WatermarkingConfig(bias=9.0)},
    "return_dict_in_generate": {"return_dict_in_generate": True},
    "output_scores": {"return_dict_in_generate": True, "output_scores": True},
    "output_logits": {"return_dict_in_generate": True, "output_logits": True},
    "early_stopping": lambda pair: {**BEAMS, "early_stopping": True, **eos(pair)},
    "length_penalty": lambda pair: {**BEAMS, "length_penalty": 2.0, **eos(pair)},
    "num_beams": BEAMS,
    "output_attentions": {"output_attentions": True},
    "output_hidden_states": {"output_hidden_states": True, "return_dict_in_generate": True},
    "use_cache": {"use_cache": False},
    "cache_implementation": {"cache_implementation": "static"},
    "cache_config": {"cache_config": {"backend": "quanto"}},
    "max_cache_len": {"max_cache_len": 64},
    "prefill_chunk_size": {"prefill_chunk_size": 4},
    "compile_config": {"compile_config": CompileConfig()},
    "disable_compile": {"disable_compile": True},
    "continuous_batching_config": {"continuous_batching_config": {}},
    "guidance_scale": {"guidance_scale": 1.5},
    "token_healing": {
        "token_healing": True,
        "tokenizer": TOKENIZER,
        "inputs": ONE,
        "pad_token_id": 0,
    },
    "prompt_lookup_num_tokens": {"inputs": ONE, "prompt_lookup_num_tokens": 3},
    "assistant_early_exit": {"inputs": ONE, "assistant_early_exit": 1},
    "use_mtp": {"inputs": ONE, "use_mtp": True},
    "is_assistant": {"is_assistant": True},
    "num_assistant_tokens": {"num_assistant_tokens": 3},
    "num_assistant_tokens_schedule": {"num_assistant_tokens_schedule": "constant"},
    "assistant_confidence_threshold": {"assistant_confidence_threshold": 0.3},
    "max_matching_ngram_size": {"max_matching_ngram_size": 2},
    "assistant_lookbehind": {"assistant_lookbehind": 3},
    "target_lookbehind": {"target_lookbehind": 3},
    "assistant_ensemble_weight": {"assistant_ensemble_weight": 0.3},
    "speculation_type": {"speculation_type": "dflash"},
    "decoder_start_token_id": {"decoder_start_token_id": 3},
    "low_memory": {"low_memory": True},
    "penalty_alpha": {"penalty_alpha": 0.6, "top_k": 4},
    "dola_layers": {"dola_layers": "low"},
    "num_beam_groups": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0},
    "diversity_penalty": {"diversity_penalty": 1.0},
    "constraints": {"num_beams": 2, "constraints": [object()]},
    "force_words_ids": {"num_beams": 2, "force_words_ids": [[5]]},
    "_from_model_config": {"_from_model_config": True},
    "transformers_version": {"transformers_version": "5.0"},
}

INSTALLED = [row for row in FIELDS if hasattr(GenerationConfig(), row.name)]


@pytest.fixture(scope="module")
def pair():
    plain, fast = tiny_model("llama"), tiny_model("llama")
    fastgen.optimize(fast)
    return plain, fast


def outcome(model, arguments: dict):
    """What a call returns or raises, and the state of the RNG after it."""
    torch.manual_seed(3)
    arguments = {"inputs": IDS, "max_new_tokens": 12, "do_sample": False, **arguments}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers warns of fields that ask for nothing
        try:
            result = model.generate(**arguments)
        except Exception as error:
            return type(error), str(error)
    told = getattr(arguments.get("streamer"), "told", None)
    return *flat(result), told, torch.rand(2).tolist()


def flat(result) -> tuple:
    """Classes, keys, shapes and dtypes exactly; tokens exactly, scores as tensors."""
    if isinstance(result, torch.Tensor):
        return (type(result), result.dtype, result.tolist())
    values = []
    for key, value in result.items():
        values.append((key, type(value)))
        if isinstance(value, torch.Tensor):
            values.append((value.dtype, tuple(value.shape)))
        elif isinstance(value, tuple) and value and isinstance(value[0], torch.Tensor):
            values.append([(item.dtype, tuple(item.shape)) for item in value])
    return (type(result), *values, result.sequences.tolist())


@pytest.mark.parametrize("row", [*ARGUMENTS, *INSTALLED], ids=lambda row: row.name)
def test_each_name_does_what_its_row_says(pair, row):
    plain, fast = pair
    case = (ARGUMENT_CASES if row in ARGUMENTS else FIELD_CASES)[row.name]

    def given() -> dict:
        return dict(case(pair) if callable(case) else case)

    expected = outcome(plain, given())
    if row.by is By.NATIVE:
        assert not isinstance(expected[0], type) or not issubclass(expected[0], Exception), expected
        with NativeTokens(fast):
            assert outcome(fast, given()) == expected
        return
    fallbacks = fastgen.api.require(fast).fallbacks
    before = fallbacks.copy()
    assert outcome(fast, given()) == expected
    counted = (fallbacks - before).values()  # an assistant is asked by calls of its own
    assert sum(counted) >= 1, "transformers' loop was not counted"
    if row.by is By.REFUSED:
        assert issubclass(expected[0], Exception)


PROCESSORS = [row for row in INSTALLED if "processor" in row.note]


@pytest.mark.parametrize("row", PROCESSORS, ids=lambda row: row.name)
def test_scores_and_logits_of_each_processor(pair, row):
    """What is ruled out is ruled out, and the rest differs by fp32 rounding of the logits."""
    case = FIELD_CASES[row.name]
    given = dict(case(pair) if callable(case) else case)
    given = {"inputs": IDS, "max_new_tokens": 12, "do_sample": False, **given}
    outputs = []
    for model in pair:
        torch.manual_seed(3)
        outputs.append(
            model.generate(
                **given, return_dict_in_generate=True, output_scores=True, output_logits=True
            )
        )
    expected, got = outputs
    assert torch.equal(got.sequences, expected.sequences)
    for kind in ("logits", "scores"):
        ours, theirs = torch.cat(got[kind]), torch.cat(expected[kind])
        finite = theirs.isfinite()
        assert torch.equal(ours.isfinite(), finite)
        assert torch.equal(ours[~finite], theirs[~finite])
        bound = 64 * torch.finfo(torch.float32).eps * theirs[finite].abs().max()
        assert (ours[finite] - theirs[finite]).abs().max() <= bound


@pytest.mark.parametrize("row", INSTALLED, ids=lambda row: row.name)
def test_a_field_at_rest_is_native(pair, row):
    for value in row.off:
        if value is not None:
            with NativeTokens(pair[1]):
                outcome(pair[1], {row.name: value})


def test_the_table_is_complete():
    assert rows_without_a_name() == []


def test_a_name_is_in_one_row():
    names = [row.name for row in (*ARGUMENTS, *FIELDS)]
    assert len(set(names)) == len(names)


def test_every_row_has_a_case():
    assert set(ARGUMENT_CASES) == {row.name for row in ARGUMENTS}
    assert set(FIELD_CASES) == {row.name for row in FIELDS}


def test_a_field_without_a_row_goes_to_transformers_loop(pair, monkeypatch):
    from fastgen.generate import support

    rows = {name: row for name, row in support._FIELDS.items() if name != "top_h"}
    monkeypatch.setattr(support, "_FIELDS", rows)
    fallbacks = fastgen.api.require(pair[1]).fallbacks
    outcome(pair[1], {**SAMPLED, "top_h": 0.4})
    assert fallbacks["the field top_h"] == 1
    assert support.rows_without_a_name() == ["top_h"]


def test_an_unknown_model_input_goes_to_transformers_loop(pair):
    fallbacks = fastgen.api.require(pair[1]).fallbacks
    positions = torch.arange(9)[None].expand(2, -1)
    expected = outcome(pair[0], {"position_ids": positions})
    before = fallbacks["the model input position_ids"]
    assert outcome(pair[1], {"position_ids": positions}) == expected
    assert fallbacks["the model input position_ids"] == before + 1


def test_the_document_is_current():
    assert "\n".join(markdown()) in (ROOT / "GENERATE.md").read_text()


# Stop strings, which transformers makes no criterion of for other loops than its own.


def stopping(model, prompt=ONE, **arguments):
    return model.generate(
        prompt,
        do_sample=False,
        max_new_tokens=24,
        pad_token_id=0,
        tokenizer=TOKENIZER,
        **arguments,
    )


@pytest.fixture(scope="module")
def met(pair) -> str:
    """A string in the middle of what greedy search generates."""
    out = pair[0].generate(ONE, do_sample=False, max_new_tokens=24)[0, ONE.shape[1] :]
    texts = [TOKENIZER.decode([token]) for token in out.tolist()]
    return next(t for place, t in enumerate(texts) if t.isascii() and t not in texts[:place][:8])


@pytest.mark.parametrize("where", ["argument", "given", "both", "the model's", "all"])
def test_stop_strings_wherever_they_are_set(pair, met, where, monkeypatch):
    def config(**fields):
        return GenerationConfig(do_sample=False, max_new_tokens=24, pad_token_id=0, **fields)

    def call(model):
        with pytest.MonkeyPatch.context() as patch:
            if where in ("the model's", "all"):
                patch.setattr(model.generation_config, "stop_strings", [met])
            arguments: dict = {"tokenizer": TOKENIZER}
            if where in ("given", "both", "all"):
                stop = [met] if where == "given" else ["never seen"]
                arguments["generation_config"] = config(stop_strings=stop)
            else:
                arguments["generation_config"] = config()
            if where in ("argument", "both", "all"):
                arguments["stop_strings"] = met
            given = arguments["generation_config"]
            before = given.to_dict()
            out = model.generate(ONE, **arguments)
            assert given.to_dict() == before, "the caller's configuration was changed"
            return out

    expected = call(pair[0])
    assert expected.shape[1] < ONE.shape[1] + 24, "the string did not stop anything"
    with NativeTokens(pair[1]):
        assert torch.equal(call(pair[1]), expected)


def test_stop_strings_of_a_batch_end_their_rows_alone(pair, met):
    ids = torch.cat([ONE, torch.tensor(prompts(9, seed=5))])
    expected = stopping(pair[0], ids, stop_strings=met)
    assert (expected == 0).any(), "no row has ended before the others"
    with NativeTokens(pair[1]):
        assert torch.equal(stopping(pair[1], ids, stop_strings=met), expected)


def test_a_criterion_of_the_caller_takes_the_place_of_the_stop_strings(pair, met):
    own = [StopStringCriteria(TOKENIZER, [met])]
    expected = stopping(pair[0], stop_strings="never seen", stopping_criteria=own)
    with NativeTokens(pair[1]):
        got = stopping(pair[1], stop_strings="never seen", stopping_criteria=own)
    assert torch.equal(got, expected)


def test_stop_strings_without_a_tokenizer_raise_what_transformers_raises(pair):
    asked = {"stop_strings": "x"}
    expected = outcome(pair[0], asked)
    assert expected[0] is ValueError
    assert outcome(pair[1], asked) == expected
