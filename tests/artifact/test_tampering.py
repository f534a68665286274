"""A folder that is not, to the byte, what was exported is refused: the reason names the file."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
from artifact_helpers import read_manifest, reseal

import fastgen
from fastgen import ArtifactError
from fastgen.artifact import manifest as manifest_module
from fastgen.artifact.manifest import MANIFEST, FileEntry, check_folder, file_entry

FILES = (
    "buffers.safetensors",
    "explain.json",
    "generation_config.json",
    "graph.json",
    "model.safetensors",
)


def test_these_are_the_files(llama_folder):
    found = {each.name for each in llama_folder.iterdir()}
    assert found == {MANIFEST, *FILES}
    assert set(check_folder(llama_folder).files) == set(FILES)


def change_a_byte(path: Path, place: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int((len(content) - 1) * place)] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def link(path: Path) -> None:
    moved = path.parent.parent / "elsewhere"
    shutil.move(path, moved)
    path.symlink_to(moved)


DAMAGE = {
    "first-byte": (lambda path: change_a_byte(path, 0), "was changed: its SHA-256"),
    "a-byte": (change_a_byte, "was changed: its SHA-256"),
    "last-byte": (lambda path: change_a_byte(path, 1), "was changed: its SHA-256"),
    "truncated": (truncate, "were exported"),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + b" "), "were exported"),
    "empty": (lambda path: path.write_bytes(b""), "were exported"),
    "missing": (Path.unlink, "lacks"),
    "symlink": (link, "symbolic link"),
    "fifo": (lambda path: (path.unlink(), os.mkfifo(path)), "neither a file nor a folder"),
    "a-folder": (lambda path: (path.unlink(), path.mkdir()), "lacks"),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file(name, damage, message, folder):
    damage(folder / name)
    with pytest.raises(ArtifactError, match=message) as raised:
        fastgen.load(folder)
    assert name in str(raised.value)


@pytest.mark.parametrize("place", [0, 0.3, 0.5, 0.7, 1])
def test_a_changed_manifest(place, folder):
    change_a_byte(folder / MANIFEST, place)
    with pytest.raises(ArtifactError, match=MANIFEST):
        fastgen.load(folder)


@pytest.mark.parametrize("step", range(8))
def test_every_byte_of_the_manifest_counts(step, folder):
    """One byte in 40, another set for each step: any of them is enough."""
    text = (folder / MANIFEST).read_bytes()
    for place in range(step * 5, len(text), 40):
        (folder / MANIFEST).write_bytes(text[:place] + bytes([text[place] ^ 1]) + text[place + 1 :])
        with pytest.raises(ArtifactError, match=MANIFEST):
            check_folder(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no JSON"),
        (b"[]", "no object"),
        (b"{}", "format None"),
        (b"\xff\xfe", "no UTF-8"),
        (b'{"format": 1}', "lacks buffers"),
        (b'{"format": 2}', "has format 2, and this fastgen reads 1: export it again"),
    ],
    ids=["empty", "list", "no-format", "no-utf8", "nothing-else", "another-format"],
)
def test_no_manifest(content, message, folder):
    (folder / MANIFEST).write_bytes(content)
    with pytest.raises(ArtifactError, match=message):
        fastgen.load(folder)


def edited(change) -> object:
    def edit(folder: Path) -> None:
        data = json.loads((folder / MANIFEST).read_text())
        change(data)
        (folder / MANIFEST).write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")

    return edit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edited(lambda data: data.update(more=1)), "unknown keys: more"),
        (edited(lambda data: data.pop("isa")), "lacks isa"),
        (edited(lambda data: data.update(vocab_size="128")), "vocab_size is no int"),
        (edited(lambda data: data.update(vocab_size=129)), "its checksum is wrong"),
        (edited(lambda data: data["weights"][0].update(more=1)), "unknown keys: more"),
        (edited(lambda data: data["files"]["graph.json"].pop("sha256")), "lacks sha256"),
        (edited(lambda data: data.update(files=[])), "is damaged"),
        (edited(lambda data: data.update(weights=None)), "is damaged"),
        (edited(lambda data: data.update(weights=[3])), "an entry is no object"),
    ],
    ids=[
        *("unknown-key", "missing-key", "other-type", "no-new-checksum", "unknown-key-of-a-weight"),
        *("file-without-hash", "files-no-object", "weights-none", "weight-no-object"),
    ],
)
def test_an_edited_manifest(change, message, folder):
    change(folder)
    with pytest.raises(ArtifactError, match=message):
        fastgen.load(folder)


@pytest.mark.parametrize("name", ["more.safetensors", ".hidden", "tokenizer/vocab.json", "x.py"])
def test_a_file_that_was_not_exported(name, folder):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("{}")
    with pytest.raises(ArtifactError, match="does not name; remove") as raised:
        fastgen.load(folder)
    assert name in str(raised.value)


def test_a_linked_folder_inside(folder, tmp_path):
    (tmp_path / "outside").mkdir()
    (folder / "tokenizer").symlink_to(tmp_path / "outside")
    with pytest.raises(ArtifactError, match="tokenizer is a symbolic link"):
        fastgen.load(folder)


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/passwd", "a/../graph.json", "a\\b", "./graph.json", ""]
)
def test_a_path_outside_the_folder(name, folder, tmp_path):
    (tmp_path / "outside").write_text("x")
    files = {**read_manifest(folder).files, name: FileEntry(1, ("0" * 64,))}
    reseal(folder, files=files)
    with pytest.raises(ArtifactError, match="no path inside the folder"):
        fastgen.load(folder)


def test_not_a_folder(tmp_path):
    with pytest.raises(ArtifactError, match="is no folder"):
        fastgen.load(tmp_path / "nothing")
    with pytest.raises(ArtifactError, match=f"lacks {MANIFEST}"):
        fastgen.load(tmp_path)


def test_hashes_that_are_missing(folder):
    files = read_manifest(folder).files
    entry = dataclasses.replace(files["graph.json"], sha256=())
    reseal(folder, files={**files, "graph.json": entry})
    with pytest.raises(ArtifactError, match=r"hashes of graph.json are missing"):
        fastgen.load(folder)


def test_a_large_file_has_a_hash_for_each_part(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest_module, "PART_BYTES", 1000)
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 10)
    entry = file_entry(path)
    assert (entry.bytes, len(entry.sha256), len(set(entry.sha256))) == (2560, 3, 3)
    for place in (0, 999, 1000, 2559):
        content = bytearray(bytes(range(256)) * 10)
        content[place] ^= 1
        path.write_bytes(content)
        changed = file_entry(path).sha256
        assert [a != b for a, b in zip(changed, entry.sha256, strict=True)] == [
            part == place // 1000 for part in range(3)
        ]


def test_nothing_is_opened_before_it_is_compared(folder, monkeypatch):
    change_a_byte(folder / "graph.json")

    def opened(*_):
        raise AssertionError("the graph was read")

    monkeypatch.setattr("fastgen.artifact.assemble.read_graph", opened)
    with pytest.raises(ArtifactError, match=r"graph\.json was changed"):
        fastgen.load(folder)


# What is consistent in itself and cannot be run.


def bad_graph(folder: Path, change) -> None:
    data = json.loads((folder / "graph.json").read_text())
    change(data)
    (folder / "graph.json").write_text(json.dumps(data))
    files = read_manifest(folder).files
    reseal(folder, files={**files, "graph.json": file_entry(folder / "graph.json")})


def first_call(data: dict) -> dict:
    return next(row for row in data["nodes"] if row["op"] == "call_function")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: first_call(data).update(target="os.system"), r"graph.json cannot be read"),
        (lambda data: data["nodes"][0].update(name="x=print(1)"), "no name of a node"),
        (lambda data: data.update(format=0), "format 0"),
        (lambda data: data.update(merges=[3]), r"graph.json cannot be read"),
        (
            lambda data: next(row for row in data["inputs"] if row[0] == "parameter").__setitem__(
                1, "model.nothing.weight"
            ),
            "reads model.nothing.weight, which no file holds",
        ),
    ],
    ids=["python-function", "code-in-a-name", "format", "no-list", "unknown-weight"],
)
def test_a_graph_that_says_other_things(change, message, folder):
    bad_graph(folder, change)
    with pytest.raises(ArtifactError, match=message):
        fastgen.load(folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("generation_config.json", "[1]"),
        ("generation_config.json", "{"),
        ("model.safetensors", "this is none"),
        ("buffers.safetensors", "this is none"),
    ],
)
def test_a_file_of_another_kind(name, content, folder):
    (folder / name).write_text(content)
    files = read_manifest(folder).files
    reseal(folder, files={**files, name: file_entry(folder / name)})
    with pytest.raises(ArtifactError, match=name):
        fastgen.load(folder)
