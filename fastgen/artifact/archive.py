"""What lies in the archive of a compiled program, looked at before it is opened.

torch's loader takes whatever lies in such an archive: it unpacks every member, and compiles sources
if there is no library. So the members are compared with the few that `write_archive` leaves, and
the file must be one plain archive from its first byte to its last. What is in them is trusted as
code is: nothing here tells whether it does harm.
"""

from __future__ import annotations

import json
import os
import re
import stat
import struct
import zipfile
from pathlib import Path
from typing import Any

from ..errors import ArtifactError

# Member, after the archive's own folder -> the most bytes it may take.
_SMALL = 64
_LIBRARY, _OPS, _METADATA = (
    rf"data/aotinductor/model/[a-z0-9]+\.wrapper{suffix}"
    for suffix in (r"\.so", r"\.json", r"_metadata\.json")
)
_MEMBERS = {
    _LIBRARY: 256 << 20,
    _OPS: 64 << 20,  # the ops that it calls by name, if there are any
    _METADATA: 16 << 20,
    r"archive_format": _SMALL,
    r"archive_version": _SMALL,
    r"\.data/version": _SMALL,
    r"byteorder": _SMALL,
    r"\.data/serialization_id": _SMALL,
}
_KEPT = (".wrapper.so", ".wrapper.json", ".wrapper_metadata.json")
_LOCAL_HEADER, _END = b"PK\x03\x04", b"PK\x05\x06"
_ELF = b"\x7fELF"


def write_archive(files: list[str], path: Path) -> None:
    """Package what AOTInductor wrote, without its sources, which no loader needs."""
    from torch._inductor.package.package import package_aoti

    package_aoti(str(path), [file for file in files if file.endswith(_KEPT)])


def check_archive(path: Path) -> dict[str, str]:
    """Look at an archive's members; nothing is unpacked or run.

    Returns: the metadata that was written with the program.
    Raises: ArtifactError for anything else than one archive with the members of a program.
    """
    try:
        _check_ends(path)
        with zipfile.ZipFile(path) as archive:
            members = _members(path, archive)
            return _metadata(path, archive, members)
    except (OSError, zipfile.BadZipFile, struct.error, NotImplementedError, EOFError) as error:
        raise ArtifactError(f"{path} is no archive of a compiled program: {error}") from error


def _check_ends(path: Path) -> None:
    """Two readers that look for the archive in two places could find two archives."""
    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise ArtifactError(f"{path} must be a file of its own, not a link or a device")
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(4)
        file.seek(max(0, size - 22))
        end = file.read()
    if start != _LOCAL_HEADER or not end.startswith(_END):
        raise ArtifactError(f"{path} must begin and end as a zip archive does, something is around")


def _members(path: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The archive's members by what they are, each once and within its bounds."""
    found: dict[str, zipfile.ZipInfo] = {}
    folders = set()
    end = 0
    for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
        folder, _, name = info.filename.partition("/")
        kind = next((kind for kind in _MEMBERS if re.fullmatch(kind, name)), None)
        if kind is None or folder in ("", ".", "..") or info.orig_filename != info.filename:
            raise ArtifactError(f"{path} has a member that no program has: {info.filename!r}")
        folders.add(folder)
        if kind in found:
            raise ArtifactError(f"{path} has two members of one kind, {info.filename!r} is one")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise ArtifactError(f"{path}: the member {info.filename!r} must be stored as it is")
        if info.file_size > _MEMBERS[kind] or info.file_size != info.compress_size:
            raise ArtifactError(
                f"{path}: the member {info.filename!r} may take {_MEMBERS[kind]} bytes, "
                f"says {info.file_size}"
            )
        if not found and info.header_offset:
            raise ArtifactError(f"{path} must begin with its first member, something is before it")
        if info.header_offset < end:
            raise ArtifactError(f"{path}: the member {info.filename!r} lies in another one")
        end = info.header_offset + info.compress_size
        found[kind] = info
    if missing := [kind for kind in _MEMBERS if kind not in found and kind != _OPS]:
        raise ArtifactError(f"{path} lacks members of a program: {', '.join(missing)}")
    if len(folders) != 1:
        raise ArtifactError(f"{path} must have one folder, has {sorted(folders)}")
    return found


def _metadata(
    path: Path, archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo]
) -> dict[str, str]:
    library, metadata = members[_LIBRARY], members[_METADATA]
    stem = library.filename.removesuffix(".so")
    names = {_OPS: f"{stem}.json", _METADATA: f"{stem}_metadata.json"}
    if any(kind in members and members[kind].filename != name for kind, name in names.items()):
        raise ArtifactError(f"{path}: the members of the program are of several programs")
    with archive.open(library) as file:
        if file.read(4) != _ELF:
            raise ArtifactError(f"{path}: {library.filename!r} is no shared library")
    for info in members.values():  # zipfile compares checksums as it reads
        with archive.open(info) as file:
            while file.read(1 << 20):
                pass
    return _strings(path, archive.read(metadata))


def _strings(path: Path, text: bytes) -> dict[str, str]:
    try:
        values: Any = json.loads(text)
    except ValueError as error:
        raise ArtifactError(f"{path}: the metadata is no JSON: {error}") from error
    if not isinstance(values, dict) or not all(isinstance(v, str) for v in values.values()):
        raise ArtifactError(f"{path}: the metadata must map names to texts")
    return values
