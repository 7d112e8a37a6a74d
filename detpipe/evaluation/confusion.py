"""What is taken for what: a confusion matrix of detections, with a row and a column for background.

Detections of at least a score are matched with objects whatever the class of either, best score first, at an IoU threshold;
crowd regions and difficult objects may be found or not. K classes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from detpipe.evaluation.matches import match
from detpipe.evaluation.records import check_annotations, check_detections
from detpipe.evaluation.segmentation import confusion_matrix
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
    found = detections.take(detections.scores >= score_threshold)
    count = max(1, len(found.scores))
    matches = match(annotations, found, [iou_threshold], ["all"], max_detections=count, by_class=False)
    background, ignored, missed = annotations.num_classes, matches.object_ignored[0], matches.missed()
    truth = np.append(np.where(ignored, -1, annotations.labels - 1), background)[matches.objects[0, 0]]
    rows = np.concatenate((truth, annotations.labels[missed] - 1))
    columns = np.concatenate((matches.detections.labels - 1, np.full(missed.sum(), background)))
    return confusion_matrix(rows, columns, background + 1)
