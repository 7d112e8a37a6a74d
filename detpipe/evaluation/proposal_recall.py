"""How many objects proposals find: recall, average recall, and best overlap.

Matching is COCO's, for proposals without classes: in their order, each takes the free object that it overlaps most, if by
enough (Lin et al., "Microsoft COCO", 2014; average recall as in Hosang et al., "What Makes for Effective Detection Proposals?",
2015). Equal to pycocotools with ``useCats=0``. Average best overlap: Uijlings et al., "Selective Search", 2013, section 5.

Crowd regions and objects that are marked as difficult are not counted.

Shapes: T thresholds, A size ranges, P proposals and G objects of an image, O objects of the data set, V numbers of boxes.

People read it as a table, and as a picture.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from detpipe.support.errors import DataError, UsageError
from detpipe.support.files import atomic_write
from detpipe.types import Annotations

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

MAX_BOXES = (10, 30, 100, 300, 1000, 2000)
IOUS = np.linspace(0.5, 0.95, 10)
SIZES = {"small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}  # square pixels, both ends in
_NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True)
class ProposalRecall:
    """What proposals find of a data set. NaN where there is no object."""

    ious: Floats  # [T]
    max_boxes: tuple[int, ...]  # [V]
    recall: Floats  # [T, V]
    recall_by_size: dict[str, Floats]  # size -> [T, V]
    recall_by_class: dict[str, Floats]  # class name -> [T, V]
    best_overlap: Floats  # [V] of an object with any of its image's proposals, on the mean
    best_overlap_by_class: dict[str, Floats]  # class name -> [V]
    num_images: int
    num_objects: int
    boxes_per_image: float

    @property
    def average_recall(self) -> Floats:
        """``[V]`` mean over the thresholds: COCO's AR."""
        return self.recall.mean(axis=0)

    @property
    def mean_best_overlap(self) -> Floats:
        """``[V]`` mean over the classes of their average best overlap: MABO."""
        rows = [row for row in self.best_overlap_by_class.values() if not np.isnan(row).any()]
        return np.mean(rows, axis=0) if rows else np.full(len(self.max_boxes), np.nan)

    def at(self, iou: float, boxes: int) -> float:
        """Recall at one threshold with one number of boxes, both out of those that were measured."""
        return float(self.recall[int(np.abs(self.ious - iou).argmin()), self.max_boxes.index(boxes)])

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON can hold it; NaN becomes None."""
        return {
            "images": self.num_images,
            "objects": self.num_objects,
            "boxes_per_image": self.boxes_per_image,
            "ious": self.ious.round(2).tolist(),
            "max_boxes": list(self.max_boxes),
            "recall": _plain(self.recall),
            "average_recall": _plain(self.average_recall),
            "average_recall_by_size": {name: _plain(rows.mean(axis=0)) for name, rows in self.recall_by_size.items()},
            "average_best_overlap": _plain(self.best_overlap),
            "mean_average_best_overlap": _plain(self.mean_best_overlap),
            "by_class": {
                name: {
                    "recall_50": _plain(rows[0]),
                    "average_recall": _plain(rows.mean(axis=0)),
                    "average_best_overlap": _plain(self.best_overlap_by_class[name]),
                }
                for name, rows in self.recall_by_class.items()
            },
        }


def evaluate_recall(
    annotations: Annotations,
    proposals: Mapping[int, npt.NDArray[np.floating]],
    max_boxes: Sequence[int] = MAX_BOXES,
    progress: Callable[[int, int], None] | None = None,
) -> ProposalRecall:
    """Measure how many objects proposals find.

    Args:
        annotations: the images and their objects.
        proposals: for each image id ``[P, 4]`` xyxy in pixels of the image, best first; each is read once.
        max_boxes: numbers of boxes an image to look at, ascending.
        progress: called with the number of images done and of all, after each.

    Returns:
        The measures.

    Raises:
        ValueError: ``max_boxes`` are not positive and ascending.
        DataError: an image has no entry, or its boxes are not finite ``[P, 4]``; the image is named.
    """
    if not max_boxes or list(max_boxes) != sorted(set(max_boxes)) or max_boxes[0] < 1:
        raise ValueError(f"max_boxes must be positive and ascending, got {list(max_boxes)}")
    ranks: dict[str, list[Ints]] = {name: [] for name in ("all", *SIZES)}
    overlaps: list[Floats] = []
    labels: list[Ints] = []
    boxes_in_all = 0
    for row in range(len(annotations)):
        boxes = boxes_of(annotations, row, proposals)
        rows = counted(annotations, row)
        objects, area = annotations.boxes[rows], annotations.area[rows]
        boxes_in_all += len(boxes)
        iou = overlap(boxes[: max_boxes[-1]], objects)
        ranks["all"].append(match(iou))
        for name, (low, high) in SIZES.items():
            ranks[name].append(match(iou[:, (area >= low) & (area <= high)]))
        overlaps.append(np.stack([iou[:count].max(axis=0, initial=0.0) for count in max_boxes]))
        labels.append(annotations.labels[rows])
        if progress is not None:
            progress(row + 1, len(annotations))
    rank, best, label = _join(ranks["all"], len(IOUS)), _join(overlaps, len(max_boxes)), _join(labels)
    of_class = {name: label == number for number, name in enumerate(annotations.class_names, start=1)}
    return ProposalRecall(
        ious=IOUS,
        max_boxes=tuple(max_boxes),
        recall=_recall(rank, max_boxes),
        recall_by_size={name: _recall(_join(ranks[name], len(IOUS)), max_boxes) for name in SIZES},
        recall_by_class={name: _recall(rank[:, chosen], max_boxes) for name, chosen in of_class.items()},
        best_overlap=_mean(best),
        best_overlap_by_class={name: _mean(best[:, chosen]) for name, chosen in of_class.items()},
        num_images=len(annotations),
        num_objects=len(label),
        boxes_per_image=boxes_in_all / max(1, len(annotations)),
    )


def boxes_of(annotations: Annotations, row: int, proposals: Mapping[int, npt.NDArray[np.floating]]) -> Floats:
    """Read the proposals of the image in a row of the annotations: ``[P, 4]``; DataError names the image."""
    image_id = int(annotations.image_ids[row])
    name = annotations.file_names[row]
    if image_id not in proposals:
        raise DataError(f"image {name} (id {image_id}) has no proposals: add them, an empty [0, 4] for none")
    boxes = np.asarray(proposals[image_id], np.float64)
    if boxes.ndim != 2 or boxes.shape[1] != 4 or not np.isfinite(boxes).all():
        raise DataError(f"image {name} (id {image_id}): proposals must be finite [P, 4], got shape {list(boxes.shape)}")
    return boxes


def counted(annotations: Annotations, row: int) -> Ints:
    """Return which rows of the boxes are objects of an image that count: neither crowd nor difficult."""
    rows = np.arange(annotations.offsets[row], annotations.offsets[row + 1])
    return rows[~(annotations.iscrowd[rows] | annotations.difficult[rows])]


def overlap(boxes: Floats, objects: Floats) -> Floats:
    """Compute the intersection over union of ``[P, 4]`` and ``[G, 4]``, rounded as pycocotools does: ``[P, G]``."""
    # from x, y, width and height, as there
    start, end = boxes[:, None, :2], (boxes[:, :2] + (boxes[:, 2:] - boxes[:, :2]))[:, None]
    other_start, other_end = objects[:, :2], objects[:, :2] + (objects[:, 2:] - objects[:, :2])
    sides = np.maximum(np.minimum(end, other_end) - np.maximum(start, other_start), 0)
    shared = sides[..., 0] * sides[..., 1]
    area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)[:, None]
    both = area + (objects[:, 2:] - objects[:, :2]).prod(axis=1) - shared
    return np.divide(shared, both, out=np.zeros_like(shared), where=both > 0)


def match(iou: Floats) -> Ints:
    """Match proposals with objects at every threshold.

    A cut of the proposals cuts the matches, so that one pass serves every number of boxes.

    Args:
        iou: ``[P, G]`` of an image, best proposals first.

    Returns:
        ``[T, G]`` the place of the proposal that took an object, a very large number for an object that none took.

    Example:
        >>> match(np.array([[0.6, 0.7], [0.6, 0.0]]))[0].tolist()
        [1, 0]
    """
    places = np.full((len(IOUS), iou.shape[1]), _NEVER)
    thresholds = np.minimum(IOUS, 1 - 1e-10)[:, None]
    for proposal in np.flatnonzero((iou >= thresholds[0]).any(axis=1)):
        fits = (places == _NEVER) & (iou[proposal] >= thresholds)
        # of equal overlaps the last object, as in pycocotools
        chosen = iou.shape[1] - 1 - np.where(fits, iou[proposal], -1.0)[:, ::-1].argmax(axis=1)
        taken = np.flatnonzero(fits.any(axis=1))
        places[taken, chosen[taken]] = proposal
    return places


def _join(parts: list[Any], rows: int | None = None) -> Any:
    """Put what belongs to the objects of all images side by side: ``[rows, O]``, or ``[O]``."""
    empty = np.zeros(0 if rows is None else (rows, 0), np.int64)
    return np.concatenate([empty, *parts], axis=-1)


def _recall(rank: Ints, max_boxes: Sequence[int]) -> Floats:
    """``[T, O]`` -> ``[T, V]``."""
    if not rank.shape[1]:
        return np.full((len(rank), len(max_boxes)), np.nan)
    return np.stack([(rank < count).mean(axis=1) for count in max_boxes], axis=1)


def _mean(best: Floats) -> Floats:
    return best.mean(axis=1) if best.shape[1] else np.full(len(best), np.nan)


def _plain(values: Floats) -> Any:
    if values.ndim > 1:
        return [_plain(row) for row in values]
    return [None if math.isnan(value) else value for value in values.tolist()]


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
