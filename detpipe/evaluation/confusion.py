"""What is taken for what: a confusion matrix of detections, with a row and a column for background.

Detections of at least a score are matched with objects whatever the class of either, best score first, at an IoU threshold;
crowd regions and difficult objects may be found or not. K classes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from detpipe.evaluation.matches import ignored_objects, overlapping_pairs, take_best
from detpipe.evaluation.records import (
    canonical_order,
    check_annotations,
    check_detections,
    image_ranks,
    object_ranks,
    rank_in_run,
)
from detpipe.types import Annotations, DetectionArrays


def detection_confusion(
    annotations: Annotations, detections: DetectionArrays, score_threshold: float, iou_threshold: float = 0.5
) -> npt.NDArray[np.int64]:
    """Count objects by what they are and what they were taken for, by detections of at least a score, at an IoU above 0, at most 1.

    Returns:
        ``[K + 1, K + 1]``: rows are the truth, columns what was detected, background last; their corner is 0.

    Raises:
        DataError: no images, or a fault in a record, which it names.
        ValueError: a threshold out of range.
    """
    if not 0 < iou_threshold <= 1:
        raise ValueError(f"iou_threshold must be above 0 and at most 1, got {iou_threshold}")
    check_annotations(annotations)
    check_detections(annotations, detections)
    found = canonical_order(detections)
    order = np.flatnonzero(found.scores >= score_threshold)
    order = order[np.lexsort((-found.scores[order], found.image_ids[order]))]
    images, labels = image_ranks(annotations, found.image_ids[order]), found.labels[order]
    object_images = object_ranks(annotations)
    crowd = annotations.iscrowd
    pairs = overlapping_pairs(
        found.boxes[order], images, annotations.boxes, object_images, crowd, minimum=min(iou_threshold, 1 - 1e-10)
    )
    ignored = ignored_objects(annotations)
    taken = take_best(pairs, rank_in_run(images), np.array([iou_threshold]), crowd, ignored)[0, 0]
    background = annotations.num_classes
    truth = np.append(np.where(ignored[0], -1, annotations.labels - 1), background)[taken]
    missed = ~ignored[0]
    missed[taken[taken >= 0]] = False
    rows = np.concatenate((truth[truth >= 0], annotations.labels[missed] - 1))
    columns = np.concatenate((labels[truth >= 0] - 1, np.full(missed.sum(), background)))
    size = background + 1
    return np.bincount(rows * size + columns, minlength=size**2).reshape(size, size)
