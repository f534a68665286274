"""Programs that AOTInductor compiled: right for every length, in the caches given, refused by name.

Compiling takes ten seconds and more, so that one quick test compiles for each dtype.
"""

import dataclasses
import json
import os
import shutil
import struct
import zipfile

import pytest
import torch
from program_steps import assert_alike, batches, direct, logits_and_cache, rewritten
from tiny_models import greedy_alone, tiny_model

import fastgen
from fastgen.artifact import aot
from fastgen.artifact.aot import load_aot
from fastgen.artifact.aot_compiler import compile_aot
from fastgen.artifact.archive import check_archive
from fastgen.engine.kv_cache import KVCache
from fastgen.errors import ArtifactError

COMPILER = os.environ.get("CXX", "g++")
pytestmark = pytest.mark.skipif(
    shutil.which(COMPILER) is None,
    reason=f"AOTInductor needs a C++ compiler, {COMPILER} is missing",
)
# What two right engines differ by in fp32, in roundings of the largest logit (see tiny_models).
ROUNDINGS = 64


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """An fp32 model, rewritten, and its compiled program."""
    case = rewritten("llama")
    path = tmp_path_factory.mktemp("aot") / "model.pt2"
    compile_aot(case.graph, path)
    return case, path


def test_every_step_is_the_direct_programs(llama):
    case, path = llama
    assert_alike(logits_and_cache(case, load_aot(path)), direct(case), torch.float32, ROUNDINGS)


@pytest.mark.slow
def test_bf16_over_packed_weights(tmp_path):
    """As near to what the same weights give in fp32 as the direct program is."""
    packed = 1 << 40
    case = rewritten("llama", dtype=torch.bfloat16, pack_bytes=packed)
    compile_aot(case.graph, tmp_path / "model.pt2")
    exact = rewritten(tiny_model("llama", dtype=torch.bfloat16).float())
    expected, ours = direct(case)[0], logits_and_cache(case, load_aot(tmp_path / "model.pt2"))[0]
    eps = torch.finfo(torch.bfloat16).eps
    for got, wanted, true in zip(ours, expected, direct(exact)[0], strict=True):
        allowed = 2 * ((wanted - true).abs().max() + eps * true.abs().max())
        assert (got - true).abs().max() <= allowed


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma2", "qwen3", "gpt_oss", "deepseek_v3"])
def test_families(family, tmp_path):
    case = rewritten(family)
    compile_aot(case.graph, tmp_path / "model.pt2")
    program = load_aot(tmp_path / "model.pt2")
    assert_alike(logits_and_cache(case, program), direct(case), torch.float32, ROUNDINGS)


def test_weights_are_inputs_and_not_in_the_archive(llama):
    case, path = llama
    content = path.read_bytes()
    for tensor in case.forward.weights.values():
        if tensor.numel() > 64:
            part = tensor.detach().flatten()[-64:].clone().view(torch.uint8).numpy().tobytes()
            assert part not in content

    other = rewritten("llama", seed=1)  # other weights of the same shapes
    assert_alike(logits_and_cache(other, load_aot(path)), direct(other), torch.float32, ROUNDINGS)


def test_a_cache_is_written_where_it_lies_and_never_copied(llama):
    """A cache of 8 GiB that is address space only: whoever copied one would take its memory."""
    case, path = llama
    program = load_aot(path)
    cache = KVCache(case.forward.spec, 1 << 20, 16, torch.device("cpu"))
    assert cache.nbytes >= 8 << 30
    places = {name: tensor.data_ptr() for name, tensor in cache.tensors.items()}
    batch = batches()[0]
    with torch.inference_mode():
        before = _resident_bytes()
        program(*case.forward.arguments(batch, cache))
        assert _resident_bytes() - before < 1 << 28
    assert {name: tensor.data_ptr() for name, tensor in cache.tensors.items()} == places
    block = int(batch.block_table[0, 0])
    assert all(tensor[block].abs().sum() > 0 for tensor in cache.tensors.values())


def _resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda tensor: tensor[:-1], r"must be \[128, 64\] float32 on the CPU, got \[127, 64\]"),
        (lambda tensor: tensor.double(), r"float32 on the CPU, got \[128, 64\] float64"),
        (lambda tensor: tensor.t().contiguous().t(), "must be contiguous, has the strides"),
        (lambda tensor: tensor.to("meta"), "on meta"),
    ],
    ids=["shape", "dtype", "strides", "device"],
)
def test_a_tensor_that_does_not_fit_is_refused(llama, change, says):
    case, path = llama
    program, cache = load_aot(path), case.cache()
    arguments = case.forward.arguments(batches()[0], cache)
    with torch.inference_mode():
        program(*arguments)
        index = [item.name for item in program.inputs].index("parameter model.embed_tokens.weight")
        with pytest.raises(ValueError, match=says):
            program(*arguments[:index], change(arguments[index]), *arguments[index + 1 :])
        with pytest.raises(ValueError, match=f"takes {len(arguments)} tensors"):
            program(*arguments[1:])
        # Sizes that are one number are compared with those of the last call, too.
        index = next(i for i, item in enumerate(program.inputs) if item.name.startswith("cache"))
        program(*arguments)
        with pytest.raises(ValueError, match="cache"):
            program(*arguments[:index], arguments[index][1:], *arguments[index + 1 :])


def _rewrite(path, target, change):
    """Copy an archive member by member; change(name, content) gives what is written instead."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w") as copy:
        for name in source.namelist():
            made = change(name, source.read(name))
            for each, content in made if isinstance(made, list) else [(name, made)]:
                copy.writestr(each, content)


def _described(**fields):
    """A change of what the program says of itself."""

    def change(name, content):
        if not name.endswith("wrapper_metadata.json"):
            return content
        metadata = json.loads(content)
        metadata["fastgen"] = json.dumps({**json.loads(metadata["fastgen"]), **fields})
        return json.dumps(metadata).encode()

    return change


def _library(replacement):
    return lambda name, content: replacement if name.endswith(".so") else content


def _added(*names):
    def change(name, content):
        extra = [(each, b"x") for each in names] if name.endswith("byteorder") else []
        return [(name, content), *extra]

    return change


def test_archives_that_are_no_program_are_refused(llama, tmp_path):
    path, target = llama[1], tmp_path / "changed.pt2"

    def refused(change, says):
        target.unlink(missing_ok=True)
        _rewrite(path, target, change)
        with pytest.raises(ArtifactError, match=says):
            check_archive(target)

    folder = check_archive(path) and zipfile.ZipFile(path).namelist()[0].split("/")[0]
    _rewrite(path, target, lambda name, content: content)
    assert check_archive(target) == check_archive(path)
    model = f"{folder}/data/aotinductor/model"
    refused(_added(f"{folder}/data/sample_inputs/model.pt"), "a member that no program has")
    refused(_added(f"{model}/data.pkl"), "a member that no program has")
    refused(_added(f"{model}/x.wrapper.cpp"), "a member that no program has")
    refused(_added(f"{folder}/../byteorder"), "a member that no program has")
    refused(_added("/byteorder"), "a member that no program has")
    refused(_added("other/byteorder"), "two members of one kind")
    refused(_added(f"{model}/x.wrapper.so"), "two members of one kind")
    refused(lambda name, content: [] if name.endswith(".json") else content, "lacks members")
    refused(_library(b"#!/bin/sh"), "no shared library")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w") as copy:
        for name in source.namelist():
            copy.writestr(name, source.read(name), zipfile.ZIP_DEFLATED)
    with pytest.raises(ArtifactError, match="must be stored as it is"):
        check_archive(target)


def test_damaged_files_are_refused(llama, tmp_path):
    content, target = llama[1].read_bytes(), tmp_path / "damaged.pt2"

    def refused(written, says):
        target.write_bytes(written)
        with pytest.raises(ArtifactError, match=says):
            check_archive(target)

    refused(b"", "something is around")
    refused(content[: len(content) // 2], "something is around")
    refused(content[:-1], "something is around")
    refused(b"#!/bin/sh\n" + content, "something is around")
    refused(content + content, "something is before it")
    library = content.index(b"\x7fELF")
    refused(content[: library + 99] + b"?" + content[library + 100 :], "Bad CRC")
    refused(struct.pack("<I", 0x06054B50) + content[4:], "something is around")
    target.unlink()
    target.symlink_to(llama[1])
    with pytest.raises(ArtifactError, match="not a link"):
        check_archive(target)
    with pytest.raises(ArtifactError, match="No such file"):
        check_archive(tmp_path / "missing.pt2")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"format": 99}, "has the format 99"),
        ({"torch": "1.0.0"}, "compiled for torch 1.0.0, this is"),
        ({"device": "cuda"}, "compiled for cuda, asked for is cpu"),
        ({"instruction_sets": ["avx9"]}, "a processor that has avx9"),
        ({"kernels": [["fastgen::rms_norm", "quantum"]]}, "calls the kernel 'quantum'"),
        ({"inputs": [{}]}, "description is damaged"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_programs_for_others_are_refused(llama, tmp_path, fields, says):
    target = tmp_path / "changed.pt2"
    _rewrite(llama[1], target, _described(**fields))
    with pytest.raises(ArtifactError, match=says):
        load_aot(target)


def test_a_lower_instruction_set_is_refused(llama, tmp_path, monkeypatch):
    target = tmp_path / "changed.pt2"
    _rewrite(llama[1], target, _described(isa="amx"))
    monkeypatch.setattr(aot.cpu, "isa", lambda: "generic")
    with pytest.raises(ArtifactError, match="kernels that use amx, here they use generic"):
        load_aot(target)


def test_what_cannot_be_compiled_is_refused(llama, tmp_path, monkeypatch):
    case = llama[0]
    with pytest.raises(fastgen.UnsupportedModelError, match="deterministic=True"):
        compile_aot(dataclasses.replace(case.graph, deterministic=True), tmp_path / "model.pt2")

    def fails(*_, **__):
        raise RuntimeError("no such lowering\nat great length")

    monkeypatch.setattr("torch._inductor.aot_compile", fails)
    with pytest.raises(fastgen.UnsupportedModelError, match=r"no such lowering\); export it with"):
        compile_aot(case.graph, tmp_path / "model.pt2")
    assert not (tmp_path / "model.pt2").exists()


@pytest.mark.slow
def test_a_folder_with_a_compiled_program(tmp_path):
    """Through export and load, from loaded models, too: the tokens are transformers'."""
    rows, expected = greedy_alone(tiny_model("llama"), 5, 33, num_tokens=20)
    fastgen.export(tiny_model("llama"), tmp_path / "direct")
    fastgen.export(fastgen.load(tmp_path / "direct"), tmp_path / "first", program="aot")
    report = fastgen.export(fastgen.load(tmp_path / "first"), tmp_path / "second", program="aot")
    assert "model.pt2" in report.file_bytes
    for name in ("first", "second"):
        loaded = fastgen.load(tmp_path / name)
        assert "codegen       aot" in str(fastgen.explain(loaded))
        engine = fastgen.Engine(loaded)
        for _ in range(2):
            outputs = engine.generate(rows, fastgen.SamplingParams(max_tokens=20, temperature=0.0))
            assert [list(output.token_ids) for output in outputs] == expected
            fastgen.release_cache(loaded)
