"""None is an answer: it overrides what the model's configuration says, as in transformers."""

import pytest
import torch
from tiny_models import prompts, tiny_model
from transformers import AutoTokenizer, GenerationConfig

import fastgen
from fastgen.cli.models import demo_model_dir

pytestmark = pytest.mark.usefixtures("graphs_of_the_session")
IDS = torch.tensor(prompts(9))
MODEL_SAYS = {"do_sample": True, "top_k": 2, "temperature": 3.0, "max_new_tokens": 24}


@pytest.fixture(scope="module")
def two_llamas():
    """Equal models, plain and optimised."""
    plain, fast = tiny_model("llama"), tiny_model("llama")
    fastgen.optimize(fast)
    return plain, fast


def generate(model, **arguments):
    torch.manual_seed(3)
    return model.generate(**{"inputs": IDS, **arguments})


@pytest.mark.parametrize(
    "arguments",
    [
        {"top_k": None},
        {"temperature": None},
        {"do_sample": None},
        {"eos_token_id": None},
        {"input_ids": None, "attention_mask": None, "position_ids": None, "top_k": None},
        {"streamer": None, "custom_generate": None, "assistant_model": None, "top_k": None},
    ],
    ids=lambda arguments: "-".join(arguments),
)
def test_none_overrides_the_models_configuration(two_llamas, arguments):
    plain, fast = two_llamas
    plain.generation_config = GenerationConfig(pad_token_id=0)
    eos = generate(plain, **MODEL_SAYS)[0, -4].item()
    for model in two_llamas:
        model.generation_config = GenerationConfig(**MODEL_SAYS, eos_token_id=eos, pad_token_id=0)
    expected, got = generate(plain, **arguments), generate(fast, **arguments)
    assert not torch.equal(expected, generate(plain)), "None makes no difference here"
    assert torch.equal(got, expected)
    assert not fastgen.explain(fast).fallbacks


def test_none_switches_the_models_stop_strings_off(two_llamas):
    plain, fast = two_llamas
    tokenizer = AutoTokenizer.from_pretrained(demo_model_dir())
    greedy = {"do_sample": False, "max_new_tokens": 24, "tokenizer": tokenizer}
    for model in two_llamas:
        model.generation_config = GenerationConfig(pad_token_id=0)
    whole = generate(plain, **greedy)
    words = [tokenizer.decode([token]) for token in whole[0, IDS.shape[1] :].tolist()]
    stop = next(word for word in words if word.isascii())
    for model in two_llamas:
        model.generation_config.stop_strings = [stop]
    assert generate(fast, **greedy).shape[1] < whole.shape[1]
    assert torch.equal(generate(fast, **greedy, stop_strings=None), whole)


def test_no_bos_token_for_no_input_raises_as_transformers_does(two_llamas):
    for model in two_llamas:
        with pytest.raises(ValueError, match="bos_token_id"):
            model.generate(max_new_tokens=4, bos_token_id=None)
