"""COCO's twelve numbers and AP of each class.

Lin et al., "Microsoft COCO: Common Objects in Context", 2014, arXiv 1405.0312; the rules are those of pycocotools'
COCOeval (:mod:`detpipe.evaluation.matches`).

Deviations:
1. An object of id 0 is found as any other: pycocotools takes 0 for "no match", which turns a perfect AP into 0.
2. Detections are put into canonical order first, so that ties between equal scores do not depend on the order of
   arrival.
3. An object that is ``difficult`` (VOC data under this protocol) is neither a miss when it is not found nor a false
   positive when it is: that is how it is trained and how the VOC protocols count. COCO has no such flag: its files'
   ``ignore`` is overwritten by ``iscrowd``, and as a crowd it would swallow every detection *inside* it. So it is
   outside of every range of sizes, and ignored with its one best match at IoU.

Arrays: T IoU thresholds, R recall thresholds, K classes, A area ranges, M numbers of detections.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from detpipe.evaluation.matches import AREAS, Floats, Integers, Matches, match
from detpipe.evaluation.records import check_annotations, check_detections
from detpipe.evaluation.reference import count_by_pycocotools
from detpipe.types import Annotations, DetectionArrays

RECALL_LEVELS: Floats = np.linspace(0.0, 1.0, 101)
Backend = Literal["detpipe", "pycocotools"]
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


@dataclass(frozen=True)
class Counts:
    """What the twelve numbers, and those of each class, are means of; NaN where there is nothing to find."""

    precision: Floats  # [T, R, K, A], at the largest number of detections
    recall: Floats  # [T, K, A, M]


def evaluate_coco(
    annotations: Annotations,
    detections: DetectionArrays,
    backend: Backend = "detpipe",
    max_detections: Sequence[int] = MAX_DETECTIONS,
) -> dict[str, Any]:
    """Compute COCO's box metrics.

    Args:
        annotations: the ground truth of I images. ``area`` decides over small, medium and large; crowd regions are ignored at
            intersection over detection area, difficult objects at IoU (see the module).
        detections: D detections in pixels of the original images, in any order.
        backend: ``"detpipe"``, or ``"pycocotools"``, the reference.
        max_detections: how many detections of a class in an image count, best first: the recalls are named after these
            numbers, and everything else uses the last. Rising, from 1 on.

    Returns:
        AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm, ARl, each in 0..1, and ``per_class``: the AP by class name.
        As in COCO, -1.0 means that there is no ground truth to find; such classes are not part of the means.

    Raises:
        ValueError: an unknown backend, ``max_detections`` that do not rise, or detection arrays of different lengths.
        DataError: no images, or a fault in a record, which it names.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be 'detpipe' or 'pycocotools', got {backend!r}")
    limits = list(max_detections)
    if not limits or limits[0] < 1 or any(b <= a for a, b in itertools.pairwise(limits)):
        raise ValueError(f"max_detections must be one or more rising numbers from 1 on, got {limits}")
    if backend == "pycocotools":
        check_annotations(annotations)
        check_detections(annotations, detections)
        arrays = count_by_pycocotools(annotations, detections, limits)
        counts = Counts(*(np.where(values > -1, values, np.nan) for values in arrays))
    else:
        counts = count(match(annotations, detections, max_detections=limits[-1]), limits)
    return coco_metrics(counts, annotations.class_names, limits)


def coco_metrics(counts: Counts, class_names: Sequence[str], max_detections: Sequence[int]) -> dict[str, Any]:
    """Average what :func:`evaluate_coco` returns."""
    metrics: dict[str, Any] = precisions(counts)
    for index, limit in enumerate(max_detections):
        metrics[f"AR{limit}"] = mean(counts.recall[:, :, _ALL, index])
    metrics.update({name: mean(counts.recall[:, :, area, -1]) for name, area in _RECALLS.items()})
    metrics["per_class"] = per_class(counts, class_names)
    return metrics


def count(matches: Matches, max_detections: Sequence[int]) -> Counts:
    """Follow precision over recall of matches in all ranges of sizes, for M rising numbers of detections of a class in an image."""
    precision, found = [], []
    for area in range(len(AREAS)):
        precision.append(precision_by_recall(matches, area).transpose(0, 2, 1))
        found.append(np.stack([recall(matches, area, most) for most in max_detections], axis=-1))
    return Counts(np.stack(precision, axis=-1), np.stack(found, axis=2))


def precisions(counts: Counts) -> dict[str, float]:
    """Average the six precisions at the largest number of detections."""
    return {name: mean(counts.precision[iou, :, :, area]) for name, (iou, area) in PRECISIONS.items()}


def per_class(counts: Counts, class_names: Sequence[str]) -> dict[str, float]:
    """Average precision by class name."""
    return {name: mean(counts.precision[:, :, k, _ALL]) for k, name in enumerate(class_names)}


def mean(values: Floats) -> float:
    """Average what was measured; -1.0 where nothing could be."""
    average = float(mean_known(values))
    return -1.0 if math.isnan(average) else average


def average_precision(
    hits: Integers, counted: Integers, objects: Integers, levels: Floats | None = RECALL_LEVELS
) -> Floats:
    """Compute ``[S]``, the mean over levels of recall of the best precision from that recall on; NaN where there is no object.

    Args:
        hits: ``[S, n]`` true positives up to and with each true positive, best score first.
        counted: ``[S, n]`` true and false positives up to there.
        objects: ``[S]`` objects to find.
        levels: of recall, rising from 0: COCO's 101 or the 11 of VOC 2007; None: the area under the curve (VOC 2010).
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


def class_counts(matches: Matches, label: int, area: int = 0, threshold: int = 0) -> tuple[Integers, Integers]:
    """Find ``[n]`` true positives among the detections of a class, best first, and count ``[n]`` true and false ones up to each."""
    rows = matches.class_slice(label)
    ignored = matches.ignored[area, threshold, rows]
    places = np.flatnonzero((matches.objects[area, threshold, rows] >= 0) & ~ignored)
    return places, np.cumsum(~ignored, dtype=np.int64)[places]


def precision_by_recall(matches: Matches, area: int = 0) -> Floats:
    """Compute ``[T, K, R]`` precision at 101 levels of recall, 0 where one is not reached; NaN for classes without an object."""
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
    """Compute ``[T, K]``, the part of the objects that the ``most`` best detections of a class in an image find, or all; or NaN."""
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
