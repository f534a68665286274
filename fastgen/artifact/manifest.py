"""What a folder holds and what it needs; whether a folder is as it was written.

A folder holds the files that its manifest names and no others. Every file is compared with the
manifest before anything in it is looked at, and the manifest with a checksum of itself.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import ArtifactError

# Told what is being done, and how much of how much.
Progress = Callable[[str, int, int], None]

FORMAT = 1
MANIFEST = "manifest.json"
# A file's hashes are those of its parts, so that two cores share the work of a large one.
PART_BYTES = 64 << 20
_MAX_MANIFEST_BYTES = 64 << 20
_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class FileEntry:
    """A file: its size, and the SHA-256 of each part of PART_BYTES, in hexadecimal digits."""

    bytes: int
    sha256: tuple[str, ...]


@dataclass(frozen=True)
class TensorEntry:
    """A weight. names: All that it has in the model, the one it is stored under first."""

    kind: str  # "parameter" or "buffer"
    dtype: str  # as torch writes it, without "torch."
    shape: tuple[int, ...]
    names: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """Everything that is known of a folder before its other files are opened.

    model: The class it was exported from. program: How the graph is run, see program.py. device:
    Where it runs. isa: What the processor must have for packed weights, see machine.py. settings:
    Fields of Config that the graph depends on. cache: One entry per layer of the KV cache.
    packed_bytes: Of packed weights in memory of ours.
    weights: Of model*.safetensors; buffers: of buffers.safetensors. files: By their path.
    """

    format: int
    fastgen: str
    torch: str
    model: str
    program: str
    device: str
    isa: str
    vocab_size: int
    max_model_len: int
    why_not_longer: str
    settings: dict[str, Any]
    cache: tuple[dict[str, Any], ...]
    packed_bytes: int
    weights: tuple[TensorEntry, ...]
    buffers: tuple[TensorEntry, ...]
    files: dict[str, FileEntry]

    def to_text(self) -> str:
        """The content of manifest.json, with its own checksum."""
        data = dataclasses.asdict(self)
        body = json.dumps(data, indent=1, sort_keys=True)
        checksum = hashlib.sha256(body.encode()).hexdigest()
        return json.dumps({**data, "checksum": checksum}, indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_text(cls, text: str, where: str = MANIFEST) -> Manifest:
        """Raises: ArtifactError unless it is, to the byte, what `to_text` wrote."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise ArtifactError(f"{where} is damaged: it is no JSON ({error})") from error
        if not isinstance(data, dict):
            raise ArtifactError(f"{where} is damaged: it is no object")
        if (found := data.get("format")) != FORMAT:
            raise ArtifactError(
                f"{where} has format {found!r}, and this fastgen reads {FORMAT}: export it again"
            )
        _check_keys(cls, data, where, "checksum")
        for field in dataclasses.fields(cls):
            kind = {"str": str, "int": int}.get(str(field.type))
            if kind is not None and type(data[field.name]) is not kind:
                raise ArtifactError(f"{where} is damaged: {field.name} is no {field.type}")
        try:
            found = cls(
                **{
                    **{field.name: data[field.name] for field in dataclasses.fields(cls)},
                    "cache": tuple(data["cache"]),
                    "weights": _tensors(data["weights"], where),
                    "buffers": _tensors(data["buffers"], where),
                    "files": {
                        name: _entry(FileEntry, row, f"{where}: {name}", sha256=tuple)
                        for name, row in data["files"].items()
                    },
                }
            )
            same = found.to_text() == text
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise ArtifactError(f"{where} is damaged: {error}") from error
        if not same:
            raise ArtifactError(f"{where} was changed: its checksum is wrong")
        return found


def _check_keys(cls: type, data: Any, where: str, *more: str) -> None:
    if not isinstance(data, dict):
        raise ArtifactError(f"{where} is damaged: an entry is no object")
    known = {field.name for field in dataclasses.fields(cls)} | set(more)
    if unknown := sorted(data.keys() - known):
        raise ArtifactError(f"{where} has unknown keys: {', '.join(map(str, unknown))}")
    if missing := sorted(known - data.keys()):
        raise ArtifactError(f"{where} lacks {', '.join(missing)}")


def _entry(cls: type, data: Any, where: str, **convert: Any) -> Any:
    _check_keys(cls, data, where)
    return cls(**{**data, **{name: make(data[name]) for name, make in convert.items()}})


def _tensors(rows: Any, where: str) -> tuple[TensorEntry, ...]:
    return tuple(_entry(TensorEntry, row, where, shape=tuple, names=tuple) for row in rows)


def file_entry(path: Path) -> FileEntry:
    """The size and the hashes of a file."""
    size = path.stat().st_size
    with ThreadPoolExecutor(2) as pool:
        return FileEntry(size, tuple(pool.map(lambda part: _hash(path, part), _parts(size))))


def _parts(size: int) -> range:
    return range(-(-size // PART_BYTES))


def _hash(path: Path, part: int) -> str:
    """The SHA-256 of one part of a file."""
    digest, left = hashlib.sha256(), PART_BYTES
    with open(path, "rb", buffering=0) as file:
        file.seek(part * PART_BYTES)
        while left and (content := file.read(min(left, _READ_BYTES))):
            digest.update(content)
            left -= len(content)
    return digest.hexdigest()


class CheckedFolder:
    """A folder whose files are being compared with its manifest, in the background.

    Which files there are, of what kind and size, is known at once; `wait(path)` returns when a
    file's content has been compared, and comes before that file is opened.

    Raises: ArtifactError, naming what is missing, too much, or not what it was.
    """

    def __init__(self, path: Path, skips_weights: bool = False) -> None:
        """skips_weights: The weights' content is not compared: others stand in their place."""
        self.path = path
        if not path.is_dir():
            raise ArtifactError(f"{path} is no folder; give one that fastgen.export wrote")
        found = dict(_files_in(path))
        self.manifest = _read_manifest(path, found)
        expected = self.manifest.files
        for name in expected:
            _check_name(name)
        if missing := sorted(expected.keys() - found.keys()):
            raise ArtifactError(f"{path} lacks {', '.join(missing)}, which its manifest names")
        if extra := sorted(found.keys() - expected.keys() - {MANIFEST}):
            raise ArtifactError(
                f"{path} holds {', '.join(extra)}, which its manifest does not name; remove what "
                "was not exported"
            )
        for name, entry in expected.items():
            if found[name] != entry.bytes:
                raise ArtifactError(
                    f"{path / name} has {found[name]} bytes, and {entry.bytes} were exported"
                )
            if len(entry.sha256) != len(_parts(entry.bytes)):
                raise ArtifactError(f"{MANIFEST} is damaged: hashes of {name} are missing")
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="fastgen-hash")
        names = [name for name in expected if not (skips_weights and is_weights(name))]
        smallest_first = sorted(names, key=lambda name: expected[name].bytes)
        self._hashes: dict[str, list[Future[str]]] = {
            name: [
                self._pool.submit(_hash, path / name, part) for part in _parts(expected[name].bytes)
            ]
            for name in smallest_first
        }
        self._pool.shutdown(wait=False)

    def wait(self, name: str) -> Path:
        """The path of a file, once its content is known to be what was exported.

        Raises: ArtifactError.
        """
        if name not in self._hashes:
            raise ArtifactError(f"{self.path} has no {name}")
        if tuple(each.result() for each in self._hashes[name]) != self.manifest.files[name].sha256:
            raise ArtifactError(
                f"{self.path / name} was changed: its SHA-256 is not the one in {MANIFEST}"
            )
        return self.path / name

    def wait_all(self, progress: Progress | None = None) -> None:
        """Compare every file. Raises: ArtifactError."""
        parts = [part for each in self._hashes.values() for part in each]
        for done, part in enumerate(parts):
            if progress is not None:
                progress("files compared", done, len(parts))
            part.result()
        for name in self._hashes:
            self.wait(name)

    def cancel(self) -> None:
        """Compare nothing more."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def is_weights(name: str) -> bool:
    """Whether a file of a folder holds the weights, or part of them, or is their index."""
    return name.startswith("model") and ".safetensors" in name


def check_folder(path: str | os.PathLike) -> Manifest:
    """Whether a folder is, to the byte, what was exported: its manifest.

    Raises: ArtifactError.
    """
    folder = CheckedFolder(Path(path))
    folder.wait_all()
    return folder.manifest


def _read_manifest(path: Path, found: dict[str, int]) -> Manifest:
    if MANIFEST not in found:
        raise ArtifactError(f"{path} lacks {MANIFEST}; give a folder that fastgen.export wrote")
    if found[MANIFEST] > _MAX_MANIFEST_BYTES:
        raise ArtifactError(f"{path / MANIFEST} has {found[MANIFEST]} bytes and is none")
    try:
        text = (path / MANIFEST).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path / MANIFEST} is damaged: it is no UTF-8") from error
    return Manifest.from_text(text, str(path / MANIFEST))


def _files_in(path: Path, prefix: str = "") -> Iterable[tuple[str, int]]:
    """Every file below a folder: its path from there, its size. Raises: ArtifactError."""
    with os.scandir(path) as entries:
        for entry in entries:
            name, mode = f"{prefix}{entry.name}", entry.stat(follow_symlinks=False).st_mode
            if stat.S_ISLNK(mode):
                raise ArtifactError(
                    f"{entry.path} is a symbolic link; put the file itself into the folder"
                )
            if stat.S_ISDIR(mode):
                yield from _files_in(Path(entry.path), f"{name}/")
            elif stat.S_ISREG(mode):
                yield name, entry.stat().st_size
            else:
                raise ArtifactError(f"{entry.path} is neither a file nor a folder")


def _check_name(name: str) -> None:
    parts = PurePosixPath(name).parts
    if not parts or name != "/".join(parts) or ".." in parts or "/" in parts or "\\" in name:
        raise ArtifactError(f"{MANIFEST} names {name!r}, which is no path inside the folder")
