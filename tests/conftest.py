"""Fixtures shared by all tests. Nothing here needs a network or a GPU."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from tiny_models import FAMILIES, tiny_model

import fastgen

torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(params=sorted(FAMILIES))
def family(request) -> str:
    return request.param


@pytest.fixture
def model(family):
    """A fresh tiny random fp32 model of each family."""
    return tiny_model(family)


@pytest.fixture
def optimized(model):
    """The same, optimised with NaN in every freed block; restored afterwards."""
    fastgen.optimize(model)
    poison(model)
    yield model
    if fastgen.api.lookup(model) is not None:
        fastgen.restore(model)


@pytest.fixture(scope="session", params=sorted(FAMILIES))
def pair(request):
    """Two equal models of each family, plain and optimised, for tests that only generate."""
    plain, fast = tiny_model(request.param), tiny_model(request.param)
    fastgen.optimize(fast)
    poison(fast)
    return plain, fast


def poison(model) -> None:
    """From now on, whoever reads a freed block of this model's cache sees NaN."""
    fastgen.api.require(model).engine().poison_freed_blocks = True
