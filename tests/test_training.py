"""Training and generating in turns: bit-equal to the same training without fastgen."""

import copy

import pytest
import torch
from following import assert_follows, small_model, tokens_of
from tiny_models import NativeTokens, prompts

import fastgen

pytestmark = pytest.mark.usefixtures("graphs_of_the_session")
BATCH = torch.tensor(prompts(12, 12, seed=5))
ROW = prompts(9)[0]
OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    "adamw-fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True),
    "sgd-momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
}


def loss_of(model):
    return model(input_ids=BATCH, labels=BATCH).loss


def assert_same(model, reference):
    pairs = zip(model.named_parameters(), reference.named_parameters(), strict=True)
    for (name, a), (_, b) in pairs:
        assert torch.equal(a, b), name
        assert (a.grad is None) == (b.grad is None), name
        assert a.grad is None or torch.equal(a.grad, b.grad), name


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("accumulated", [1, 2], ids=["every-batch", "accumulated"])
def test_generate_and_train_in_turns(make, accumulated):
    model, reference = small_model(), small_model()
    fastgen.optimize(model)
    optimizers = [make(model.parameters()), make(reference.parameters())]
    model.train()
    reference.train()
    seen = []
    for _ in range(5):
        with NativeTokens(model):
            seen.append(tuple(tokens_of(model, ROW, 6)))
        assert model.training
        assert all(module.training for module in model.modules())
        for each in (model, reference):
            for _ in range(accumulated):
                (loss_of(each) / accumulated).backward()
        assert_same(model, reference)
        for optimizer in optimizers:
            optimizer.step()
        assert_same(model, reference)
        for optimizer in optimizers:
            optimizer.zero_grad()
    assert len(set(seen)) > 2, "training shows nothing"
    assert fastgen.api.require(model).weight_epoch == 4
    assert_follows(model.eval())
    assert len(fastgen.api.require(model)._graphs) == 1


def test_forward_and_backward_are_eager_ones_while_optimised(family):
    """I10."""
    model = small_model(family)
    reference = copy.deepcopy(model)
    fastgen.optimize(model)
    for _ in range(2):
        outputs = [loss_of(each) for each in (model, reference)]
        assert torch.equal(*outputs)
        for loss in outputs:
            loss.backward()
        assert_same(model, reference)
        tokens_of(model, ROW, 3)


def test_generate_leaves_gradients_that_wait_for_a_step():
    model, reference = small_model(), small_model()
    fastgen.optimize(model)
    for each in (model, reference):
        loss_of(each).backward()
    tokens_of(model, ROW, 3)
    loss_of(model).backward()
    loss_of(reference).backward()
    assert_same(model, reference)


def test_frozen_parts_stay_frozen():
    model, reference = small_model(), small_model()
    for each in (model, reference):
        each.model.layers[0].self_attn.k_proj.requires_grad_(False)
    fastgen.optimize(model)
    for each in (model, reference):
        optimizer = torch.optim.AdamW([p for p in each.parameters() if p.requires_grad], lr=0.01)
        loss_of(each).backward()
        optimizer.step()
    assert_same(model, reference)
    assert_follows(model)


def test_an_optimizer_made_before_optimize_goes_on():
    """Its state belongs to the parameters, which stay the same objects."""
    model, reference = small_model(), small_model()
    optimizers = [torch.optim.AdamW(each.parameters(), lr=0.01) for each in (model, reference)]
    for turn in range(3):
        if turn == 1:
            fastgen.optimize(model)
        if turn == 2:
            fastgen.restore(model)
        for each, optimizer in zip((model, reference), optimizers, strict=True):
            loss_of(each).backward()
            optimizer.step()
        assert_same(model, reference)


def test_gradient_checkpointing():
    """It hangs a hook on the embedding that changes no value, and is no reason to go slow."""
    model, reference = small_model(), small_model()
    model.gradient_checkpointing_enable()
    fastgen.optimize(model)
    before = assert_follows(model)
    reference.gradient_checkpointing_enable()
    for each in (model, reference):
        each.train()
        optimizer = torch.optim.AdamW(each.parameters(), lr=0.05)
        loss_of(each).backward()
        optimizer.step()
        each.eval()
    assert_same(model, reference)
    assert assert_follows(model) != before
    model.gradient_checkpointing_disable()
    assert_follows(model)
    model.gradient_checkpointing_enable()
    assert_follows(model)
    assert len(fastgen.api.require(model)._graphs) == 1
    assert model.model.embed_tokens._forward_hooks, "the hook is the user's and must stay"
