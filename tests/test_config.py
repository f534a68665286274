"""What Config accepts, and how it refuses the rest. SamplingParams: test_sampling_params.py."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
from field_cases import HUGE, NOT_INTS, cases, check_refused

from fastgen.config import Config, SamplingParams, check_float, check_int

# Config.

CONFIG_GOOD = {
    "max_num_seqs": [1, 2, 256, 1 << 16],
    "max_num_batched_tokens": [1, 2048, 1 << 20],
    "max_model_len": [None, 1, 4096, 2**31 - 1],
    "block_size": [16, 32, 64],
    "kv_cache_memory_bytes": [None, 1, 2**31, 2**40, 1 << 50],
    "weight_check": ["sampled", "full", "manual"],
    "codegen": ["auto", "direct", "inductor"],
    "prefix_cache": [True, False],
    "graph_cache": [True, False],
    "gpu_memory_utilization": [0.01, 0.9, 1, 1.0],
    "enforce_eager": [True, False],
    "pack": ["auto", True, False],
    "passes_off": [(), ("merge_linears",), ["a", "b"]],
}
CONFIG_BAD = {
    "max_num_seqs": [0, -1, (1 << 16) + 1, *HUGE, None, *NOT_INTS],
    "max_num_batched_tokens": [0, -1, (1 << 20) + 1, *HUGE, None, *NOT_INTS],
    "max_model_len": [0, -1, *HUGE, *NOT_INTS],
    "block_size": [0, 1, 8, 15, 17, 48, 128, -16, *HUGE, None, 16.0, 64.0, "16", *NOT_INTS],
    "kv_cache_memory_bytes": [0, -1, (1 << 50) + 1, 2**63, 10**400, *NOT_INTS],
    "weight_check": ["", "Sampled", "never", None, True, 1],
    "codegen": ["", "Direct", "eager", None, True, 1],
    "prefix_cache": [None, 0, 1, 1.0, "yes", [True]],
    "graph_cache": [None, 0, 1, "yes"],
    "gpu_memory_utilization": [0, -0.5, 1.01, 90, float("nan"), None, "0.9", True],
    "enforce_eager": [None, 0, 1, "yes"],
    "pack": ["", "Auto", None, 0, 1, 1.0, [True]],
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
        "max_queue": None,
        "max_model_len": None,
        "block_size": 16,
        "kv_cache_memory_bytes": None,
        "weight_check": "sampled",
        "prefix_cache": True,
        "graph_cache": True,
        "deterministic": False,
        "watchdog_s": 60.0,
        "gpu_memory_utilization": 0.9,
        "enforce_eager": False,
        "pack": "auto",
        "release_weights": False,
        "passes_off": (),
        "codegen": "auto",
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


def test_check_int_and_check_float_take_their_limits():
    check_int("n", 3, 3, 3)
    check_float("x", 3.0, 3, 3)
    for value in (2, 4):
        with pytest.raises(ValueError, match="n must be between 3 and 3"):
            check_int("n", value, 3, 3)
        with pytest.raises(ValueError, match="x must be a finite number between 3 and 3"):
            check_float("x", value, 3, 3)


# Planted mistakes.


@dataclasses.dataclass(frozen=True)
class AcceptsBools:
    max_num_seqs: int = 256

    def __post_init__(self):
        if not isinstance(self.max_num_seqs, int) or not 1 <= self.max_num_seqs <= 1 << 16:
            raise ValueError(f"max_num_seqs {self.max_num_seqs}")


@dataclasses.dataclass(frozen=True)
class AcceptsLimitPlusOne:
    max_num_seqs: int = 256

    def __post_init__(self):
        check_int("max_num_seqs", self.max_num_seqs, 1, (1 << 16) + 1)


@pytest.mark.parametrize("broken", [AcceptsBools, AcceptsLimitPlusOne], ids=lambda c: c.__name__)
def test_planted_mistake_is_found(broken):
    table = {"max_num_seqs": CONFIG_BAD["max_num_seqs"]}
    check_refused(Config, table, ValueError)
    with pytest.raises(pytest.fail.Exception):
        check_refused(broken, table, ValueError)
