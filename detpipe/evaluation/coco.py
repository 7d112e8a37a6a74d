"""COCO's twelve numbers and AP of each class.

Lin et al., "Microsoft COCO: Common Objects in Context", 2014, arXiv 1405.0312; the rules are those of pycocotools'
COCOeval (:mod:`detpipe.evaluation.counting`).

Deviations:
1. Ground truth is renumbered from 1: the evaluators take an id of 0 for "no match", which turns a perfect AP into 0.
2. Detections are put into canonical order first, so that ties between equal scores do not depend on the order of
   arrival.
3. An object that is ``difficult`` (VOC data under this protocol) is neither a miss when it is not found nor a false
   positive when it is: that is how it is trained and how the VOC protocols count. COCO has no such flag: its files'
   ``ignore`` is overwritten by ``iscrowd``, and as a crowd it would swallow every detection *inside* it. So it is
   given an infinite area, which lies in none of COCO's area ranges; the evaluators then ignore it and its one best
   match at IoU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from detpipe.evaluation.counting import AREAS, Backend, Counts, count
from detpipe.evaluation.records import check_annotations, check_detections
from detpipe.types import Annotations, DetectionArrays

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


def evaluate_coco(
    annotations: Annotations,
    detections: DetectionArrays,
    backend: Backend = "faster_coco_eval",
    max_detections: Sequence[int] = MAX_DETECTIONS,
) -> dict[str, Any]:
    """Compute COCO's box metrics.

    Args:
        annotations: the ground truth of I images. ``area`` decides over small, medium and large; crowd regions are
            ignored at intersection over detection area, as COCO does; difficult objects are ignored at IoU (see the
            module).
        detections: D detections in pixels of the original images, in any order.
        backend: ``"faster_coco_eval"``, or ``"pycocotools"``, the reference.
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
    check_annotations(annotations)
    check_detections(annotations, detections)
    counts = count(annotations, detections, backend, max_detections)
    metrics: dict[str, Any] = precisions(counts)
    for index, limit in enumerate(max_detections):
        metrics[f"AR{limit}"] = mean(counts.recall[:, :, _ALL, index])
    metrics.update({name: mean(counts.recall[:, :, area, -1]) for name, area in _RECALLS.items()})
    metrics["per_class"] = per_class(annotations, counts)
    return metrics


def precisions(counts: Counts) -> dict[str, float]:
    """Average the six precisions at the largest number of detections."""
    return {name: mean(counts.precision[iou, :, :, area, -1]) for name, (iou, area) in PRECISIONS.items()}


def per_class(annotations: Annotations, counts: Counts) -> dict[str, float]:
    """Average precision by class name."""
    return {name: mean(counts.precision[:, :, k, _ALL, -1]) for k, name in enumerate(annotations.class_names)}


def mean(values: npt.NDArray[np.float64]) -> float:
    """Average what was measured; -1.0 where nothing could be."""
    measured = values[values > -1]
    return float(measured.mean()) if measured.size else -1.0
