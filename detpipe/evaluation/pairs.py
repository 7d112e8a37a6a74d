"""Which detections overlap which objects, as a list of pairs instead of a matrix that is mostly zeros.

D detections, B objects, P pairs. A group is what may be matched with each other: an image, or a class of an image.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from detpipe.evaluation.records import box_sizes

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

_BLOCK = 1 << 17  # pairs that are looked at together, so that memory stays small whatever the groups' size


@dataclass(frozen=True)
class Pairs:
    """Detections and objects of the same group, sorted by detection, then by object.

    Args:
        found: ``[P]`` row of the detection.
        objects: ``[P]`` row of the object.
        iou: ``[P]``; with a crowd region the intersection over the detection's area, as COCO does.
    """

    found: Integers
    objects: Integers
    iou: Floats


def overlapping_pairs(
    boxes: Floats,
    groups: Integers,
    object_boxes: Floats,
    object_groups: Integers,
    crowd: Flags,
    minimum: float,
) -> Pairs:
    """Find every detection and object of one group whose boxes overlap enough.

    Args:
        boxes: ``[D, 4]`` xyxy of the detections.
        groups: ``[D]``.
        object_boxes: ``[B, 4]`` xyxy.
        object_groups: ``[B]``.
        crowd: ``[B]`` regions of many objects.
        minimum: IoU from which a pair is listed, above 0.

    Returns:
        The pairs.
    """
    order = np.argsort(object_groups, kind="stable")
    in_order = object_groups[order]
    first = np.searchsorted(in_order, groups, side="left")
    counts = np.searchsorted(in_order, groups, side="right") - first
    found_rects, object_rects = _rectangles(boxes), _rectangles(object_boxes)
    parts: list[tuple[Integers, Integers, Floats]] = []
    for rows in _blocks(counts):
        pair_rows = np.repeat(rows, counts[rows])
        starts = np.cumsum(counts[rows]) - counts[rows]
        within = np.arange(len(pair_rows)) - np.repeat(starts, counts[rows])
        pair_objects = order[first[pair_rows] + within]
        iou = _intersection_over_union(found_rects[:, pair_rows], object_rects[:, pair_objects], crowd[pair_objects])
        keep = iou >= minimum
        parts.append((pair_rows[keep], pair_objects[keep], iou[keep]))
    if not parts:
        return Pairs(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
    found, objects, iou = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Pairs(found, objects, iou)


def _blocks(counts: Integers) -> Iterator[Integers]:
    """Cut the detections that have any object into runs of about ``_BLOCK`` pairs."""
    busy = np.flatnonzero(counts)
    if len(busy):
        number = np.cumsum(counts[busy]) // _BLOCK
        yield from np.split(busy, np.flatnonzero(np.diff(number)) + 1)


def _rectangles(boxes: Floats) -> Floats:
    """``[5, N]``: x1, y1, and x2, y2, area from the widths that a file gave, as COCO's evaluators compute them."""
    sizes = box_sizes(boxes)
    return np.concatenate((boxes[:, :2], boxes[:, :2] + sizes, sizes.prod(axis=1, keepdims=True)), axis=1).T.copy()


def _intersection_over_union(one: Floats, other: Floats, crowd: Flags) -> Floats:
    size = np.minimum(one[2:4], other[2:4]) - np.maximum(one[:2], other[:2])
    shared = size.clip(min=0).prod(axis=0)
    union = np.where(crowd, one[4], one[4] + other[4] - shared)
    return np.divide(shared, union, out=np.zeros_like(shared), where=shared > 0)
