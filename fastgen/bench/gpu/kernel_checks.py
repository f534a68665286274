"""Section `kernels`: the Triton implementation of every op against fp64, on random numbers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ... import kernels
from ...kernels.attention import attend_reference
from . import exact
from .findings import Check, Finding, checked
from .paged_step import paged_step

HEAD_SIZES = {64: 64, 80: 80, 96: 48, 128: 128, 256: 256}  # of keys -> of values
GROUPS = {7: (14, 2), 4: (8, 2), 1: (3, 3)}  # query heads of a KV head -> heads
BLOCK_SIZES = (16, 32, 64)
EPS = 1e-5
_LITTLE = ((0, 0), (1, 0), (2, 1))  # of a dry run: plain, a window, both window and sinks

Details = dict[str, Any]
Case = tuple[str, Callable[[], Details]]


def run(device: str, dtype: str, op: str) -> Iterator[Finding]:
    """op: "paged_attention", "attention", "others" or, for a dry run's few cases, "all"."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))
    of_dtype = getattr(torch, dtype)
    ops = OPS if op == "all" else [name for name in OPS if (name == op) or op == "others"]
    if op == "others":
        ops = [name for name in OPS if name not in ("paged_attention", "attention")]
    for name in ops:
        for case, function in OPS[name](device, of_dtype):
            yield checked(f"{name} {dtype} {case}", function)


def coverage() -> Iterator[Finding]:
    """No op may have a Triton implementation that nothing here runs."""
    ops = [
        name
        for name in dir(kernels)
        if isinstance(getattr(kernels, name), torch.library.CustomOpDef)  # pyright: ignore
    ]
    with_triton = {
        name
        for name in ops
        if any(item.name == "triton" for item in kernels.implementations(f"fastgen::{name}"))
    }
    yield Check(
        "every op with a Triton implementation is checked",
        with_triton == set(OPS),
        {"with_triton": sorted(with_triton), "checked": sorted(OPS)},
    )


def triton(op: str, arguments: dict[str, Any]) -> Any:
    """Run the op's Triton implementation. Raises: AssertionError if it refuses the call."""
    found = next(i for i in kernels.implementations(f"fastgen::{op}") if i.name == "triton")
    device = next(v.device for v in arguments.values() if isinstance(v, torch.Tensor))
    why = found.refuses(kernels.CallSite(device, arguments))
    assert why is None, f"Triton refuses: {why}"
    return found.function(**arguments)


def _randn(device: str, dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(device)


def _settings(device: str, dtype: torch.dtype, num_heads: int, which: int) -> tuple[str, Details]:
    plain: Details = {"window": 0, "softcap": 0.0, "sinks": None}
    sinks = _randn(device, dtype, num_heads, seed=9)
    name, changes = (
        ("plain", {}),
        ("window", {"window": 12}),
        ("softcap", {"softcap": 1.5}),
        ("sinks", {"sinks": sinks}),
        ("window and sinks", {"window": 40, "sinks": sinks}),
    )[which % 5]
    return name, {**plain, **changes}


def _attention(device: str, dtype: torch.dtype) -> Iterator[Case]:
    """One sequence: head sizes x groups, the settings in turn."""
    small = device == "cpu"
    for i, (head_dim, v_head_dim) in enumerate(HEAD_SIZES.items()):
        for j, (group, heads) in enumerate(GROUPS.items()):
            if small and (i, j) not in _LITTLE:
                continue
            name, settings = _settings(device, dtype, heads[0], i + 2 * j)
            length = (1, 63, 300)[(i + j) % 3] if not small else 20

            def case(
                heads=heads, head_dim=head_dim, v_dim=v_head_dim, settings=settings, length=length
            ):
                query = _randn(device, dtype, length, heads[0], head_dim)
                # Slices of one projection, as a merged one gives them.
                merged = _randn(device, dtype, length, heads[1], head_dim + v_dim, seed=1)
                key, value = merged.split([head_dim, v_dim], dim=2)
                given = {"query": query, "key": key, "value": value, "scale": head_dim**-0.5}
                output = triton("attention", {**given, "mask": None, **settings, "layer_idx": 0})
                return exact.accurate(
                    output,
                    attend_reference(**given, **settings),
                    exact.attention(**given, **settings),
                )

            yield f"heads of {head_dim}, group {group}, {length} tokens, {name}", case


def _paged_attention(device: str, dtype: torch.dtype) -> Iterator[Case]:
    """Head sizes x block sizes, groups and settings in turn; steps with prompts and without."""
    small = device == "cpu"
    # First and later chunks of prompts beside decodes, and a step of decodes alone.
    mixed = [(0, 37), (50, 1), (21, 20), (3, 1), (90, 1)]
    decodes = [(0, 1), (15, 1), (16, 1), (99, 1)]
    if not small:
        mixed += [(0, 300), (700, 150), (1000, 1)]
        decodes += [(63, 1), (1500, 1), (4096, 1)]
    groups = list(GROUPS.items())
    for i, (head_dim, v_head_dim) in enumerate(HEAD_SIZES.items()):
        for j, block_size in enumerate(BLOCK_SIZES):
            if small and (i, j) not in _LITTLE:
                continue
            group, heads = groups[(i + j) % 3]
            name, settings = _settings(device, dtype, heads[0], i + 2 * j)
            for kind, sequences in (("mixed", mixed), ("decodes", decodes)):

                def case(
                    sequences=sequences,
                    heads=heads,
                    head_dim=head_dim,
                    v_head_dim=v_head_dim,
                    block_size=block_size,
                    settings=settings,
                ):
                    return _check_step(
                        sequences,
                        heads=heads,
                        head_dim=head_dim,
                        v_head_dim=v_head_dim,
                        block_size=block_size,
                        dtype=dtype,
                        device=device,
                        settings=settings,
                    )

                yield (
                    f"{kind}, heads of {head_dim}, group {group}, blocks of {block_size}, {name}",
                    case,
                )


def _check_step(sequences: list[tuple[int, int]], **shape: Any) -> Details:
    step = paged_step(sequences, **shape)
    output = triton("paged_attention", step.arguments)
    step.assert_stored()
    how = {name: step.arguments[name] for name in ("scale", "window", "softcap", "sinks")}
    dense = list(zip(map(step.query, range(len(sequences))), step.keys, step.values, strict=True))
    return exact.accurate(
        output,
        torch.cat([attend_reference(*tensors, **how) for tensors in dense]),
        torch.cat([exact.attention(*tensors, **how) for tensors in dense]),
    )


def _rms_norm(device: str, dtype: torch.dtype) -> Iterator[Case]:
    yield from _norms(device, dtype, with_residual=False)


def _add_rms_norm(device: str, dtype: torch.dtype) -> Iterator[Case]:
    yield from _norms(device, dtype, with_residual=True)


def _norms(device: str, dtype: torch.dtype, with_residual: bool) -> Iterator[Case]:
    """Models round before the weight (Llama), after it (Gemma, from 1), or have none."""
    op = "add_rms_norm" if with_residual else "rms_norm"
    for shape in ((63, 80),) if device == "cpu" else ((1, 64), (63, 80), (3, 7, 128), (100, 4096)):
        for offset, cast_first, weighted in (
            (0.0, True, True),
            (1.0, False, True),
            (0.0, False, False),
        ):

            def case(shape=shape, offset=offset, cast_first=cast_first, weighted=weighted):
                input = _randn(device, dtype, *shape)
                weight = _randn(device, dtype, shape[-1], seed=1) if weighted else None
                how = {
                    "weight": weight,
                    "eps": EPS,
                    "weight_offset": offset,
                    "cast_first": cast_first,
                }
                given: Details = {"input": input, **how}
                if with_residual:
                    given["residual"] = _randn(device, dtype, *shape, seed=2)
                found = triton(op, given)
                output, total = found if with_residual else (found, input)
                if with_residual:
                    input = input + given["residual"]
                    assert torch.equal(total, input), "the sum is another"
                peer = kernels.rms_norm(input, **how)
                return exact.accurate(output, peer, exact.rms_norm(input, weight, EPS, offset))

            yield (
                f"{list(shape)}, offset {offset}, cast first {cast_first}, weight {weighted}",
                case,
            )


def _silu_mul(device: str, dtype: torch.dtype) -> Iterator[Case]:
    yield from _gated("silu_mul", device, dtype, {"silu": {}})


def _gelu_mul(device: str, dtype: torch.dtype) -> Iterator[Case]:
    yield from _gated(
        "gelu_mul", device, dtype, {"gelu": {"tanh": False}, "gelu_tanh": {"tanh": True}}
    )


def _gated(
    op: str, device: str, dtype: torch.dtype, activations: dict[str, Details]
) -> Iterator[Case]:
    for shape in ((63, 80),) if device == "cpu" else ((1, 64), (63, 80), (1, 100, 4864)):
        for activation, how in activations.items():

            def case(shape=shape, activation=activation, how=how):
                merged = 3 * _randn(device, dtype, *shape[:-1], 2 * shape[-1])
                gate, up = merged.chunk(2, dim=-1)
                peer = getattr(kernels, op)(gate, up, **how)
                output = triton(op, {"gate": gate, "up": up, **how})
                return exact.accurate(output, peer, exact.gated(activation, gate, up))

            yield f"{list(shape)} {activation}", case


def _rope(device: str, dtype: torch.dtype) -> Iterator[Case]:
    yield from _ropes(device, dtype, stored=False)


def _rope_store_kv(device: str, dtype: torch.dtype) -> Iterator[Case]:
    yield from _ropes(device, dtype, stored=True)


def _ropes(device: str, dtype: torch.dtype, stored: bool) -> Iterator[Case]:
    """Whole heads and parts of them, halves and neighbours, tables of the heads' dtype and fp32."""
    layouts = (((14, 2), 64, 64), ((8, 2), 80, 32), ((3, 3), 128, 128), ((7, 1), 256, 64))
    if device == "cpu":
        layouts = layouts[:2]
    for number, (heads, head_dim, rotary_dim) in enumerate(layouts):
        for interleaved in (False, True):
            table_dtype = torch.float32 if number % 2 else dtype
            block_size = BLOCK_SIZES[number % 3]

            def case(
                heads=heads,
                head_dim=head_dim,
                rotary_dim=rotary_dim,
                interleaved=interleaved,
                table_dtype=table_dtype,
                block_size=block_size,
            ):
                return _check_rope(
                    heads, head_dim, rotary_dim, interleaved, table_dtype, block_size, dtype,
                    device, stored,
                )  # fmt: skip

            yield (
                f"heads of {head_dim}, {rotary_dim} turned, interleaved {interleaved}, "
                f"{str(table_dtype).removeprefix('torch.')} tables",
                case,
            )


def _check_rope(
    heads: tuple[int, int],
    head_dim: int,
    rotary_dim: int,
    interleaved: bool,
    table_dtype: torch.dtype,
    block_size: int,
    dtype: torch.dtype,
    device: str,
    stored: bool,
) -> Details:
    num_tokens = 63
    angles = 100 * _randn(device, torch.float32, num_tokens, rotary_dim, seed=3)
    tables = {"cos": angles.cos().to(table_dtype), "sin": angles.sin().to(table_dtype)}
    # Of one step: a prompt's tokens, of which those in the cache already are left out.
    step = paged_step(
        [(0, num_tokens)],
        heads=heads,
        head_dim=head_dim,
        v_head_dim=head_dim,
        block_size=block_size,
        dtype=dtype,
        device=device,
        settings={},
    )
    query, key = step.arguments["query"], step.arguments["key"]
    given: Details = {"query": query, "key": key, **tables, "interleaved": interleaved}
    names = ("value", "key_cache", "value_cache", "slot_mapping")
    pages = {name: step.arguments[name] for name in names} if stored else {}
    rotated = triton("rope_store_kv" if stored else "rope", {**given, **pages})
    if stored:
        step.keys[0] = rotated[1]
        step.assert_stored()
    peers = kernels.rope(**given)
    found = [
        exact.accurate(output, peer, exact.rotated(source, **tables, interleaved=interleaved))
        for output, peer, source in zip(rotated, peers, (query, key), strict=True)
    ]
    return max(found, key=lambda details: details["error"] / details["allowed"])


OPS: dict[str, Callable[[str, torch.dtype], Iterator[Case]]] = {
    "attention": _attention,
    "paged_attention": _paged_attention,
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "silu_mul": _silu_mul,
    "gelu_mul": _gelu_mul,
    "rope": _rope,
    "rope_store_kv": _rope_store_kv,
}
