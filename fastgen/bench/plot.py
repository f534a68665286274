"""A picture of a bench result: one bar per engine."""

from __future__ import annotations

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
