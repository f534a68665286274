"""Which machine a figure was measured on, told without touching its GPU from this process."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from typing import Any

from ..._version import __version__

_QUERY = (
    "name",
    "driver_version",
    "memory.total",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "power.draw",
    "power.limit",
    "temperature.gpu",
)


def describe_machine(device: str) -> dict[str, Any]:
    """The device, its clocks and power as they are now, and versions."""
    versions = {"python": platform.python_version(), "fastgen": __version__}
    for package in ("torch", "triton", "transformers"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {"device": device, **_card(device), "cpu_cores": os.cpu_count(), "versions": versions}


def _card(device: str) -> dict[str, str]:
    if device != "cuda":
        return {"name": platform.processor() or platform.machine()}
    command = ["nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader", "--id=0"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        return {"name": f"not told: {error}"}
    return dict(zip(_QUERY, (word.strip() for word in told.stdout.split(",")), strict=False))
