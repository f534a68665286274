"""How a GPU's memory is divided, against sums by hand."""

from __future__ import annotations

import pytest
from engine_helpers import core_of, engine_fixture, make_engine_fixture, model_fixture  # noqa: F401

from fastgen.engine.decode_graphs import table_bytes
from fastgen.engine.memory_plan import GpuMemory, plan_memory
from fastgen.errors import CapacityError

GIB = 2**30


@pytest.fixture
def compiled(engine):
    return core_of(engine).compiled


def test_the_cache_gets_the_rest(compiled):
    plan = plan_memory(GpuMemory(80 * GIB, 60 * GIB), compiled, 0.75, 512, (1, 4), 32)
    assert plan.left_alone == 20 * GIB
    assert plan.activations == compiled.activation_bytes(512, 4)
    vocab_bytes = compiled.vocab_size * 4
    assert plan.captures == compiled.activation_bytes(4, 4) + 5 * vocab_bytes + table_bytes(4, 32)
    assert plan.cache == 60 * GIB - plan.left_alone - plan.activations - plan.captures


def test_activations_grow_with_tokens(compiled):
    small, large = compiled.activation_bytes(16, 4), compiled.activation_bytes(1600, 4)
    assert 50 * small < large < 101 * small
    hidden, intermediate = 64, 96
    assert large >= 1600 * (hidden + 2 * intermediate) * 4  # gate and up beside the residual


def test_nothing_is_kept_for_captures_that_are_off(compiled):
    plan = plan_memory(GpuMemory(80 * GIB, 60 * GIB), compiled, 0.9, 512, (), 32)
    assert plan.captures == 0


def test_no_room_for_a_cache(compiled):
    with pytest.raises(CapacityError, match=r"gpu_memory_utilization=0\.5 leaves no memory"):
        plan_memory(GpuMemory(80 * GIB, 30 * GIB), compiled, 0.5, 512, (1,), 32)
