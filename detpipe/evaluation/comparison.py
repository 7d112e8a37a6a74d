"""Is one run better than another, or only luckier with these images? Paired bootstrap over the images of a data set.

Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapters 13 and 16 (percentile intervals): draw as many
images as there are, with replacement; an image counts as often as it was drawn, its detections and objects with it; compute
AP of each run on the same draw, and take their difference. The interval holds the middle 95% of the differences.

Matching is by image, so it is done once; a draw only weighs what was matched. The copies of an image stand beside each
other in the order of scores.

S resamples, K classes, T IoU thresholds, I images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from detpipe.evaluation.coco import RECALL_LEVELS, average_precision, class_counts, mean_known
from detpipe.evaluation.matches import Floats, Integers, Matches, match, match_voc
from detpipe.evaluation.voc import ELEVEN_LEVELS
from detpipe.types import Annotations, DetectionArrays

Weights = npt.NDArray[np.int32]

_LEVELS = {"coco": RECALL_LEVELS, "voc07": ELEVEN_LEVELS, "voc10": None}
COMPARED = tuple(_LEVELS)  # the protocols
_BLOCK = 1 << 21  # detections times resamples that are weighed together


def compare(
    annotations: Annotations,
    runs: Mapping[str, DetectionArrays],
    protocol: str = "coco",
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
    most: int = 100,
    matched: Mapping[str, Matches] | None = None,
) -> dict[str, Any]:
    """Compare runs, name -> detections, with the first of them.

    Args:
        annotations: the ground truth of I images, the same for all.
        runs: two or more.
        protocol: ``"coco"`` for AP, AP50 and AP75; ``"voc07"`` or ``"voc10"`` for mAP.
        resamples: S draws of I images. More make the ends of the intervals steadier.
        seed: of the draws.
        confidence: the part of the draws inside an interval, above 0 and below 1.
        most: for ``"coco"``: so many detections of a class in an image count.
        matched: the matches of the runs by these rules, where they are known.

    Returns:
        ``baseline``, ``resamples``, ``seed``, ``confidence``; and ``runs``, each with ``name``, ``metrics`` (name -> ``value``,
        ``low``, ``high``), ``difference`` to the first (the same, with ``better``, the part of the draws in which it is above 0;
        None for the first run) and ``per_class``, ``difference`` in AP by class name. NaN where a class has no objects.

    Raises:
        ValueError: fewer than two runs, an unknown protocol, or a number out of range.
        DataError: a fault in a record, which it names.
    """
    if len(runs) < 2:
        raise ValueError(f"a comparison needs two or more runs, got {len(runs)}")
    if protocol not in _LEVELS:
        raise ValueError(f"protocol must be one of {', '.join(_LEVELS)}; got {protocol!r}")
    if resamples < 1 or not 0 < confidence < 1:
        raise ValueError(f"resamples must be positive, confidence between 0 and 1; got {resamples} and {confidence}")
    draws = np.concatenate((np.ones((1, len(annotations)), np.int32), draw_images(len(annotations), resamples, seed)))
    names, base = annotations.class_names, np.zeros(0)
    records: list[dict[str, Any]] = []
    for name, detections in runs.items():
        if matched is not None:
            matches = matched[name]
        elif protocol == "coco":
            matches = match(annotations, detections, areas=["all"], max_detections=most)
        else:
            matches = match_voc(annotations, detections)
        values = weighted_precision(matches, draws, _LEVELS[protocol])
        if not records:
            base = values
        records.append({"name": name, **_record(values, base if records else None, names, protocol, confidence)})
    return {
        "baseline": records[0]["name"],
        "resamples": resamples,
        "seed": seed,
        "confidence": confidence,
        "runs": records,
    }


def _record(
    values: Floats, base: Floats | None, class_names: Sequence[str], protocol: str, confidence: float
) -> dict[str, Any]:
    """The intervals of one run, and of its differences; values are [1 + S, K, T], the whole data set first."""
    scores = _metrics(values, protocol)
    record: dict[str, Any] = {"metrics": {key: _interval(one, confidence) for key, one in scores.items()}}
    if base is None:
        return record | {"difference": None, "per_class": None}
    first, by_class = _metrics(base, protocol), [mean_known(one, axis=2) for one in (base, values)]
    record["difference"] = {key: _difference(first[key], one, confidence) for key, one in scores.items()}
    record["per_class"] = {
        name: _difference(by_class[0][:, k], by_class[1][:, k], confidence) for k, name in enumerate(class_names)
    }
    return record


def draw_images(count: int, resamples: int, seed: int) -> Weights:
    """Draw ``count`` images with replacement: ``[S, I]``, how often each was drawn; each row sums to I."""
    generator = np.random.default_rng(seed)
    draws = np.zeros((resamples, count), np.int32)
    for row in draws:
        row += np.bincount(generator.integers(count, size=count), minlength=count).astype(np.int32)
    return draws


def weighted_precision(matches: Matches, weights: Weights, levels: Floats | None = RECALL_LEVELS) -> Floats:
    """Compute AP ``[S, K, T]`` with images that count as often as ``weights`` ``[S, I]`` say, by rank; NaN without objects."""
    values = np.full((len(weights), matches.num_classes, len(matches.thresholds)), np.nan)
    asked = ~matches.object_ignored[0]
    for label in range(1, matches.num_classes + 1):
        owners = matches.object_images[asked & (matches.labels == label)]
        if not len(owners):
            continue
        rows = matches.class_slice(label)
        block = max(1, _BLOCK // max(rows.stop - rows.start, len(owners), 1))
        for start in range(0, len(weights), block):
            part = weights[start : start + block]
            objects = part[:, owners].sum(axis=1, dtype=np.int64)
            values[start : start + block, label - 1] = _class_precision(matches, label, part, objects, levels)
    return values


def _class_precision(
    matches: Matches, label: int, weights: Weights, objects: Integers, levels: Floats | None
) -> Floats:
    """``[S, T]`` of one class."""
    rows = matches.class_slice(label)
    images = matches.images[rows]
    weighed = weights[:, images]
    everything = np.cumsum(weighed, axis=1, dtype=np.int64)
    columns: list[Floats] = []
    for t in range(len(matches.thresholds)):
        places, _ = class_counts(matches, label, 0, t)
        hits, counted = np.cumsum(weighed[:, places], axis=1, dtype=np.int64), everything[:, places]
        ignored = np.flatnonzero(matches.ignored[0, t, rows])
        if len(ignored):
            forgiven = np.cumsum(weighed[:, ignored], axis=1, dtype=np.int64)
            before = np.searchsorted(ignored, places)  # ignored detections before each true positive
            counted = counted - np.where(before > 0, forgiven[:, before - 1], 0)
        columns.append(average_precision(hits, counted, objects, levels))
    return np.stack(columns, axis=1)


def _metrics(values: Floats, protocol: str) -> dict[str, Floats]:
    """The numbers of a protocol from ``[S, K, T]``, each ``[S]``."""
    if protocol != "coco":
        return {"mAP": mean_known(values[:, :, 0], axis=1)}
    return {
        "AP": mean_known(values, axis=(1, 2)),
        "AP50": mean_known(values[:, :, 0], axis=1),
        "AP75": mean_known(values[:, :, 5], axis=1),
    }


def _interval(values: Floats, confidence: float) -> dict[str, float]:
    """``values``: [1 + S], the whole data set first."""
    known = values[1:][~np.isnan(values[1:])]
    ends = np.quantile(known, [(1 - confidence) / 2, (1 + confidence) / 2]) if len(known) else [np.nan, np.nan]
    return {"value": float(values[0]), "low": float(ends[0]), "high": float(ends[1])}


def _difference(first: Floats, other: Floats, confidence: float) -> dict[str, float]:
    apart = other - first
    drawn = apart[1:][~np.isnan(apart[1:])]
    return {**_interval(apart, confidence), "better": float(np.mean(drawn > 0)) if len(drawn) else float("nan")}
