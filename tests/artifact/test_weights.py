"""The weights of a folder: a checkpoint like any other, which others can stand in for."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from artifact_helpers import read_manifest
from safetensors.torch import load_file, save_file
from tiny_models import NativeTokens, greedy_alone, tiny_model

import fastgen
from fastgen import ArtifactError
from fastgen.artifact.weights import INDEX, files_of, read_tensors, weights_of, write_weights

CPU = torch.device("cpu")


def tokens_of(model, row: list[int], count: int = 12) -> list[int]:
    with NativeTokens(model):
        out = model.generate(torch.tensor([row]), max_new_tokens=count)
    return out[0, len(row) :].tolist()


def test_they_are_the_models_state_dict(llama_folder):
    state = tiny_model("llama").state_dict()
    found = load_file(llama_folder / "model.safetensors")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_transformers_reads_them(llama_folder, tmp_path):
    from transformers import LlamaForCausalLM

    model = tiny_model("llama")
    model.config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((llama_folder / "model.safetensors").read_bytes())
    back = LlamaForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(value, back[name]) for name, value in model.state_dict().items())


def test_they_are_mapped_and_not_changed(folder):
    before = (folder / "model.safetensors").read_bytes()
    loaded = fastgen.load(folder)
    if sys.platform == "linux":
        assert str(folder / "model.safetensors") in Path("/proc/self/maps").read_text()
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.fill_(0.5)
    assert (folder / "model.safetensors").read_bytes() == before


def test_tied_ones_are_there_once(tmp_path):
    tied = {"tie_word_embeddings": True}
    rows, expected = greedy_alone(tiny_model("llama", **tied), 9, num_tokens=12)
    fastgen.export(tiny_model("llama", **tied), tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out/model.safetensors")
    loaded = fastgen.load(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert tokens_of(loaded, rows[0]) == expected[0]
    both = tiny_model("llama", **tied).state_dict()
    save_file({name: value.clone() for name, value in both.items()}, tmp_path / "both.safetensors")
    fastgen.load(tmp_path / "out", weights=tmp_path / "both.safetensors")
    both["lm_head.weight"] = both["lm_head.weight"] + 1
    save_file(both, tmp_path / "other.safetensors")
    with pytest.raises(ArtifactError, match=r"embed_tokens.weight and lm_head.weight are one"):
        fastgen.load(tmp_path / "out", weights=tmp_path / "other.safetensors")


def test_other_weights_take_their_place(llama_folder, tmp_path):
    rows, expected = greedy_alone(tiny_model("llama", seed=1), 9, 30, num_tokens=12)
    save_file(tiny_model("llama", seed=1).state_dict(), tmp_path / "new.safetensors")
    loaded = fastgen.load(llama_folder, weights=tmp_path / "new.safetensors")
    assert [tokens_of(loaded, row) for row in rows] == expected


def test_a_checkpoint_of_transformers_takes_their_place(llama_folder, tmp_path):
    other = tiny_model("llama", seed=1)
    rows, expected = greedy_alone(other, 9, num_tokens=12)
    other.save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / INDEX).exists()
    loaded = fastgen.load(llama_folder, weights=tmp_path)
    assert tokens_of(loaded, rows[0]) == expected[0]


def test_damaged_weights_are_not_looked_at_if_others_are_given(folder, tmp_path):
    other = folder / "model.safetensors"
    size = other.stat().st_size
    save_file(tiny_model("llama", seed=1).state_dict(), tmp_path / "new.safetensors")
    other.write_bytes(b"\0" * size)
    fastgen.load(folder, weights=tmp_path / "new.safetensors")
    with pytest.raises(ArtifactError, match=r"model\.safetensors was changed"):
        fastgen.load(folder)


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop(NORM), f"{NORM} are missing"),
        (lambda state: state.update(more=torch.zeros(1)), "holds more, which the model has not"),
        (
            lambda state: state.update({NORM: torch.zeros(65)}),
            rf"{NORM} must be float32 \[64\], and in .* it is float32 \[65\]",
        ),
        (
            lambda state: state.update({NORM: state[NORM].half()}),
            rf"{NORM} must be float32 \[64\], and in .* it is float16 \[64\]",
        ),
    ],
    ids=["missing", "more", "shape", "dtype"],
)
def test_other_weights_that_do_not_fit(change, message, llama_folder, tmp_path):
    state = tiny_model("llama").state_dict()
    change(state)
    save_file(state, tmp_path / "new.safetensors")
    with pytest.raises(ArtifactError, match=message):
        fastgen.load(llama_folder, weights=tmp_path / "new.safetensors")


def test_other_weights_that_are_none(llama_folder, tmp_path):
    with pytest.raises(ArtifactError, match="must be a safetensors file or a folder"):
        fastgen.load(llama_folder, weights=tmp_path / "nothing")
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match="no safetensors file that can be read"):
        fastgen.load(llama_folder, weights=tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "no index of weights"),
        ("{}", "no index of weights"),
        ('{"weight_map": {"w": "../x.safetensors"}}', "which is no file beside it"),
        ('{"weight_map": {"w": 3}}', "which is no file beside it"),
        ('{"weight_map": {"w": "gone.safetensors"}}', "cannot|can be read"),
    ],
)
def test_an_index_that_is_none(index, message, llama_folder, tmp_path):
    (tmp_path / INDEX).write_text(index)
    with pytest.raises(ArtifactError, match=message):
        fastgen.load(llama_folder, weights=tmp_path)


def test_shards(tmp_path):
    found = weights_of(tiny_model("llama"))
    weights = {name: tensor for name, (_, tensor) in found.items()}
    told: list[int] = []
    write_weights(tmp_path, weights, told.append, shard_bytes=100_000)
    paths = files_of(tmp_path)
    assert [path.name for path in paths] == [
        f"model-{number:05d}-of-{len(paths):05d}.safetensors" for number in range(1, len(paths) + 1)
    ]
    assert len(paths) > 2
    sizes = [sum(t.nbytes for t in load_file(path).values()) for path in paths]
    assert told == sizes
    assert max(sizes) <= 100_000
    assert json.loads((tmp_path / INDEX).read_text())["metadata"] == {"total_size": sum(sizes)}
    back = read_tensors(paths, [entry for entry, _ in found.values()], CPU)
    assert all(torch.equal(back[name], weights[name]) for name in weights)


def test_a_sharded_folder_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "fastgen.artifact.export.write_weights",
        lambda folder, weights, told: write_weights(folder, weights, told, shard_bytes=100_000),
    )
    rows, expected = greedy_alone(tiny_model("llama"), 9, num_tokens=12)
    fastgen.export(tiny_model("llama"), tmp_path / "out")
    assert INDEX in read_manifest(tmp_path / "out").files
    assert tokens_of(fastgen.load(tmp_path / "out"), rows[0]) == expected[0]


def test_what_is_no_plain_tensor():
    model = tiny_model("llama")

    class Packed(torch.nn.Parameter):
        pass

    model.model.norm.weight = Packed(torch.ones(64))
    with pytest.raises(ArtifactError, match=r"model.norm.weight is a Packed; only plain tensors"):
        weights_of(model)
