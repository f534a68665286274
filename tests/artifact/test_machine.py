"""Another version, device or processor, and too little memory: refused, and what to do is said."""

from __future__ import annotations

import pytest
import torch
from artifact_helpers import read_manifest, reseal
from fastgen.kernels import cpu
from fastgen.passes import InputSpec
from tiny_models import tiny_model

import fastgen
from fastgen import ArtifactError
from fastgen.artifact import assemble, machine


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"torch": "2.9.1"}, r"exported with torch 2\.9\.1, and this is .*: export it again"),
        ({"fastgen": "0.0.9"}, r"exported by fastgen 0\.0\.9, and this is .*: export it again"),
        ({"device": "cuda:7"}, "exported on cuda:7, and there is no such device here"),
        ({"device": "abacus"}, "its device 'abacus' is unknown"),
        ({"isa": "sve2"}, "a processor with sve2, and this fastgen does not know"),
        ({"program": "magic"}, "kind 'magic', and this fastgen runs direct"),
        ({"settings": {"max_num_seqs": 0}}, "its settings are none of this fastgen"),
        ({"settings": {"colour": "red"}}, "its settings are none of this fastgen"),
    ],
    ids=[
        *("torch", "fastgen", "device", "unknown-device", "unknown-isa", "program"),
        *("setting-out-of-range", "unknown-setting"),
    ],
)
def test_another_machine(fields, message, folder):
    reseal(folder, **fields)
    with pytest.raises(ArtifactError, match=message) as raised:
        fastgen.load(folder)
    assert str(raised.value).startswith(f"{folder} cannot be loaded: ")


def test_a_patch_release_of_torch_is_the_same(folder):
    major, minor, *_ = torch.__version__.split("+")[0].split(".")
    reseal(folder, torch=f"{major}.{minor}.77")
    fastgen.load(folder)


@pytest.fixture(scope="module")
def packed_folder(tmp_path_factory):
    if cpu.why_missing() is not None or cpu.isa() == "generic":
        pytest.skip("nothing is packed here")
    path = tmp_path_factory.mktemp("export") / "packed"
    fastgen.export(tiny_model("llama", dtype=torch.bfloat16), path)
    return path


def test_packed_weights_need_their_instructions(packed_folder, monkeypatch):
    assert read_manifest(packed_folder).isa == "avx512_bf16"
    monkeypatch.setattr(machine.cpu, "isa", lambda: "generic")
    with pytest.raises(ArtifactError, match=r"packed for a processor with avx512_bf16, and there"):
        fastgen.load(packed_folder)


def test_packed_weights_need_the_kernels(packed_folder, monkeypatch):
    monkeypatch.setattr(machine.cpu, "why_missing", lambda: "no C++ compiler was found")
    with pytest.raises(ArtifactError, match=r"and no C\+\+ compiler was found: export it here"):
        fastgen.load(packed_folder)


def test_plain_weights_need_no_instructions(llama_folder, monkeypatch):
    assert read_manifest(llama_folder).isa == "any"
    monkeypatch.setattr(machine.cpu, "isa", lambda: "generic")
    fastgen.load(llama_folder)


@pytest.mark.parametrize(
    ("layouts", "isa"),
    [
        ([None], "any"),
        (["tiles", None, "gated_tiles"], "avx512_bf16"),
        (["onednn"], "onednn_bf16"),
        (["onednn", "tiles"], "avx512_bf16+onednn_bf16"),
    ],
)
def test_what_layouts_need(layouts, isa):
    assert machine.isa_of([InputSpec("packed", "w", layout) for layout in layouts]) == isa


@pytest.mark.parametrize("release", [False, True], ids=["kept", "released"])
def test_too_little_memory(packed_folder, release, monkeypatch):
    asked = []
    monkeypatch.setattr(assemble, "free_memory_bytes", lambda device: asked.append(device) or 1000)
    monkeypatch.setattr(assemble, "read_tensors", None)  # nothing is opened
    with pytest.raises(ArtifactError, match=r"take \d+ MiB of memory on cpu .*, and 0 MiB are"):
        fastgen.load(packed_folder, release_weights=release)
    assert asked == [torch.device("cpu")]


def test_memory_for_packed_weights_and_nothing_else(packed_folder, monkeypatch):
    packed = read_manifest(packed_folder).packed_bytes
    monkeypatch.setattr(assemble, "free_memory_bytes", lambda device: packed)
    with pytest.raises(ArtifactError, match="as they are merged and packed"):
        fastgen.load(packed_folder)
    monkeypatch.setattr(assemble, "free_memory_bytes", lambda device: packed + (1 << 20))
    fastgen.load(packed_folder)


def test_what_memory_is_needed(packed_folder, llama_folder):
    """Packed copies, merged weights that are read as such, and the largest while it is packed."""
    packed, plain = fastgen.load(packed_folder), fastgen.load(llama_folder)
    gate_and_up = 2 * 96 * 64
    assert needed_bytes(plain) == merged_bytes(plain) + gate_and_up * 4
    assert merged_bytes(packed) == 0
    weights = fastgen.api.require(packed).compiled.weights
    copies = sum(tensor.nbytes for spec, tensor in weights.items() if spec.kind == "packed")
    assert packed.manifest.packed_bytes == copies
    assert needed_bytes(packed) == copies + gate_and_up * 2


def needed_bytes(loaded) -> int:
    graph = fastgen.api.require(loaded).graphs.rewritten
    return assemble._memory_bytes(loaded.manifest, graph)


def merged_bytes(loaded) -> int:
    merged = fastgen.api.require(loaded).weights._merged.values()
    return sum(each.tensor.nbytes for each in merged)
