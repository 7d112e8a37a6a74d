"""Losses and scores of a run as one picture, from the numbers that Lightning's CSVLogger wrote."""

from __future__ import annotations

import csv
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from detpipe.pictures.figures import new_figure, plain_axes, save_figure
from detpipe.support.errors import DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = tuple[list[float], list[float]]  # x in epochs that have passed, y

_TRAIN, _VAL, _OTHER = "#2f6fde", "#e4572e", "#2ca25f"
_SCORES = {  # title of the panel -> column, name in the legend, color
    "mean average precision": (("AP", "AP", _TRAIN), ("AP50", "AP50", _OTHER), ("mAP", "mAP", _TRAIN)),
    "accuracy": (("top1", "top-1", _TRAIN), ("top5", "top-5", _OTHER)),
}
_COLORS = (_TRAIN, _OTHER, _VAL)  # of scores that are not listed above


def plot_curves(metrics_csv: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    """Plot losses and scores over epochs, two panels in one PNG that is complete when it is visible.

    The table is what Lightning's CSVLogger writes: columns ``epoch``, ``step``, ``train/loss``, ``val/loss``, and scores in 0..1
    named ``val/...``, of those that are not known by name up to three; most cells of a row are empty.

    Raises:
        DataError: the file is missing, has no rows yet, or a cell is not a number.
        UsageError: matplotlib is not installed.
    """
    figure = new_figure(11, 4.2, "curves")
    columns = _read_metrics(Path(metrics_csv))
    losses, scores = figure.subplots(1, 2)
    _plot_losses(losses, columns)
    kind, named = _scores(columns)
    for name, shown, color in named:
        if f"val/{name}" in columns:
            x, y = columns[f"val/{name}"]
            scores.plot(x, y, color=color, linewidth=1.8, marker="o", markersize=4, label=f"{shown}, best {max(y):.3f}")
    scores.set_ylim(0, 1)
    for axes, title in ((losses, "loss"), (scores, f"{kind}, validation split")):
        axes.set_title(title, loc="left")
        axes.set_xlabel("epoch")
        plain_axes(axes)
        if axes.lines:
            axes.set_xlim(left=0)
            axes.legend(frameon=False)
        else:
            axes.text(0.5, 0.5, "nothing logged yet", transform=axes.transAxes, ha="center", color="gray")
    save_figure(figure, out)


def _scores(columns: dict[str, Points]) -> tuple[str, tuple[tuple[str, str, str], ...]]:
    """The title of the panel of scores, and what is in it: column, name in the legend, color."""
    for kind in ("accuracy", "mean average precision"):
        if any(f"val/{name}" in columns for name, _, _ in _SCORES[kind]):
            return kind, _SCORES[kind]
    others = [name.removeprefix("val/") for name in columns if name.startswith("val/") and name != "val/loss"]
    if not others:
        return "mean average precision", ()
    named = tuple((name, name.replace("_", " "), color) for name, color in zip(others, _COLORS, strict=False))
    return "scores", named


def _plot_losses(axes: Axes, columns: dict[str, Points]) -> None:
    """Training and validation loss; the noise of single steps stays visible behind their running mean."""
    names = [name for name in ("train/loss", "train/loss_step", "train/loss_epoch") if name in columns]
    if names:
        x, y = columns[names[0]]
        if len(x) > 60:
            axes.plot(x, y, color=_TRAIN, alpha=0.25, linewidth=0.8)
            axes.plot(x, _running_mean(y, len(y) // 30), color=_TRAIN, linewidth=1.8, label="train (running mean)")
        else:
            axes.plot(x, y, color=_TRAIN, linewidth=1.8, marker="o", markersize=4, label="train")
    if "val/loss" in columns:
        axes.plot(*columns["val/loss"], color=_VAL, linewidth=1.8, marker="o", markersize=4, label="val")
    if axes.lines:
        # a spike in the first steps must not flatten the rest; rewards may take a loss below 0
        values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axes.lines])
        low, high = min(0.0, float(values.min())), 1.15 * float(np.quantile(values, 0.98))
        axes.set_ylim(low, high if high > low else low + 1)


def _read_metrics(path: Path) -> dict[str, Points]:
    """Each column that has values: where, in epochs that have passed, and what. NaN and infinities are left out."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist: a run writes it when it logs the first losses") from error
    cells: list[tuple[str, float, float, float]] = []  # column, epoch, step, value
    for line, row in enumerate(rows, start=2):
        try:
            numbers = {name: float(text) for name, text in row.items() if name and text}
        except ValueError as error:
            raise DataError(f"{path} line {line}: {error}; expected a number in each cell") from error
        if "epoch" in numbers and "step" in numbers:
            cells += [(name, numbers["epoch"], numbers["step"], value) for name, value in numbers.items()]
    if not cells:
        raise DataError(f"{path} has no rows with epoch and step: nothing has been logged yet")
    # an epoch that has just begun has few steps, so the whole ones are those with the most
    steps = max((step + 1) / (epoch + 1) for _, epoch, step, _ in cells)
    columns: dict[str, Points] = {}
    for name, _, step, value in cells:
        if math.isfinite(value):
            x, y = columns.setdefault(name, ([], []))
            x.append((step + 1) / steps)
            y.append(value)
    return columns


def _running_mean(values: list[float], window: int) -> list[float]:
    sums, ends = np.cumsum([0.0, *values]), np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return ((sums[ends] - sums[starts]) / (ends - starts)).tolist()
