"""Models that accelerate has placed or prepared."""

import functools

import pytest
import torch
from accelerate import Accelerator, cpu_offload, dispatch_model
from accelerate.state import AcceleratorState
from following import assert_follows, small_model, tokens_of
from tiny_models import prompts
from transformers import AutoModelForCausalLM

import fastgen

pytestmark = pytest.mark.usefixtures("graphs_of_the_session")
ROW = prompts(9)[0]


@pytest.fixture(autouse=True)
def fresh_state():
    """accelerate keeps the settings of the first Accelerator of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_device_map_on_one_device(tmp_path):
    small_model().save_pretrained(tmp_path)
    for device_map in ("auto", {"": "cpu"}):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map)
        model.generation_config.eos_token_id = None
        fastgen.optimize(model)
        assert_follows(model)


def test_hooks_that_only_place_on_one_device():
    model = dispatch_model(small_model(), {"": "cpu"}, force_hooks=True)
    assert hasattr(model, "_hf_hook")
    fastgen.optimize(model)
    assert_follows(model)


def test_a_forward_put_over_accelerates_is_seen():
    model = dispatch_model(small_model(), {"": "cpu"}, force_hooks=True)
    fastgen.optimize(model)
    tokens_of(model, ROW, 2)
    placed = model.forward
    model.forward = functools.wraps(placed)(lambda *args, **kwargs: placed(*args, **kwargs))
    tokens_of(model, ROW, 2)
    reasons = list(fastgen.api.require(model).fallbacks)
    assert any("forwards" in reason for reason in reasons), reasons


def test_offloaded_models_are_refused_by_name():
    model = cpu_offload(small_model(), execution_device=torch.device("cpu"))
    with pytest.raises(fastgen.UnsupportedModelError, match="meta device"):
        fastgen.optimize(model)


@pytest.mark.parametrize("prepare_first", [True, False], ids=["prepared", "optimised"])
def test_prepare_and_train(prepare_first):
    accelerator, model = Accelerator(cpu=True), small_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    if not prepare_first:
        fastgen.optimize(model)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    fastgen.optimize(prepared)
    before, ids = assert_follows(prepared), torch.tensor([ROW])
    accelerator.backward(prepared(input_ids=ids, labels=ids).loss)
    optimizer.step()
    assert assert_follows(prepared) != before
    assert fastgen.api.require(prepared).weight_epoch == 1
    unwrapped = accelerator.unwrap_model(prepared)
    assert fastgen.api.lookup(unwrapped) is fastgen.api.lookup(prepared)


def test_mixed_precision_runs_under_autocast_and_is_refused_by_name():
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare(small_model())
    with pytest.raises(
        fastgen.UnsupportedModelError, match="replaced forwards on LlamaForCausalLM"
    ):
        fastgen.optimize(prepared)


def test_mixed_precision_after_optimize_runs_transformers_loop():
    model = fastgen.optimize(small_model())
    tokens_of(model, ROW, 2)
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    tokens_of(prepared, ROW, 2)
    assert any("forward" in reason for reason in fastgen.api.require(prepared).fallbacks)
