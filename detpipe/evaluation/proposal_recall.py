"""How many objects proposals find: recall, average recall, and best overlap.

Matching is COCO's (:mod:`detpipe.evaluation.matches`), for proposals without classes, best first (Lin et al., "Microsoft COCO",
2014; average recall as in Hosang et al., "What Makes for Effective Detection Proposals?", 2015). Equal to pycocotools
with ``useCats=0``. Average best overlap: Uijlings et al., "Selective Search", 2013, section 5.

Crowd regions and objects that are marked as difficult are not counted.

Shapes: T thresholds, A size ranges, P proposals and G objects of an image, O objects of the data set, V numbers of boxes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from detpipe.evaluation.matches import (
    AREAS,
    IOU_THRESHOLDS,
    Floats,
    ignored_objects,
    overlapping_pairs,
    take_best,
)
from detpipe.evaluation.table import aligned, plain
from detpipe.support.errors import DataError
from detpipe.types import Annotations

MAX_BOXES = (10, 30, 100, 300, 1000, 2000)
IOUS = IOU_THRESHOLDS
SIZES = tuple(AREAS)[1:]
_NEVER = np.iinfo(np.int32).max
_IMAGES = 128  # that are matched together


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
        return plain(
            {
                "images": self.num_images,
                "objects": self.num_objects,
                "boxes_per_image": self.boxes_per_image,
                "ious": self.ious.round(2),
                "max_boxes": self.max_boxes,
                "recall": self.recall,
                "average_recall": self.average_recall,
                "average_recall_by_size": {name: rows.mean(axis=0) for name, rows in self.recall_by_size.items()},
                "average_best_overlap": self.best_overlap,
                "mean_average_best_overlap": self.mean_best_overlap,
                "by_class": {
                    name: {
                        "recall_50": rows[0],
                        "average_recall": rows.mean(axis=0),
                        "average_best_overlap": self.best_overlap_by_class[name],
                    }
                    for name, rows in self.recall_by_class.items()
                },
            }
        )


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

    Raises:
        ValueError: ``max_boxes`` are not positive and ascending.
        DataError: an image has no entry, or its boxes are not finite ``[P, 4]``; the image is named.
    """
    if not max_boxes or list(max_boxes) != sorted(set(max_boxes)) or max_boxes[0] < 1:
        raise ValueError(f"max_boxes must be positive and ascending, got {list(max_boxes)}")
    ranks = [np.zeros((len(AREAS), len(IOUS), 0), np.int32)]
    overlaps = [np.zeros((len(max_boxes), 0))]
    boxes_in_all, part = 0, list[Floats]()
    for row in range(len(annotations)):
        boxes = boxes_of(annotations, row, proposals)
        boxes_in_all += len(boxes)
        part.append(boxes[: max_boxes[-1]])
        if len(part) == _IMAGES or row + 1 == len(annotations):
            found = _find(annotations.subset(np.arange(row + 1 - len(part), row + 1)), part, max_boxes)
            ranks.append(found[0])
            overlaps.append(found[1])
            part = []
        if progress is not None:
            progress(row + 1, len(annotations))
    rank, best, ignored = (
        np.concatenate(ranks, axis=2),
        np.concatenate(overlaps, axis=1),
        ignored_objects(annotations, tuple(AREAS)),
    )
    counted = ~ignored[0]
    of_class = {
        name: counted & (annotations.labels == label) for label, name in enumerate(annotations.class_names, start=1)
    }
    return ProposalRecall(
        ious=IOUS,
        max_boxes=tuple(max_boxes),
        recall=_recall(rank[0][:, counted], max_boxes),
        recall_by_size={
            name: _recall(rank[area][:, ~ignored[area]], max_boxes) for area, name in enumerate(AREAS) if area
        },
        recall_by_class={name: _recall(rank[0][:, chosen], max_boxes) for name, chosen in of_class.items()},
        best_overlap=_mean(best[:, counted]),
        best_overlap_by_class={name: _mean(best[:, chosen]) for name, chosen in of_class.items()},
        num_images=len(annotations),
        num_objects=int(counted.sum()),
        boxes_per_image=boxes_in_all / max(1, len(annotations)),
    )


def _find(
    annotations: Annotations, boxes: list[Floats], max_boxes: Sequence[int]
) -> tuple[npt.NDArray[np.int32], Floats]:
    """Match the boxes of some images; a cut of the boxes cuts the matches, so that one pass serves every number of them.

    ``[A, T, B]`` the place of the box that took an object, a very large number where none did; ``[V, B]`` best overlaps.
    """
    counts, objects = [len(part) for part in boxes], len(annotations.boxes)
    images = np.repeat(np.arange(len(boxes)), counts)
    owners = np.repeat(np.arange(len(boxes)), np.diff(annotations.offsets))
    crowd = annotations.iscrowd
    pairs = overlapping_pairs(np.concatenate(boxes), images, annotations.boxes, owners, crowd, np.finfo(float).tiny)
    places = np.concatenate([np.arange(count) for count in counts])
    taken = take_best(pairs.take(pairs.iou >= IOUS[0]), places, IOUS, crowd, ignored_objects(annotations, tuple(AREAS)))
    ranks = np.full((*taken.shape[:2], objects), _NEVER, np.int32)
    area, level, box = np.nonzero(taken >= 0)
    ranks[area, level, taken[area, level, box]] = places[box]
    best = np.zeros((len(max_boxes), objects))
    for row, most in enumerate(max_boxes):
        kept = places[pairs.found] < most
        np.maximum.at(best[row], pairs.objects[kept], pairs.iou[kept])
    return ranks, best


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


def _recall(rank: npt.NDArray[np.int32], max_boxes: Sequence[int]) -> Floats:
    """``[T, O]`` -> ``[T, V]``."""
    return np.stack([_mean(rank < count) for count in max_boxes], axis=1)


def _mean(best: npt.NDArray[Any]) -> Floats:
    return best.mean(axis=1) if best.shape[1] else np.full(len(best), np.nan)


def recall_table(reports: Mapping[str, ProposalRecall], markdown: bool = False) -> str:
    """Lay out the measures of several sources, by name and with the same numbers of boxes, a line a source.

    Boxes an image, recall at IoU .5 and average recall (AR) by number of boxes, AR of small, medium and large objects and best
    overlaps (ABO; MABO by class) with the most boxes.
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
    return aligned(rows, markdown)


def class_table(report: ProposalRecall, most: int = 20) -> str:
    """Lay out recall at IoU .5, AR and ABO with the most boxes, for the ``most`` classes with objects that are found least."""
    found = [name for name, rows in report.recall_by_class.items() if not math.isnan(rows[0, -1])]
    found.sort(key=lambda name: report.recall_by_class[name][0, -1])
    rows = [["class", "R50", "AR", "ABO"]]
    for name in found[:most]:
        of_class = report.recall_by_class[name]
        values = of_class[0, -1], of_class[:, -1].mean(), report.best_overlap_by_class[name][-1]
        rows.append([name, *map(_number, values)])
    left = f"\n... and {len(found) - most} classes more" if len(found) > most else ""
    return aligned(rows) + left


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}".removeprefix("0")
