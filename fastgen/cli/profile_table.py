"""The tables and the picture of `fastgen bench --profile`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..bench.profile import DECODE, PROMPT

_TITLES = {DECODE: "decode steps", PROMPT: "prompt steps", "workload": "workload"}
_NUM_OPS = 8


def show_profile(result: dict[str, Any], heading: str) -> None:
    """Parts of a step's time, rooflines, and the ops that take most."""
    from rich.console import Console

    console = Console()
    machine = result["machine"]
    console.print(heading)
    console.print(
        f"machine: reads {machine['read_gb_per_s']:.1f} GB/s, GEMM "
        f"{machine['gemm_tflop_per_s']:.2f} TFLOP/s; watched {result['seconds']:.2f} s, as it is "
        f"{result['plain_seconds']:.2f} s: watching costs {result['overhead']:.1%}"
    )
    kinds = {kind: result[kind] for kind in _TITLES if kind in result}
    console.print(_parts_table(kinds))
    console.print(_roofline_table(kinds))
    whole = result["workload"]
    top = list(whole["ops"].items())[:_NUM_OPS]
    listed = ", ".join(f"{op} {spent / whole['seconds']:.1%}" for op, spent in top)
    console.print(f"ops by time: {listed}")


def _parts_table(kinds: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(caption="milliseconds per step, seconds of the workload")
    table.add_column("part", no_wrap=True)
    for kind, row in kinds.items():
        table.add_column(
            f"{_TITLES[kind]}\n{row['steps']} steps\n{row['tokens']} tokens", justify="right"
        )
    parts = list(kinds["workload"]["parts"])
    for part in (*parts, "together"):
        cells = []
        for kind, row in kinds.items():
            if part != "together" and part not in row["parts"]:
                cells.append("")
                continue
            spent = row["seconds"] if part == "together" else row["parts"][part]
            shown = f"{spent:.2f} s" if kind == "workload" else f"{spent / row['steps'] * 1e3:.2f}"
            cells.append(f"{shown} {spent / row['seconds']:6.1%}")
        table.add_row(part, *cells, end_section=part == parts[-1])
    return table


def _roofline_table(kinds: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(caption="FLOPs and bytes by formula; shares are of the machine's limits")
    for name in ("roofline", "in", "FLOP/B", "GFLOP/s", "share", "GB/s", "share", "bound by"):
        left = name in ("roofline", "in", "bound by")
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    for op in ("GEMM", "attention"):
        for kind, row in kinds.items():
            line = row["roofline"][op]
            table.add_row(
                op,
                kind,
                f"{line['flops_per_byte']:.1f}",
                f"{line['gflop_per_s']:.1f}",
                f"{line['compute_share']:.0%}",
                f"{line['gb_per_s']:.1f}",
                f"{line['bandwidth_share']:.0%}",
                line["bound_by"],
                end_section=kind == "workload",
            )
    return table


def plot_profile(result: dict[str, Any], heading: str, path: Path) -> None:
    """Shares of a step's time by kind of step, and the roofline; the ending chooses the format.

    Raises: ImportError without matplotlib, ValueError for an unknown ending.
    """
    from matplotlib.figure import Figure

    kinds = {kind: result[kind] for kind in _TITLES if kind in result}
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    bars, lines = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_parts(bars, kinds)
    _draw_roofline(lines, kinds, result["machine"])
    figure.suptitle(heading, fontsize=9)
    figure.savefig(path)


def _draw_parts(axes: Any, kinds: dict[str, Any]) -> None:
    titles = [
        f"{_TITLES[kind]}\n"
        + (
            f"{row['seconds']:.1f} s"
            if kind == "workload"
            else f"{row['seconds'] / row['steps'] * 1e3:.1f} ms each"
        )
        for kind, row in kinds.items()
    ]
    ends = [0.0] * len(kinds)
    for part in kinds["workload"]["parts"]:
        shares = [
            max(0.0, row["parts"].get(part, 0.0)) / row["seconds"] * 100 for row in kinds.values()
        ]
        axes.barh(titles, shares, left=ends, label=part)
        ends = [end + share for end, share in zip(ends, shares, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("% of the time")
    axes.legend(fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    axes.spines[["top", "right"]].set_visible(False)


def _draw_roofline(axes: Any, kinds: dict[str, Any], machine: dict[str, float]) -> None:
    peak, bandwidth = machine["gemm_tflop_per_s"] * 1e3, machine["read_gb_per_s"]
    ridge = peak / bandwidth
    axes.plot([0.1, ridge, ridge * 10], [0.1 * bandwidth, peak, peak], color="#555555")
    for op, marker in (("GEMM", "o"), ("attention", "^")):
        for kind, row in kinds.items():
            line = row["roofline"][op]
            if kind != "workload" and line["flops"]:
                point = (line["flops_per_byte"], line["gflop_per_s"])
                axes.plot(*point, marker, label=f"{op}, {_TITLES[kind]}")
    axes.set(xscale="log", yscale="log", xlabel="FLOP/byte", ylabel="GFLOP/s")
    axes.legend(fontsize=7, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
