"""Matches by the rules of VOC's devkit, in the shape of COCO's, for what is computed from matches.

A detection is compared with the one object of its class and image that it overlaps most, the first of several; see
``voc.py``.
"""

from __future__ import annotations

import numpy as np

from detpipe.evaluation.matches import Matches
from detpipe.evaluation.pairs import overlapping_pairs
from detpipe.evaluation.records import (
    box_image_ids,
    canonical_order,
    check_annotations,
    check_detections,
    image_ranks,
    rank_in_run,
)
from detpipe.types import Annotations, DetectionArrays


def match_voc(
    annotations: Annotations, detections: DetectionArrays, iou_threshold: float = 0.5, strict: bool = False
) -> Matches:
    """Match detections with objects of their class.

    Args:
        annotations: the ground truth of I images.
        detections: in pixels of the original images, in any order; all of them count.
        iou_threshold: the overlap that makes a match, above 0, at most 1.
        strict: a match must exceed the threshold instead of reaching it.

    Returns:
        The matches, of one range of sizes and one threshold.

    Raises:
        DataError: no images, or a fault in a record, which it names.
    """
    check_annotations(annotations)
    check_detections(annotations, detections)
    found = canonical_order(detections)
    order = np.lexsort((-found.scores, found.labels))
    kept = found.take(order)
    images = image_ranks(annotations, kept.image_ids)
    object_images, classes = image_ranks(annotations, box_image_ids(annotations)), annotations.num_classes + 1
    pairs = overlapping_pairs(
        kept.boxes,
        images * classes + kept.labels,
        annotations.boxes,
        object_images * classes + annotations.labels,
        np.zeros(len(annotations.labels), np.bool_),
        minimum=float(np.nextafter(iou_threshold, 2)) if strict else iou_threshold,
    )
    best = np.full(len(order), -1, np.int64)
    by_overlap = np.lexsort((-pairs.objects, pairs.iou, pairs.found))  # the last of each detection is its best
    best[pairs.found[by_overlap]] = pairs.objects[by_overlap]
    unasked = annotations.difficult | annotations.iscrowd
    forgiven = np.append(unasked, False)[best]
    rivals = np.flatnonzero((best >= 0) & ~forgiven)
    rivals = rivals[np.argsort(best[rivals], kind="stable")]
    late = rivals[rank_in_run(best[rivals]) > 0]
    best[late] = -1
    return Matches(
        detections=kept,
        images=images,
        labels=annotations.labels,
        object_images=object_images,
        object_ignored=unasked[None],
        objects=best.astype(np.int32)[None, None],
        ignored=forgiven[None, None],
        areas=("all",),
        thresholds=np.array([iou_threshold]),
        image_count=len(annotations),
        num_classes=annotations.num_classes,
    )
