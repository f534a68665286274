"""Parts of bench in a process of their own: what they leave behind must not be measured."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any


def run_fresh(what: str, arguments: list[str]) -> dict[str, Any]:
    """Start `fastgen bench` again with other arguments and read the JSON that it prints last.

    Raises: ValueError with the child's own words if it fails.
    """
    command = [sys.executable, "-m", "fastgen.cli.main", "bench", *arguments]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode:
        raise ValueError(f"{what} failed: {child.stderr.strip()}")
    return json.loads(child.stdout.splitlines()[-1])
