"""`Engine.default_params`: what a generation config says, taken over or refused by name."""

from __future__ import annotations

import pytest
from engine_helpers import (  # noqa: F401 - the fixtures are used by name
    engine_fixture,
    expected_fixture,
    model_fixture,
    within,
)
from transformers import GenerationConfig

from fastgen import InvalidRequestError, SamplingParams
from fastgen.frontend import _NOT_IN_SAMPLING_PARAMS

TAKEN = {
    "max_new_tokens",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "num_return_sequences",
    "eos_token_id",  # by the requests themselves
}
# What changes no token: how fast and where they are computed, and what comes back beside them.
# early_stopping and length_penalty are of beams; renormalize_logits changes no probability.
NO_MATTER = {
    *("early_stopping", "length_penalty", "renormalize_logits", "low_memory"),
    *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size"),
    *("compile_config", "disable_compile", "continuous_batching_config", "use_mtp"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits"),
    *("return_dict_in_generate", "pad_token_id", "bos_token_id", "decoder_start_token_id"),
    *("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule"),
    *("assistant_confidence_threshold", "assistant_early_exit", "assistant_lookbehind"),
    *("assistant_ensemble_weight", "target_lookbehind", "speculation_type"),
    *("prompt_lookup_num_tokens", "max_matching_ngram_size"),
    *("_from_model_config", "transformers_version"),
}
# A value of each refused field that transformers might hold.
SET = {
    "num_beams": 4,
    "typical_p": 0.5,
    "epsilon_cutoff": 0.1,
    "eta_cutoff": 0.1,
    "top_h": 0.4,
    "no_repeat_ngram_size": 2,
    "encoder_repetition_penalty": 1.5,
    "encoder_no_repeat_ngram_size": 2,
    "bad_words_ids": [[5]],
    "sequence_bias": {(5,): 1.0},
    "suppress_tokens": [5],
    "begin_suppress_tokens": [5],
    "forced_bos_token_id": 5,
    "forced_eos_token_id": 5,
    "exponential_decay_length_penalty": (5, 1.1),
    "guidance_scale": 1.5,
    "penalty_alpha": 0.6,
    "dola_layers": "high",
    "watermarking_config": {"bias": 1.0},
    "min_length": 5,
    "min_new_tokens": 5,
    "stop_strings": ["a"],
    "max_length": 50,
    "max_time": 1.0,
    "num_beam_groups": 2,
    "diversity_penalty": 0.5,
    "constraints": ["one"],
    "force_words_ids": [[5]],
    "token_healing": True,
    "remove_invalid_values": True,
}


def test_every_field_of_a_generation_config_is_taken_refused_or_of_no_matter():
    assert SET.keys() == _NOT_IN_SAMPLING_PARAMS.keys()
    unknown = set(vars(GenerationConfig())) - TAKEN - SET.keys() - NO_MATTER
    assert not unknown, "fields that are silently ignored"


@pytest.mark.parametrize("name", SET)
def test_what_cannot_be_said_is_refused_by_name(engine, expected, monkeypatch, name):
    config = engine.model.generation_config
    for off in (None, *_NOT_IN_SAMPLING_PARAMS[name]):
        monkeypatch.setattr(config, name, off, raising=False)
        assert engine.default_params() == SamplingParams(temperature=0.0)
    monkeypatch.setattr(config, name, SET[name], raising=False)
    for call in (engine.default_params, lambda: engine.submit([5]), lambda: engine.generate([[5]])):
        with pytest.raises(InvalidRequestError, match=f"sets {name}=.*pass params"):
            within(call)
    params = SamplingParams(max_tokens=3, temperature=0.0)
    (output,) = within(engine.generate, expected[0][:1], params)
    assert output.token_ids == expected[1][0][:3], "params that are given do not ask the config"


@pytest.mark.parametrize(
    ("fields", "expected_params"),
    [
        ({}, SamplingParams(temperature=0.0)),
        ({"temperature": 0.5, "top_k": 3}, SamplingParams(temperature=0.0)),
        (
            {"repetition_penalty": 1.2, "max_new_tokens": 7, "num_return_sequences": 2},
            SamplingParams(n=2, max_tokens=7, temperature=0.0, repetition_penalty=1.2),
        ),
        ({"do_sample": True}, SamplingParams(top_k=50)),
        (
            {
                "do_sample": True,
                "temperature": 0.7,
                "top_k": 0,
                "top_p": 0.9,
                "min_p": 0.1,
                "repetition_penalty": 1.1,
                "num_return_sequences": 3,
                "max_new_tokens": 9,
            },
            SamplingParams(
                n=3,
                max_tokens=9,
                temperature=0.7,
                top_k=0,
                top_p=0.9,
                min_p=0.1,
                repetition_penalty=1.1,
            ),
        ),
    ],
    ids=["nothing", "greedy", "greedy-fields", "sampling", "sampling-fields"],
)
def test_what_is_taken(engine, monkeypatch, fields, expected_params):
    for name, value in fields.items():
        monkeypatch.setattr(engine.model.generation_config, name, value)
    assert engine.default_params() == expected_params
