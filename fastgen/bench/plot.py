"""Pictures of bench results: one bar per engine, or curves in panels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def plot_bars(title: str, unit: str, bars: list[tuple[str, float]], path: Path) -> None:
    """Write horizontal bars to an image file; its ending chooses the format.

    Raises: ImportError without matplotlib, ValueError for an unknown ending.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.6 * len(bars) + 1.2), layout="constrained")
    axes: Any = figure.add_subplot()
    names = [name for name, _ in bars]
    drawn = axes.barh(names, [value for _, value in bars], color="#9aa7b8")
    drawn[0].set_color("#2f6fde")
    axes.bar_label(drawn, fmt="%.4g", padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel(unit)
    figure.suptitle(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


@dataclass(frozen=True)
class Panel:
    """Curves over one axis, each named and given by its points."""

    x_label: str
    y_label: str
    curves: Mapping[str, Sequence[tuple[float, float]]]
    log_x: bool = False
    log_y: bool = False


def plot_panels(title: str, panels: Sequence[Panel], path: Path) -> None:
    """Write panels beside one another to an image file; its ending chooses the format.

    Raises: ImportError without matplotlib, ValueError for an unknown ending.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(panels), 4.2), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name, points in panel.curves.items():
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
        axes.set(xlabel=panel.x_label, ylabel=panel.y_label)
        axes.set_xscale("log" if panel.log_x else "linear")
        axes.set_yscale("log" if panel.log_y else "linear")
        if not panel.log_y:
            axes.set_ylim(bottom=0)
        axes.legend(fontsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path)
