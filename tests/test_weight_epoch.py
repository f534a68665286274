"""I14: every way to change a weight changes the next tokens, and begins a new weight epoch."""

import copy
import gc
import threading

import pytest
import torch
from following import assert_follows, epoch_of, small_model, tokens_of
from test_saving import tied_model
from tiny_models import prompts
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks

import fastgen
from fastgen.engine.token_reader import TokenReader

pytestmark = pytest.mark.usefixtures("graphs_of_the_session")
ROW = prompts(9)[0]
IDS = torch.tensor([ROW])


def step(model, optimizer_class=torch.optim.AdamW, **options):
    optimizer = optimizer_class(model.parameters(), **{"lr": 0.1, **options})
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def up_proj(model):
    return model.model.layers[0].mlp.up_proj


def query(model):
    return model.model.layers[0].self_attn.q_proj


def noise_like(tensor):
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)).to(tensor)


def other_state():
    return {name: noise_like(tensor) for name, tensor in small_model().state_dict().items()}


def copy_into_data(model):
    query(model).weight.data.copy_(noise_like(query(model).weight))


def set_data(model):
    query(model).weight.data = noise_like(query(model).weight)


def in_place(model, mode=torch.no_grad):
    with mode():
        up_proj(model).weight.mul_(-1)
        model.model.embed_tokens.weight.mul_(-1)


def through_numpy(model):
    up_proj(model).weight.detach().numpy()[:] *= -1


def assign(model):
    model.load_state_dict(other_state(), assign=True)


def replace_parameter(model):
    up_proj(model).weight = nn.Parameter(noise_like(up_proj(model).weight))


def replace_module(model):
    fresh = nn.Linear(64, 96, bias=False)
    fresh.weight.data = noise_like(fresh.weight)
    model.model.layers[0].mlp.up_proj = fresh


def swap_modules(model):
    mlp = model.model.layers[0].mlp
    mlp.up_proj, mlp.gate_proj = mlp.gate_proj, mlp.up_proj


def through_bfloat16(model):
    model.to(torch.bfloat16)
    model.to(torch.float32)
    copy_into_data(model)


def resize(model):
    torch.manual_seed(3)
    model.resize_token_embeddings(160)
    copy_into_data(model)


def tie(model):
    model.lm_head.weight = model.model.embed_tokens.weight


def share_memory(model):
    """Not a tie: two parameters over the same storage."""
    layer = model.model.layers[0].self_attn
    layer.k_proj.weight.data = layer.v_proj.weight.data


CHANGES = {
    "adamw": step,
    "adamw-plain": lambda model: step(model, foreach=False),
    "adamw-foreach": lambda model: step(model, foreach=True),
    "adamw-fused": lambda model: step(model, fused=True),
    "sgd": lambda model: step(model, torch.optim.SGD),
    "data-copy": copy_into_data,
    "data": set_data,
    "no-grad": in_place,
    "inference-mode": lambda model: in_place(model, torch.inference_mode),
    "numpy": through_numpy,
    "load-state-dict": lambda model: model.load_state_dict(other_state()),
    "assign": assign,
    "parameter": replace_parameter,
    "module": replace_module,
    "swap": swap_modules,
    "to-and-back": through_bfloat16,
    "resize": resize,
    "tie": tie,
    "share-memory": share_memory,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_followed(change):
    model = fastgen.optimize(small_model())
    before, epoch = assert_follows(model), epoch_of(model)
    assert assert_follows(model) == before
    assert epoch_of(model) == epoch, "an epoch began without a change"
    change(model)
    assert assert_follows(model) != before, "the change shows nothing"
    began = epoch_of(model)
    assert began > epoch
    assert fastgen.api.require(model).engine().epoch == began
    assert_follows(model)
    assert epoch_of(model) == began, "an epoch began without a change"


@pytest.mark.parametrize("change", [in_place, set_data, step], ids=["in-place", "data", "step"])
def test_a_second_change_is_followed_too(change):
    model = fastgen.optimize(small_model("qwen2"))
    seen = [assert_follows(model)]
    for _ in range(2):
        change(model)
        seen.append(assert_follows(model))
    assert epoch_of(model) == 2
    assert seen[1] != seen[0]


def test_untied_by_hand():
    model = fastgen.optimize(tied_model())
    before, epoch = assert_follows(model), epoch_of(model)
    model.lm_head.weight = nn.Parameter(noise_like(model.lm_head.weight))
    assert assert_follows(model) != before
    assert epoch_of(model) > epoch


def test_tied_weights_change_together():
    model = fastgen.optimize(tied_model())
    before = assert_follows(model)
    with torch.inference_mode():
        model.lm_head.weight.mul_(-1)
    assert assert_follows(model) != before
    assert epoch_of(model) == 1


def test_weights_made_under_inference_mode():
    """They have no version: only the checksum sees a change in place."""
    with torch.inference_mode():
        model = small_model()
    assert model.lm_head.weight.is_inference()
    fastgen.optimize(model)
    before = assert_follows(model)
    assert "was made under inference_mode" in str(fastgen.explain(model))
    with torch.inference_mode():
        in_place(model)
    assert assert_follows(model) != before
    assert epoch_of(model) == 1


# How changes are found.

UNSEEN = {"data-copy": copy_into_data, "numpy": through_numpy}


@pytest.mark.parametrize("change", UNSEEN.values(), ids=UNSEEN)
def test_manual_looks_at_no_values_until_it_is_told(change):
    model = fastgen.optimize(small_model(), weight_check="manual")
    assert_follows(model)
    change(model)
    assert_follows(model)
    assert epoch_of(model) == 0
    fastgen.weights_changed(model)
    assert_follows(model)
    assert_follows(model)
    assert epoch_of(model) == 1


def test_full_sees_what_sampled_passes_over():
    """One number in the middle of a page."""
    epochs = {}
    for check in ("sampled", "full"):
        model = fastgen.optimize(small_model(), weight_check=check)
        tokens_of(model, ROW, 2)
        query(model).weight.data.view(-1)[500] += 1
        tokens_of(model, ROW, 2)
        epochs[check] = epoch_of(model)
    assert epochs == {"sampled": 0, "full": 1}


def test_values_are_not_read_while_requests_run(monkeypatch):
    model = fastgen.optimize(small_model())
    tokens_of(model, ROW, 2)
    optimized, looked = fastgen.api.require(model), []
    check = optimized.weights.check
    monkeypatch.setattr(
        optimized.weights, "check", lambda look_at_values: looked.append(look_at_values) or check()
    )
    engine = fastgen.Engine(model)
    long = engine.submit(ROW, fastgen.SamplingParams(max_tokens=400, temperature=0.0))
    next(iter(TokenReader([long])))
    engine.submit(ROW, fastgen.SamplingParams(max_tokens=2, temperature=0.0))
    engine.cancel(long)
    optimized.engine().wait_idle()
    engine.submit(ROW, fastgen.SamplingParams(max_tokens=2, temperature=0.0))
    assert looked == [True, False, True]


def test_the_step_of_an_optimizer_over_these_weights_is_noticed_by_itself():
    """A fused step leaves torch's versions as they were, and "manual" looks at no values."""
    model, other = fastgen.optimize(small_model(), weight_check="manual"), small_model()
    tokens_of(model, ROW, 2)
    step(other, fused=True)
    tokens_of(model, ROW, 2)
    assert epoch_of(model) == 0
    versions = [parameter._version for parameter in model.parameters()]
    step(model, fused=True)
    assert [parameter._version for parameter in model.parameters()] == versions
    tokens_of(model, ROW, 2)
    assert epoch_of(model) == 1


def test_parameters_that_come_to_share_memory_go_on_sharing_it():
    model = fastgen.optimize(small_model())
    assert_follows(model)
    share_memory(model)
    assert_follows(model)
    assert "shares its memory" in str(fastgen.explain(model))
    attention = model.model.layers[0].self_attn
    attention.v_proj.weight.data.fill_(2.0)
    assert torch.equal(attention.k_proj.weight, torch.full((32, 64), 2.0))


def test_optimizers_are_watched_only_while_a_model_is_optimised():
    gc.collect()
    watched = len(_global_optimizer_post_hooks)
    others = list(fastgen.registry._optimized.values())
    model = fastgen.optimize(small_model())
    if not others:
        assert len(_global_optimizer_post_hooks) == watched + 1
    fastgen.restore(model)
    assert len(_global_optimizer_post_hooks) == watched
    fastgen.optimize(model)
    del model
    gc.collect()
    assert len(_global_optimizer_post_hooks) == watched


def test_explain_says_what_the_check_costs():
    model = fastgen.optimize(small_model(), weight_check="full")
    tokens_of(model, ROW, 2)
    data = fastgen.explain(model).to_dict()
    assert data["seconds"]["weight check (full)"] > 0
    assert data["config"]["weight_check"] == "full"


def test_a_bad_weight_check_is_named():
    with pytest.raises(ValueError, match="weight_check must be one of sampled, full, manual"):
        fastgen.Config(weight_check="never")


def test_threads_that_enter_together_begin_one_epoch():
    model = fastgen.optimize(small_model())
    tokens_of(model, ROW, 2)
    in_place(model)
    expected = tokens_of(copy.deepcopy(model), ROW, 6)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(tokens_of(model, ROW, 6))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert found == [expected] * 4
    assert epoch_of(model) == 1
