"""The C++ kernels as one shared library: compiled at first use, kept on disk, called by ctypes.

The sources include no header of torch's and take raw pointers, so that they compile in seconds,
not in a minute. They use the OpenMP runtime that torch has loaded (its symbols are global), and
with it torch's own worker threads: a second runtime would bring a second team.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

import torch

_SOURCES = (
    "isa.cpp",
    "argmax.cpp",
    "attention.cpp",
    "attention_plain.cpp",
    "attention_bf16.cpp",
    "elementwise.cpp",
    "linear.cpp",
    "program.cpp",
    "row_linear.cpp",
)
_HEADERS = (
    "amx.h",
    "attention.h",
    "attention_tile.h",
    "call.h",
    "isa.h",
    "numbers.h",
    "vectors.h",
)
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fPIC",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",  # products are rounded where the reference bodies round them
)


class MissingLibraryError(RuntimeError):
    """The kernels cannot be compiled or loaded here; str() is the reason."""


def why_missing() -> str | None:
    """Why there are no C++ kernels on this machine, or None if there are."""
    try:
        library()
    except MissingLibraryError as error:
        return str(error)
    return None


@functools.cache
def _load() -> ctypes.CDLL | MissingLibraryError:
    try:
        return ctypes.CDLL(str(_built()))
    except MissingLibraryError as error:
        return error
    except OSError as error:
        return MissingLibraryError(f"the C++ kernels cannot be loaded: {error}")


def library() -> ctypes.CDLL:
    """The compiled kernels; the first call of a machine compiles them.

    Raises: MissingLibraryError.
    """
    loaded = _load()
    if isinstance(loaded, MissingLibraryError):
        raise loaded
    return loaded


def cache_dir() -> Path:
    """Where fastgen keeps files between runs: FASTGEN_CACHE_DIR, or the user's cache folder.

    Raises: MissingLibraryError if others could write into it.
    """
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastgen"
    folder = Path(os.environ.get("FASTGEN_CACHE_DIR") or default)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise MissingLibraryError(
            f"the cache folder {folder} must belong to this user and be writable by no other; "
            "mend it or set FASTGEN_CACHE_DIR"
        )
    return folder


def _built() -> Path:
    """The library's file, compiled now if it is not there."""
    if platform.system() != "Linux":
        raise MissingLibraryError(f"C++ kernels are built on Linux, this is {platform.system()}")
    compiler = shutil.which(os.environ.get("CXX") or "g++")
    if compiler is None:
        raise MissingLibraryError("no C++ compiler (g++ or $CXX) was found")
    here = Path(__file__).parent
    digest = hashlib.sha256(repr((_FLAGS, compiler, _processor(), torch.__version__)).encode())
    for name in (*_SOURCES, *_HEADERS):
        digest.update((here / name).read_bytes())
    try:
        folder = cache_dir()
        path = folder / f"kernels-{digest.hexdigest()[:24]}.so"
        if not path.exists():
            with open(folder / "kernels.lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # who comes second finds the file
                if not path.exists():
                    _compile(compiler, [here / name for name in _SOURCES], path)
    except OSError as error:
        raise MissingLibraryError(f"the cache folder cannot be used: {error}") from error
    return path


def _compile(compiler: str, sources: list[Path], path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        objects = [f"{folder}/{source.stem}.o" for source in sources]
        for source, compiled in zip(sources, objects, strict=True):
            _run([compiler, *_FLAGS, "-c", str(source), "-o", compiled])
        # Linked without -fopenmp: what it needs of OpenMP it finds in torch's runtime.
        _run([compiler, "-shared", *objects, "-o", f"{folder}/library.so"])
        os.replace(f"{folder}/library.so", path)


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        words = result.stderr.strip().splitlines() or ["no message"]
        raise MissingLibraryError(f"the C++ kernels do not compile here: {words[0]}")


# How the flags of /proc/cpuinfo begin that name instructions; the others name faults and features
# of the system.
_INSTRUCTIONS = ("avx", "amx", "sse", "ssse", "fma", "f16c", "bmi", "adx", "abm", "popcnt", "movbe")
_INSTRUCTIONS += ("aes", "vaes", "sha", "gfni", "pclmul", "vpclmul", "sve", "asimd")


def instruction_sets() -> frozenset[str]:
    """What this processor has of what a compiler may use; the machine's name if nothing says so."""
    _, colon, flags = _processor().partition(":")
    found = frozenset(flag for flag in flags.split() if flag.startswith(_INSTRUCTIONS))
    return found if colon and found else frozenset({platform.machine()})


def _processor() -> str:
    """What the compiler may use of this processor: machine code for it runs on no other."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    except OSError:
        pass
    return platform.machine()
