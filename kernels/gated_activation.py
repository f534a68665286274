"""The product in a gated feed-forward layer: act(gate) * up.

    silu_mul: gate * sigmoid(gate) * up
    gelu_mul: gate * Phi(gate) * up, Phi the normal distribution or its tanh approximation

Source: Shazeer 2020, arXiv:2002.05202 (SwiGLU, GEGLU); GELU: Hendrycks and Gimpel 2016,
arXiv:1606.08415.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import cpu, gpu
from .registry import CallSite, register
from .rows import rows_of

_SILU_MUL = cpu.Kernel("silu_mul", "piipiipiiiiib")
_GELU_TANH_MUL = cpu.Kernel("gelu_tanh_mul", "piipiipiiiiib")


def silu_mul_reference(gate, up):
    return (F.silu(gate) * up).contiguous()


def gelu_mul_reference(gate, up, tanh):
    return (F.gelu(gate, approximate="tanh" if tanh else "none") * up).contiguous()


def check_gate(gate: torch.Tensor, up: torch.Tensor) -> None:
    """Raise ValueError unless the two have one shape and dtype."""
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            "gate and up must have one shape and dtype, got "
            f"{list(gate.shape)} {gate.dtype} and {list(up.shape)} {up.dtype}"
        )


@torch.library.custom_op("fastgen::silu_mul", mutates_args=())
def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up.

    Args:
        gate, up: [..., intermediate_size] of one dtype, fp16/bf16/fp32, any strides (they may be
            the halves of one tensor).
    Returns: their shape and dtype, contiguous.
    Raises: ValueError if shapes or dtypes differ.
    Numerics: the activation in fp32, rounded to the dtype; then the product, rounded.
    """
    check_gate(gate, up)
    return silu_mul_reference(gate, up)


@torch.library.custom_op("fastgen::gelu_mul", mutates_args=())
def gelu_mul(gate: torch.Tensor, up: torch.Tensor, tanh: bool) -> torch.Tensor:
    """gelu(gate) * up.

    Args:
        gate, up: as in `silu_mul`. tanh: The tanh approximation of GELU.
    Returns: their shape and dtype, contiguous.
    Raises: ValueError if shapes or dtypes differ.
    Numerics: as `silu_mul`.
    """
    check_gate(gate, up)
    return gelu_mul_reference(gate, up, tanh)


@silu_mul.register_fake
def _(gate, up):
    check_gate(gate, up)
    return gate.new_empty(gate.shape)


@gelu_mul.register_fake
def _(gate, up, tanh):
    check_gate(gate, up)
    return gate.new_empty(gate.shape)


def _gated_cpu(kernel: cpu.Kernel, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    output = gate.new_empty(gate.shape)
    rows = rows_of(gate, up, output)
    if rows is None:
        return _gated_cpu(kernel, gate.contiguous(), up.contiguous())
    outer, inner, strides = rows
    kernel[gate.dtype](
        gate.data_ptr(),
        *strides[0],
        up.data_ptr(),
        *strides[1],
        output.data_ptr(),
        *strides[2],
        outer,
        inner,
        gate.shape[-1],
        cpu.num_threads(),
    )
    return output


@cpu.recordable
def silu_mul_cpu(gate, up):
    return _gated_cpu(_SILU_MUL, gate, up)


@cpu.recordable
def gelu_mul_cpu(gate, up, tanh):
    return _gated_cpu(_GELU_TANH_MUL, gate, up)


def cpu_refuses(call: CallSite) -> str | None:
    if call.args.get("tanh") is False:
        return "the exact GELU needs erf"
    return cpu.refuses(call, "gate")


def _gated_triton(activation: str, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    from .gpu.gated_activation import launch_of

    output = gate.new_empty(gate.shape)
    launch = launch_of(gate, up, output, activation)
    if launch is None:
        return _gated_triton(activation, gate.contiguous(), up.contiguous())
    launch.run()
    return output


def silu_mul_triton(gate, up):
    return _gated_triton("silu", gate, up)


def gelu_mul_triton(gate, up, tanh):
    return _gated_triton("gelu_tanh" if tanh else "gelu", gate, up)


def triton_refuses(call: CallSite) -> str | None:
    return gpu.refuses(call, "gate")


register("fastgen::silu_mul", "reference", silu_mul_reference)
register("fastgen::silu_mul", "cpu", silu_mul_cpu, cpu_refuses, batch_invariant=True)
register("fastgen::silu_mul", "triton", silu_mul_triton, triton_refuses)
register("fastgen::gelu_mul", "reference", gelu_mul_reference)
register("fastgen::gelu_mul", "cpu", gelu_mul_cpu, cpu_refuses, batch_invariant=True)
register("fastgen::gelu_mul", "triton", gelu_mul_triton, triton_refuses)
