"""Reads a COCO annotation file in a fraction of the time that Python's JSON reader takes, if there is no fault in it.

The records are decoded by msgspec straight into the fields that are needed. It checks the syntax of all else without making
objects of it, so that polygons cost next to nothing. What is not proven to be sound is not read: the strict reader
(``coco_json``) then reads the file once more, and names the fault or finds that there is none.

msgspec keeps the last of two equal keys, as Python does. That no key is there twice is proven by counting: outside of text,
a file has one colon for each key. If the fields that were read, and the colons in text, account for all colons of the file,
then no key was dropped.
"""

from __future__ import annotations

import json
import sys
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import UNSET, Raw, UnsetType

from detpipe.datasets.records import Records
from detpipe.support.errors import DataError
from detpipe.support.files import refuse_special
from detpipe.support.strict_json import parse_json, paused_collection

Columns = dict[str, list[Any]]  # field -> its value in each record; UNSET where a record lacks it

_IMAGE = {"id": int, "file_name": str, "height": int, "width": int}
_FLAG = int | bool | UnsetType
_BOX = {
    "id": int,
    "image_id": int,
    "category_id": int,
    "bbox": tuple[float, float, float, float],
    "iscrowd": _FLAG,
    "difficult": _FLAG,
    "area": float | UnsetType,
    "segmentation": Raw | UnsetType,
}
_FIRST = 2**20  # bytes in which the first record should end
_CHUNK = 2**15  # records whose unread fields are looked at together
_BLOCK = 2**20  # bytes that fit into a processor's cache
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class _UnprovenError(Exception):
    """The file may be faulty: the strict reader has to look at it."""


def sound_records(path: Path, image_root: Path) -> Records | None:
    """Read an annotation file that has no fault.

    Args:
        path: the file.
        image_root: the folder that file names are relative to.

    Returns:
        Its records, every reference resolved, nothing of image files or geometry checked yet; None where the strict reader has to
        read the file: it has a fault, or is not of a kind of which this reader can prove that it has none.
    """
    refuse_special(path)
    try:
        data = path.read_bytes()
        with paused_collection():
            return _read(data.removeprefix(_BYTE_ORDER_MARK), image_root)
    except (
        _UnprovenError,
        msgspec.MsgspecError,
        DataError,
        UnicodeDecodeError,
        OverflowError,
        RecursionError,
        OSError,
    ):
        return None


def _read(data: bytes, image_root: Path) -> Records:
    _check_text(data)
    top = msgspec.json.decode(data, type=dict[str, Raw])
    _prove(top.keys() >= {"images", "annotations", "categories"})
    colons = {key: _colons(section) for key, section in top.items()}
    _prove(_colons(data) == len(top) + sum(colons.values()))
    small = {key: parse_json(bytes(top[key]).decode(), key) for key in top.keys() - {"images", "annotations"}}
    class_names, category_ids = _classes(small["categories"])
    file_names, image_ids, sizes = _images(top["images"], colons["images"])
    boxes = _boxes(top["annotations"], colons["annotations"], image_ids, category_ids)
    ids, xywh, image = boxes.pop("ids"), boxes.pop("xywh"), boxes["box_image"]
    return Records(
        root=image_root,
        folders=[image_root],
        file_names=file_names,
        image_ids=image_ids,
        sizes=sizes,
        class_names=class_names,
        category_ids=category_ids,
        boxes=np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1),
        name_box=lambda b: f"annotation id {ids[b]} (image {file_names[image[b]]}): bbox {xywh[b].tolist()}",
        images_read=len(file_names),
        boxes_read=len(ids),
        **boxes,
    )


def _prove(condition: Any) -> None:
    if not condition:
        raise _UnprovenError


def _check_text(data: bytes) -> None:
    """What msgspec leaves unchecked in fields that are not wanted: UTF-8, and numbers that Python finds too long."""
    if not data.isascii():
        data.decode()
    if b"\\" in data:
        _prove(b"\\u003a" not in data and b"\\u003A" not in data)  # a colon that counting would miss
    block = sys.get_int_max_str_digits() // 2
    if block and len(data) >= block:  # a number that is too long fills a whole block
        blocks = np.frombuffer(data, dtype=np.uint8)[: len(data) // block * block].reshape(-1, block)
        for place in range(0, block, 32):
            digits = blocks[:, place] - ord("0") < 10  # wraps below 0
            blocks = blocks[digits]
        _prove(len(blocks) == 0)


def _classes(records: list[Any]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Names and ids, by ascending id."""
    _prove(type(records) is list and set(map(type, records)) == {dict})
    ids, names = [record.get("id") for record in records], [record.get("name") for record in records]
    _prove(set(map(type, ids)) == {int} and set(map(type, names)) == {str} and "" not in names)
    named: dict[int, str] = dict(zip(ids, names, strict=True))
    _prove(len(records) == len(named) == len(set(names)) and min(ids) >= -(2**63) and max(ids) < 2**63)
    return tuple(named[key] for key in sorted(ids)), tuple(sorted(ids))


def _images(section: Raw, colons: int) -> tuple[list[str], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """File names, ids and sizes [I, 2]."""
    columns = _decode(section, _IMAGE)
    names: list[str] = columns["file_name"]
    text = "".join(names)
    _prove_every_key(columns, colons - text.count(":"), _unread(columns, _IMAGE))
    _prove("" not in names and "\0" not in text)
    ids = _integers(columns["id"])
    sizes = np.stack([_integers(columns["height"]), _integers(columns["width"])], axis=1)
    _prove((sizes > 0).all() and (sizes < 2**31).all() and _all_differ(ids))
    return names, ids, sizes


def _boxes(
    section: Raw, colons: int, image_ids: npt.NDArray[np.int64], category_ids: tuple[int, ...]
) -> dict[str, Any]:
    """The columns of boxes."""
    columns = _decode(section, _BOX)
    _prove_every_key(columns, colons, [*_unread(columns, _BOX), "segmentation"])
    ids, areas = _integers(columns["id"]), columns["area"]
    area = np.array([np.nan if value is UNSET else value for value in areas] if UNSET in areas else areas, dtype=float)
    _prove(_all_differ(ids) and not (area < 0).any() and not (area >= 2**63).any())
    xywh = np.fromiter(chain.from_iterable(columns["bbox"]), dtype=np.float64, count=4 * len(ids)).reshape(-1, 4)
    return {
        "ids": ids,
        "box_image": _rows(_integers(columns["image_id"]), image_ids),
        "labels": _rows(_integers(columns["category_id"]), np.array(category_ids, dtype=np.int64)) + 1,
        "xywh": xywh,
        "iscrowd": _flags(columns["iscrowd"]),
        "difficult": _flags(columns["difficult"]),
        "area": area,
    }


def _decode(section: Raw, fields: dict[str, Any]) -> Columns:
    """Every field of a list of objects: those that are wanted with their types, the others of the first object unread."""
    kinds = {**dict.fromkeys(_first_keys(section), Raw | UnsetType), **fields}
    names = {f"f{i}": key for i, key in enumerate(kinds)}  # a key need not be a name in Python
    optional = [
        (name, kinds[key], UNSET) if UnsetType in getattr(kinds[key], "__args__", ()) else (name, kinds[key])
        for name, key in names.items()
    ]
    kind = msgspec.defstruct("Record", optional, rename=names, gc=False, kw_only=True)
    records = msgspec.json.decode(section, type=list[kind])  # pyright: ignore[reportInvalidTypeForm]
    return {key: list(map(attrgetter(name), records)) for name, key in names.items()}


def _first_keys(section: Raw) -> list[str]:
    """The fields of the first record, which those after it are expected to have as well."""
    text = bytes(memoryview(section)[:_FIRST]).decode(errors="replace").removeprefix("[").lstrip()
    try:
        record = json.JSONDecoder().raw_decode(text)[0]
    except ValueError:  # an empty list, or no end within the part that was looked at
        return []
    return list(record) if isinstance(record, dict) else []


def _unread(columns: Columns, fields: dict[str, Any]) -> list[str]:
    return [key for key in columns if key not in fields]


def _prove_every_key(columns: Columns, colons: int, unread: list[str]) -> None:
    """Prove that the fields that were found are all that the file has.

    Args:
        columns: the fields.
        colons: in the file, those in text that was read left out.
        unread: fields that may hold colons of their own.
    """
    left = colons - sum(len(column) - column.count(UNSET) for column in columns.values())
    if left:
        _prove(left == sum(_colons_unread(columns[key]) for key in unread))


def _colons_unread(values: list[Any]) -> int:
    """The colons in a field that was not read; objects in it must not have a key twice either."""
    count = 0
    for start in range(0, len(values), _CHUNK):
        chunk = [value for value in values[start : start + _CHUNK] if value is not UNSET]
        text = b",".join(chunk)
        count += _colons(text)
        if b"{" in text:
            objects = b",".join(value for value in map(bytes, chunk) if b"{" in value)
            parse_json(f"[{objects.decode()}]", "")
    return count


def _colons(text: Any) -> int:
    characters = np.frombuffer(text, dtype=np.uint8)
    parts = (characters[start : start + _BLOCK] for start in range(0, len(characters), _BLOCK))
    return sum(int(np.count_nonzero(part == ord(":"))) for part in parts)


def _integers(values: list[int]) -> npt.NDArray[np.int64]:
    return np.fromiter(values, dtype=np.int64, count=len(values))


def _flags(values: list[Any]) -> npt.NDArray[np.bool_]:
    _prove(set(values) <= {0, 1, UNSET})
    return np.array([value is not UNSET and value for value in values] if UNSET in values else values, dtype=bool)


def _all_differ(ids: npt.NDArray[np.int64]) -> bool:
    ordered = np.sort(ids)
    return bool((ordered[1:] != ordered[:-1]).all())


def _rows(wanted: npt.NDArray[np.int64], ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The row of each wanted id."""
    order = np.argsort(ids, kind="stable")
    _prove(len(ids) or not len(wanted))
    places = np.searchsorted(ids[order], wanted).clip(max=max(len(ids) - 1, 0))
    _prove((ids[order[places]] == wanted).all())
    return order[places]
