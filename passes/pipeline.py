"""The passes in order, each run on a copy that is committed or thrown away."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from ..kernels import gpu
from .cache_latent import cache_latent
from .canonicalize import canonicalize
from .fuse_gated_activation import fuse_gated_activation
from .fuse_rms_norm import fuse_rms_norm
from .fuse_rope import fuse_rope
from .fuse_rope_store import fuse_rope_store
from .graph import CapturedGraph, fake_mode_of
from .insert_paged_cache import insert_paged_cache
from .merge_linears import merge_linears
from .pack_gated_linears import pack_gated_linears
from .pack_linears import pack_linears
from .report import PassReport, Report

logger = logging.getLogger("fastgen")


class RequiredPassError(ValueError):
    """A pass that the rest relies on could not do its work; `__cause__` says why."""


@dataclass(frozen=True)
class Pass:
    """A rewrite: `run` changes the graph it is given and returns its report.

    A required pass cannot be switched off, and its failure is the caller's error. only_on:
    whether it is for graphs on a device, None: for all.
    """

    run: Callable[[CapturedGraph], PassReport]
    required: bool = False
    only_on: Callable[[torch.device], bool] | None = None

    @property
    def name(self) -> str:
        return self.run.__name__

    def runs_on(self, device: torch.device) -> bool:
        """Whether it is for graphs on this device."""
        return self.only_on is None or self.only_on(device)


def _reads_latents(device: torch.device) -> bool:
    """Whether latents are read faster than expanded keys; of the meta device nothing is known."""
    return device.type in ("cpu", "meta")


PASSES: tuple[Pass, ...] = (
    Pass(canonicalize, required=True),
    Pass(merge_linears),
    Pass(fuse_rms_norm),
    Pass(fuse_rope),
    Pass(fuse_gated_activation),
    Pass(cache_latent, only_on=_reads_latents),
    Pass(pack_gated_linears),
    Pass(pack_linears),
    Pass(insert_paged_cache, required=True),
    Pass(fuse_rope_store, only_on=gpu.runs_on),
)


def run_passes(
    captured: CapturedGraph, passes_off: Sequence[str] = (), passes: Sequence[Pass] = PASSES
) -> tuple[CapturedGraph, Report]:
    """Run the passes over a copy of `captured`, which stays as it is.

    Every pass runs on a copy that is committed if its graph lints. Then the result is checked
    once as a whole on fake tensors; if that fails, the passes run again with a check after each,
    so that the one at fault is found. A pass that raises or fails its check is rolled back: named
    in the report and logged if it is optional, raised if it is required.

    Raises: ValueError if passes_off names an unknown or a required pass.
    """
    optional = [item.name for item in passes if not item.required]
    for name in passes_off:
        if name not in optional:
            raise ValueError(f"passes_off may name {', '.join(optional)}; got {name!r}")
    current, report = _run(captured, passes_off, passes, check_each=False)
    try:
        check_values(captured, current)
    except Exception as error:
        logger.debug("the rewritten graph does not check (%s); looking for the pass", error)
        current, report = _run(captured, passes_off, passes, check_each=True)
    return current, report


def _run(
    captured: CapturedGraph, passes_off: Sequence[str], passes: Sequence[Pass], check_each: bool
) -> tuple[CapturedGraph, Report]:
    report, current = Report(), captured
    device = _device_of(captured)
    for item in passes:
        if item.name in passes_off:
            report.passes.append(PassReport(item.name, status="off"))
            continue
        if not item.runs_on(device):
            report.passes.append(PassReport(item.name, status=f"not for {device.type}"))
            continue
        start = time.perf_counter()
        candidate = current.copy()
        try:
            result = item.run(candidate)
            check_form(candidate)
            if check_each:
                check_values(current, candidate)
        except Exception as error:
            if item.required:
                raise RequiredPassError(f"{item.name}: {error}") from error
            logger.warning("pass %s failed and was rolled back: %s", item.name, error)
            result = PassReport(item.name, status="rolled back")
            result.refuse("the whole graph", f"{type(error).__name__}: {error}")
            candidate = current
        result.seconds = time.perf_counter() - start
        report.passes.append(result)
        current = candidate
    return current, report


def _device_of(captured: CapturedGraph) -> torch.device:
    """Where the graph's inputs are."""
    values = (node.meta["val"] for node in captured.placeholders())
    return next(value.device for value in values if isinstance(value, torch.Tensor))


def check_form(graph: CapturedGraph) -> None:
    """The graph is well formed and its inputs are the ones that are named."""
    graph.graph.lint()
    names = [node.name for node in graph.placeholders()]
    assert names == list(graph.inputs), f"inputs {list(graph.inputs)} do not name {names}"


def _fixed_sizes(value: torch.Tensor | torch.SymInt) -> list[torch.SymInt]:
    """Of an input, the sizes that were symbols once and are numbers now; torch.compile's graphs
    have sizes as inputs of their own."""
    sizes = value.shape if isinstance(value, torch.Tensor) else [value]
    return [s for s in sizes if isinstance(s, torch.SymInt) and s.node.expr.is_number]


def check_values(before: CapturedGraph, after: CapturedGraph) -> None:
    """Rerun the graph on fake tensors; the outputs must keep their shapes and dtypes.

    Every node's fake value is made anew on the way. Sizes that vary must go on doing so: an op that
    torch knows no symbolic sizes for fixes them, for every graph of the capture.
    """
    old_dtypes, old_shapes = before.output_form()
    after.module.recompile()
    values = [node.meta["val"] for node in after.placeholders()]
    mode = fake_mode_of(after.placeholders())
    with enable_python_dispatcher():  # as in the capture: polar, for one, is symbolic only there
        FakeTensorProp(after.module, mode).propagate_dont_convert_inputs(*values)
    for node, value in zip(after.placeholders(), values, strict=True):
        fixed = _fixed_sizes(value)
        assert not fixed, f"{node.name} was of any length, and is now of {fixed[0]}"
    dtypes, shapes = after.output_form()
    assert old_dtypes == dtypes, f"outputs were {old_dtypes}, are {dtypes}"
    assert str(old_shapes) == str(shapes), f"outputs were {old_shapes}, are {shapes}"
