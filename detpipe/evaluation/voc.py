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

from detpipe.evaluation.coco import average_precision, class_counts
from detpipe.evaluation.matches import match_voc
from detpipe.types import Annotations, DetectionArrays

ELEVEN_LEVELS = np.arange(0.0, 1.1, 0.1)  # of recall


def evaluate_voc(
    annotations: Annotations,
    detections: DetectionArrays,
    protocol: Literal["voc07", "voc10"],
    iou_threshold: float = 0.5,
    strict: bool = False,
) -> dict[str, Any]:
    """Compute VOC's average precision of each class and their mean; difficult objects are not counted as misses.

    Args:
        annotations: the ground truth of I images.
        detections: D detections in pixels of the original images, in any order.
        protocol: ``"voc07"``, the mean of the best precision at 11 levels of recall, or ``"voc10"``, the area under the
            precision envelope.
        iou_threshold: the overlap that makes a match, above 0, at most 1.
        strict: a match must exceed the threshold, as in detectron2's ``voc_eval``, instead of reaching it.

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
    matches = match_voc(annotations, detections, iou_threshold, strict)
    levels = ELEVEN_LEVELS if protocol == "voc07" else None
    objects = matches.object_counts()
    per_class: dict[str, float] = {}
    for label, name in enumerate(annotations.class_names, start=1):
        places, counted = class_counts(matches, label)
        hits, total = np.arange(1, len(places) + 1), objects[label - 1 : label]
        per_class[name] = float(average_precision(hits[None], counted[None], total, levels)[0]) if total[0] else -1.0
    measured = [ap for ap in per_class.values() if ap >= 0]
    return {"mAP": float(np.mean(measured)) if measured else -1.0, "per_class": per_class}
