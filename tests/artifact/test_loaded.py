"""A loaded model, used: generate() and Engine as the live model's, new weights followed."""

from __future__ import annotations

import asyncio
import copy

import pytest
import torch
from tiny_models import NativeTokens, greedy_alone, left_padded, prompts, tiny_model

import fastgen
from fastgen import (
    AsyncEngine,
    CapacityError,
    Engine,
    FastgenError,
    InvalidRequestError,
    NotOptimizedError,
    SamplingParams,
)
from fastgen.artifact.loaded import GenerationConfig


@pytest.fixture(scope="module")
def live():
    model = tiny_model("llama")
    with pytest.MonkeyPatch.context() as patch:
        from fastgen.graph_key import graph_key

        patch.setattr("fastgen.graphs.graph_key", graph_key)
        return fastgen.optimize(model)


GENERATE = {
    "greedy": {"max_new_tokens": 12},
    "max-length": {"max_length": 20},
    "both-lengths": {"max_length": 5, "max_new_tokens": 7},
    "no-length": {},
    "penalty": {"max_new_tokens": 12, "repetition_penalty": 1.3},
    "bad-words": {"max_new_tokens": 12, "bad_words_ids": [[5], [7, 9]]},
    "not-sampled": {"max_new_tokens": 5, "do_sample": False, "temperature": 1.0},
}


@pytest.mark.parametrize("fields", GENERATE.values(), ids=GENERATE)
def test_generate_is_the_live_models(fields, live, loaded):
    ids = torch.tensor(prompts(9))
    with NativeTokens(loaded):
        out = loaded.generate(ids, **fields)
    assert torch.equal(out, live.generate(ids, **fields))
    assert out.dtype == torch.int64


@pytest.mark.parametrize("given", ["mask", "guessed", "end-is-padding"])
def test_rows_of_unequal_length(given, live, loaded):
    ids, mask = left_padded(prompts(9, 4, 17))
    free = live.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    eos = int(free[1, ids.shape[1] + 4])  # ends one of them early
    fields = {"max_new_tokens": 12, "eos_token_id": eos, "min_new_tokens": 2}
    if given == "end-is-padding":
        fields["pad_token_id"] = eos
    if given != "guessed":
        fields["attention_mask"] = mask
    out = loaded.generate(ids, **fields)
    assert torch.equal(out, live.generate(ids, **fields))
    assert (out[:, ids.shape[1] :] == eos).any()


def test_sampling_draws_from_torchs_generator(loaded):
    ids = torch.tensor(prompts(9, 9, seed=4))
    fields = {"do_sample": True, "max_new_tokens": 12, "top_k": 20, "num_return_sequences": 3}
    torch.manual_seed(1)
    first = loaded.generate(ids, **fields)
    torch.manual_seed(1)
    assert torch.equal(loaded.generate(ids, **fields), first)
    assert first.shape == (6, 21)
    assert torch.equal(first[:, :9], ids.repeat_interleave(3, dim=0))
    assert len({tuple(row) for row in first.tolist()}) == 6
    assert not torch.equal(loaded.generate(ids, **fields), first)


@pytest.mark.parametrize(
    ("ids", "fields", "message"),
    [
        ([[3, 4]], {"num_beams": 2}, "does not take num_beams; it takes max_new_tokens"),
        ([[3, 4]], {"stop_strings": ["x"]}, "does not take stop_strings"),
        ([3, 4], {}, r"rows and columns \[B, T\]"),
        ([[]], {}, "must hold token ids"),
        ([[0.5]], {}, "must hold token ids"),
        ([[3, 4]], {"attention_mask": [[1]]}, r"the shape of input_ids \[1, 2\], got \[1, 1\]"),
        ([[3, 4]], {"attention_mask": [[1, 0]]}, "row 0 of attention_mask must be zeros and then"),
        ([[3, 4], [3, 4]], {"attention_mask": [[1, 1], [0, 0]]}, "row 1 of attention_mask"),
        ([[3, 999]], {}, "prompt token id must be between 0 and 127"),
        ([[3, 4]], {"temperature": -1.0, "do_sample": True}, "temperature must be"),
        ([[3, 4]], {"max_new_tokens": 0}, "max_tokens must be"),
    ],
    ids=[
        *("beams", "stop-strings", "one-row", "empty", "floats", "other-mask", "right-padded"),
        *("hidden-row", "unknown-token", "temperature", "no-tokens"),
    ],
)
def test_what_generate_does_not_do(ids, fields, message, loaded):
    fields = {name: torch.tensor(v) if "mask" in name else v for name, v in fields.items()}
    with pytest.raises(InvalidRequestError, match=message):
        loaded.generate(torch.tensor(ids), **fields)


def test_a_prompt_that_is_too_long(loaded):
    with pytest.raises(CapacityError, match="max_model_len"):
        loaded.generate(torch.tensor(prompts(500)), max_new_tokens=100)


def test_a_generation_config_is_used_or_refused(folder, live):
    import json

    from artifact_helpers import read_manifest, reseal

    from fastgen.artifact.manifest import file_entry

    path = folder / "generation_config.json"

    def configured(**fields):
        path.write_text(json.dumps(fields))
        files = {**read_manifest(folder).files, path.name: file_entry(path)}
        reseal(folder, files=files)
        return fastgen.load(folder)

    ids = torch.tensor(prompts(9))
    out = configured(max_new_tokens=3).generate(ids)
    assert torch.equal(out, live.generate(ids, max_new_tokens=3))
    assert configured(max_new_tokens=3).generate(ids, max_length=20).shape == (1, 20)
    with pytest.raises(InvalidRequestError, match="sets num_beams=4"):
        configured(num_beams=4).generate(ids)


def test_fields_that_are_not_set_are_none():
    config = GenerationConfig({"top_k": 5})
    assert (config.top_k, config.top_p) == (5, None)
    assert vars(copy.deepcopy(config)) == {"top_k": 5}


# Engine.

SAMPLED = SamplingParams(n=2, max_tokens=16, temperature=0.9, top_p=0.9, seed=7, logprobs=2)


def test_engine_samples_as_the_live_models(live, loaded):
    rows = prompts(5, 20, 33)
    with Engine(live) as ours, Engine(loaded) as theirs:
        expected, found = (engine.generate(rows, SAMPLED) for engine in (ours, theirs))
    for one, other in zip(expected, found, strict=True):
        for mine, yours in zip(one.outputs, other.outputs, strict=True):
            assert mine.token_ids == yours.token_ids
            assert mine.logprobs == yours.logprobs


def test_engine_streams_and_cancels(loaded):
    with Engine(loaded) as engine:
        whole = engine.generate(prompts(9), SAMPLED)[0]
        events = list(engine.stream(engine.submit(prompts(9)[0], SAMPLED)))
        streamed: list[list[int]] = [[], []]
        for event in events:
            streamed[event.index] += event.token_ids
        assert streamed == [each.token_ids for each in whole.outputs]
        request = engine.submit(prompts(9)[0], SamplingParams(max_tokens=400))
        engine.cancel(request)
        assert engine.result(request).finish_reason == "cancelled"
        assert engine.metrics().num_running == 0


def test_async_engine(llama_folder):
    loaded = fastgen.load(llama_folder)  # its engine ends with the loop

    async def run() -> list[int]:
        engine = AsyncEngine(loaded)
        params = SamplingParams(max_tokens=8, temperature=0.0)
        output = await engine.generate(rows[0], params)
        await engine.shutdown()
        return output.token_ids

    rows, expected = greedy_alone(tiny_model("llama"), 9, num_tokens=8)
    assert asyncio.run(run()) == expected[0]


# Its weights.


def test_new_values_are_followed(llama_folder):
    rows, expected = greedy_alone(tiny_model("llama", seed=1), 9, num_tokens=12)
    loaded = fastgen.load(llama_folder)
    ids = torch.tensor(rows)
    before = loaded.generate(ids, max_new_tokens=12)
    loaded.load_state_dict(tiny_model("llama", seed=1).state_dict())
    with NativeTokens(loaded):
        assert loaded.generate(ids, max_new_tokens=12)[0, 9:].tolist() == expected[0]
    loaded.load_state_dict(tiny_model("llama").state_dict(), assign=True)
    assert torch.equal(loaded.generate(ids, max_new_tokens=12), before)
    assert fastgen.explain(loaded).weight_epoch == 2


def test_new_values_of_packed_weights_are_followed(tmp_path):
    def model(seed: int):
        return tiny_model("llama", seed=seed, dtype=torch.bfloat16)

    fastgen.export(model(0), tmp_path / "out")
    loaded, ids = fastgen.load(tmp_path / "out"), torch.tensor(prompts(9))
    first = loaded.generate(ids, max_new_tokens=12)
    assert torch.equal(first, fastgen.optimize(model(0)).generate(ids, max_new_tokens=12))
    loaded.load_state_dict(model(1).state_dict())
    second = loaded.generate(ids, max_new_tokens=12)
    assert torch.equal(second, fastgen.optimize(model(1)).generate(ids, max_new_tokens=12))
    assert not torch.equal(first, second)
    with torch.no_grad():  # of one member of what is packed together
        loaded.get_parameter("model.layers.0.self_attn.v_proj.weight").neg_()
    assert not torch.equal(loaded.generate(ids, max_new_tokens=12), second)


def test_another_dtype_is_refused(llama_folder):
    loaded = fastgen.load(llama_folder)
    ids = torch.tensor(prompts(9))
    before = loaded.generate(ids, max_new_tokens=3)
    loaded.double()
    with pytest.raises(FastgenError, match="can take other values and no other shapes, dtypes"):
        loaded.generate(ids, max_new_tokens=3)
    loaded.float()
    assert torch.equal(loaded.generate(ids, max_new_tokens=3), before)


def test_what_it_has_not(loaded):
    with pytest.raises(FastgenError, match="has no forward: the code of LlamaForCausalLM"):
        loaded(torch.tensor(prompts(9)))
    assert loaded.tokenizer is None
    with pytest.raises(NotOptimizedError):
        copy.deepcopy(loaded).generate(torch.tensor(prompts(9)))
    with pytest.raises(fastgen.UnsupportedModelError, match="transformers PreTrainedModel"):
        fastgen.optimize(copy.deepcopy(loaded))


def test_explain_and_the_cache(llama_folder):
    loaded = fastgen.load(llama_folder)
    loaded.generate(torch.tensor(prompts(9)), max_new_tokens=4)
    explanation = fastgen.explain(loaded)
    assert explanation.graph_source == f"from {llama_folder}"
    assert {"imports", "graph read", "choice of kernels"} <= set(explanation.start)
    assert explanation.metrics is not None
    assert explanation.metrics.output_tokens == loaded.metrics().output_tokens == 4
    fastgen.release_cache(loaded)
    assert loaded.metrics().num_blocks == 0
    assert repr(loaded) == f"LoadedModel(LlamaForCausalLM, {str(llama_folder)!r})"
