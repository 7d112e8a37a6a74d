"""PASCAL VOC's average precision, with 11 points (2007 to 2009) or as the area under the curve (2010 and later).

Everingham et al., "The PASCAL Visual Object Classes Challenge: A Retrospective", 2015; the rules are those of the
devkit's ``VOCevaldet.m`` and ``VOCap.m``.

Deviations:
1. Ties between equal scores are broken by image id, area and corners instead of the order of lines in a
   file.
2. A class without a countable object has no AP: it is -1.0 and not part of the mean (the devkit divides by zero).
3. The 11 recall levels are ``numpy.arange(0, 1.1, .1)``, as in the Python ports of the devkit (Fast R-CNN's,
   detectron2's).

Convention: the devkit's boxes are 1-based and inclusive, and it adds 1 to each width. Ours are continuous: with
``x1 = xmin - 1`` and ``x2 = xmax`` the plain width ``x2 - x1`` *is* ``xmax - xmin + 1``: every overlap is the devkit's.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from detpipe.evaluation.records import box_image_ids, canonical_order, check_annotations, check_detections
from detpipe.types import Annotations, DetectionArrays

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


def evaluate_voc(
    annotations: Annotations,
    detections: DetectionArrays,
    protocol: Literal["voc07", "voc10"],
    iou_threshold: float = 0.5,
    strict: bool = False,
) -> dict[str, Any]:
    """Compute VOC's average precision of each class and their mean.

    A detection is compared with the object of its class and image that it overlaps most. If that object is difficult
    (or a crowd region), the detection is not counted; if a better scored detection has taken it already, this one is a
    false positive, whatever else it overlaps. Difficult objects are not counted as misses.

    Args:
        annotations: the ground truth of I images.
        detections: D detections in pixels of the original images, in any order.
        protocol: ``"voc07"``, the mean of the best precision at 11 levels of recall, or ``"voc10"``, the area under the
            precision envelope.
        iou_threshold: the overlap that makes a match, above 0, at most 1.
        strict: a match must exceed the threshold, as in detectron2's ``voc_eval``, instead of reaching it, as in the
            devkit.

    Returns:
        ``mAP`` and ``per_class``, the AP by class name, in 0..1; -1.0 for a class without a countable object, and for
        the mean if there is no other.

    Raises:
        ValueError: an unknown protocol, a threshold out of range, or detection arrays of different lengths.
        DataError: no images, or a fault in a record, which it names.
    """
    if protocol not in ("voc07", "voc10"):
        raise ValueError(f"protocol must be 'voc07' or 'voc10', got {protocol!r}")
    if not 0 < iou_threshold <= 1:
        raise ValueError(f"iou_threshold must be above 0 and at most 1, got {iou_threshold}")
    check_annotations(annotations)
    check_detections(annotations, detections)
    found = canonical_order(detections)
    truth_images, ignored = box_image_ids(annotations), annotations.difficult | annotations.iscrowd
    average = _eleven_point if protocol == "voc07" else _area_under_envelope
    per_class: dict[str, float] = {}
    for label, name in enumerate(annotations.class_names, start=1):
        of_truth, of_found = np.flatnonzero(annotations.labels == label), np.flatnonzero(found.labels == label)
        of_truth = of_truth[np.argsort(truth_images[of_truth], kind="stable")]
        of_found = of_found[np.argsort(-found.scores[of_found], kind="stable")]
        objects = int(np.count_nonzero(~ignored[of_truth]))
        best, overlap = _best_overlap(
            found.boxes[of_found], found.image_ids[of_found], annotations.boxes[of_truth], truth_images[of_truth]
        )
        matched = overlap > iou_threshold if strict else overlap >= iou_threshold
        true, false = _judge(best, matched, ignored[of_truth])
        per_class[name] = average(*_curve(true, false, objects)) if objects else -1.0
    measured = [ap for ap in per_class.values() if ap >= 0]
    return {"mAP": float(np.mean(measured)) if measured else -1.0, "per_class": per_class}


def _best_overlap(boxes: Floats, images: Integers, objects: Floats, object_images: Integers) -> tuple[Integers, Floats]:
    """For each detection of one class, find the object of its image that it overlaps most.

    Args:
        boxes: [D, 4] xyxy.
        images: [D] image ids.
        objects: [G, 4] xyxy, those of an image beside each other.
        object_images: [G] image ids, rising.

    Returns:
        [D] row of the object, the first of several equal ones (0 where the image has none); [D] IoU with it, or 0.
    """
    first = np.searchsorted(object_images, images, side="left")
    counts = np.searchsorted(object_images, images, side="right") - first
    best, overlap = np.zeros(len(boxes), np.int64), np.zeros(len(boxes))
    busy = np.flatnonzero(counts)
    if len(busy) == 0:
        return best, overlap
    first, counts = first[busy], counts[busy]
    starts = np.cumsum(counts) - counts  # of each detection's run in the list of all pairs
    runs = np.repeat(np.arange(len(busy)), counts)
    pair_objects = np.arange(len(runs)) - starts[runs] + first[runs]
    ious = _paired_iou(boxes[busy[runs]], objects[pair_objects])
    highest = np.maximum.reduceat(ious, starts)
    winners = np.flatnonzero(ious == highest[runs])
    _, first_winner = np.unique(runs[winners], return_index=True)
    best[busy], overlap[busy] = pair_objects[winners[first_winner]], highest
    return best, overlap


def _paired_iou(boxes: Floats, others: Floats) -> Floats:
    """Compute the IoU of row i of [P, 4] with row i of [P, 4]; 0 where both areas are 0."""
    size = np.minimum(boxes[:, 2:], others[:, 2:]) - np.maximum(boxes[:, :2], others[:, :2])
    shared = size.clip(min=0).prod(axis=1)
    union = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) + (others[:, 2:] - others[:, :2]).prod(axis=1) - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def _judge(
    best: Integers, matched: npt.NDArray[np.bool_], ignored: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Tell true from false positives, best score first; a match with an ignored object is neither."""
    counted = np.zeros(len(best), np.bool_)
    counted[matched] = ~ignored[best[matched]]
    candidates = np.flatnonzero(counted)
    _, earliest = np.unique(best[candidates], return_index=True)
    true = np.zeros(len(best), np.bool_)
    true[candidates[earliest]] = True
    return true, (counted & ~true) | ~matched


def _curve(true: npt.NDArray[np.bool_], false: npt.NDArray[np.bool_], objects: int) -> tuple[Floats, Floats]:
    """Return recall [D] and precision [D] after each detection."""
    hits, errors = np.cumsum(true), np.cumsum(false)
    return hits / objects, hits / np.maximum(hits + errors, 1)


def _eleven_point(recall: Floats, precision: Floats) -> float:
    levels = np.arange(0.0, 1.1, 0.1)
    best = [precision[recall >= level].max(initial=0.0) for level in levels]
    return float(np.sum(best) / 11)


def _area_under_envelope(recall: Floats, precision: Floats) -> float:
    recall = np.concatenate(([0.0], recall, [1.0]))
    precision = np.concatenate(([0.0], precision, [0.0]))
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall) * envelope[1:]))
