"""The recall of proposal sources for people to read: a table, and a picture."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping

from detpipe.errors import UsageError
from detpipe.evaluation.proposal_recall import ProposalRecall
from detpipe.files import atomic_write

COLORS = ("#2f6fde", "#e4572e", "#2ca25f", "#8e5bc9", "#d99a1c", "#4fb3bf", "#c2457e", "#6b6b6b")


def recall_table(reports: Mapping[str, ProposalRecall], markdown: bool = False) -> str:
    """Lay out the measures of several sources, all with the same numbers of boxes.

    Args:
        reports: name of the source -> its recall.
        markdown: write a Markdown table.

    Returns:
        A table with one line a source: boxes an image, recall at IoU .5 and average recall (AR) by number of boxes, AR of
        small, medium and large objects and best overlaps (ABO; MABO by class) with the most boxes.
    """
    counts = next(iter(reports.values())).max_boxes
    shown = [count for count in counts if count >= 100] or list(counts)
    head = ["source", "boxes", *(f"R50@{count}" for count in shown), *(f"AR@{count}" for count in shown)]
    rows = [[*head, "ARs", "ARm", "ARl", "ABO", "MABO"]]
    for name, report in reports.items():
        places = [report.max_boxes.index(count) for count in shown]
        values = [*report.recall[0, places], *report.average_recall[places]]
        values += [by_size[:, -1].mean() for by_size in report.recall_by_size.values()]
        values += [report.best_overlap[-1], report.mean_best_overlap[-1]]
        rows.append([name, f"{report.boxes_per_image:.0f}", *map(_number, values)])
    return _markdown(rows) if markdown else _aligned(rows)


def class_table(report: ProposalRecall, most: int = 20) -> str:
    """Lay out the recall of one source by class, the class that is found least first.

    Args:
        report: the recall.
        most: leave out what comes after this many classes.

    Returns:
        A table of recall at IoU .5, AR and ABO with the most boxes; classes without objects are left out.
    """
    found = [name for name, rows in report.recall_by_class.items() if not math.isnan(rows[0, -1])]
    found.sort(key=lambda name: report.recall_by_class[name][0, -1])
    rows = [["class", "R50", "AR", "ABO"]]
    for name in found[:most]:
        of_class = report.recall_by_class[name]
        values = of_class[0, -1], of_class[:, -1].mean(), report.best_overlap_by_class[name][-1]
        rows.append([name, *map(_number, values)])
    left = f"\n... and {len(found) - most} classes more" if len(found) > most else ""
    return _aligned(rows) + left


def plot_recall(reports: Mapping[str, ProposalRecall], out: str | os.PathLike[str], title: str = "") -> None:
    """Plot recall against IoU, and against the number of boxes, for all sources in one PNG.

    Args:
        reports: name of the source -> its recall, all with the same numbers of boxes.
        out: the PNG, written so that it is complete when it is visible.
        title: such as the name of the data.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("matplotlib, which draws curves, is not installed: pip install 'detpipe[train]'") from error
    figure = Figure(figsize=(14.5, 4.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    by_iou, by_count, average = figure.subplots(1, 3)
    most = next(iter(reports.values())).max_boxes[-1]
    for index, (name, report) in enumerate(reports.items()):
        style = {
            "color": COLORS[index % len(COLORS)],
            "marker": "os^Dv<>P"[index % 8],
            "markersize": 4,
            "linewidth": 1.6,
        }
        by_iou.plot(report.ious, report.recall[:, -1], label=name, **style)
        by_count.plot(report.max_boxes, report.recall[0], label=name, **style)
        average.plot(report.max_boxes, report.average_recall, label=name, **style)
    by_iou.set_title(f"recall with {most} boxes", loc="left")
    by_iou.set_xlabel("IoU that counts as found")
    by_count.set_title("recall at IoU .5", loc="left")
    average.set_title("average recall, IoU .5 to .95", loc="left")
    for axes in (by_count, average):
        axes.set_xscale("log")
        axes.set_xticks(report.max_boxes, [str(count) for count in report.max_boxes])
        axes.minorticks_off()
        axes.set_xlabel("boxes an image")
    for axes in (by_iou, by_count, average):
        axes.set_ylim(0, 1)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*by_iou.get_legend_handles_labels(), frameon=False, fontsize="small", loc="outside right center")
    with atomic_write(out) as temporary:
        figure.savefig(temporary, format="png")


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}".removeprefix("0")


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _markdown(rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, f"| --- |{' ---: |' * (len(rows[0]) - 1)}")
    return "\n".join(lines)
