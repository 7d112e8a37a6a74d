"""Reads COCO instance annotations (``instances_*.json``) strictly, record by record.

A file without a fault is read by ``coco_quick``. What is here reads all others, and names what is wrong with them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from detpipe.datasets.faults import Faults, Policy
from detpipe.datasets.formats.coco_quick import sound_records
from detpipe.datasets.records import RecordBuilder, build_annotations
from detpipe.support.errors import DataError
from detpipe.support.strict_json import load_json, shorten
from detpipe.types import Annotations

_MISSING: Any = object()
_INT64 = 2**63
_Field = tuple[str, Callable[[Any], bool], str, Any]  # name, what is accepted, that in words, default


def load_coco(json_path: str | Path, image_root: str | Path, on_bad: Policy = "error") -> Annotations:
    """Read one COCO annotation file and check it against its images.

    Category ids become the labels 1..K in ascending order of the ids; images without annotations stay in. A missing
    ``iscrowd`` is 0, a missing ``area`` is the area of the box. VOC's ``difficult``, where a file has it, is kept.

    Args:
        json_path: the annotation file.
        image_root: the folder that each ``file_name`` is relative to.
        on_bad: ``"error"`` refuses a file with any faulty record; ``"skip"`` leaves these records out and counts them.

    Returns:
        The annotations of all images, in the order of the file.

    Raises:
        DataError: for anything wrong, naming the file, the record, the field and its value.
    """
    json_path, image_root = Path(json_path), Path(image_root)
    records = sound_records(json_path, image_root)
    if records is not None:
        _check_folder(image_root, json_path)
        return build_annotations(records, Faults(json_path, on_bad))
    images, annotations, categories = _top_level(json_path)
    _check_folder(image_root, json_path)
    faults = Faults(json_path, on_bad)
    builder = RecordBuilder(*_categories(categories, faults))
    rows, dropped = _add_images(images, builder, faults)
    _add_boxes(annotations, rows, dropped, builder, faults)
    return build_annotations(builder.records(image_root, [image_root], len(images), len(annotations)), faults)


def _check_folder(image_root: Path, json_path: Path) -> None:
    if not image_root.is_dir():
        raise DataError(f"{image_root}: no such image folder; it should hold the images of {json_path}")


def _top_level(path: Path) -> list[list[dict[str, Any]]]:
    """The records under "images", "annotations" and "categories"."""
    content = load_json(path)
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected an object with images, annotations and categories, got {shorten(content)}")
    parts = []
    for key in ("images", "annotations", "categories"):
        if key not in content:
            raise DataError(
                f"{path}: the top-level key {key!r} is missing; COCO files have images, annotations, categories"
            )
        records = content[key]
        if not isinstance(records, list):
            raise DataError(f"{path}: {key} must be a list of objects, got {shorten(records)}")
        if set(map(type, records)) - {dict}:
            i = next(i for i, record in enumerate(records) if type(record) is not dict)
            raise DataError(f"{path}: {key}[{i}] must be an object, got {shorten(records[i])}")
        parts.append(records)
    return parts


def _categories(records: list[dict[str, Any]], faults: Faults) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Names and original ids, by ascending id."""
    named: dict[int, str] = {}
    for i, record in enumerate(records):
        key, name = record.get("id"), record.get("name")
        if type(key) is not int or not -_INT64 <= key < _INT64:
            faults.fatal("bad category", f"categories[{i}]: id must be a whole number, got {shorten(key)}")
        elif type(name) is not str or not name:
            faults.fatal("bad category", f"category id {key}: name must be text, got {shorten(name)}")
        elif key in named or name in named.values():
            faults.fatal("duplicate category", f"category id {key}, name {name!r}: the id or the name is there twice")
        else:
            named[key] = name
    if not records:
        faults.fatal("bad category", "categories is empty; at least one class is needed")
    faults.check()
    return tuple(named[key] for key in sorted(named)), tuple(sorted(named))


def _add_images(
    records: list[dict[str, Any]], builder: RecordBuilder, faults: Faults
) -> tuple[dict[int, int], set[int]]:
    """Add the usable images; their ids with their rows, and the ids of the others."""
    rows: dict[int, int] = {}
    dropped: set[int] = set()
    name_of: dict[int, Any] = {}
    for i, record in enumerate(records):
        key, name = _values(record, "id", "file_name")
        field, text = _first_fault(record, _IMAGE)
        if field != "id" and name_of.setdefault(key, name) is not name:
            faults.fatal(
                "duplicate image id", f"image id {key} is there twice: file_name {name_of[key]!r} and {name!r}"
            )
        if field:
            where = f"images[{i}]" if field == "id" else f"image id {key} ({name})"
            faults.image(f"bad {field}", f"{where}: field {field} {text}")
            if type(key) is int:
                dropped.add(key)
        else:
            rows.setdefault(key, len(builder.images))
            builder.add_image(name, key, (record["height"], record["width"]))
    return rows, dropped


def _add_boxes(
    records: list[dict[str, Any]], rows: dict[int, int], dropped: set[int], builder: RecordBuilder, faults: Faults
) -> None:
    """Add the annotations that can be parsed."""
    labels = {category: label for label, category in enumerate(builder.category_ids, start=1)}
    first: dict[int, int] = {}
    for b, record in enumerate(records):
        key, image, category = _values(record, "id", "image_id", "category_id")
        field, text = _first_fault(record, _BOX)
        if not field and image in dropped:  # the fault is that of the image
            faults.skipped["boxes skipped: image skipped"] += 1
            continue
        for owner, wanted, known in (("image", image, rows), ("category", category, labels)):
            if not field and wanted not in known:
                field = f"{owner}_id"
                text = f"is {wanted}, which no {owner} has (there are {shorten(sorted(known))})"
        if field:
            where = f"annotations[{b}]" if field == "id" else f"annotation id {key}"
            faults.box(f"bad {field}", f"{where}: field {field} {text}")
        elif first.setdefault(key, b) != b:
            message = f"annotation id {key} is there twice: annotations[{first[key]}] and annotations[{b}]"
            faults.box("duplicate id", message)
        else:
            x, y, width, height = map(float, record["bbox"])
            builder.add_box(
                rows[image],
                (x, y, x + width, y + height),
                labels[category],
                f"annotation id {key} (image {builder.images[rows[image]][0]}): bbox {[x, y, width, height]}",
                difficult=bool(record.get("difficult", 0)),
                iscrowd=bool(record.get("iscrowd", 0)),
                area=float(record.get("area", math.nan)),
            )


def _values(record: dict[str, Any], *fields: str) -> list[Any]:
    return [record.get(field) for field in fields]


def _first_fault(record: dict[str, Any], fields: tuple[_Field, ...]) -> tuple[str, str]:
    """The first field of a record that is not as it must be, and what is wrong with it; both empty if there is none."""
    for field, accepts, expected, default in fields:
        value = record.get(field, default)
        if value is _MISSING:
            return field, "is missing"
        if value is not default and not accepts(value):
            return field, f"must be {expected}, got {shorten(value)}"
    return "", ""


def _is_int64(value: Any) -> bool:
    return type(value) is int and -_INT64 <= value < _INT64


def _is_length(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


def _is_box(value: list[Any]) -> bool:
    return len(value) == 4 and all(type(v) is float or (type(v) is int and abs(v) <= sys.float_info.max) for v in value)


def _is_flag(value: Any) -> bool:
    return type(value) in (int, bool) and value in (0, 1)


def _is_area(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < _INT64


_ID = (_is_int64, "a whole number", _MISSING)
_SIDE = (_is_length, "a whole number of pixels above 0", _MISSING)
_IMAGE: tuple[_Field, ...] = (
    ("id", *_ID),
    ("file_name", lambda value: type(value) is str and value != "", "text", _MISSING),
    ("height", *_SIDE),
    ("width", *_SIDE),
)
_BOX: tuple[_Field, ...] = (
    ("id", *_ID),
    ("image_id", *_ID),
    ("category_id", *_ID),
    ("bbox", lambda value: type(value) is list, "4 numbers", _MISSING),
    ("bbox", _is_box, "4 numbers [x, y, width, height]", _MISSING),
    ("iscrowd", _is_flag, "0 or 1", 0),
    ("difficult", _is_flag, "0 or 1", 0),
    ("area", _is_area, "a number of at least 0", math.nan),
)
