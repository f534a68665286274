"""What the tests of elementwise and normalizing ops share."""

from __future__ import annotations

import pytest
import torch
from fastgen.kernels import CallSite, cpu, implementations

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)


def force(level: str) -> None:
    """Let the C++ kernels use these instructions; skip where the machine does not have them."""
    highest = cpu.ISA_LEVELS[cpu.library().highest_isa()]
    if cpu.ISA_LEVELS.index(level) > cpu.ISA_LEVELS.index(highest):
        pytest.skip(f"this machine has {highest}, not {level}")
    cpu.library().set_isa(cpu.ISA_LEVELS.index(level))


@pytest.fixture(autouse=True)
def settings_are_restored():
    """One thread unless a test says otherwise: many only wait for each other on a busy machine."""
    if cpu.why_missing() is not None:
        yield
        return
    level, threads = cpu.isa(), torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    force(level)


def every_implementation(op: str):
    """Parametrize a test by "op" itself and the names of its implementations."""
    names = ["op", *(item.name for item in implementations(op))]
    return pytest.mark.parametrize("name", names)


def call(op: str, name: str, **arguments):
    """Run the op itself or one implementation; skip what an implementation refuses."""
    overload = getattr(torch.ops.fastgen, op.removeprefix("fastgen::")).default
    if name == "op":
        return overload(**arguments)
    chosen = next(item for item in implementations(op) if item.name == name)
    device = next(value.device for value in arguments.values() if isinstance(value, torch.Tensor))
    if (why := chosen.refuses(CallSite(device, arguments))) is not None:
        pytest.skip(f"{name} refuses: {why}")
    return chosen.function(**arguments)


def assert_accurate(output: torch.Tensor, peer: torch.Tensor, exact: torch.Tensor) -> None:
    """Error against fp64 <= 2 x (error of a formula of the same dtype + eps x max)."""
    assert output.shape == exact.shape
    assert output.dtype == peer.dtype
    eps = torch.finfo(output.dtype).eps
    allowed = 2 * ((peer.double() - exact).abs().max() + eps * exact.abs().max())
    error = (output.double() - exact).abs().max()
    assert error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}"


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
