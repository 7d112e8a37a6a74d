"""Precision and recall counted by pycocotools, the reference that our own counting is held to, class by class.

Lin et al., "Microsoft COCO: Common Objects in Context", 2014, arXiv 1405.0312. The library wants a dict for each box, and keeps
an entry for each pair of image and class. Classes do not know of each other in these rules, so memory is that of one class.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from detpipe.evaluation.matches import Floats
from detpipe.evaluation.records import box_image_ids, box_sizes, canonical_order, image_ranks
from detpipe.types import Annotations, DetectionArrays


def count_by_pycocotools(
    annotations: Annotations, detections: DetectionArrays, max_detections: Sequence[int]
) -> tuple[Floats, Floats]:
    """Count the detections of sound records, for M rising numbers of detections of a class in an image.

    Returns:
        Precision ``[T, R, K, A]`` at the largest number and recall ``[T, K, A, M]``; -1 where there is nothing to find.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    found = canonical_order(detections)
    owner = box_image_ids(annotations)
    images = [{"id": i} for i in range(1, len(annotations) + 1)]
    precisions, recalls = [], []
    for label in range(1, annotations.num_classes + 1):
        header = {"images": images, "categories": [{"id": label}]}
        objects = _objects(annotations, owner, annotations.labels == label)
        of_class = _detections(annotations, found.take(found.labels == label))
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
            evaluator = COCOeval(_indexed(COCO(), header, objects), _indexed(COCO(), header, of_class), "bbox")
            evaluator.params.maxDets = list(max_detections)
            evaluator.evaluate()
            evaluator.accumulate()
        precisions.append(evaluator.eval["precision"][..., -1])
        recalls.append(evaluator.eval["recall"])
    return np.concatenate(precisions, axis=2), np.concatenate(recalls, axis=1)


def _objects(
    annotations: Annotations, owner: npt.NDArray[np.int64], rows: npt.NDArray[np.bool_]
) -> list[dict[str, Any]]:
    iscrowd, difficult = annotations.iscrowd[rows], annotations.difficult[rows]
    return _records(
        image_id=image_ranks(annotations, owner[rows]) + 1,
        category_id=annotations.labels[rows],
        bbox=_xywh(annotations.boxes[rows]),
        area=np.where(difficult & ~iscrowd, math.inf, annotations.area[rows]),
        iscrowd=iscrowd.astype(int),
    )


def _detections(annotations: Annotations, found: DetectionArrays) -> list[dict[str, Any]]:
    return _records(
        image_id=image_ranks(annotations, found.image_ids) + 1,
        category_id=found.labels,
        bbox=_xywh(found.boxes),
        area=box_sizes(found.boxes).prod(axis=1),
        iscrowd=np.zeros(len(found.labels), int),
        score=found.scores,
    )


def _xywh(boxes: Floats) -> Floats:
    return np.concatenate((boxes[:, :2], box_sizes(boxes)), axis=1)


def _records(**columns: npt.NDArray[Any]) -> list[dict[str, Any]]:
    """Make the library's dicts; boxes are numbered from 1, their order is kept."""
    names = ("id", *columns)
    values = zip(itertools.count(1), *(column.tolist() for column in columns.values()))
    return [dict(zip(names, row, strict=True)) for row in values]


def _indexed(coco: Any, header: dict[str, Any], records: list[dict[str, Any]]) -> Any:
    """Fill an empty COCO object; unlike ``loadRes`` this takes no detections for what they are."""
    coco.dataset = {**header, "annotations": records}
    coco.createIndex()
    return coco
