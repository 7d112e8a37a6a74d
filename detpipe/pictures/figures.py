"""Figures of matplotlib, which need no display."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from detpipe.support.errors import UsageError
from detpipe.support.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SLIMMEST = 6  # sides of an image in this relation, 1 : 6, are shown as they are; what is slimmer is stretched across
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


def image_panels(
    count: int, size: Sequence[int], side: float, margin: float, drawn: str
) -> tuple[Figure, list[Axes], Literal["equal", "auto"]]:
    """Make a figure of panels, four in a row, each ``side`` inches wide with a margin below, for images of a size (H, W).

    The height of a panel is 1 / 6 to 6 of its width: slimmer images are stretched, by the aspect that is returned.
    """
    ratio = min(max(size[0] / size[1], 1 / SLIMMEST), SLIMMEST)
    columns = min(4, count)
    rows = -(-count // columns)
    figure = new_figure(side * columns, (side * ratio + margin) * rows, drawn)
    axes = list(figure.subplots(rows, columns, squeeze=False).flatten())
    for one in axes:
        one.set_axis_off()
    return figure, axes, "equal" if ratio == size[0] / size[1] else "auto"


def plain_axes(axes: Axes, grid: Literal["both", "x", "y"] = "both") -> None:
    """Draw a faint grid behind everything, and no frame at the right and above."""
    axes.set_axisbelow(True)
    axes.grid(alpha=0.3, axis=grid)
    axes.spines[["top", "right"]].set_visible(False)


def writable(text: object) -> str:
    """Escape what is no Unicode, the bytes of a name that is no UTF-8: files refuse it, and drawing it may end the process."""
    return str(text).encode("utf-8", "backslashreplace").decode()


def save_figure(figure: Figure, out: str | os.PathLike[str]) -> None:
    """Write a PNG, which is complete when it is visible; dollars in texts, such as names of classes, are no formulas."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)  # pyright: ignore[reportAttributeAccessIssue]
        text.set_text(writable(text.get_text()))  # pyright: ignore[reportAttributeAccessIssue]
    with atomic_write(out) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # a class name in a script without a font
        figure.savefig(temporary, format="png")
