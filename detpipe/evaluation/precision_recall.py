"""Precision by recall, and its mean, from matches: COCO's interpolated average precision, also of weighted images.

S sets of weights (resamples), n true positives of a class, A ranges of sizes, T IoU thresholds, K classes, R levels of
recall. NaN stands for a class without an object to find.
"""

from __future__ import annotations

import warnings

import numpy as np

from detpipe.evaluation.matches import Matches
from detpipe.evaluation.pairs import Floats, Integers

RECALL_LEVELS: Floats = np.linspace(0.0, 1.0, 101)


def average_precision(
    hits: Integers, counted: Integers, objects: Integers, levels: Floats | None = RECALL_LEVELS
) -> Floats:
    """Compute the mean over levels of recall of the best precision from that recall on.

    Args:
        hits: ``[S, n]`` true positives up to and with each true positive, best score first.
        counted: ``[S, n]`` true and false positives up to there.
        objects: ``[S]`` objects to find.
        levels: of recall, rising from 0: COCO's 101 or the 11 of VOC 2007; None: the area under the curve (VOC 2010).

    Returns:
        ``[S]`` in 0..1; NaN where there is no object.
    """
    recall = hits / np.maximum(objects, 1)[:, None]
    envelope = _envelope(hits, counted)
    if levels is None:
        mean = (envelope * np.diff(recall, axis=1, prepend=0.0)).sum(axis=1)
    else:
        mean = (envelope * _levels_reached(recall, levels)).sum(axis=1) / len(levels)
    return np.where(objects > 0, mean, np.nan)


def _envelope(hits: Integers, counted: Integers) -> Floats:
    """``[S, n]`` best precision from each true positive on."""
    precision = hits / np.maximum(counted, 1)
    return np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]


def _levels_reached(recall: Floats, levels: Floats) -> Integers:
    """``[S, n]`` how many levels of recall each true positive is the first to reach."""
    return np.diff(np.searchsorted(levels, recall, side="right"), axis=1, prepend=0)


def class_counts(matches: Matches, label: int, area: int, threshold: int) -> tuple[Integers, Integers]:
    """Count along the detections of a class, best score first.

    Args:
        matches: of a data set.
        label: the class, from 1.
        area: index of the range of sizes.
        threshold: index of the IoU threshold.

    Returns:
        ``[n]`` places of its true positives among the detections of the class; ``[n]`` true and false positives up to and
        with each.
    """
    rows = matches.class_slice(label)
    ignored = matches.ignored[area, threshold, rows]
    places = np.flatnonzero((matches.objects[area, threshold, rows] >= 0) & ~ignored)
    return places, np.cumsum(~ignored, dtype=np.int64)[places]


def precision_by_recall(matches: Matches, area: int = 0) -> Floats:
    """Compute the curve of each class and IoU threshold, as COCO does.

    Args:
        matches: of a data set.
        area: index of the range of sizes.

    Returns:
        ``[T, K, R]`` precision at R = 101 levels of recall, 0 where that recall is not reached; NaN for classes without an
        object.
    """
    objects = matches.object_counts(area)
    curves = np.zeros((len(matches.thresholds), matches.num_classes, len(RECALL_LEVELS)))
    curves[:, objects == 0] = np.nan
    for label in (np.flatnonzero(objects) + 1).tolist():
        for t in range(len(matches.thresholds)):
            places, counted = class_counts(matches, label, area, t)
            hits = np.arange(1, len(places) + 1)[None]
            steps = _levels_reached(hits / objects[label - 1], RECALL_LEVELS)
            reached = np.repeat(_envelope(hits, counted[None])[0], steps[0])
            curves[t, label - 1, : len(reached)] = reached
    return curves


def recall(matches: Matches, area: int = 0, most: int | None = None) -> Floats:
    """Compute which part of the objects was found.

    Args:
        matches: of a data set.
        area: index of the range of sizes.
        most: so many of the best detections of a class in an image count; None for all.

    Returns:
        ``[T, K]``; NaN for classes without an object.
    """
    objects = matches.object_counts(area)
    counted = np.True_ if most is None else matches.ranks() < most
    found = np.stack(
        [
            np.bincount(matches.detections.labels[matches.true(area, t) & counted] - 1, minlength=matches.num_classes)
            for t in range(len(matches.thresholds))
        ]
    )
    return np.where(objects > 0, found / np.maximum(objects, 1), np.nan)


def mean_known(values: Floats, axis: int | tuple[int, ...] | None = None) -> Floats:
    """Average what is not NaN; NaN where nothing else is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of an empty mean, which is what NaN says
        return np.nanmean(values, axis=axis)
