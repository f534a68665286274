"""Packed copies of live weights: they follow every change, in the memory they have."""

from __future__ import annotations

import copy

import pytest
import torch
from fastgen.kernels.packing import pack, packed_bytes, unpack, why_not_packed, why_not_tiles
from following import epoch_of, tokens_of
from tiny_models import NativeTokens, prompts, tiny_model
from torch import nn

import fastgen

BF16 = torch.bfloat16
pytestmark = pytest.mark.skipif(
    (reason := why_not_packed(torch.empty(1, 32, dtype=BF16))) is not None,
    reason=f"weights are not packed here: {reason}",
)
TILES = why_not_tiles(torch.empty(1, 32, dtype=BF16)) is None
needs_tiles = pytest.mark.skipif(not TILES, reason="there is no layout of our own here")
ROW = prompts(9)[0]


def small_model(family: str = "qwen2", **fields):
    return tiny_model(family, dtype=BF16, num_hidden_layers=1, **fields)


def packed_inputs(model) -> dict:
    """What the compiled graph really reads: a packed tensor for each of its packed inputs."""
    compiled = fastgen.api.require(model).compiled
    inputs = zip(compiled.inputs.values(), compiled._arguments, strict=True)
    return {spec: tensor for spec, tensor in inputs if spec.kind == "packed"}


def addresses(model) -> dict:
    return {spec: tensor.data_ptr() for spec, tensor in packed_inputs(model).items()}


def plain_weight(model, spec) -> torch.Tensor:
    plans = {plan.name: plan for plan in fastgen.api.require(model).compiled.merges}
    plan = plans.get(spec.target)
    names = (spec.target,) if plan is None else plan.members
    return torch.cat([model.get_parameter(name).detach() for name in names])


def assert_packed_follow(model) -> None:
    """Every packed copy is that of the weight as it is now."""
    for spec, tensor in packed_inputs(model).items():
        plain = plain_weight(model, spec)
        assert torch.equal(unpack(tensor, spec.layout, len(plain)), plain), spec.target


def assert_tokens_follow(model) -> list[int]:
    """The tokens that a copy of the model as it is now makes, optimised anew. Returns: them."""
    fresh = fastgen.optimize(copy.deepcopy(model), pack=True)
    with NativeTokens(model), NativeTokens(fresh):
        found = tokens_of(model, ROW, 8)
        assert found == tokens_of(fresh, ROW, 8)
    assert_packed_follow(model)
    return found


def noise_like(tensor):
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)).to(tensor) / 3


def step(model, **options):
    ids = torch.tensor([ROW])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.2, **options)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def every_linear(model):
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def copy_into_data(model):
    for linear in every_linear(model):
        linear.weight.data.copy_(noise_like(linear.weight))


def in_place(model):
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(-1)
        model.lm_head.weight.mul_(-1)


IN_PLACE = {
    "adamw": step,
    "adamw-fused": lambda model: step(model, fused=True),
    "data-copy": copy_into_data,
    "no-grad": in_place,
}


@pytest.mark.parametrize("change", IN_PLACE.values(), ids=IN_PLACE)
def test_a_change_in_place_is_packed_into_the_same_memory(change):
    model = fastgen.optimize(small_model(), pack=True)
    before, places = tokens_of(model, ROW, 8), addresses(model)
    assert len(places) == 5  # qkv, o, gate and up, down, head
    change(model)
    assert assert_tokens_follow(model) != before, "the change shows nothing"
    assert epoch_of(model) == 1
    if TILES:  # what oneDNN packs lies in memory of its own
        assert addresses(model) == places
    assert not packed_inputs(model).keys() - places.keys()


@needs_tiles
def test_the_copies_lie_one_after_the_other_in_one_memory():
    model = fastgen.optimize(small_model(), pack=True)
    tensors = packed_inputs(model).values()
    (storage,) = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    size = sum(packed_bytes(plain_weight(model, s).shape, s.layout) for s in packed_inputs(model))
    places = sorted((tensor.data_ptr(), tensor.nbytes) for tensor in tensors)
    ends = [place + num_bytes for place, num_bytes in places]
    assert [place for place, _ in places[1:]] == ends[:-1]
    assert ends[-1] - places[0][0] == size
    assert places[0][0] % (2 << 20) == 0
    assert all(place % 64 == 0 for place, _ in places)
    assert storage <= places[0][0]


def set_data(model):
    query = model.model.layers[0].self_attn.q_proj
    query.weight.data = noise_like(query.weight)


def replace_parameter(model):
    up = model.model.layers[0].mlp.up_proj
    up.weight = nn.Parameter(noise_like(up.weight))


def assign(model):
    state = {name: noise_like(tensor) for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def to_and_back(model):
    model.to(torch.float32)
    model.to(BF16)
    copy_into_data(model)


MOVED = {
    "data": set_data,
    "parameter": replace_parameter,
    "assign": assign,
    "to-and-back": to_and_back,
}


@pytest.mark.parametrize("change", MOVED.values(), ids=MOVED)
def test_a_moved_weight_is_packed_anew(change):
    model = fastgen.optimize(small_model(), pack=True)
    before = tokens_of(model, ROW, 8)
    change(model)
    assert assert_tokens_follow(model) != before, "the change shows nothing"
    in_place(model)
    places = addresses(model)
    tokens_of(model, ROW, 2)
    assert_packed_follow(model)
    if TILES:
        assert addresses(model) == places


def test_a_tied_head_follows_its_embedding():
    model = fastgen.optimize(small_model("llama", tie_word_embeddings=True), pack=True)
    before = tokens_of(model, ROW, 8)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(noise_like(model.model.embed_tokens.weight) * 3)
    assert assert_tokens_follow(model) != before


@needs_tiles
def test_nothing_is_allocated_for_a_change_in_place(monkeypatch):
    model = fastgen.optimize(small_model(), pack=True)
    tokens_of(model, ROW, 2)
    asked = []
    monkeypatch.setattr(
        fastgen.live, "huge_pages", lambda size: asked.append(size) or torch.empty(size)
    )
    in_place(model)
    tokens_of(model, ROW, 2)
    assert epoch_of(model) == 1
    assert asked == []
    assert_packed_follow(model)


def test_planted_old_copies_are_seen(monkeypatch):
    """A pack that leaves what is there as it was."""
    model = fastgen.optimize(small_model(), pack=True)
    tokens_of(model, ROW, 2)

    def lazy(weight, layout, out=None):
        return pack(torch.zeros_like(weight), layout) if out is None else out

    monkeypatch.setattr(fastgen.live, "pack", lazy)
    in_place(model)
    tokens_of(model, ROW, 2)
    with pytest.raises(AssertionError):
        assert_packed_follow(model)


def test_restore_lets_go_of_the_copies():
    model = fastgen.optimize(small_model(), pack=True)
    tokens_of(model, ROW, 2)
    weights = fastgen.api.require(model).weights
    fastgen.restore(model)
    assert weights._packed == {}
    assert weights._packed_shapes == {}
