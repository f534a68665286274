"""Calls of generate() with hostile processors, criteria, streamers and inputs, beside good requests
of an engine over the same model: those have their tokens, and the call what transformers gives."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine_helpers import (  # noqa: F401 - the fixtures are used by name
    Boom,
    expected_fixture,
    gated_fixture,
    make_engine_fixture,
    model_fixture,
)
from neighbours import (  # noqa: F401 - the fixtures are used by name
    alone_fixture,
    make_neighbours_fixture,
    neighbours_fixture,
)
from tiny_models import VOCAB, prompts, tiny_model
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

ROWS, NEW = 2, 12


@pytest.fixture(scope="module")
def plain():
    return tiny_model("qwen2")


@pytest.fixture
def agrees(neighbours, plain):
    """The outcome of a hostile call, the same as transformers' own."""

    def check(**arguments: Any) -> Any:
        expected = outcome(plain, **arguments)
        got = neighbours.beside(lambda engine: outcome(engine.model, **arguments))
        assert got == expected
        return got

    return check


def outcome(model: Any, sampled: bool = False, make: Callable | None = None, **arguments) -> Any:
    """Tokens, or the type of what was raised.

    make: Of arguments that are used up by a call.
    """
    torch.manual_seed(5)
    options = {"max_new_tokens": NEW, "do_sample": sampled, "pad_token_id": 0}
    ids = torch.tensor(prompts(*[7] * ROWS))
    try:
        made = make() if make is not None else {}
        return model.generate(**{"input_ids": ids, **options, **arguments, **made}).tolist()
    except Exception as error:
        return type(error)


class Processor(LogitsProcessor):
    """Changes the scores of the fifth new token and all that follow."""

    def __init__(self, change: Callable) -> None:
        self.change = change

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> Any:
        return self.change(scores) if input_ids.shape[1] > 11 else scores


def fill(value: float) -> Callable:
    return lambda scores: torch.full_like(scores, value)


def fill_in_place(scores):
    return scores.fill_(float("nan"))


def one_nan(scores):
    scores[0, 5] = float("nan")
    return scores


def wider(scores):
    """A token that the model has not is the best."""
    return torch.cat([scores, scores.amax(dim=1, keepdim=True) + 9], dim=1)


def raises(scores):
    raise Boom("mine")


CHANGES = {
    "nan": fill(float("nan")),
    "nan-in-place": fill_in_place,
    "one-nan": one_nan,
    "inf": fill(float("inf")),
    "minus-inf": fill(float("-inf")),
    "raises": raises,
    "none": lambda scores: None,
    "str": lambda scores: "scores",
    "list": lambda scores: scores.tolist(),
    "narrower": lambda scores: scores[:, :5],
    "wider": wider,
    "empty": lambda scores: scores[:, :0],
    "one-row": lambda scores: scores[:1],
    "more-rows": lambda scores: torch.cat([scores, scores]),
    "flat": lambda scores: scores.flatten(),
    "deeper": lambda scores: scores[None],
    "integers": lambda scores: scores.long(),
    "half": lambda scores: scores.half(),
    "meta": lambda scores: scores.to("meta"),
}


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_processor(agrees, name, sampled):
    agrees(sampled=sampled, make=lambda: {"logits_processor": [Processor(CHANGES[name])]})


@pytest.mark.parametrize("name", CHANGES)
def test_a_processor_of_beams(agrees, name):
    agrees(num_beams=3, make=lambda: {"logits_processor": [Processor(CHANGES[name])]})


def test_a_processor_that_changes_the_history(agrees):
    class Rewrites(LogitsProcessor):
        def __call__(self, input_ids, scores):
            input_ids.fill_(10**6)
            return scores

    agrees(make=lambda: {"logits_processor": LogitsProcessorList([Rewrites()])})


class Criterion(StoppingCriteria):
    """Says something from the fifth new token on."""

    def __init__(self, say: Callable) -> None:
        self.say = say

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> Any:
        if input_ids.shape[1] > 11:
            return self.say(input_ids)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


SAYINGS = {
    "raises": raises,
    "none": lambda ids: None,
    "true": lambda ids: True,
    "str": lambda ids: "stop",
    "int": lambda ids: 1,
    "float-tensor": lambda ids: torch.ones(len(ids)),
    "one-row": lambda ids: torch.ones(1, dtype=torch.bool),
    "more-rows": lambda ids: torch.ones(5, dtype=torch.bool),
    "deeper": lambda ids: torch.ones(2, 2, dtype=torch.bool),
    "empty": lambda ids: torch.ones(0, dtype=torch.bool),
    "integers": lambda ids: torch.tensor([3, 0]),
}


@pytest.mark.parametrize("name", SAYINGS)
def test_a_criterion(agrees, name):
    criteria = StoppingCriteriaList([Criterion(SAYINGS[name])])
    agrees(make=lambda: {"stopping_criteria": criteria})


@pytest.mark.parametrize(
    "allowed",
    [[], [VOCAB], [-1], None, [1.5], "ab"],
    ids=["none", "beyond", "negative", "None", "float", "str"],
)
def test_a_function_of_allowed_tokens(agrees, allowed):
    agrees(prefix_allowed_tokens_fn=lambda row, ids: allowed if len(ids) > 10 else [1, 2, 3])


class Streamer:
    """Raises, or worse, at its fourth piece or at the end."""

    def __init__(self, where: str, act: Callable) -> None:
        self.where, self.act, self.num_pieces = where, act, 0

    def put(self, value: torch.Tensor) -> None:
        self.num_pieces += 1
        if self.where == "put" and self.num_pieces == 4:
            self.act(value)

    def end(self) -> None:
        if self.where == "end":
            self.act(None)


def rewrites(value: torch.Tensor) -> None:
    value.fill_(10**6)


STREAMERS = {
    "put-raises": ("put", raises),
    "end-raises": ("end", raises),
    "put-rewrites": ("put", rewrites),
}


@pytest.mark.parametrize("name", STREAMERS)
def test_a_streamer(agrees, name):
    ids = torch.tensor(prompts(7))
    agrees(make=lambda: {"input_ids": ids.clone(), "streamer": Streamer(*STREAMERS[name])})


@pytest.mark.parametrize(
    "name",
    [
        "put-raises",
        "end-raises",
        "put-rewrites",
    ],
)
def test_a_streamer_of_rows_in_lockstep(agrees, name):
    agrees(make=lambda: {"streamer": Streamer(*STREAMERS[name])})


def interrupted(model: Any, **arguments: Any) -> type:
    with pytest.raises(KeyboardInterrupt) as caught:
        model.generate(torch.tensor(prompts(7)), max_new_tokens=NEW, do_sample=False, **arguments)
    return caught.type


def interrupt(_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("place", ["streamer", "processor", "criterion"])
def test_interrupted(neighbours, place):
    arguments = {
        "streamer": {"streamer": Streamer("put", interrupt)},
        "processor": {"logits_processor": [Processor(interrupt)]},
        "criterion": {"stopping_criteria": [Criterion(interrupt)]},
    }[place]
    neighbours.beside(lambda engine: interrupted(engine.model, **arguments))


INPUTS = {
    "id-beyond": {"input_ids": torch.tensor([[1, 2, VOCAB]])},
    "id-negative": {"input_ids": torch.tensor([[1, 2, -1]])},
    "id-hidden-beyond": {
        "input_ids": torch.tensor([[VOCAB, 1, 2]]),
        "attention_mask": torch.tensor([[0, 1, 1]]),
    },
    "id-asked-beyond": {
        "input_ids": torch.tensor([[1, 2, VOCAB]]),
        "attention_mask": torch.tensor([[1, 1, 0]]),
    },
    "id-asked-negative": {
        "input_ids": torch.tensor([[1, 2, -1]]),
        "attention_mask": torch.tensor([[1, 1, 0]]),
    },
    "float-ids": {"input_ids": torch.tensor([[1.0, 2.0]])},
    "no-rows": {"input_ids": torch.zeros(0, 3, dtype=torch.long)},
    "no-tokens": {"input_ids": torch.zeros(1, 0, dtype=torch.long)},
    "mask-of-another-shape": {
        "input_ids": torch.tensor([[1, 2, 3]]),
        "attention_mask": torch.ones(1, 9, dtype=torch.long),
    },
    "no-new-tokens": {"input_ids": torch.tensor([[1, 2]]), "max_new_tokens": 0},
    "new-tokens-negative": {"input_ids": torch.tensor([[1, 2]]), "max_new_tokens": -3},
    "end-token-beyond": {"input_ids": torch.tensor([[1, 2]]), "eos_token_id": 10**9},
    "bad-word-beyond": {"input_ids": torch.tensor([[1, 2]]), "bad_words_ids": [[10**9]]},
    "temperature-nan": {
        "input_ids": torch.tensor([[1, 2]]),
        "sampled": True,
        "temperature": float("nan"),
    },
    "beams-0": {"input_ids": torch.tensor([[1, 2]]), "num_beams": 0},
}


@pytest.mark.parametrize("name", INPUTS)
def test_an_input(agrees, name):
    agrees(**INPUTS[name])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_embeddings_that_are_no_numbers(neighbours, plain, value):
    """Keys and values of NaN are in blocks that nobody else may see, and that are used again."""
    embeds = torch.full((1, 20, 64), value)
    arguments = {"input_ids": None, "inputs_embeds": embeds}
    neighbours.beside(lambda engine: outcome(engine.model, **arguments))


def test_a_planted_exchange_is_seen(neighbours, monkeypatch):
    """A processor that could reach another's request would be found."""
    request_of = neighbours.engine.submit

    def call(engine):
        good = neighbours._requests[0]
        good.output_token_ids[-1] ^= 1
        request_of([1], None)

    with pytest.raises(AssertionError, match="a neighbour was heard"):
        neighbours.beside(call)
    with contextlib.suppress(AssertionError):
        neighbours.finish()
