"""Figures of matplotlib, which need no display."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

from detpipe.support.errors import UsageError
from detpipe.support.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# of lines side by side
COLORS = ("#2f6fde", "#e4572e", "#2ca25f", "#8e5bc9", "#d99a1c", "#4fb3bf", "#c2457e", "#6b6b6b")


def new_figure(width: float, height: float, drawn: str) -> Figure:
    """Make a figure of a size in inches; a UsageError if matplotlib, which draws what is said, is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError(f"matplotlib, which draws {drawn}, is not installed: pip install 'detpipe[train]'") from error
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plain_axes(axes: Axes, grid: Literal["both", "x", "y"] = "both") -> None:
    """Draw a faint grid behind everything, and no frame at the right and above."""
    axes.set_axisbelow(True)
    axes.grid(alpha=0.3, axis=grid)
    axes.spines[["top", "right"]].set_visible(False)


def save_figure(figure: Figure, out: str | os.PathLike[str]) -> None:
    """Write a PNG, which is complete when it is visible."""
    with atomic_write(out) as temporary:
        figure.savefig(temporary, format="png")
