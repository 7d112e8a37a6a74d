r"""Everything that helps to understand a result, as numbers that JSON can hold.

    Annotations, DetectionArrays --match--> Matches --> curves, sizes, classes, calibration, error types, worst images
                                 \--evaluate--> the numbers of the protocol;  several runs --compare--> intervals

K classes, T IoU thresholds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from detpipe.evaluation.calibration import BINS, Calibration, OperatingPoint, calibration_by_class, operating_point
from detpipe.evaluation.coco import MAX_DETECTIONS, Counts, coco_metrics, count, mean_known, precision_by_recall
from detpipe.evaluation.comparison import COMPARED, compare
from detpipe.evaluation.confusion import detection_confusion
from detpipe.evaluation.error_types import ERROR_TYPES, error_gains, find_errors
from detpipe.evaluation.matches import AREAS, Floats, Matches, describe_area, match
from detpipe.evaluation.protocols import evaluate
from detpipe.evaluation.table import plain
from detpipe.evaluation.worst_images import ImageOutcome, worst_images
from detpipe.types import Annotations, DetectionArrays


@dataclass(frozen=True)
class AnalysisSettings:
    """What may be chosen.

    Args:
        protocol: of the headline numbers and of the comparison; everything else follows COCO's rules.
        score_threshold: of the confusion matrix, precision and recall by class, and the images; None: where F1 is best.
        worst: so many images at most.
        resamples: of the comparison.
        seed: of the comparison.
        max_detections: of COCO's rules: how many detections of a class in an image count; everything but the recalls uses the last.
    """

    protocol: str = "coco"
    score_threshold: float | None = None
    worst: int = 12
    resamples: int = 1000
    seed: int = 0
    max_detections: tuple[int, ...] = MAX_DETECTIONS


@dataclass(frozen=True)
class Analysis:
    """All numbers as JSON can hold them, None for what cannot be computed; and the images that cost most, to be drawn."""

    numbers: dict[str, Any]
    worst: list[ImageOutcome]


def analyze(
    annotations: Annotations, runs: Mapping[str, DetectionArrays], settings: AnalysisSettings | None = None
) -> Analysis:
    """Analyze the first of some runs, name -> detections, and compare the others with it.

    Raises:
        ValueError: no runs, or a protocol that runs are not compared by.
        DataError: a fault in a record, which it names.
    """
    chosen = settings or AnalysisSettings()
    if not runs:
        raise ValueError("there must be at least one run to analyze")
    if chosen.protocol not in COMPARED:
        raise ValueError(f"an analysis follows one of {', '.join(COMPARED)}; got {chosen.protocol!r}")
    name, detections = next(iter(runs.items()))
    limits, coco = chosen.max_detections, chosen.protocol == "coco"
    matches = match(annotations, detections, max_detections=limits[-1])
    counts = count(matches, limits)
    metrics = coco_metrics(counts, annotations.class_names, limits) if coco else None
    curves, matched = {name: _curves(counts.precision[..., 0])}, {name: matches}
    for other in list(runs)[1:]:
        matched[other] = match(annotations, runs[other], areas=["all"], max_detections=limits[-1])
        curves[other] = _curves(precision_by_recall(matched[other]).transpose(0, 2, 1))
    point = operating_point(matches, chosen.score_threshold)
    worst, numbers = _errors(matches, point.score, chosen.worst)
    calibration = calibration_by_class(matches)
    return Analysis(
        plain(
            {
                "run": name,
                "protocol": chosen.protocol,
                "metrics": metrics or evaluate(annotations, detections, chosen.protocol),
                "data": _describe(annotations, detections),
                "class_names": list(annotations.class_names),
                "iou_thresholds": matches.thresholds.round(2).tolist(),
                "curves": curves,
                "sizes": _sizes(matches, counts),
                "max_detections": limits[-1],
                "operating_point": {**vars(point), "given": chosen.score_threshold is not None},
                "per_class": _per_class(annotations, matches, curves[name], point, calibration),
                "confusion": detection_confusion(annotations, detections, point.score).tolist(),
                "calibration": _calibration(annotations, calibration),
                "errors": numbers,
                "worst_wanted": chosen.worst,
                "worst_images": [_listed(outcome, annotations) for outcome in worst],
                "comparison": _compare(annotations, runs, matched, chosen),
            }
        ),
        worst,
    )


def _describe(annotations: Annotations, detections: DetectionArrays) -> dict[str, Any]:
    ignored = annotations.iscrowd | annotations.difficult
    return {
        "images": len(annotations),
        "images_without_objects": int(np.count_nonzero(np.diff(annotations.offsets) == 0)),
        "objects": int(np.count_nonzero(~ignored)),
        "ignored_objects": int(np.count_nonzero(ignored)),
        "classes": annotations.num_classes,
        "detections": len(detections.scores),
    }


def _curves(precision: Floats) -> dict[str, Any]:
    """From [T, R, K]: ``precision`` [1 + K, T, R] and ``AP`` [1 + K, T], the mean over classes first."""
    curves = precision.transpose(2, 0, 1)
    everything = np.concatenate((mean_known(curves, axis=0)[None], curves))
    return {"precision": everything.round(6), "AP": everything.mean(axis=2)}


def _sizes(matches: Matches, counts: Counts) -> list[dict[str, Any]]:
    rows = []
    for area, name in enumerate(AREAS):
        by_threshold = mean_known(counts.precision[..., area], axis=(1, 2))
        rows.append(
            {
                "name": name,
                "meaning": describe_area(name),
                "objects": int(matches.object_counts(area).sum()),
                "AP": float(by_threshold.mean()),
                "AP50": float(by_threshold[0]),
                "AP75": float(by_threshold[5]),
                "recall": float(mean_known(counts.recall[:, :, area, -1])),
            }
        )
    return rows


def _per_class(
    annotations: Annotations,
    matches: Matches,
    curves: dict[str, Floats],
    point: OperatingPoint,
    calibration: list[Calibration] | None,
) -> list[dict[str, Any]]:
    kept = (matches.detections.scores >= point.score) & ~matches.ignored[0, 0]
    right = kept & matches.true()
    count = annotations.num_classes + 1
    detected, hits = (np.bincount(matches.detections.labels[rows], minlength=count) for rows in (kept, right))
    objects = matches.object_counts()
    rows = []
    for label, name in enumerate(annotations.class_names, start=1):
        average = curves["AP"][label]
        rows.append(
            {
                "name": name,
                "objects": int(objects[label - 1]),
                "detections": int(detected[label]),
                "AP": float(average.mean()),
                "AP50": float(average[0]),
                "AP75": float(average[5]),
                "precision": hits[label] / detected[label] if detected[label] else None,
                "recall": hits[label] / objects[label - 1] if objects[label - 1] else None,
                "calibration_error": calibration[label].error if calibration else None,
            }
        )
    return rows


def _calibration(annotations: Annotations, diagrams: list[Calibration] | None) -> dict[str, Any] | None:
    if diagrams is None:
        return None
    names = ["", *annotations.class_names]
    return {
        "bins": BINS,
        "diagrams": [{"name": name, **vars(diagram)} for name, diagram in zip(names, diagrams, strict=True)],
    }


def _compare(
    annotations: Annotations,
    runs: Mapping[str, DetectionArrays],
    matched: Mapping[str, Matches],
    chosen: AnalysisSettings,
) -> dict[str, Any] | None:
    if len(runs) < 2:
        return None
    known = matched if chosen.protocol == "coco" else None  # VOC's rules match otherwise
    return compare(annotations, runs, chosen.protocol, chosen.resamples, chosen.seed, matched=known)


def _errors(matches: Matches, score: float, worst: int) -> tuple[list[ImageOutcome], dict[str, Any]]:
    """What is judged at an IoU of 0.5, the first threshold: error types with their gains, and the worst images."""
    errors = find_errors(matches)
    gains, counts = error_gains(matches, errors), errors.counts()
    numbers = {
        "AP50": gains["AP50"],
        "types": [{"name": name, "count": counts[name], "gain": gains[name]} for name in ERROR_TYPES],
        "false_positives": {"count": int(matches.false().sum()), "gain": gains["false_positives"]},
        "false_negatives": {"count": int(matches.missed().sum()), "gain": gains["false_negatives"]},
    }
    return worst_images(matches, errors, score, worst), numbers


def _listed(outcome: ImageOutcome, annotations: Annotations) -> dict[str, Any]:
    return {
        "file_name": outcome.file_name,
        "image_id": outcome.image_id,
        "cost": outcome.cost,
        "objects": dict(Counter(outcome.states)),
        "detections": dict(Counter(outcome.found_states)),
        "missed_classes": dict(
            Counter(
                annotations.class_names[label - 1]
                for label, state in zip(outcome.labels.tolist(), outcome.states, strict=True)
                if state == "missed"
            )
        ),
    }
