"""COCO's twelve numbers and AP of each class.

Lin et al., "Microsoft COCO: Common Objects in Context", 2014, arXiv 1405.0312; the rules are those of pycocotools'
COCOeval, which ``faster_coco_eval`` computes in C++ (about eight times faster, equal within 1e-12).

Deviations:
1. Ground truth is renumbered from 1: the evaluators take an id of 0 for "no match", which turns a perfect AP into 0.
2. Detections are put into canonical order first, so that ties between equal scores do not depend on the order of
   arrival.
3. An object that is ``difficult`` (VOC data under this protocol) is neither a miss when it is not found nor a false
   positive when it is: that is how it is trained and how the VOC protocols count. COCO has no such flag: its files'
   ``ignore`` is overwritten by ``iscrowd``, and as a crowd it would swallow every detection *inside* it. So it is
   given an infinite area, which lies in none of COCO's area ranges; the evaluators then ignore it and its one best
   match at IoU.

Arrays: T IoU thresholds, R recall thresholds, K classes, A area ranges, M numbers of detections.
"""

from __future__ import annotations

import contextlib
import io
import math
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from detpipe.evaluation.records import (
    box_image_ids,
    box_sizes,
    canonical_order,
    check_annotations,
    check_detections,
    image_ranks,
)
from detpipe.types import Annotations, DetectionArrays

Backend = Literal["faster_coco_eval", "pycocotools"]

_ALL_IOU = slice(None)
_IOU50, _IOU75 = slice(0, 1), slice(5, 6)  # of .50, .55, .. .95
_ALL, _SMALL, _MEDIUM, _LARGE = range(4)  # area ranges, divided at 32 x 32 and 96 x 96 pixels
_MAX1, _MAX10, _MAX100 = range(3)  # detections counted in an image

_PRECISIONS = {
    "AP": (_ALL_IOU, _ALL),
    "AP50": (_IOU50, _ALL),
    "AP75": (_IOU75, _ALL),
    "APs": (_ALL_IOU, _SMALL),
    "APm": (_ALL_IOU, _MEDIUM),
    "APl": (_ALL_IOU, _LARGE),
}
_RECALLS = {
    "AR1": (_ALL, _MAX1),
    "AR10": (_ALL, _MAX10),
    "AR100": (_ALL, _MAX100),
    "ARs": (_SMALL, _MAX100),
    "ARm": (_MEDIUM, _MAX100),
    "ARl": (_LARGE, _MAX100),
}


def evaluate_coco(
    annotations: Annotations, detections: DetectionArrays, backend: Backend = "faster_coco_eval"
) -> dict[str, Any]:
    """Compute COCO's box metrics.

    Args:
        annotations: the ground truth of I images. ``area`` decides over small, medium and large; crowd regions are
            ignored at intersection over detection area, as COCO does; difficult objects are ignored at IoU (see the
            module).
        detections: D detections in pixels of the original images, in any order. Of each class, the best 100 of an image
            count.
        backend: ``"faster_coco_eval"``, or ``"pycocotools"``, the reference.

    Returns:
        AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm, ARl, each in 0..1, and ``per_class``: the AP by class
        name. Like in COCO, -1.0 means that there is no ground truth to find, and such classes are not part of the
        means.

    Raises:
        ValueError: an unknown backend, or detection arrays of different lengths.
        DataError: no images, or a fault in a record, which it names.
    """
    if backend not in ("faster_coco_eval", "pycocotools"):
        raise ValueError(f"backend must be 'faster_coco_eval' or 'pycocotools', got {backend!r}")
    check_annotations(annotations)
    check_detections(annotations, detections)
    truth = {**_images_and_categories(annotations), "annotations": _truth_records(annotations)}
    found = {**_images_and_categories(annotations), "annotations": _found_records(annotations, detections)}
    precision, recall = _pycocotools(truth, found) if backend == "pycocotools" else _faster_coco_eval(truth, found)
    metrics: dict[str, Any] = {
        name: _mean(precision[iou, :, :, area, _MAX100]) for name, (iou, area) in _PRECISIONS.items()
    }
    metrics.update({name: _mean(recall[:, :, area, count]) for name, (area, count) in _RECALLS.items()})
    metrics["per_class"] = {
        name: _mean(precision[:, :, k, _ALL, _MAX100]) for k, name in enumerate(annotations.class_names)
    }
    return metrics


def _mean(values: npt.NDArray[np.float64]) -> float:
    """Average what was measured; -1.0 where nothing could be."""
    measured = values[values > -1]
    return float(measured.mean()) if measured.size else -1.0


def _images_and_categories(annotations: Annotations) -> dict[str, list[dict[str, int]]]:
    return {
        "images": [{"id": i} for i in range(1, len(annotations) + 1)],
        "categories": [{"id": k} for k in range(1, annotations.num_classes + 1)],
    }


def _truth_records(annotations: Annotations) -> list[dict[str, Any]]:
    ignored = annotations.difficult & ~annotations.iscrowd
    area = np.where(ignored, math.inf, annotations.area)
    return _records(
        image_ranks(annotations, box_image_ids(annotations)),
        annotations.labels,
        annotations.boxes,
        area=area.tolist(),
        iscrowd=annotations.iscrowd.astype(int).tolist(),
    )


def _found_records(annotations: Annotations, detections: DetectionArrays) -> list[dict[str, Any]]:
    found = canonical_order(detections)
    return _records(
        image_ranks(annotations, found.image_ids),
        found.labels,
        found.boxes,
        area=box_sizes(found.boxes).prod(axis=1).tolist(),
        iscrowd=[0] * len(found.scores),
        score=found.scores.tolist(),
    )


def _records(
    ranks: npt.NDArray[np.int64], labels: npt.NDArray[np.int64], boxes: npt.NDArray[np.float64], **columns: list
) -> list[dict[str, Any]]:
    """Make the evaluators' annotation dicts; images and annotations are numbered from 1, the order is kept."""
    names = ("id", "image_id", "category_id", "bbox", *columns)
    xywh = np.concatenate((boxes[:, :2], box_sizes(boxes)), axis=1).tolist()
    rows = zip(range(1, len(labels) + 1), (ranks + 1).tolist(), labels.tolist(), xywh, *columns.values(), strict=True)
    return [dict(zip(names, row, strict=True)) for row in rows]


def _pycocotools(truth: dict, found: dict) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return precision [T, R, K, A, M] and recall [T, K, A, M]."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        evaluator = COCOeval(_indexed(COCO(), truth), _indexed(COCO(), found), iouType="bbox")
        evaluator.evaluate()
        evaluator.accumulate()
    return evaluator.eval["precision"], evaluator.eval["recall"]


def _faster_coco_eval(truth: dict, found: dict) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return precision [T, R, K, A, M] and recall [T, K, A, M]."""
    from faster_coco_eval import COCO, COCOeval_faster

    with contextlib.redirect_stdout(io.StringIO()):
        evaluator = COCOeval_faster(_indexed(COCO(), truth), _indexed(COCO(), found), iouType="bbox")
        evaluator.evaluate()
        evaluator.accumulate()
    return np.asarray(evaluator.eval["precision"]), np.asarray(evaluator.eval["recall"])


def _indexed(coco: Any, dataset: dict) -> Any:
    """Fill an empty COCO object of either library; unlike ``loadRes`` this takes no detections for what they are."""
    coco.dataset = dataset
    coco.createIndex()
    return coco
