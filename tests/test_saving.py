"""I13: every way to save an optimised model reloads bit-equal, with every key, at its size."""

import copy
import io

import pytest
import torch
from accelerate import Accelerator
from following import tokens_of
from safetensors.torch import load_file, load_model, save_file, save_model
from tiny_models import prompts, tiny_model
from transformers import AutoModelForCausalLM

import fastgen

pytestmark = pytest.mark.usefixtures("graphs_of_the_session")
ROW = prompts(9)[0]
HEADER_BYTES = 16 * 1024  # what a file holds besides numbers
TIED = "lm_head.weight"


def tied_model():
    return tiny_model("llama", tie_word_embeddings=True)


MODELS = {"untied": lambda: tiny_model("qwen2"), "tied": tied_model}


@pytest.fixture(params=MODELS.values(), ids=MODELS, scope="module")
def saved(request):
    """An optimised model that has generated, and its weights before it was optimised."""
    model = request.param()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fastgen.optimize(model)
    tokens_of(model, ROW, 3)
    assert fastgen.api.require(model).compiled.merges, "nothing is merged"
    return model, before


def assert_bit_equal(state, before, but=()):
    assert state.keys() == before.keys() - set(but)
    for name, tensor in state.items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name]), name


def tied_names(model) -> tuple[str, ...]:
    return (TIED,) if model.lm_head.weight is model.model.embed_tokens.weight else ()


def own_bytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def expected_bytes(model) -> int:
    return own_bytes(model.parameters())  # a tied weight once


def assert_size(path, expected):
    assert expected < path.stat().st_size < expected + 2 * HEADER_BYTES


def test_save_pretrained(saved, tmp_path):
    model, before = saved
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_bit_equal(loaded.state_dict(), before)
    assert_bit_equal(load_file(tmp_path / "model.safetensors"), before, tied_names(model))
    assert_size(tmp_path / "model.safetensors", expected_bytes(model))


def test_save_pretrained_in_shards(saved, tmp_path):
    model, before = saved
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_bit_equal(loaded.state_dict(), before)


def test_safetensors_save_file(saved, tmp_path):
    model, before = saved
    state = {name: t for name, t in model.state_dict().items() if name not in tied_names(model)}
    save_file(state, tmp_path / "all.safetensors")
    assert_bit_equal(load_file(tmp_path / "all.safetensors"), before, tied_names(model))
    assert_size(tmp_path / "all.safetensors", expected_bytes(model))


def test_safetensors_save_model(saved, tmp_path):
    model, before = saved
    save_model(model, str(tmp_path / "all.safetensors"))
    loaded = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.zero_()
    assert load_model(loaded, tmp_path / "all.safetensors") == (set(), [])
    assert_bit_equal(loaded.state_dict(), before)
    assert_size(tmp_path / "all.safetensors", expected_bytes(model))


def test_accelerator_save_model(saved, tmp_path):
    model, before = saved
    Accelerator(cpu=True).save_model(model, tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    found = load_file(path)
    dropped = before.keys() - found.keys()
    assert len(dropped) == len(tied_names(model)), dropped
    assert_bit_equal(found, before, dropped)
    assert_size(path, expected_bytes(model))


def test_torch_save_of_the_state_dict(saved, tmp_path):
    model, before = saved
    torch.save(model.state_dict(), tmp_path / "all.pt")
    assert_bit_equal(torch.load(tmp_path / "all.pt"), before)
    assert_size(tmp_path / "all.pt", expected_bytes(model))


def test_torch_save_of_every_single_parameter(saved):
    model, before = saved
    for name, parameter in model.named_parameters():
        file = io.BytesIO()
        torch.save(parameter, file)
        assert len(file.getvalue()) < own_bytes([parameter]) + HEADER_BYTES, name
        file.seek(0)
        assert torch.equal(torch.load(file), before[name]), name


def test_torch_save_of_the_model(saved, tmp_path):
    model, before = saved
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert_bit_equal(loaded.state_dict(), before)
    assert fastgen.api.lookup(loaded) is None
    assert tokens_of(loaded, ROW, 6) == tokens_of(copy.deepcopy(model), ROW, 6)
    assert bool(tied_names(loaded)) == bool(tied_names(model))


def test_deepcopy_is_independent_and_not_optimised(saved):
    model, before = saved
    other = copy.deepcopy(model)
    assert fastgen.api.lookup(other) is None
    assert_bit_equal(other.state_dict(), before)
    with torch.no_grad():
        for parameter in other.parameters():
            assert parameter.untyped_storage().nbytes() == own_bytes([parameter])
            parameter.zero_()
    assert_bit_equal(model.state_dict(), before)


def test_load_state_dict_of_what_was_saved(saved, tmp_path):
    model, before = saved
    torch.save(model.state_dict(), tmp_path / "all.pt")
    plain = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.zero_()
    plain.load_state_dict(torch.load(tmp_path / "all.pt"))
    assert_bit_equal(plain.state_dict(), before)
    assert tokens_of(fastgen.optimize(plain), ROW, 6) == tokens_of(model, ROW, 6)


def test_slices_of_one_storage_would_be_seen(tmp_path):
    """Members that are plain slices of the merged weight: what the own storages are for."""
    attention = tiny_model("llama").model.layers[0].self_attn
    members = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    merged = torch.cat([member.detach() for member in members])
    for member, part in zip(members, merged.split([64, 32, 32]), strict=True):
        member.data = part
    torch.save(members[1], tmp_path / "one.pt")
    assert (tmp_path / "one.pt").stat().st_size > own_bytes(members[1:2]) + HEADER_BYTES
