"""The figures of a report as PNG, for slides and papers: curves, sizes, error types, confusions, calibration, comparison."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from detpipe.pictures.figures import new_figure, plain_axes, save_figure, writable
from detpipe.pictures.report_confusion import shown_classes
from detpipe.pictures.report_scores import ERROR_COLORS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OPTIONAL_FIGURES = ("calibration", "comparison")  # the others are always drawn
DRAWN = "the figures of a report"
_BLUE, _LINES = "#2456b8", 10  # classes with a curve


def require_matplotlib() -> None:
    """Fail before anything is computed if matplotlib is not installed, with a UsageError."""
    new_figure(1, 1, DRAWN)


def write_figures(numbers: dict[str, Any], folder: Path) -> list[Path]:
    """Draw what there is to draw of the numbers of an analysis, as PNG files that appear when they are complete."""
    shown = min(len(numbers["class_names"]), 25) + 1
    figures: dict[str, tuple[float, float, Callable[[Figure, dict[str, Any]], None]]] = {
        "pr_curves": (13, 4.6, _curves),
        "ap_by_size": (6, 3.4, _sizes),
        "error_types": (7.5, 3.6, _errors),
        "confusion": (2.8 + 0.34 * shown, 2.2 + 0.32 * shown, _confusion),
    }
    if numbers["calibration"] is not None:
        figures["calibration"] = (5, 4.6, _calibration)
    if numbers["comparison"] is not None:
        count = len(numbers["comparison"]["runs"]) - 1
        figures["comparison"] = (7.5, 1.4 + 0.9 * count, _comparison)
    for name, (width, height, draw) in figures.items():
        figure = new_figure(width, height, DRAWN)
        draw(figure, numbers)
        save_figure(figure, folder / f"{name}.png")
    return [folder / f"{name}.png" for name in figures]


def _curves(figure: Figure, numbers: dict[str, Any]) -> None:
    left, right = figure.subplots(1, 2)
    run = numbers["curves"][numbers["run"]]
    levels = np.linspace(0, 1, len(run["precision"][0][0]))
    for index, iou in enumerate(numbers["iou_thresholds"]):
        color = (0.1, 0.25 + 0.06 * index, 0.75 - 0.05 * index)
        _line(left, levels, run["precision"][0][index], f"IoU {iou:.2f}: {_short(run['AP'][0][index])}", color)
    _plain(left, "mean over classes, by IoU (AP)")
    objects = [-one["objects"] for one in numbers["per_class"]]
    chosen = sorted(np.argsort(objects, kind="stable")[:_LINES].tolist())
    for place, row in enumerate(chosen):
        name = numbers["class_names"][row]
        # a legend leaves out what begins with an underscore
        label = f" {_cut(name)}: {_short(run['AP'][row + 1][0])}"
        _line(right, levels, run["precision"][row + 1][0], label, f"C{place}")
    some = "classes" if len(chosen) == len(objects) else f"{len(chosen)} classes with most objects"
    _plain(right, f"{some}, IoU 0.50 (AP50)")
    for axes in (left, right):
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
        axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _line(axes: Axes, levels: Any, curve: list[float | None], label: str, color: Any) -> None:
    axes.plot(levels, np.array(curve, np.float64), color=color, linewidth=1.6, label=label)


def _sizes(figure: Figure, numbers: dict[str, Any]) -> None:
    axes = figure.subplots()
    rows = numbers["sizes"]
    for shift, key, color in ((-0.2, "AP", _BLUE), (0.2, "AP50", "#9db8ea")):
        values = [one[key] or 0 for one in rows]
        bars = axes.bar(np.arange(len(rows)) + shift, values, 0.38, color=color, label=key)
        axes.bar_label(bars, [_short(one[key]) for one in rows], fontsize=8)
    axes.set_xticks(range(len(rows)), [f"{one['name']}\n{one['objects']} objects" for one in rows])
    axes.set_ylim(0, 1.08)
    axes.legend(frameon=False, fontsize=8, loc="upper right", ncols=2)
    _plain(axes, "average precision by size", "y")


def _errors(figure: Figure, numbers: dict[str, Any]) -> None:
    axes = figure.subplots()
    rows = numbers["errors"]["types"][::-1]
    gains = [one["gain"] or 0 for one in rows]
    bars = axes.barh([one["name"] for one in rows], gains, color=[ERROR_COLORS[one["name"]] for one in rows])
    axes.bar_label(bars, [f" {_short(one['gain'])} ({one['count']})" for one in rows], fontsize=8)
    axes.set_xlim(0, 1.3 * max([*gains, 0.01]))
    axes.set_xlabel("AP50 that mending all errors of this type would give back (errors)")
    _plain(axes, f"where AP50 of {_short(numbers['errors']['AP50'])} is lost", "x")


def _confusion(figure: Figure, numbers: dict[str, Any]) -> None:
    axes = figure.subplots()
    counts = np.array(numbers["confusion"])
    places = [*shown_classes(counts), len(counts) - 1]
    names = [_cut(numbers["class_names"][place]) for place in places[:-1]]
    part = (counts / np.maximum(counts.sum(axis=1, keepdims=True), 1))[np.ix_(places, places)]
    axes.imshow(part, cmap="Blues", vmin=0, vmax=1)
    for row, column in zip(*np.nonzero(part), strict=True):
        ink = "white" if part[row, column] > 0.5 else "black"
        count = counts[places[row], places[column]]
        axes.text(column, row, str(count), ha="center", va="center", fontsize=7, color=ink)
    axes.set_xticks(range(len(places)), [*names, "not found"], rotation=90, fontsize=8)
    axes.set_yticks(range(len(places)), [*names, "background"], fontsize=8)
    axes.set(xlabel="detected", ylabel="truth")
    score = numbers["operating_point"]["score"]
    axes.set_title(f"confusions, score at least {score:.3f}, IoU 0.50", loc="left", fontsize=10)


def _calibration(figure: Figure, numbers: dict[str, Any]) -> None:
    axes = figure.subplots()
    diagram = numbers["calibration"]["diagrams"][0]
    bins, total = len(diagram["counts"]), max(sum(diagram["counts"]), 1)
    edges = (np.arange(bins) + 0.5) / bins
    axes.bar(edges, np.array(diagram["counts"]) / total, 0.9 / bins, color="#cfd5dd", label="part of the detections")
    axes.plot([0, 1], [0, 1], color="#6c747e", linestyle="--", linewidth=1)
    scores, precision = (np.array(diagram[key], np.float64) for key in ("scores", "precision"))
    axes.plot(scores, precision, "o-", color=_BLUE, label="precision")
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="score", ylabel="precision at IoU 0.50")
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    _plain(axes, f"expected calibration error {_short(diagram['error'])}")


def _comparison(figure: Figure, numbers: dict[str, Any]) -> None:
    axes = figure.subplots()
    found = numbers["comparison"]
    labels: list[str] = []
    for run in found["runs"][1:]:
        for metric, one in run["difference"].items():
            if one["value"] is None or one["low"] is None:
                continue
            place = len(labels)
            axes.plot([one["low"], one["high"]], [place, place], color=_BLUE, linewidth=3)
            axes.plot([one["value"]], [place], "o", color="black")
            labels.append(f"{_cut(run['name'])}, {metric}")
    axes.axvline(0, color="#888888", linestyle="--", linewidth=1)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylim(max(len(labels), 1) - 0.5, -0.5)
    axes.set_xlabel(f"difference, {100 * found['confidence']:g}% interval")
    _plain(axes, f"against {_cut(found['baseline'])}", "x")


def _plain(axes: Axes, title: str, grid: Any = "both") -> None:
    axes.set_title(_cut(title, 90), loc="left", fontsize=10)
    plain_axes(axes, grid)


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _cut(name: str, length: int = 28) -> str:
    name = writable(name)
    return name if len(name) <= length else name[: length - 1] + "…"
