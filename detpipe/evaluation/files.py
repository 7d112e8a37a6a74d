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
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from detpipe.evaluation.records import box_sizes, canonical_order, check_detections
from detpipe.support.errors import DataError
from detpipe.support.files import atomic_write
from detpipe.support.strict_json import load_json, optional_flag, require, require_numbers, shorten
from detpipe.types import Annotations, DetectionArrays, Federation

FREQUENCIES = ("r", "c", "f")
_NEGATIVE, _NOT_EXHAUSTIVE = "neg_category_ids", "not_exhaustive_category_ids"


def is_federated(images: dict[int, dict[str, Any]]) -> bool:
    """Whether any image lists classes that it was searched for without finding them."""
    return any(_NEGATIVE in image for image in images.values())


def read_federation(
    images: dict[int, dict[str, Any]], categories: dict[int, dict[str, Any]], label_of: dict[int, int], path: str
) -> Federation:
    """Read the fields of a federated data set.

    Args:
        images: the records of the file by id.
        categories: the records of the file by id.
        label_of: category id -> label.
        path: of the file, for messages.

    Returns:
        The classes of each image, and how frequent each class is.

    Raises:
        DataError: a field is missing or of the wrong kind, or names a category that the file does not have.
    """
    frequencies = []
    for key in label_of:
        where = f"{path}: category id {key}"
        frequency = require(categories[key], "frequency", str, where)
        if frequency not in FREQUENCIES:
            raise DataError(
                f"{where}: the field 'frequency' is {frequency!r}: expected one of {', '.join(FREQUENCIES)}"
            )
        frequencies.append(frequency)
    return Federation(
        negative=_pairs(images, _NEGATIVE, label_of, path),
        not_exhaustive=_pairs(images, _NOT_EXHAUSTIVE, label_of, path),
        frequencies=tuple(frequencies),
    )


def _pairs(images: dict[int, dict[str, Any]], field: str, label_of: dict[int, int], path: str) -> npt.NDArray[np.int64]:
    pairs: list[tuple[int, int]] = []
    for key, image in images.items():
        where = f"{path}: image id {key}"
        for category in require(image, field, list, where):
            if type(category) is not int or category not in label_of:
                raise DataError(f"{where}: the field {field!r} lists {category!r}, which is no category id of the file")
            pairs.append((key, label_of[category]))
    return np.array(pairs, np.int64).reshape(-1, 2)


def read_coco_annotations(path: str | os.PathLike[str]) -> Annotations:
    """Read a COCO annotation file as ground truth for evaluation; the images themselves are not needed.

    Classes are numbered by rising category id, gaps closed. ``iscrowd`` and ``difficult`` are 0 where absent. Where
    ``area`` is absent it is width times height, counted under "areas taken from boxes". ``file_name``, ``width`` and
    ``height`` of an image may be absent: evaluation does not use them (the name is then the id, the size 0). An LVIS file
    (``neg_category_ids`` in the images) also gives the ``federation``.

    Args:
        path: the JSON file.

    Returns:
        The ground truth, boxes as the file gives them: neither clipped nor checked against the size of the image.

    Raises:
        DataError: a file that is cut off or malformed; a missing key or field; a number that is not finite; a category,
            image or annotation id twice; a category or image id that is not listed; a box of negative size.
    """
    data = load_json(path)
    categories = _by_id(require(data, "categories", list, f"{path}"), "category", f"{path}")
    images = _by_id(require(data, "images", list, f"{path}"), "image", f"{path}")
    names = [require(categories[key], "name", str, f"{path}: category id {key}") for key in sorted(categories)]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{path}: the category name {twice!r} occurs more than once: give each category its own name")
    annotations = _packed(Path(path), images, dict(zip(sorted(categories), names, strict=True)), data)
    if not is_federated(images):
        return annotations
    label_of = {category: k for k, category in enumerate(annotations.category_ids, start=1)}
    return replace(annotations, federation=read_federation(images, categories, label_of, f"{path}"))


def read_detections(path: str | os.PathLike[str], annotations: Annotations) -> DetectionArrays:
    """Read detections from a file in COCO's result format.

    Args:
        path: the JSON file.
        annotations: the ground truth, whose image ids and category ids the file uses.

    Returns:
        The detections in the order of the file.

    Raises:
        DataError: a malformed file; a record without one of the fields, with a number that is not finite, a box of
            negative size, or an image or category id that the ground truth does not have. Names the record, counted
            from 0.
    """
    rows = load_json(path)
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a list of detections (COCO's result format), got {shorten(rows)}")
    image_ids, labels = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
    boxes, scores = np.zeros((len(rows), 4)), np.zeros(len(rows))
    known_images = set(annotations.image_ids.tolist())
    label_of = {category: k for k, category in enumerate(annotations.category_ids, start=1)}
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


def write_detections(path: str | os.PathLike[str], detections: DetectionArrays, annotations: Annotations) -> None:
    """Write detections in COCO's result format, with the image ids and category ids of the annotation file.

    Records are in canonical order, one a line, so that equal sets of detections make equal files. Numbers are written
    such that reading them back gives the same bits (boxes that were float32, or of a few decimals, included). The file
    appears under its name only when it is complete.

    Args:
        path: the JSON file to write.
        detections: D detections in pixels of the original images.
        annotations: the ground truth that they belong to.

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


def _by_id(records: list, kind: str, path: str) -> dict[int, dict[str, Any]]:
    """Index records by their id, which must be there and unique."""
    by_id: dict[int, dict[str, Any]] = {}
    for i, record in enumerate(records):
        key = require(record, "id", int, f"{path}: {kind} {i} of the list")
        if key in by_id:
            label = {"image": "file_name", "category": "name", "annotation": "image_id"}[kind]
            both = " and ".join(shorten(one.get(label)) for one in (by_id[key], record))
            raise DataError(f"{path}: {kind} id {key} is used twice ({label} {both}): ids must be unique")
        by_id[key] = record
    return by_id


def _packed(path: Path, images: dict[int, dict], names: dict[int, str], data: dict) -> Annotations:
    """Check the annotations one by one and sort them by image, in the order of the file within an image."""
    records = _by_id(require(data, "annotations", list, f"{path}"), "annotation", f"{path}")
    position = {image_id: i for i, image_id in enumerate(images)}
    label_of = {category: k for k, category in enumerate(names, start=1)}
    count = len(records)
    owner, labels = np.zeros(count, np.int64), np.zeros(count, np.int64)
    boxes, area = np.zeros((count, 4)), np.zeros(count)
    iscrowd, difficult = np.zeros(count, np.bool_), np.zeros(count, np.bool_)
    for i, (key, record) in enumerate(records.items()):
        where = f"{path}: annotation id {key}"
        image_id, category = require(record, "image_id", int, where), require(record, "category_id", int, where)
        if image_id not in position:
            raise DataError(f"{where}: image_id {image_id} is not among the images of the file")
        if category not in label_of:
            raise DataError(f"{where}: category_id {category} is not among the categories of the file")
        owner[i], labels[i], boxes[i] = position[image_id], label_of[category], _read_box(record, where)
        area[i] = _read_area(record, where)
        iscrowd[i], difficult[i] = optional_flag(record, "iscrowd", where), optional_flag(record, "difficult", where)
    order = np.argsort(owner, kind="stable")
    sizes = [_read_size(image, f"{path}: image id {key}") for key, image in images.items()]
    without_area = sum("area" not in record for record in records.values())
    return Annotations(
        root=path,
        file_names=np.array([str(image.get("file_name", key)) for key, image in images.items()], dtype=np.str_),
        image_ids=np.array(list(images), np.int64),
        sizes=np.array(sizes, np.int32).reshape(-1, 2),
        offsets=np.concatenate(([0], np.cumsum(np.bincount(owner, minlength=len(images))))).astype(np.int64),
        boxes=boxes[order],
        labels=labels[order],
        iscrowd=iscrowd[order],
        difficult=difficult[order],
        area=area[order],
        class_names=tuple(names.values()),
        category_ids=tuple(names),
        counts={"images read": len(images), "boxes read": count, "areas taken from boxes": without_area},
    )


def _read_box(record: dict[str, Any], where: str) -> tuple[float, float, float, float]:
    x, y, width, height = require_numbers(record, "bbox", 4, where)
    if width < 0 or height < 0:
        raise DataError(f"{where}: the field 'bbox' is {shorten(record['bbox'])}: expected width and height >= 0")
    return x, y, x + width, y + height


def _read_area(record: dict[str, Any], where: str) -> float:
    if "area" not in record:
        return record["bbox"][2] * record["bbox"][3]
    area = require(record, "area", float, where)
    if area < 0:
        raise DataError(f"{where}: the field 'area' is {area}: expected square pixels, 0 or more")
    return area


def _read_size(image: dict[str, Any], where: str) -> tuple[int, int]:
    height, width = (require(image, side, int, where) if side in image else 0 for side in ("height", "width"))
    return height, width
