"""A picture of proposal recall: against IoU, and against the number of boxes."""

from __future__ import annotations

import os
from collections.abc import Mapping

from detpipe.evaluation.proposal_recall import ProposalRecall
from detpipe.pictures.figures import COLORS, new_figure, plain_axes, save_figure


def plot_recall(reports: Mapping[str, ProposalRecall], out: str | os.PathLike[str], title: str = "") -> None:
    """Plot recall against IoU, and against the number of boxes, for all sources in one PNG that is complete when it is visible."""
    figure = new_figure(14.5, 4.4, "curves")
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    by_iou, by_count, average = figure.subplots(1, 3)
    most = next(iter(reports.values())).max_boxes[-1]
    for index, (name, report) in enumerate(reports.items()):
        style = {"color": COLORS[index % 8], "marker": "os^Dv<>P"[index % 8], "markersize": 4, "linewidth": 1.6}
        # a legend leaves out what begins with an underscore
        by_iou.plot(report.ious, report.recall[:, -1], label=f" {name}", **style)
        by_count.plot(report.max_boxes, report.recall[0], **style)
        average.plot(report.max_boxes, report.average_recall, **style)
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
        plain_axes(axes)
    figure.legend(*by_iou.get_legend_handles_labels(), frameon=False, fontsize="small", loc="outside right center")
    save_figure(figure, out)
