"""Mean intersection over union of segmentations, from a confusion matrix over all pixels of a split.

Everingham et al., "The PASCAL Visual Object Classes Challenge: A Retrospective", 2015, section 4.3: the mean over the classes and
background of true positives / (true positives + false positives + false negatives), all images together.

C classes, background included: class 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.integer]


def confusion_matrix(truth: Ints, predicted: Ints, classes: int) -> npt.NDArray[np.int64]:
    """Count pixels ``[C, C]`` by what they are, rows, and what they were taken for, columns; matrices of images may be added.

    Truth and prediction are whole numbers below C, of one shape; negative ones of the truth are ignored.

    Raises:
        ValueError: shapes that differ, or a class out of range.

    Example:
        >>> confusion_matrix(np.array([0, 1, 1, -1]), np.array([0, 0, 1, 1]), 2).tolist()
        [[1, 0], [1, 1]]
    """
    if truth.shape != predicted.shape:
        raise ValueError(f"truth and prediction must have one shape, got {truth.shape} and {predicted.shape}")
    counted = truth >= 0
    rows, columns = truth[counted].astype(np.int64), predicted[counted].astype(np.int64)
    for name, values in (("truth", rows), ("predicted", columns)):
        if values.size and not (values.min() >= 0 and values.max() < classes):
            raise ValueError(f"{name} must be in 0..{classes - 1}, got {values.min()}..{values.max()}")
    return np.bincount(rows * classes + columns, minlength=classes**2).reshape(classes, classes)


def segmentation_scores(confusion: npt.NDArray[np.integer], class_names: Sequence[str]) -> dict[str, Any]:
    """Compute mean IoU and its parts from a matrix ``[C, C]`` and the C - 1 names of the classes without background.

    Returns:
        ``mIoU`` in 0..1 over background and the classes that are true or predicted anywhere; ``pixel_accuracy`` in 0..1; and
        ``per_class``: IoU by name, ``background`` first. -1.0 stands for what cannot be computed: a class without pixels.

    Raises:
        ValueError: not one name for each class but background.
    """
    if confusion.shape != (len(class_names) + 1,) * 2:
        size = len(class_names) + 1
        raise ValueError(
            f"expected a [{size}, {size}] matrix for {len(class_names)} classes and background, got {confusion.shape}"
        )
    hits = np.diag(confusion).astype(np.float64)
    union = confusion.sum(0) + confusion.sum(1) - hits
    iou = np.where(union > 0, hits / np.maximum(union, 1), -1.0)
    total = confusion.sum()
    return {
        "mIoU": float(iou[union > 0].mean()) if total else -1.0,
        "pixel_accuracy": float(hits.sum() / total) if total else -1.0,
        "per_class": dict(zip(("background", *class_names), iou.tolist(), strict=True)),
    }


def all_background(confusion: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    """Make the matrix ``[C, C]`` of who calls everything background: the least that a segmentation must be better than."""
    blind = np.zeros(confusion.shape, np.int64)
    blind[:, 0] = confusion.sum(1)
    return blind
