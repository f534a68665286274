"""Fixtures shared by all tests. Nothing here needs a network or a GPU."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from tiny_models import tiny_model

import fastgen

torch.set_num_threads(min(2, torch.get_num_threads()))

# What a test of the engine or of generate() runs on; tests/test_families.py is about all families.
PAIR = ("llama", "qwen2")


@pytest.fixture(params=PAIR)
def family(request) -> str:
    return request.param


@pytest.fixture
def model(family):
    """A fresh tiny random fp32 model."""
    return tiny_model(family)


@pytest.fixture
def optimized(model):
    """The same, optimised with NaN in every freed block; restored afterwards."""
    fastgen.optimize(model)
    poison(model)
    yield model
    if fastgen.api.lookup(model) is not None:
        fastgen.restore(model)


@pytest.fixture(scope="session", params=PAIR)
def pair(request):
    """Two equal models, plain and optimised, for tests that only generate."""
    plain, fast = tiny_model(request.param), tiny_model(request.param)
    fastgen.optimize(fast)
    poison(fast)
    return plain, fast


def poison(model) -> None:
    """From now on, whoever reads a freed block of this model's cache sees NaN."""
    fastgen.api.require(model).engine().poison_freed_blocks = True
