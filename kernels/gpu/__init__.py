"""The Triton implementations of ops. Triton is imported when the first one is asked for."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

from ..registry import CallSite

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# What has no products compiles for older cards, too; attention would spill there.
LEAST_CAPABILITY, LEAST_FOR_PRODUCTS = (7, 5), (8, 0)
# Set before Triton is imported, this makes it run kernels in Python, on tensors of the CPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def runs_on(device: torch.device) -> bool:
    """Whether Triton's kernels may be given tensors of this device."""
    if INTERPRETED:
        return device.type == "cpu"
    return device.type == "cuda" and torch.version.hip is None


@functools.cache
def _why_missing(device: torch.device, least: tuple[int, int]) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    capability = torch.cuda.get_device_capability(device)
    if capability < least:
        return (
            f"the GPU has compute capability {capability[0]}.{capability[1]}, "
            f"this Triton kernel needs {least[0]}.{least[1]}"
        )
    return None


def refuses(call: CallSite, *tensors: str, least: tuple[int, int] = LEAST_CAPABILITY) -> str | None:
    """Why the Triton kernels cannot take a call: its device, the dtype of a tensor, no Triton."""
    if not runs_on(call.device):
        return f"the tensors are on {call.device.type}, which is not NVIDIA's"
    for name in tensors:
        tensor = call.args[name]
        if tensor is not None and tensor.dtype not in _DTYPES:
            return f"{name} is {str(tensor.dtype).removeprefix('torch.')}"
    return None if INTERPRETED else _why_missing(call.device, least)
