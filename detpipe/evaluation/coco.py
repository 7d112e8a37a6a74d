"""COCO's twelve numbers and AP of each class.

Lin et al., "Microsoft COCO: Common Objects in Context", 2014, arXiv 1405.0312; the rules are those of pycocotools'
COCOeval (:mod:`detpipe.evaluation.matches`).

Deviations:
1. An object of id 0 is found as any other: pycocotools takes 0 for "no match", which turns a perfect AP into 0.
2. Detections are put into canonical order first, so that ties between equal scores do not depend on the order of
   arrival.
3. An object that is ``difficult`` (VOC data under this protocol) is neither a miss when it is not found nor a false
   positive when it is: that is how it is trained and how the VOC protocols count. COCO has no such flag: its files'
   ``ignore`` is overwritten by ``iscrowd``, and as a crowd it would swallow every detection *inside* it. So it is
   outside of every range of sizes, and ignored with its one best match at IoU.

Arrays: T IoU thresholds, R recall thresholds, K classes, A area ranges, M numbers of detections.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from detpipe.evaluation.matches import AREAS, Matches, match
from detpipe.evaluation.pairs import Floats
from detpipe.evaluation.precision_recall import mean_known, precision_by_recall, recall
from detpipe.evaluation.records import check_annotations, check_detections
from detpipe.evaluation.reference import count_by_pycocotools
from detpipe.types import Annotations, DetectionArrays

Backend = Literal["detpipe", "pycocotools"]
_ALL_IOU = slice(None)
_IOU50, _IOU75 = slice(0, 1), slice(5, 6)  # of .50, .55, .. .95
_ALL, _SMALL, _MEDIUM, _LARGE = range(len(AREAS))
PRECISIONS = {
    "AP": (_ALL_IOU, _ALL),
    "AP50": (_IOU50, _ALL),
    "AP75": (_IOU75, _ALL),
    "APs": (_ALL_IOU, _SMALL),
    "APm": (_ALL_IOU, _MEDIUM),
    "APl": (_ALL_IOU, _LARGE),
}
MAX_DETECTIONS = (1, 10, 100)
_RECALLS = {"ARs": _SMALL, "ARm": _MEDIUM, "ARl": _LARGE}


@dataclass(frozen=True)
class Counts:
    """What the twelve numbers, and those of each class, are means of; NaN where there is nothing to find."""

    precision: Floats  # [T, R, K, A], at the largest number of detections
    recall: Floats  # [T, K, A, M]


def evaluate_coco(
    annotations: Annotations,
    detections: DetectionArrays,
    backend: Backend = "detpipe",
    max_detections: Sequence[int] = MAX_DETECTIONS,
) -> dict[str, Any]:
    """Compute COCO's box metrics.

    Args:
        annotations: the ground truth of I images. ``area`` decides over small, medium and large; crowd regions are
            ignored at intersection over detection area, as COCO does; difficult objects are ignored at IoU (see the
            module).
        detections: D detections in pixels of the original images, in any order.
        backend: ``"detpipe"``, or ``"pycocotools"``, the reference.
        max_detections: how many detections of a class in an image count, best first: the recalls are named after these
            numbers, and everything else uses the last. Rising, from 1 on.

    Returns:
        AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm, ARl, each in 0..1, and ``per_class``: the AP by class
        name. Like in COCO, -1.0 means that there is no ground truth to find, and such classes are not part of the
        means.

    Raises:
        ValueError: an unknown backend, ``max_detections`` that do not rise, or detection arrays of different lengths.
        DataError: no images, or a fault in a record, which it names.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be 'detpipe' or 'pycocotools', got {backend!r}")
    limits = list(max_detections)
    if not limits or limits[0] < 1 or any(b <= a for a, b in itertools.pairwise(limits)):
        raise ValueError(f"max_detections must be one or more rising numbers from 1 on, got {limits}")
    if backend == "pycocotools":
        check_annotations(annotations)
        check_detections(annotations, detections)
        arrays = count_by_pycocotools(annotations, detections, limits)
        counts = Counts(*(np.where(values > -1, values, np.nan) for values in arrays))
    else:
        counts = count(match(annotations, detections, max_detections=limits[-1]), limits)
    return coco_metrics(counts, annotations.class_names, limits)


def coco_metrics(counts: Counts, class_names: Sequence[str], max_detections: Sequence[int]) -> dict[str, Any]:
    """Average what :func:`evaluate_coco` returns."""
    metrics: dict[str, Any] = precisions(counts)
    for index, limit in enumerate(max_detections):
        metrics[f"AR{limit}"] = mean(counts.recall[:, :, _ALL, index])
    metrics.update({name: mean(counts.recall[:, :, area, -1]) for name, area in _RECALLS.items()})
    metrics["per_class"] = per_class(counts, class_names)
    return metrics


def count(matches: Matches, max_detections: Sequence[int]) -> Counts:
    """Follow precision over recall.

    Args:
        matches: of all ranges of sizes, with the largest of ``max_detections``.
        max_detections: M numbers, rising: the best detections of a class in an image that count.

    Returns:
        Precision and recall.
    """
    precision, found = [], []
    for area in range(len(AREAS)):
        precision.append(precision_by_recall(matches, area).transpose(0, 2, 1))
        found.append(np.stack([recall(matches, area, most) for most in max_detections], axis=-1))
    return Counts(np.stack(precision, axis=-1), np.stack(found, axis=2))


def precisions(counts: Counts) -> dict[str, float]:
    """Average the six precisions at the largest number of detections."""
    return {name: mean(counts.precision[iou, :, :, area]) for name, (iou, area) in PRECISIONS.items()}


def per_class(counts: Counts, class_names: Sequence[str]) -> dict[str, float]:
    """Average precision by class name."""
    return {name: mean(counts.precision[:, :, k, _ALL]) for k, name in enumerate(class_names)}


def mean(values: Floats) -> float:
    """Average what was measured; -1.0 where nothing could be."""
    average = float(mean_known(values))
    return -1.0 if math.isnan(average) else average
