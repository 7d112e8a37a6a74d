"""Do scores mean what they say: of detections with a score around 0.8, are 80% right?

Guo et al., "On Calibration of Modern Neural Networks", 2017, arXiv 1706.04599, for detections: right is what found an object
of its class at an IoU threshold (here as everywhere, an object is found once). Detections that are ignored are left out.

Deviations:
1. Only what a detector reports is judged: what it dropped below its own score threshold is not there to be seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from detpipe.evaluation.matches import Matches
from detpipe.evaluation.pairs import Flags, Floats, Integers

BINS = 10


@dataclass(frozen=True)
class Calibration:
    """A reliability diagram.

    Args:
        counts: ``[bins]`` detections with a score in each tenth of 0..1.
        scores: ``[bins]`` their mean score; NaN where there are none.
        precision: ``[bins]`` the part of them that is right; NaN where there are none.
        error: the expected calibration error: the mean distance between score and precision, by detection; NaN without
            detections.
    """

    counts: Integers
    scores: Floats
    precision: Floats
    error: float


def calibrate(scores: Floats, right: Flags, bins: int = BINS) -> Calibration:
    """Sort detections into bins of equal width by their score.

    Args:
        scores: ``[D]`` in 0..1.
        right: ``[D]``.
        bins: how many.

    Returns:
        The diagram.

    Raises:
        ValueError: a score outside of 0..1.

    Example:
        >>> calibrate(np.array([0.95, 0.85, 0.85, 0.05]), np.array([True, True, False, False])).error
        0.2
    """
    if len(scores) and not (scores.min() >= 0 and scores.max() <= 1):
        raise ValueError(f"calibration needs scores in 0..1, got {scores.min():g}..{scores.max():g}")
    index = np.minimum((scores * bins).astype(np.int64), bins - 1)
    counts = np.bincount(index, minlength=bins)
    known = np.where(counts > 0, counts, np.nan)
    mean_score = np.bincount(index, scores, bins) / known
    precision = np.bincount(index, right, bins) / known
    distance = np.nansum(counts * np.abs(mean_score - precision))
    error = float(distance / len(scores)) if len(scores) else float("nan")
    return Calibration(counts, mean_score, precision, error)


def calibration_by_class(matches: Matches, threshold: int = 0) -> list[Calibration] | None:
    """Compute the diagram of all classes together, and of each.

    Args:
        matches: of a data set.
        threshold: index of the IoU threshold.

    Returns:
        K + 1 diagrams, that of all classes first; None where scores lie outside of 0..1, so that they are no probabilities.
    """
    scores, labels = matches.detections.scores, matches.detections.labels
    if len(scores) and not (scores.min() >= 0 and scores.max() <= 1):
        return None
    right, counted = matches.true(0, threshold), ~matches.ignored[0, threshold]
    chosen = [counted, *(counted & (labels == label) for label in range(1, matches.num_classes + 1))]
    return [calibrate(scores[rows], right[rows]) for rows in chosen]


@dataclass(frozen=True)
class OperatingPoint:
    """What remains when detections below a score are dropped; all classes together.

    Args:
        score: the lowest that is kept.
        precision: in 0..1; 0 without detections.
        recall: in 0..1; 0 without objects.
        f1: their harmonic mean.
    """

    score: float
    precision: float
    recall: float
    f1: float


def operating_point(matches: Matches, score: float | None = None, threshold: int = 0) -> OperatingPoint:
    """Count at a score, or at the one with the best F1.

    Args:
        matches: of a data set.
        score: detections below it are dropped; None: where F1 is best, the highest of several such scores.
        threshold: index of the IoU threshold.

    Returns:
        The point; at a score of 0.5 where there is nothing to choose from.
    """
    counted = np.flatnonzero(~matches.ignored[0, threshold])
    order = counted[np.argsort(-matches.detections.scores[counted], kind="stable")]
    scores = matches.detections.scores[order]
    hits = np.cumsum(matches.true(0, threshold)[order])
    objects = int(matches.object_counts().sum())
    if score is None:
        last = np.flatnonzero(np.append(scores[1:] < scores[:-1], len(scores) > 0))  # of each run of equal scores
        f1 = 2 * hits[last] / (last + 1 + objects)
        score = float(scores[last[np.argmax(f1)]]) if len(last) else 0.5
    kept = int(np.count_nonzero(scores >= score))
    right = int(hits[kept - 1]) if kept else 0
    return OperatingPoint(score, right / max(kept, 1), right / max(objects, 1), 2 * right / max(kept + objects, 1))
