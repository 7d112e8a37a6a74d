"""Do scores mean what they say: of detections with a score around 0.8, are 80% right?

Guo et al., "On Calibration of Modern Neural Networks", 2017, arXiv 1706.04599, for detections: right is what found an object
of its class at an IoU threshold (here as everywhere, an object is found once). Detections that are ignored are left out.

Deviations:
1. Only what a detector reports is judged: what it dropped below its own score threshold is not there to be seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from detpipe.evaluation.matches import Flags, Floats, Integers, Matches

BINS = 10


@dataclass(frozen=True)
class Calibration:
    """A reliability diagram of detections in bins by their score; NaN where there are none."""

    counts: Integers
    scores: Floats
    precision: Floats
    error: float


def calibrate(scores: Floats, right: Flags, bins: int = BINS) -> Calibration:
    """Sort detections into bins of equal width by their score ``[D]`` in 0..1; ``right`` is ``[D]``.

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


def calibration_by_class(matches: Matches) -> list[Calibration] | None:
    """Compute K + 1 diagrams at the first IoU threshold, that of all classes first; None where scores leave 0..1."""
    scores, labels = matches.detections.scores, matches.detections.labels
    if len(scores) and not (scores.min() >= 0 and scores.max() <= 1):
        return None
    right, counted = matches.true(), ~matches.ignored[0, 0]
    chosen = [counted, *(counted & (labels == label) for label in range(1, matches.num_classes + 1))]
    return [calibrate(scores[rows], right[rows]) for rows in chosen]


@dataclass(frozen=True)
class OperatingPoint:
    """What remains when detections below a score are dropped, all classes together; 0 where there is nothing to count."""

    score: float
    precision: float
    recall: float
    f1: float


def operating_point(matches: Matches, score: float | None = None) -> OperatingPoint:
    """Count at a score, or at the highest of those with the best F1 (0.5 if there are none), at the first IoU threshold."""
    counted = np.flatnonzero(~matches.ignored[0, 0])
    order = counted[np.argsort(-matches.detections.scores[counted], kind="stable")]
    scores = matches.detections.scores[order]
    hits = np.cumsum(matches.true()[order])
    objects = int(matches.object_counts().sum())
    if score is None:
        last = np.flatnonzero(np.append(scores[1:] < scores[:-1], len(scores) > 0))  # of each run of equal scores
        f1 = 2 * hits[last] / (last + 1 + objects)
        score = float(scores[last[np.argmax(f1)]]) if len(last) else 0.5
    kept = int(np.count_nonzero(scores >= score))
    right = int(hits[kept - 1]) if kept else 0
    return OperatingPoint(score, right / max(kept, 1), right / max(objects, 1), 2 * right / max(kept + objects, 1))
