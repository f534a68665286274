"""What Config and SamplingParams accept, and how they refuse the rest."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle

import numpy as np
import pytest

from fastgen.config import SEED_MAX, Config, SamplingParams, check_float, check_int
from fastgen.errors import FastgenError, InvalidRequestError

# In no field of either class is one of these a number.
NOT_NUMBERS = [
    True,
    False,
    "1",
    "",
    b"1",
    [1],
    (1,),
    {1},
    object(),
    1j,
    math.nan,
    math.inf,
    -math.inf,
]
NOT_INTS = [*NOT_NUMBERS, 1.0, 1.5, np.float64(1.0)]
HUGE = [2**31, 2**63, 10**400]


def value_id(value: object) -> str:
    text = repr(value)
    if "object at" in text:
        return "object"
    return text if len(text) < 30 else f"{text[:5]}..({len(text)} digits)"


def cases(table: dict[str, list]) -> list:
    return [
        pytest.param(name, value, id=f"{name}={value_id(value)}")
        for name, values in table.items()
        for value in values
    ]


def check_refused(cls, table: dict[str, list], error: type[Exception]) -> None:
    """Every value is refused with `error`, naming the field."""
    for name, values in table.items():
        for value in values:
            with pytest.raises(error, match=name):
                cls(**{name: value})


# Config.

CONFIG_GOOD = {
    "max_num_seqs": [1, 2, 256, 1 << 16],
    "max_num_batched_tokens": [1, 2048, 1 << 20],
    "max_model_len": [None, 1, 4096, 2**31 - 1],
    "block_size": [16, 32, 64],
    "kv_cache_memory_bytes": [None, 1, 2**31, 2**40, 1 << 50],
    "weight_check": ["sampled", "full", "manual"],
    "passes_off": [(), ("merge_linears",), ["a", "b"]],
}
CONFIG_BAD = {
    "max_num_seqs": [0, -1, (1 << 16) + 1, *HUGE, None, *NOT_INTS],
    "max_num_batched_tokens": [0, -1, (1 << 20) + 1, *HUGE, None, *NOT_INTS],
    "max_model_len": [0, -1, *HUGE, *NOT_INTS],
    "block_size": [0, 1, 8, 15, 17, 48, 128, -16, *HUGE, None, 16.0, 64.0, "16", *NOT_INTS],
    "kv_cache_memory_bytes": [0, -1, (1 << 50) + 1, 2**63, 10**400, *NOT_INTS],
    "weight_check": ["", "Sampled", "never", None, True, 1],
    "passes_off": ["merge_linears", ""],
}


@pytest.mark.parametrize(("name", "value"), cases(CONFIG_GOOD))
def test_config_accepts(name, value):
    expected = tuple(value) if name == "passes_off" else value
    assert getattr(Config(**{name: value}), name) == expected


@pytest.mark.parametrize(("name", "value"), cases(CONFIG_BAD))
def test_config_refuses(name, value):
    check_refused(Config, {name: [value]}, ValueError)


@pytest.mark.parametrize("value", [None, 5, 1.5])
def test_passes_off_must_be_a_sequence(value):
    with pytest.raises((TypeError, ValueError)):
        Config(passes_off=value)


def test_config_defaults():
    assert dataclasses.asdict(Config()) == {
        "max_num_seqs": 256,
        "max_num_batched_tokens": 2048,
        "max_model_len": None,
        "block_size": 16,
        "kv_cache_memory_bytes": None,
        "weight_check": "sampled",
        "passes_off": (),
    }


def test_config_message_says_what_must_hold_and_what_was_given():
    with pytest.raises(ValueError, match="max_num_seqs must be between 1 and 65536, got 0"):
        Config(max_num_seqs=0)
    with pytest.raises(ValueError, match=r"max_num_seqs must be an int, got '8' \(str\)"):
        Config(max_num_seqs="8")  # pyright: ignore
    with pytest.raises(ValueError, match="block_size must be 16, 32 or 64, got 20"):
        Config(block_size=20)


@pytest.mark.parametrize("make", [Config, lambda **f: Config().replace(**f), SamplingParams])
def test_unknown_fields_raise(make):
    with pytest.raises(TypeError, match="max_num_sequences"):
        make(max_num_sequences=8)


def test_config_replace_names_the_fields_there_are():
    with pytest.raises(TypeError, match=r"no field 'blocksize'.*block_size"):
        Config().replace(blocksize=16)


def test_config_replace_changes_a_copy_and_checks_it():
    config = Config(max_num_seqs=3)
    assert config.replace(block_size=32) == Config(max_num_seqs=3, block_size=32)
    assert config.replace() == config
    assert config.block_size == 16
    with pytest.raises(ValueError, match="block_size"):
        config.replace(block_size=20)


# SamplingParams.

SAMPLING_GOOD = {
    "max_tokens": [1, 16, 2**31 - 1],
    "temperature": [0, 0.0, -0.0, 5e-324, 0.7, 1, 2, 1e6],
    "top_k": [0, 1, 50, 2**31 - 1],
    "top_p": [5e-324, 0.5, 1.0, 1],
    "seed": [None, 0, 1, 2**31, 2**63 - 1],
    "stop_token_ids": [(), [], [0], [5, 5], {1, 2}, frozenset([3]), (2**31 - 1,)],
    "ignore_eos": [True, False],
}
SAMPLING_BAD = {
    "max_tokens": [0, -1, *HUGE, None, *NOT_INTS],
    "temperature": [-1, -1e-9, 1e6 + 1, *HUGE, -(10**400), None, *NOT_NUMBERS],
    "top_k": [-1, *HUGE, None, *NOT_INTS],
    "top_p": [0, 0.0, -0.0, -0.1, 1.0000001, 2, *HUGE, None, *NOT_NUMBERS],
    "seed": [-1, 2**63, 2**64, 10**400, *NOT_INTS],
    "stop_token_ids": [
        None,
        5,
        "ab",
        b"ab",
        {1: 2},
        range(3),
        [-1],
        [2**31],
        [1.0],
        [True],
        ["a"],
        [None],
        [[1]],
    ],
    "ignore_eos": [0, 1, "yes", None, 1.0],
}


@pytest.mark.parametrize(("name", "value"), cases(SAMPLING_GOOD))
def test_sampling_accepts(name, value):
    expected = tuple(value) if name == "stop_token_ids" else value
    assert getattr(SamplingParams(**{name: value}), name) == expected


@pytest.mark.parametrize(("name", "value"), cases(SAMPLING_BAD))
def test_sampling_refuses(name, value):
    check_refused(SamplingParams, {name: [value]}, InvalidRequestError)


def test_invalid_request_error_is_a_value_error_and_ours():
    assert issubclass(InvalidRequestError, ValueError)
    assert issubclass(InvalidRequestError, FastgenError)


def test_sampling_defaults_are_vllms():
    assert dataclasses.asdict(SamplingParams()) == {
        "max_tokens": 16,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "seed": None,
        "stop_token_ids": (),
        "ignore_eos": False,
    }


def test_zero_top_p_names_the_way_to_greedy():
    with pytest.raises(InvalidRequestError, match="temperature=0"):
        SamplingParams(top_p=0)


@pytest.mark.parametrize(
    ("temperature", "greedy"), [(0, True), (0.0, True), (-0.0, True), (1e-9, False), (1, False)]
)
def test_greedy(temperature, greedy):
    assert SamplingParams(temperature=temperature).greedy is greedy


# Both.


@pytest.mark.parametrize("value", [Config(), SamplingParams()], ids=["Config", "SamplingParams"])
def test_frozen_hashable_and_copied_by_value(value):
    for field in dataclasses.fields(value):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, field.name, getattr(value, field.name))
    with pytest.raises((AttributeError, TypeError)):
        value.new_field = 1
    assert hash(value) == hash(type(value)())
    assert pickle.loads(pickle.dumps(value)) == copy.deepcopy(value) == value


def test_a_list_that_was_given_is_not_kept():
    stops = [1, 2]
    params = SamplingParams(stop_token_ids=stops)  # pyright: ignore
    stops.append(-1)
    assert params.stop_token_ids == (1, 2)


def test_check_int_and_check_float_take_their_limits():
    check_int("n", 3, 3, 3)
    check_float("x", 3.0, 3, 3)
    for value in (2, 4):
        with pytest.raises(ValueError, match="n must be between 3 and 3"):
            check_int("n", value, 3, 3)
        with pytest.raises(ValueError, match="x must be a finite number between 3 and 3"):
            check_float("x", value, 3, 3)


def test_seed_limit_is_what_a_torch_generator_takes():
    import torch

    torch.Generator().manual_seed(SEED_MAX)


# Planted mistakes.


@dataclasses.dataclass(frozen=True)
class AcceptsBools:
    max_tokens: int = 16

    def __post_init__(self):
        if not isinstance(self.max_tokens, int) or not 1 <= self.max_tokens < 2**31:
            raise InvalidRequestError(f"max_tokens {self.max_tokens}")


@dataclasses.dataclass(frozen=True)
class AcceptsLimitPlusOne:
    max_tokens: int = 16

    def __post_init__(self):
        check_int("max_tokens", self.max_tokens, 1, 2**31, InvalidRequestError)


@pytest.mark.parametrize("broken", [AcceptsBools, AcceptsLimitPlusOne], ids=lambda c: c.__name__)
def test_planted_mistake_is_found(broken):
    table = {"max_tokens": SAMPLING_BAD["max_tokens"]}
    check_refused(SamplingParams, table, InvalidRequestError)
    with pytest.raises(pytest.fail.Exception):
        check_refused(broken, table, InvalidRequestError)
