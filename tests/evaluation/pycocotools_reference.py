"""pycocotools on our data types."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np

from detpipe.evaluation import canonical_order
from detpipe.evaluation.records import box_sizes
from detpipe.types import Annotations, DetectionArrays


def records(
    annotations: Annotations, image_ids: np.ndarray, labels: np.ndarray, boxes: np.ndarray, **more: Any
) -> dict:
    """A data set as pycocotools reads it: images by rising id, and everything else, numbered from 1."""
    columns = {
        "image_id": np.searchsorted(np.sort(annotations.image_ids), image_ids) + 1,
        "category_id": labels,
        "bbox": np.concatenate((boxes[:, :2], box_sizes(boxes)), axis=1),
        **more,
    }
    rows = zip(*(np.asarray(column).tolist() for column in columns.values()), strict=True)
    return {
        "images": [{"id": i + 1} for i in range(len(annotations))],
        "categories": [{"id": k + 1} for k in range(annotations.num_classes)],
        "annotations": [{"id": i, **dict(zip(columns, row, strict=True))} for i, row in enumerate(rows, start=1)],
    }


def reference_evaluator(annotations: Annotations, detections: DetectionArrays, **params: Any) -> Any:
    """pycocotools and its own matching, image by image; a difficult object lies in no range of sizes."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def indexed(data: dict) -> Any:
        coco = COCO()
        coco.dataset = data
        coco.createIndex()
        return coco

    owners = np.repeat(annotations.image_ids, np.diff(annotations.offsets))
    areas = np.where(annotations.difficult & ~annotations.iscrowd, np.inf, annotations.area)
    crowd = annotations.iscrowd.astype(int)
    truths = records(annotations, owners, annotations.labels, annotations.boxes, area=areas, iscrowd=crowd)
    ordered = canonical_order(detections)
    more = {"area": box_sizes(ordered.boxes).prod(axis=1), "score": ordered.scores, "iscrowd": 0 * ordered.labels}
    founds = records(annotations, ordered.image_ids, ordered.labels, ordered.boxes, **more)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator = COCOeval(indexed(truths), indexed(founds), iouType="bbox")
        vars(evaluator.params).update(params)
        evaluator.evaluate()
        evaluator.accumulate()
    return evaluator
