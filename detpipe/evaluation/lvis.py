"""Average precision where each image was searched for some classes only: LVIS's federated rules.

Gupta, Dollár and Girshick, "LVIS: A Dataset for Large Vocabulary Instance Segmentation", 2019, arXiv 1908.03195, section 2; the
rules are those of lvis-api's ``LVISEval`` for boxes, at the thresholds and areas of COCO:

1. A detection counts only where its class is known to be in the image, or known not to be.
2. Where a class was not annotated exhaustively, a detection that matches nothing is not a false positive.
3. The best 300 detections of an image count, over all classes, before rule 1.
4. Classes are also averaged by frequency: rare, common, frequent.

Deviation: ties between equal scores are broken by label, area and corners instead of the order of a file.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from detpipe.evaluation.coco import count, mean, per_class, precisions
from detpipe.evaluation.matches import match
from detpipe.evaluation.records import (
    best_rows,
    box_image_ids,
    check_annotations,
    check_detections,
    image_ranks,
    rank_in_run,
)
from detpipe.support.errors import DataError
from detpipe.types import Annotations, DetectionArrays

_FREQUENCIES = {"r": "APr", "c": "APc", "f": "APf"}


def evaluate_lvis(annotations: Annotations, detections: DetectionArrays, max_detections: int = 300) -> dict[str, Any]:
    """Compute LVIS's box metrics.

    Args:
        annotations: the ground truth of I images, with its ``federation``.
        detections: D detections in pixels of the original images, in any order.
        max_detections: how many detections of an image count, over all classes, best first.

    Returns:
        AP, AP50, AP75, APs, APm, APl, APr, APc, APf, AR, ARs, ARm, ARl, each in 0..1, and ``per_class``: the AP by class name.
        -1.0 means that there is no ground truth to find; such classes are not part of the means.

    Raises:
        ValueError: ``max_detections`` below 1, or detection arrays of different lengths.
        DataError: no images, no federation, or a fault in a record, which it names.
    """
    if max_detections < 1:
        raise ValueError(f"max_detections must be at least 1, got {max_detections}")
    check_annotations(annotations)
    check_detections(annotations, detections)
    federation = annotations.federation
    if federation is None:
        raise DataError(
            f"{annotations.root}: does not say for which classes each image was searched ('neg_category_ids' of LVIS's "
            "files): evaluate by the protocol 'coco'"
        )
    detections = _best_of_images(detections, max_detections)
    present = _keys(annotations, box_image_ids(annotations), annotations.labels)
    absent = _keys(annotations, *federation.negative.T)
    known = np.isin(_keys(annotations, detections.image_ids, detections.labels), np.concatenate((present, absent)))
    detections = detections.take(known)
    forgiven = np.isin(
        _keys(annotations, detections.image_ids, detections.labels), _keys(annotations, *federation.not_exhaustive.T)
    )
    matches = match(annotations, detections, max_detections=max_detections, forgiven=forgiven)
    counts = count(matches, [max_detections])
    metrics: dict[str, Any] = precisions(counts)
    for letter, name in _FREQUENCIES.items():
        classes = np.array([frequency == letter for frequency in federation.frequencies], np.bool_)
        metrics[name] = mean(counts.precision[:, :, classes, 0])
    for area, name in enumerate(("AR", "ARs", "ARm", "ARl")):
        metrics[name] = mean(counts.recall[:, :, area, -1])
    metrics["per_class"] = per_class(counts, annotations.class_names)
    return metrics


def _best_of_images(detections: DetectionArrays, limit: int) -> DetectionArrays:
    rows = best_rows(detections)
    return detections.take(rows[rank_in_run(detections.image_ids[rows]) < limit])


def _keys(
    annotations: Annotations, image_ids: npt.NDArray[np.int64], labels: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """A number for each pair of image and class: ``[D]``; pairs of images that are not there are left out."""
    known = np.isin(image_ids, annotations.image_ids)
    return image_ranks(annotations, image_ids[known]) * (annotations.num_classes + 1) + labels[known]
