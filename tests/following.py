"""Whether an optimised model follows what its user does to it."""

import copy

import torch
from tiny_models import NativeTokens, greedy_alone, tiny_model

import fastgen


def small_model(family: str = "llama"):
    """A tiny model of one layer, for tests that capture many times."""
    model = tiny_model(family)
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    return model


def tokens_of(model, row: list[int], num_tokens: int) -> list[int]:
    out = model.generate(torch.tensor([row]), max_new_tokens=num_tokens, do_sample=False)
    return out[0, len(row) :].tolist()


def assert_follows(model, num_tokens: int = 8) -> list[list[int]]:
    """The engine makes the tokens that transformers makes with a copy of the model as it is now.

    Returns: the tokens, for prompts of 9 and 20 tokens.
    """
    reference = copy.deepcopy(model)
    assert fastgen.api.lookup(reference) is None
    rows, expected = greedy_alone(reference, 9, 20, num_tokens=num_tokens)
    with NativeTokens(model):
        assert [tokens_of(model, row, num_tokens) for row in rows] == expected
    return expected


def epoch_of(model) -> int:
    return fastgen.api.require(model).weight_epoch
