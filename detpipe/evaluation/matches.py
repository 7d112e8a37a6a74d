"""Which detection found which object, by COCO's rules for every IoU threshold and object size at once, or by VOC's.

COCO's: best score first, each detection of an image and class takes the free object that it overlaps most; of equal overlaps the
later object. It takes an ignored object (a crowd region, a difficult object, one outside of the range of sizes) only where
no other is left, and is then ignored itself, as is what finds nothing and lies outside of the range of sizes. A crowd region
is never used up. Equal to what pycocotools computes image by image; here all images and classes take one step together.

A ranges of sizes, T IoU thresholds, D detections, B objects, P pairs of both, K classes, I images (numbered by rising id: "rank").
A group is what may be matched with each other: an image, or a class of an image.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from detpipe.evaluation.records import (
    best_rows,
    box_sizes,
    canonical_rows,
    check_annotations,
    check_detections,
    image_ranks,
    object_ranks,
    rank_in_run,
)
from detpipe.types import Annotations, DetectionArrays

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

IOU_THRESHOLDS: Floats = np.linspace(0.5, 0.95, 10)
AREAS: dict[str, tuple[float, float]] = {  # square pixels, both ends included
    "all": (0.0, 1e10),
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, 1e10),
}
_BLOCK = 1 << 17  # pairs that are looked at together, so that memory stays small whatever the groups' size
_ALMOST_ONE = 1 - 1e-10  # COCO's: two equal boxes match at a threshold of 1 in spite of rounding


@dataclass(frozen=True)
class Matches:
    """What was found, for each range of sizes and IoU threshold.

    Args:
        annotations: the ground truth of I images with B objects.
        detections: the D detections that count, class by class, best score first.
        object_ignored: ``[A, B]`` objects that need not be found.
        objects: ``[A, T, D]`` row of the object that the detection took, or -1.
        ignored: ``[A, T, D]`` detections that are neither right nor wrong.
        areas: A names of ranges of sizes.
        thresholds: ``[T]`` IoU.
    """

    annotations: Annotations
    detections: DetectionArrays
    object_ignored: Flags
    objects: npt.NDArray[np.int32]
    ignored: Flags
    areas: tuple[str, ...]
    thresholds: Floats

    def __len__(self) -> int:
        return len(self.detections.labels)

    @property
    def labels(self) -> Integers:
        """``[B]`` in 1..K, of the objects."""
        return self.annotations.labels

    @property
    def num_classes(self) -> int:
        """K."""
        return self.annotations.num_classes

    @cached_property
    def images(self) -> Integers:
        """``[D]`` rank of the image of each detection."""
        return image_ranks(self.annotations, self.detections.image_ids)

    @cached_property
    def object_images(self) -> Integers:
        """``[B]`` rank of the image of each object."""
        return object_ranks(self.annotations)

    def class_slice(self, label: int) -> slice:
        """Where the detections of a class lie; labels count from 1."""
        low, high = np.searchsorted(self.detections.labels, [label, label + 1]).tolist()
        return slice(low, high)

    def ranks(self) -> Integers:
        """``[D]`` place of each detection among those of its class and image, 0 for the best."""
        group = self.images * (self.num_classes + 1) + self.detections.labels
        order = np.argsort(group, kind="stable")
        ranks = np.empty_like(order)
        ranks[order] = rank_in_run(group[order])
        return ranks

    def true(self, area: int = 0, threshold: int = 0) -> Flags:
        """``[D]``: the detection found an object that counts."""
        return (self.objects[area, threshold] >= 0) & ~self.ignored[area, threshold]

    def false(self, area: int = 0, threshold: int = 0) -> Flags:
        """``[D]``: the detection is a false positive."""
        return (self.objects[area, threshold] < 0) & ~self.ignored[area, threshold]

    def missed(self, area: int = 0, threshold: int = 0) -> Flags:
        """``[B]``: the object counts, and nothing found it."""
        taken = self.objects[area, threshold]
        missed = ~self.object_ignored[area]
        missed[taken[taken >= 0]] = False
        return missed

    def object_counts(self, area: int = 0) -> Integers:
        """``[K]`` objects of each class that count."""
        return np.bincount(self.labels[~self.object_ignored[area]] - 1, minlength=self.num_classes)


def match(
    annotations: Annotations,
    detections: DetectionArrays,
    thresholds: Sequence[float] | Floats = IOU_THRESHOLDS,
    areas: Sequence[str] = tuple(AREAS),
    max_detections: int = 100,
    forgiven: Flags | None = None,
    by_class: bool = True,
) -> Matches:
    """Match detections, in any order, with objects, for ranges of sizes by their name in ``AREAS``.

    Args:
        annotations: the ground truth of I images.
        detections: in pixels of the original images.
        thresholds: T IoU thresholds, above 0, at most 1.
        areas: names in ``AREAS``.
        max_detections: of each class, so many of the best of an image count.
        forgiven: ``[D]``, detections that are neither right nor wrong if they match nothing (LVIS); None for none.
        by_class: match those of a class with each other; else whatever class either has, and ``max_detections`` are of an image.

    Raises:
        ValueError: a threshold out of range, or detection arrays of different lengths.
        DataError: no images, or a fault in a record, which it names.
    """
    levels = np.asarray(thresholds, np.float64)
    if not len(levels) or not ((levels > 0) & (levels <= 1)).all():
        raise ValueError(f"IoU thresholds must be above 0 and at most 1, got {levels.tolist()}")
    rows, ranks = _ordered(annotations, detections, by_class)
    rows, ranks = rows[ranks < max_detections], ranks[ranks < max_detections]
    found = detections.take(rows)
    pairs = _pairs(annotations, found, min(float(levels.min()), _ALMOST_ONE), annotations.iscrowd, by_class)
    ignored = ignored_objects(annotations, areas)
    objects = take_best(pairs, ranks, levels, annotations.iscrowd, ignored)
    pardoned = (objects < 0) & (np.False_ if forgiven is None else forgiven[rows])
    lost = _ignored_detections(objects, ignored, box_sizes(found.boxes).prod(axis=1), areas) | pardoned
    return Matches(annotations, found, ignored, objects, lost, tuple(areas), levels)


def match_voc(
    annotations: Annotations, detections: DetectionArrays, iou_threshold: float = 0.5, strict: bool = False
) -> Matches:
    """Match by VOC's rules: a detection is compared with the one object of its class and image that it overlaps most.

    If that object (the first of several) is difficult or a crowd region, the detection is ignored; if a better scored detection has
    taken it, this one is a false positive, whatever else it overlaps. All detections count; with ``strict`` a match must exceed the
    threshold, above 0 and at most 1, instead of reaching it. The matches are of one range of sizes and one threshold.

    Raises:
        DataError: no images, or a fault in a record, which it names.
    """
    rows, _ = _ordered(annotations, detections)
    found = detections.take(rows)
    least = float(np.nextafter(iou_threshold, 2)) if strict else iou_threshold
    pairs = _pairs(annotations, found, least, np.zeros(len(annotations.labels), np.bool_))
    _, objects = pairs.best(len(rows))
    best = objects.astype(np.int32)
    ignored = ignored_objects(annotations)
    forgiven = np.append(ignored[0], False)[best]
    rivals = np.flatnonzero((best >= 0) & ~forgiven)
    rivals = rivals[np.argsort(best[rivals], kind="stable")]
    best[rivals[rank_in_run(objects[rivals]) > 0]] = -1
    levels = np.array([iou_threshold])
    return Matches(annotations, found, ignored, best[None, None], forgiven[None, None], ("all",), levels)


def _ordered(annotations: Annotations, detections: DetectionArrays, by_class: bool = True) -> tuple[Integers, Integers]:
    """Check the records; rows of the detections, class by class, best score first, and their ranks in their group: [D]."""
    check_annotations(annotations)
    check_detections(annotations, detections)
    rows = canonical_rows(detections) if by_class else best_rows(detections)
    labels, images = detections.labels[rows], detections.image_ids[rows]
    ranks = rank_in_run(images, labels) if by_class else rank_in_run(images)
    order = np.argsort(-detections.scores[rows], kind="stable")
    order = order[np.argsort(labels[order], kind="stable")]
    return rows[order], ranks[order]


def _pairs(
    annotations: Annotations, found: DetectionArrays, minimum: float, crowd: Flags, by_class: bool = True
) -> Pairs:
    """Detections and objects of one group that overlap enough."""
    groups, object_groups = image_ranks(annotations, found.image_ids), object_ranks(annotations)
    if by_class:
        classes = annotations.num_classes + 1
        groups, object_groups = groups * classes + found.labels, object_groups * classes + annotations.labels
    return overlapping_pairs(found.boxes, groups, annotations.boxes, object_groups, crowd, minimum)


def ignored_objects(annotations: Annotations, areas: Sequence[str] = ("all",)) -> Flags:
    """Tell which objects need not be found: ``[A, B]`` crowd regions, difficult ones, and those outside of the range of sizes."""
    unasked = annotations.iscrowd | annotations.difficult
    limits = np.array([AREAS[name] for name in areas])
    return unasked | (annotations.area < limits[:, :1]) | (annotations.area > limits[:, 1:])


def take_best(pairs: Pairs, ranks: Integers, thresholds: Floats, crowd: Flags, ignored: Flags) -> npt.NDArray[np.int32]:
    """Let each detection, best first in its group, take the free object that it overlaps most: ``[A, T, D]`` rows, -1 for none.

    Args:
        pairs: detections and objects of the same group that overlap at least by the lowest threshold.
        ranks: ``[D]`` place of each detection in its group, 0 for the best.
        thresholds: ``[T]`` IoU.
        crowd: ``[B]`` regions that any number of detections may take.
        ignored: ``[A, B]`` objects that are taken only where no other is left.
    """
    shape = (len(ignored), len(thresholds))
    limits = np.minimum(thresholds, _ALMOST_ONE)
    chosen = np.full((*shape, len(ranks)), -1, np.int32)
    taken = np.zeros((len(crowd), *shape), np.bool_)
    rank = ranks[pairs.found]
    order = np.argsort(rank, kind="stable")
    for step in np.split(order, np.flatnonzero(np.diff(rank[order])) + 1):
        if not len(step):
            continue
        objects, iou = pairs.objects[step], pairs.iou[step][:, None, None]
        free = (~taken[objects] | crowd[objects][:, None, None]) & (iou >= limits)
        rows, starts = np.unique(pairs.found[step], return_index=True)
        runs = np.repeat(np.arange(len(rows)), np.diff(np.append(starts, len(step))))
        wanted = free & ~ignored.T[objects][:, :, None]
        usable = np.where(np.logical_or.reduceat(wanted, starts)[runs], wanted, free)
        highest = np.maximum.reduceat(np.where(usable, iou, -1.0), starts)
        winners = usable & (iou == highest[runs])
        place = np.maximum.reduceat(np.where(winners, np.arange(len(step))[:, None, None], -1), starts)
        picked = np.where(place >= 0, objects[place], -1)
        chosen[:, :, rows] = np.moveaxis(picked, 0, -1)
        row, area, level = np.nonzero(picked >= 0)
        taken[picked[row, area, level], area, level] = True
    return chosen


def _ignored_detections(objects: npt.NDArray[np.int32], ignored: Flags, sizes: Floats, areas: Sequence[str]) -> Flags:
    """``[A, T, D]``: took an ignored object, or nothing while itself outside of the range of sizes."""
    result = np.zeros(objects.shape, np.bool_)
    for index, name in enumerate(areas):
        low, high = AREAS[name]
        outside = (sizes < low) | (sizes > high)
        lost = objects[index] < 0
        padded = np.append(ignored[index], False)  # a row for -1, which is no object
        result[index] = np.where(lost, outside, padded[objects[index]])
    return result


def describe_area(name: str) -> str:
    """Say in words which objects a range of sizes holds, such as ``32 x 32 to 96 x 96 pixels``."""
    low, high = (math.sqrt(limit) for limit in AREAS[name])
    if name == "all":
        return "all sizes"
    if low == 0:
        return f"up to {high:g} x {high:g} pixels"
    return f"from {low:g} x {low:g} pixels" if high > 1e4 else f"{low:g} x {low:g} to {high:g} x {high:g} pixels"


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

    def best(self, detections: int) -> tuple[Floats, Integers]:
        """Of each of D detections the largest overlap, 0 for none, and the first object that has it, -1: ``[D]`` each."""
        order = np.lexsort((-self.objects, self.iou, self.found))  # the last of each detection is its best
        iou, objects = np.zeros(detections), np.full(detections, -1, np.int64)
        iou[self.found[order]], objects[self.found[order]] = self.iou[order], self.objects[order]
        return iou, objects

    def take(self, rows: Flags) -> Pairs:
        """Some of the pairs."""
        return Pairs(self.found[rows], self.objects[rows], self.iou[rows])


def overlapping_pairs(
    boxes: Floats,
    groups: Integers,
    object_boxes: Floats,
    object_groups: Integers,
    crowd: Flags,
    minimum: float,
) -> Pairs:
    """Find every detection and object, xyxy, of one group with an IoU of ``minimum``, above 0, or more; ``crowd`` is [B]."""
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
