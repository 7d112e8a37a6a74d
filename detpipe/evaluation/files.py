"""Ground truth and detections in COCO's file formats.

A result file is a list of ``{"image_id", "category_id", "bbox": [x, y, width, height], "score"}`` with the ids of the
annotation file. What is read is what is counted: boxes keep the numbers of the file, nothing is clipped or dropped,
and a fault is an error that names the file, the record and the field.

LVIS's annotation files say beyond COCO's for which classes each image was searched.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from msgspec import UNSET

from detpipe.evaluation import predictions
from detpipe.evaluation.records import box_sizes, canonical_order, check_detections
from detpipe.support.coco_file import COCOFile, as_key, read_coco_file
from detpipe.support.errors import DataError
from detpipe.support.files import atomic_write
from detpipe.support.strict_json import load_json, require, require_numbers, shorten
from detpipe.types import Annotations, DetectionArrays, Federation

FREQUENCIES = ("r", "c", "f")
_NEGATIVE, _NOT_EXHAUSTIVE = "neg_category_ids", "not_exhaustive_category_ids"


def read_coco_annotations(path: str | os.PathLike[str]) -> Annotations:
    """Read a COCO annotation file as ground truth for evaluation; the images themselves are not needed.

    Classes are numbered by rising category id, gaps closed. ``iscrowd`` and ``difficult`` are 0 where absent. Where ``area`` is
    absent it is width times height, counted under "areas taken from boxes". ``file_name``, ``width`` and ``height`` of an image
    may be absent (the name is then the id, the size 0). An LVIS file (``neg_category_ids``) also gives the ``federation``.

    Returns:
        The ground truth, boxes as the file gives them: neither clipped nor checked against the size of the image.

    Raises:
        DataError: a file that is cut off or malformed; a missing key or field; a number that is not finite; a category,
            image or annotation id twice; a category or image id that is not listed; a box of negative size.
    """
    file = read_coco_file(path)
    box_ids, xywh = file.boxes["id"], file.xywh
    faults = [fault.message for fault in file.faults]
    for b in np.flatnonzero(~np.isfinite(xywh).all(1) | (xywh[:, 2:] < 0).any(1)).tolist():
        found = f"annotation id {box_ids[b]}: field bbox is {xywh[b].tolist()}"
        faults.append(f"{found}: expected finite numbers, width and height of at least 0")
    if faults:
        more = f" (and {len(faults) - 1} more faults)" if len(faults) > 1 else ""
        raise DataError(f"{path}: {faults[0]}{more}; correct the file")
    order = np.argsort(file.box_image, kind="stable")
    names = zip(file.images["file_name"], file.images["id"], strict=True)
    without_area = np.isnan(file.area)
    return Annotations(
        root=Path(path),
        file_names=np.array([str(name or key) for name, key in names], dtype=np.str_),
        image_ids=file.image_ids,
        sizes=file.sizes.astype(np.int32),
        offsets=np.concatenate(([0], np.cumsum(np.bincount(file.box_image, minlength=len(file.image_ids))))).astype(
            np.int64
        ),
        boxes=np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)[order],
        labels=file.labels[order],
        iscrowd=file.iscrowd[order],
        difficult=file.difficult[order],
        area=np.where(without_area, xywh[:, 2] * xywh[:, 3], file.area)[order],
        class_names=tuple(file.categories["name"]),
        category_ids=file.category_ids,
        federation=_federation(file, f"{path}"),
        counts={
            "images read": file.images_read,
            "boxes read": file.boxes_read,
            "areas taken from boxes": int(without_area.sum()),
            **file.counts,
        },
    )


def _federation(file: COCOFile, path: str) -> Federation | None:
    """The fields of a federated data set; None if no image lists classes that it was searched for without finding them."""
    if all(values is UNSET for values in file.images[_NEGATIVE]):
        return None
    for key, frequency in zip(file.category_ids, file.categories["frequency"], strict=True):
        if frequency not in FREQUENCIES:
            found = "missing" if frequency is UNSET else shorten(frequency)
            raise DataError(
                f"{path}: category id {key}: the field 'frequency' is {found}: expected one of {', '.join(FREQUENCIES)}"
            )
    pairs = [_pairs(file, field, path) for field in (_NEGATIVE, _NOT_EXHAUSTIVE)]
    return Federation(*pairs, frequencies=tuple(file.categories["frequency"]))


def _pairs(file: COCOFile, field: str, path: str) -> npt.NDArray[np.int64]:
    """[M, 2] image id and label of the classes that the images list in a field."""
    label_of = {category: k for k, category in enumerate(file.category_ids, start=1)}
    pairs: list[tuple[int, int]] = []
    for key, categories in zip(file.image_ids.tolist(), file.images[field], strict=True):
        where = f"{path}: image id {key}"
        for category in require({} if categories is UNSET else {field: categories}, field, list, where):
            if type(category) is not int or category not in label_of:
                raise DataError(f"{where}: the field {field!r} lists {category!r}, which is no category id of the file")
            pairs.append((key, label_of[category]))
    return np.array(pairs, np.int64).reshape(-1, 2)


def read_detections(path: str | os.PathLike[str], annotations: Annotations) -> DetectionArrays:
    """Read detections from a file in COCO's result format, in the order of the file, or from what ``detpipe predict`` has written.

    Args:
        path: the JSON file, or JSON lines (``*.jsonl``).
        annotations: the ground truth, whose image ids and category ids the file uses; where those are text, that text or the
            numbers that stand for it.

    Raises:
        DataError: a malformed file; a record without one of the fields, with a number that is not finite, a box of negative
            size, or an image or category id that the ground truth does not have. Names the record, counted from 0.
    """
    rows = predictions.read_lines(path) if Path(path).suffix == predictions.LINES else load_json(path)
    if predictions.is_predictions(rows):
        return predictions.from_predictions(rows, path, annotations)
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a list of detections (COCO's result format), got {shorten(rows)}")
    image_ids, labels = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
    boxes, scores = np.zeros((len(rows), 4)), np.zeros(len(rows))
    known_images = set(annotations.image_ids.tolist())
    label_of = {category: k for k, category in enumerate(annotations.category_ids, start=1)}
    _number_ids(rows, annotations)
    for i, row in enumerate(rows):
        where = f"{path}: record {i}"
        image_id = require(row, "image_id", int, where)
        if image_id not in known_images:
            raise DataError(f"{where}: image_id {image_id} is not an image of the ground truth: do the files match?")
        category = require(row, "category_id", int, where)
        if category not in label_of:
            raise DataError(f"{where}: category_id {category} is not a category of the ground truth: use its ids")
        image_ids[i], labels[i] = image_id, label_of[category]
        boxes[i] = _read_box(row, where)
        scores[i] = require(row, "score", float, where)
    return DetectionArrays(image_ids=image_ids, boxes=boxes, scores=scores, labels=labels)


def _number_ids(records: list[Any], annotations: Annotations) -> None:
    """Replace ids of records that are not written as whole numbers by the numbers that stand for them, if there are any."""
    numbers: dict[str, dict[Any, int]] = {"image_id": {}, "category_id": {}}
    rows = (row for row in records if isinstance(row, dict))
    written = [(row, name) for row in rows for name in numbers if type(row.get(name)) in (str, float)]
    if written and annotations.root.is_file():
        file = read_coco_file(annotations.root)
        numbers["image_id"] = dict(zip(file.images["id"], file.image_ids.tolist(), strict=True))
        numbers["category_id"] = dict(zip(file.categories["id"], file.category_ids, strict=True))
    for row, name in written:
        key = as_key(row[name])
        row[name] = numbers[name].get(key, key)


def write_detections(path: str | os.PathLike[str], detections: DetectionArrays, annotations: Annotations) -> None:
    """Write detections in COCO's result format, with the image and category ids of the annotation file, or the numbers of text.

    Records are in canonical order, one a line, so that equal sets of detections make equal files; reading them back gives the
    same bits. The file appears under its name only when it is complete.

    Raises:
        DataError: a detection that is not sound, named; or a file that cannot be written.
    """
    check_detections(annotations, detections)
    try:
        with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as stream:
            stream.writelines(_result_lines(canonical_order(detections), annotations))
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error}): check folder and space") from error


def _result_lines(detections: DetectionArrays, annotations: Annotations) -> Iterator[str]:
    categories = np.array([0, *annotations.category_ids])[detections.labels].tolist()
    xywh = np.concatenate((detections.boxes[:, :2], box_sizes(detections.boxes)), axis=1).tolist()
    columns = (detections.image_ids.tolist(), categories, xywh, detections.scores.tolist())
    separator = "[\n"
    for image_id, category, box, score in zip(*columns, strict=True):
        row = {"image_id": image_id, "category_id": category, "bbox": box, "score": score}
        yield separator + json.dumps(row, allow_nan=False)
        separator = ",\n"
    yield "[]\n" if separator == "[\n" else "\n]\n"


def _read_box(record: dict[str, Any], where: str) -> tuple[float, float, float, float]:
    x, y, width, height = require_numbers(record, "bbox", 4, where)
    if width < 0 or height < 0:
        raise DataError(f"{where}: the field 'bbox' is {shorten(record['bbox'])}: expected width and height >= 0")
    return x, y, x + width, y + height
