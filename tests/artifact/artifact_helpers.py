"""What the tests of artifacts share: exports of tiny models, and processes that only load."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

from fastgen.artifact.manifest import MANIFEST, Manifest

ROOT = Path(__file__).parents[2]


def read_manifest(folder: Path) -> Manifest:
    return Manifest.from_text((folder / MANIFEST).read_text())


def reseal(folder: Path, **fields) -> None:
    """Change fields of a manifest, whose checksum is right again."""
    changed = dataclasses.replace(read_manifest(folder), **fields)
    (folder / MANIFEST).write_text(changed.to_text())


def in_fresh_process(code: str, *arguments, cwd: Path) -> dict:
    """What code prints as JSON on its last line; it runs where no test module can be found."""
    child = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=cwd,
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout.splitlines()[-1])
