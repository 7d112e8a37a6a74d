"""Precision and recall by COCO's rules, counted by a library, some classes at a time so that memory stays small.

Lin et al., "Microsoft COCO: Common Objects in Context", 2014, arXiv 1405.0312; the rules are those of pycocotools'
COCOeval, which ``faster_coco_eval`` follows in C++.

The libraries want a dict for each box, and keep an entry for each pair of image and class. Classes do not know of each
other in these rules, so they are counted in groups of a bounded number of boxes and pairs: the same numbers, and the peak of a
group instead of the whole.

Arrays: T IoU thresholds, R recall thresholds, K classes, A area ranges, M numbers of detections.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from detpipe.evaluation.records import box_image_ids, box_sizes, canonical_rows, image_ranks, rank_in_run
from detpipe.types import Annotations, DetectionArrays

Backend = Literal["faster_coco_eval", "pycocotools"]
AREAS = ("all", "small", "medium", "large")  # divided at 32 x 32 and 96 x 96 pixels

_GROUP_BOXES, _GROUP_PAIRS = 30_000, 60_000  # of a group of classes: some 60 MiB


@dataclass(frozen=True)
class Counts:
    """What the twelve numbers, and those of each class, are means of; -1 where there is nothing to find."""

    precision: npt.NDArray[np.float64]  # [T, R, K, A, M]
    recall: npt.NDArray[np.float64]  # [T, K, A, M]


def count(
    annotations: Annotations,
    detections: DetectionArrays,
    backend: Backend,
    max_detections: Sequence[int],
    forgiven: npt.NDArray[np.bool_] | None = None,
) -> Counts:
    """Match detections with objects, and follow precision over recall.

    Args:
        annotations: the ground truth of I images, sound.
        detections: D detections, sound, in any order.
        backend: the library that counts.
        max_detections: M numbers, rising: the best detections of a class in an image that count.
        forgiven: ``[D]``, detections that are not false positives if they match nothing.

    Returns:
        Precision and recall.

    Raises:
        ValueError: an unknown backend, ``forgiven`` with pycocotools, or ``max_detections`` that do not rise from 1 on.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be 'faster_coco_eval' or 'pycocotools', got {backend!r}")
    if forgiven is not None and backend == "pycocotools":
        raise ValueError("pycocotools cannot forgive detections: give the backend 'faster_coco_eval'")
    limits = list(max_detections)
    if not limits or limits[0] < 1 or any(b <= a for a, b in itertools.pairwise(limits)):
        raise ValueError(f"max_detections must be one or more rising numbers from 1 on, got {limits}")
    rows = canonical_rows(detections)
    rows = rows[rank_in_run(detections.image_ids[rows], detections.labels[rows]) < limits[-1]]
    owner = box_image_ids(annotations)
    images = [{"id": i} for i in range(1, len(annotations) + 1)]
    parts = []
    for labels in _groups(annotations, annotations.labels, detections.labels[rows]):
        header = {"images": images, "categories": [{"id": label} for label in labels]}
        truth = _truth(annotations, owner, np.flatnonzero(_among(annotations.labels, labels)))
        found = _found(annotations, detections, rows[_among(detections.labels[rows], labels)], forgiven)
        parts.append(_run(backend, {**header, "annotations": truth}, {**header, "annotations": found}, limits))
        del truth, found  # before those of the next group are made
    precision, recall = (np.concatenate(arrays, axis=-3) for arrays in zip(*parts, strict=True))
    return Counts(precision, recall)


def _groups(annotations: Annotations, *labels: npt.NDArray[np.int64]) -> Iterator[list[int]]:
    """Divide 1..K into runs of classes that are small enough to be counted together."""
    boxes = np.bincount(np.concatenate(labels), minlength=annotations.num_classes + 1)
    most = max(1, _GROUP_PAIRS // max(1, len(annotations)))
    group: list[int] = []
    held = 0
    for label in range(1, annotations.num_classes + 1):
        if group and (held + boxes[label] > _GROUP_BOXES or len(group) == most):
            yield group
            group, held = [], 0
        group.append(label)
        held += int(boxes[label])
    yield group


def _among(of: npt.NDArray[np.int64], labels: list[int]) -> npt.NDArray[np.bool_]:
    """Which labels are of a run of classes."""
    return (of >= labels[0]) & (of <= labels[-1])


Rows = npt.NDArray[np.intp]


def _truth(annotations: Annotations, owner: npt.NDArray[np.int64], rows: Rows) -> list[dict[str, Any]]:
    """The libraries' dicts of some objects."""
    iscrowd, difficult = annotations.iscrowd[rows], annotations.difficult[rows]
    return _records(
        image_id=image_ranks(annotations, owner[rows]) + 1,
        category_id=annotations.labels[rows],
        bbox=_xywh(annotations.boxes[rows]),
        area=np.where(difficult & ~iscrowd, math.inf, annotations.area[rows]),
        iscrowd=iscrowd.astype(int),
    )


def _found(
    annotations: Annotations, detections: DetectionArrays, rows: Rows, forgiven: npt.NDArray[np.bool_] | None
) -> list[dict[str, Any]]:
    """The libraries' dicts of some detections."""
    boxes = detections.boxes[rows]
    return _records(
        image_id=image_ranks(annotations, detections.image_ids[rows]) + 1,
        category_id=detections.labels[rows],
        bbox=_xywh(boxes),
        area=box_sizes(boxes).prod(axis=1),
        iscrowd=np.zeros(len(rows), int),
        score=detections.scores[rows],
        **({} if forgiven is None else {"lvis_mark": forgiven[rows]}),
    )


def _xywh(boxes: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.concatenate((boxes[:, :2], box_sizes(boxes)), axis=1)


def _records(**columns: npt.NDArray[Any]) -> list[dict[str, Any]]:
    """Make the libraries' dicts; boxes are numbered from 1, their order is kept."""
    names = ("id", *columns)
    values = zip(itertools.count(1), *(column.tolist() for column in columns.values()))
    return [dict(zip(names, row, strict=True)) for row in values]


def _run(backend: Backend, truth: dict, found: dict, limits: list[int]) -> tuple[npt.NDArray, npt.NDArray]:
    """Return precision [T, R, K, A, M] and recall [T, K, A, M]."""
    if backend == "pycocotools":
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval as Evaluator
    else:
        from faster_coco_eval import COCO
        from faster_coco_eval import COCOeval_faster as Evaluator
    with contextlib.redirect_stdout(io.StringIO()):  # they print their progress
        evaluator = Evaluator(_indexed(COCO(), truth), _indexed(COCO(), found), iouType="bbox")
        evaluator.params.maxDets = limits
        evaluator.evaluate()
        evaluator.accumulate()
    return np.asarray(evaluator.eval["precision"]), np.asarray(evaluator.eval["recall"])


def _indexed(coco: Any, dataset: dict) -> Any:
    """Fill an empty COCO object of either library; unlike ``loadRes`` this takes no detections for what they are."""
    coco.dataset = dataset
    coco.createIndex()
    return coco
