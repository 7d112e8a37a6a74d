"""What every protocol needs of its input: sound records, one total order, and widths without rounding noise.

I images, K classes, D detections, B boxes of the ground truth.
"""

from __future__ import annotations

from collections import Counter
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from detpipe.support.errors import DataError
from detpipe.types import Annotations, DetectionArrays


def canonical_order(detections: DetectionArrays) -> DetectionArrays:
    """Sort detections by image id, label, falling score, falling area, then x1, y1, x2, y2.

    This order is total: detections that it cannot tell apart are equal in every field. Evaluators break ties between equal
    scores by the order of arrival, which moves AP by some 1e-4; after this sort, arrival has no say. Of equal scores the larger
    box comes first, which gives the published numbers of COCO's evaluation demo and of detectron2 for the same boxes.
    """
    return detections.take(canonical_rows(detections))


def canonical_rows(detections: DetectionArrays) -> npt.NDArray[np.int64]:
    """Return ``[D]``, the rows in the order of :func:`canonical_order`."""
    rows = np.lexsort((-detections.scores, detections.labels, detections.image_ids))
    same = np.ones(max(0, len(rows) - 1), np.bool_)  # whether a row is tied with the next
    for key in (detections.image_ids, detections.labels, detections.scores):
        same &= key[rows[1:]] == key[rows[:-1]]
    tied = np.flatnonzero(np.concatenate(([False], same)) | np.concatenate((same, [False])))
    rows[tied] = rows[tied][_full_order(detections.take(rows[tied]))]  # few: only they are compared by their boxes
    return rows


def best_rows(detections: DetectionArrays) -> npt.NDArray[np.int64]:
    """Return ``[D]``, the rows image by image, best score first, ties as of :func:`canonical_order`."""
    rows = canonical_rows(detections)
    return rows[np.lexsort((-detections.scores[rows], detections.image_ids[rows]))]


def _full_order(detections: DetectionArrays) -> npt.NDArray[np.int64]:
    """Sort by all keys."""
    boxes = detections.boxes
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return np.lexsort((*boxes.T[::-1], -area, -detections.scores, detections.labels, detections.image_ids))


def rank_in_run(*keys: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Count from 0 within each run of equal keys, one or more ``[D]``."""
    size = len(keys[0])
    starts = np.ones(size, np.bool_)
    if size:
        starts[1:] = np.logical_or.reduce([key[1:] != key[:-1] for key in keys])
    first = np.flatnonzero(starts)
    return np.arange(size) - np.repeat(first, np.diff(np.append(first, size)))


def image_ranks(annotations: Annotations, image_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Number ``[D]`` images by rising id, from 0, whatever gaps the ids of the I images have."""
    return np.searchsorted(np.sort(annotations.image_ids), image_ids)


def box_image_ids(annotations: Annotations) -> npt.NDArray[np.int64]:
    """Return ``[B]``, the id of the image that each box of the ground truth lies in."""
    return np.repeat(annotations.image_ids, np.diff(annotations.offsets))


def object_ranks(annotations: Annotations) -> npt.NDArray[np.int64]:
    """Return ``[B]``, the number of the image that each box of the ground truth lies in, see :func:`image_ranks`."""
    return image_ranks(annotations, box_image_ids(annotations))


def box_sizes(boxes: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Recover the ``[D, 2]`` width and height that a file gave for xyxy boxes.

    Files hold widths, arrays hold corners, and ``(x + w) - x`` differs from ``w`` in the last bits: enough to move a
    box of exactly 32 x 32 pixels out of COCO's small objects. So where a width of at most six decimals leads to the
    same corner, that is the one; else it is the difference, which is exact for boxes that were float32. Widths of more
    decimals are had to the last bit or two only: an overlap that equals a threshold exactly may then fall on either side.
    """
    low, high = boxes[:, :2], boxes[:, 2:]
    difference = high - low
    rounded = np.round(difference, 6)
    return np.where(low + rounded == high, rounded, difference)


def check_detections(annotations: Annotations, detections: DetectionArrays) -> None:
    """Refuse detections that would be counted wrongly; a NaN score, for one, turns AP into 1.0 in COCO's evaluators.

    Raises:
        ValueError: the arrays do not have the same length, or the boxes are not ``[D, 4]``.
        DataError: an unsound record; the first is named, counted from 0.
    """
    count = len(detections.scores)
    shapes = (detections.image_ids.shape, detections.boxes.shape, detections.scores.shape, detections.labels.shape)
    if shapes != ((count,), (count, 4), (count,), (count,)):
        raise ValueError(f"image_ids [D], boxes [D, 4], scores [D] and labels [D] are needed, got shapes {shapes}")
    boxes, labels = detections.boxes, detections.labels

    def refuse(bad: npt.NDArray[np.bool_] | np.bool_, field: str, values: npt.NDArray, expected: str) -> None:
        if np.any(bad):
            first = int(np.flatnonzero(bad)[0])
            raise DataError(
                f"detection {first} (image id {detections.image_ids[first]}, label {labels[first]}): the {field} is "
                f"{values[first].tolist()}: expected {expected}; {int(bad.sum())} of {count} detections have this fault"
            )

    known = f"one of the {len(annotations)} image ids of the ground truth"
    refuse(~np.isin(detections.image_ids, annotations.image_ids), "image id", detections.image_ids, known)
    outside = (labels < 1) | (labels > annotations.num_classes)
    refuse(outside, "label", labels, f"1..{annotations.num_classes}, the classes of the ground truth")
    refuse(~np.isfinite(detections.scores), "score", detections.scores, "a finite number")
    refuse(~np.isfinite(boxes).all(axis=1), "box", boxes, "four finite numbers")
    refuse((boxes[:, 2:] < boxes[:, :2]).any(axis=1), "box", boxes, "x1, y1, x2, y2 with x2 >= x1 and y2 >= y1")


def check_annotations(annotations: Annotations) -> None:
    """Refuse ground truth that cannot be evaluated against, with a DataError: of no images or classes, or an unsound record."""
    source = str(annotations.root)
    if len(annotations) == 0:
        raise DataError(f"{source}: the ground truth holds no images: there is nothing to evaluate")
    if not annotations.class_names:
        raise DataError(f"{source}: the ground truth has no classes: there is nothing to evaluate")
    ids, counts = np.unique(annotations.image_ids, return_counts=True)
    if (counts > 1).any():
        raise DataError(f"{source}: image id {ids[counts > 1][0]} occurs more than once in the ground truth")
    twice = [name for name, count in Counter(annotations.class_names).items() if count > 1]
    if twice:
        raise DataError(f"{source}: the class name {min(twice)!r} occurs more than once: make names unique")
    boxes, labels, area = annotations.boxes, annotations.labels, annotations.area
    checks = (
        (~np.isfinite(boxes).all(axis=1), "box", boxes, "four finite numbers"),
        ((boxes[:, 2:] < boxes[:, :2]).any(axis=1), "box", boxes, "x2 >= x1 and y2 >= y1"),
        (~(np.isfinite(area) & (area >= 0)), "area", area, "a finite number of square pixels, 0 or more"),
        ((labels < 1) | (labels > annotations.num_classes), "label", labels, f"1..{annotations.num_classes}"),
    )
    for bad, field, values, expected in checks:
        if bad.any():
            _refuse_truth(annotations, int(np.flatnonzero(bad)[0]), field, values, expected)


def _refuse_truth(annotations: Annotations, row: int, field: str, values: npt.NDArray, expected: str) -> NoReturn:
    image = int(np.searchsorted(annotations.offsets, row, side="right")) - 1
    raise DataError(
        f"{annotations.root}: box {row - int(annotations.offsets[image])} of image id {annotations.image_ids[image]} "
        f"({annotations.file_names[image]}): the {field} is {values[row].tolist()}: expected {expected}"
    )
