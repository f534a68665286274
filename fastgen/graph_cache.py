"""Rewritten graphs on disk, so that a second start neither traces nor rewrites.

One file per key (graph_key.py) in the folder `graphs` of the cache folder: a checksum, then JSON
(graph_json.py). A file that is damaged or does not fit is as good as none.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from pathlib import Path

import torch

from .graph_json import NotCacheableError, graph_from, written
from .kernels.cpu.build import MissingLibraryError, cache_dir
from .passes import CapturedGraph, Report

logger = logging.getLogger("fastgen")

MAX_BYTES = 64 << 20  # of all files; those used longest ago go first
_SUFFIX = ".json"


def folder() -> Path:
    """Where the graphs lie. Raises: OSError."""
    try:
        path = cache_dir() / "graphs"
    except MissingLibraryError as error:
        raise OSError(str(error)) from error
    path.mkdir(mode=0o700, exist_ok=True)
    return path


def load(key: str, device: torch.device) -> tuple[CapturedGraph, Report] | None:
    """The graph and report of a key, or None. Raises nothing: a bad file is removed and named."""
    try:
        path = folder() / f"{key}{_SUFFIX}"
        content = path.read_bytes()
    except OSError:
        return None
    try:
        checksum, _, text = content.partition(b"\n")
        if checksum.decode() != hashlib.sha256(key.encode() + text).hexdigest():
            raise ValueError("the checksum is wrong")
        found = graph_from(json.loads(text), device)
        os.utime(path)  # it was used just now
    except Exception as error:  # whatever is wrong with it: the graph is captured again
        logger.warning("the cached graph %s cannot be used and is removed: %s", path, error)
        path.unlink(missing_ok=True)
        return None
    return found


def store(key: str, graph: CapturedGraph, report: Report) -> None:
    """Write a graph. Raises: NotCacheableError for what cannot be written, OSError."""
    text = json.dumps(written(graph, report)).encode()
    content = hashlib.sha256(key.encode() + text).hexdigest().encode() + b"\n" + text
    if len(content) > MAX_BYTES:
        raise NotCacheableError(f"the graph takes {len(content)} bytes")
    place = folder()
    handle, temporary = tempfile.mkstemp(dir=place)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, place / f"{key}{_SUFFIX}")
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _make_room(MAX_BYTES)


def entries() -> list[Path]:
    """The files of all graphs, the one used longest ago first. Raises: OSError."""
    used = []
    for path in folder().glob(f"*{_SUFFIX}"):
        try:
            used.append((path.stat().st_mtime_ns, path))
        except FileNotFoundError:  # another process was faster
            continue
    return [path for _, path in sorted(used)]


def _make_room(max_bytes: int) -> None:
    sizes = [(path, path.stat().st_size) for path in entries() if path.exists()]
    total = sum(size for _, size in sizes)
    for path, size in sizes:
        if total <= max_bytes:
            break
        path.unlink(missing_ok=True)
        total -= size
