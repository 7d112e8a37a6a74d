"""Reads COCO instance annotations (``instances_*.json``) strictly, a whole field of all records at a time.

A file without a fault is read by ``coco_quick``, or comes from the cache of an earlier run. What is here reads all others, and
names what is wrong with them. Looking at one field of all records at once keeps the checks near the speed of C; only where
something is wrong are the records looked at one by one, to name them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from detpipe.datasets.coco_quick import sound_columns
from detpipe.datasets.faults import Faults, Policy
from detpipe.datasets.records import Records, build_annotations
from detpipe.errors import DataError
from detpipe.strict_json import load_json, shorten
from detpipe.types import Annotations

_MISSING: Any = object()
_INT64 = 2**63
_Column = tuple[list[Any], npt.NDArray[np.bool_]]  # values with a stand-in where they are bad, and which are good


def load_coco(
    json_path: str | Path, image_root: str | Path, on_bad: Policy = "error", cache: str | Path | None = None
) -> Annotations:
    """Read one COCO annotation file and check it against its images.

    Category ids become the labels 1..K in ascending order of the ids; images without annotations stay in. A missing
    ``iscrowd`` is 0, a missing ``area`` is the area of the box. VOC's ``difficult``, where a file has it, is kept.

    Args:
        json_path: the annotation file.
        image_root: the folder that each ``file_name`` is relative to.
        on_bad: ``"error"`` refuses a file with any faulty record; ``"skip"`` leaves these records out and counts them.
        cache: the folder that keeps what was read of large files without faults for the next time, by their content;
            ``"off"`` for none, None for what the environment says (``annotation_cache``). Boxes and image files are checked
            each time.

    Returns:
        The annotations of all images, in the order of the file.

    Raises:
        DataError: for anything wrong, naming the file, the record, the field and its value.
    """
    json_path, image_root = Path(json_path), Path(image_root)
    columns = sound_columns(json_path, cache)
    if columns is not None:
        _check_folder(image_root, json_path)
        return build_annotations(columns.records(image_root), Faults(json_path, on_bad))
    images, annotations, categories = _top_level(json_path)
    _check_folder(image_root, json_path)
    faults = Faults(json_path, on_bad)
    class_names, category_ids = _categories(categories, faults)
    file_names, image_ids, sizes, dropped = _images(images, faults)
    records = _annotations(annotations, file_names, image_ids, dropped, category_ids, faults)
    return build_annotations(
        Records(
            root=image_root,
            folders=[image_root],
            file_names=file_names,
            image_ids=image_ids,
            sizes=sizes,
            class_names=class_names,
            category_ids=category_ids,
            images_read=len(images),
            boxes_read=len(annotations),
            **records,
        ),
        faults,
    )


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


def _images(
    records: list[dict[str, Any]], faults: Faults
) -> tuple[list[str], npt.NDArray[np.int64], npt.NDArray[np.int64], set[int]]:
    """File names, ids and sizes [I, 2] of the usable images, and the ids of the others."""
    bad: dict[int, tuple[str, str]] = {}  # row -> reason and message; the first fault of a record stands for it

    def note(i: int, field: str, text: str) -> None:
        record = records[i]
        name = f"images[{i}]" if field == "id" else f"image id {record.get('id')} ({record.get('file_name')})"
        bad.setdefault(i, (f"bad {field}", f"{name}: field {field} {text}"))

    ids, has_id = _column(records, "id", _is_int64, "a whole number", note)
    names, named = _column(records, "file_name", _is_text, "text", note)
    columns = [_column(records, f, _is_length, "a whole number of pixels above 0", note) for f in ("height", "width")]
    good = has_id & named & columns[0][1] & columns[1][1]
    for i in sorted(bad):
        faults.image(*bad[i])
    sizes = np.array([columns[0][0], columns[1][0]], dtype=np.int64).T.reshape(-1, 2)
    image_ids = np.array(ids, dtype=np.int64)
    for first, again in _repeats(image_ids, has_id):
        faults.fatal(
            "duplicate image id",
            f"image id {ids[again]} is there twice: file_name {names[first]!r} and {names[again]!r}",
        )
    rows = np.flatnonzero(good).tolist()
    dropped = {record["id"] for i, record in enumerate(records) if not good[i] and type(record.get("id")) is int}
    return [names[i] for i in rows], image_ids[rows], sizes[rows], dropped


def _annotations(
    records: list[dict[str, Any]],
    file_names: list[str],
    image_ids: npt.NDArray[np.int64],
    dropped: set[int],
    category_ids: tuple[int, ...],
    faults: Faults,
) -> dict[str, Any]:
    """The box arrays of `Records`, without the annotations that cannot be parsed."""
    bad: dict[int, tuple[str, str]] = {}  # row -> reason and message; the first fault of a record stands for it

    def note(b: int, field: str, text: str) -> None:
        name = f"annotations[{b}]" if field == "id" else f"annotation id {records[b].get('id')}"
        bad.setdefault(b, (f"bad {field}", f"{name}: field {field} {text}"))

    ids = np.array(_column(records, "id", _is_int64, "a whole number", note)[0], dtype=np.int64)
    image_of = np.array(_column(records, "image_id", _is_int64, "a whole number", note)[0], dtype=np.int64)
    category_of = np.array(_column(records, "category_id", _is_int64, "a whole number", note)[0], dtype=np.int64)
    xywh = _boxes(records, note)
    iscrowd = np.array(_column(records, "iscrowd", _is_flag, "0 or 1", note, default=0)[0], dtype=bool)
    difficult = np.array(_column(records, "difficult", _is_flag, "0 or 1", note, default=0)[0], dtype=bool)
    area = np.array(
        _column(records, "area", _is_area, "a number of at least 0", note, default=math.nan)[0], dtype=float
    )

    orphaned = {b for b, image in enumerate(image_of.tolist()) if image in dropped and b not in bad}
    faults.skipped["boxes skipped: image skipped"] += len(orphaned)  # the fault is that of the image
    box_image = _look_up(image_of, image_ids, "image_id", note)
    labels = _look_up(category_of, np.array(category_ids, dtype=np.int64), "category_id", note)
    good = np.ones(len(records), dtype=bool)
    good[[*bad, *orphaned]] = False
    for first, again in _repeats(ids, good):
        message = f"annotation id {ids[again]} is there twice: annotations[{first}] and annotations[{again}]"
        bad.setdefault(again, ("duplicate id", message))
        good[again] = False
    for b in sorted(bad.keys() - orphaned):
        faults.box(*bad[b])
    rows = np.flatnonzero(good)
    return {
        "box_image": box_image[rows],
        "boxes": np.concatenate([xywh[rows, :2], xywh[rows, :2] + xywh[rows, 2:]], axis=1),
        "labels": labels[rows] + 1,
        "iscrowd": iscrowd[rows],
        "difficult": difficult[rows],
        "area": area[rows],
        "name_box": lambda b: (
            f"annotation id {ids[rows[b]]} (image {file_names[box_image[rows[b]]]}): bbox {xywh[rows[b]].tolist()}"
        ),
    }


def _boxes(records: list[dict[str, Any]], note: Callable[[int, str, str], None]) -> npt.NDArray[np.float64]:
    """[B, 4] x, y, width, height."""
    values, _ = _column(records, "bbox", _is_list, "4 numbers", note, stand_in=[0, 0, 0, 0])
    flat = list(chain.from_iterable(values))
    if set(map(len, values)) <= {4} and set(map(type, flat)) <= {int, float}:
        try:
            return np.array(flat, dtype=np.float64).reshape(-1, 4)
        except OverflowError:  # a whole number beyond the range of floats: name it below
            pass
    for b, value in enumerate(values):
        if len(value) != 4 or not all(type(v) in (int, float) and abs(v) < _INT64 for v in value):
            note(b, "bbox", f"must be 4 numbers [x, y, width, height], got {shorten(value)}")
            values[b] = [0, 0, 0, 0]
    return np.array(values, dtype=np.float64).reshape(-1, 4)


def _column(
    records: list[dict[str, Any]],
    field: str,
    check: tuple[set[type], Callable[[Any], bool]],
    expected: str,
    note: Callable[[int, str, str], None],
    default: Any = _MISSING,
    stand_in: Any = 0,
) -> _Column:
    """One field of all records; those that fail the check are noted and replaced by a stand-in."""
    kinds, accepts = check
    values = [record.get(field, default) for record in records]
    good = np.ones(len(values), dtype=bool)
    if set(map(type, values)) <= kinds and all(map(accepts, _extremes(values))):
        return values, good
    for i, value in enumerate(values):
        if default is not _MISSING and value is default:
            continue
        if type(value) not in kinds or not accepts(value):
            note(i, field, "is missing" if value is _MISSING else f"must be {expected}, got {shorten(value)}")
            values[i], good[i] = stand_in, False
    return values, good


def _extremes(values: list[Any]) -> list[Any]:
    """The values that decide whether all lie in a range; every value where they have no order."""
    if not values or type(values[0]) in (str, list):
        return [] if not values or type(values[0]) is list else values
    if any(value != value for value in values):  # NaN, the default of the area: no order
        return values
    return [min(values), max(values)]


_is_int64 = ({int}, lambda v: -_INT64 <= v < _INT64)
_is_length = ({int}, lambda v: 0 < v < 2**31)
_is_text = ({str}, lambda v: v != "")
_is_list = ({list}, lambda v: True)
_is_flag = ({int, bool}, lambda v: v in (0, 1))
_is_area = ({int, float}, lambda v: 0 <= v < _INT64)


def _look_up(
    wanted: npt.NDArray[np.int64], ids: npt.NDArray[np.int64], field: str, note: Callable[[int, str, str], None]
) -> npt.NDArray[np.int64]:
    """The row of each wanted id; those that are not there are noted and get row 0."""
    order = np.argsort(ids, kind="stable")
    places = np.searchsorted(ids[order], wanted)
    known = places < len(ids)
    known[known] = ids[order[places[known]]] == wanted[known]
    for b in np.flatnonzero(~known).tolist():
        owner = field.removesuffix("_id")
        note(b, field, f"is {wanted[b]}, which no {owner} has (there are {shorten(np.sort(ids).tolist())})")
    rows = np.zeros(len(wanted), dtype=np.int64)
    rows[known] = order[places[known]]
    return rows


def _repeats(ids: npt.NDArray[np.int64], good: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Pairs of rows with the same id: the first, and each one after it."""
    rows = np.flatnonzero(good)
    _, first, inverse, count = np.unique(ids[rows], return_index=True, return_inverse=True, return_counts=True)
    if len(count) == len(rows):
        return []
    again = np.flatnonzero((count[inverse] > 1) & (first[inverse] != np.arange(len(rows))))
    return [(int(rows[first[inverse[i]]]), int(rows[i])) for i in again]
