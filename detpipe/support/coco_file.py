"""Reads the records of a COCO annotation file, once for all that need them: data, masks, evaluation and lists of images.

msgspec decodes the file straight into typed records and skips what nobody asks for, so that polygons cost next to nothing. A
file in which something is not as it must be is read a second time, record by record, only to name what it is.

JSON readers keep the last of two equal keys. Here the keys that are read are counted in the text: a file that has more of them
than its records is read strictly as well. ``strict`` finds equal keys anywhere.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import UNSET, Meta, Raw, UnsetType

from detpipe.support.errors import DataError
from detpipe.support.files import refuse_special
from detpipe.support.strict_json import load_json, paused_collection, shorten

Key = int | str
Columns = dict[str, list[Any]]  # field -> its value in each record; UNSET where a record lacks it
_Whole = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
_WholeFloat = Annotated[float, Meta(ge=-(2**53), le=2**53, multiple_of=1)]  # 17.0, as tables write it
_Text = Annotated[str, Meta(min_length=1)]
_Id = _Whole | _WholeFloat | _Text
_Side = Annotated[float, Meta(gt=0, lt=2**31, multiple_of=1)]
_Flag = Annotated[float, Meta(ge=0, le=1, multiple_of=1)] | bool
_Area = Annotated[float, Meta(ge=0, lt=2**63)]

_EXPECTED = {
    "id": "a whole number or text",
    "image_id": "a whole number or text",
    "category_id": "a whole number or text",
    "file_name": "text",
    "name": "text",
    "height": "a whole number of pixels above 0",
    "width": "a whole number of pixels above 0",
    "bbox": "4 numbers [x, y, width, height]",
    "iscrowd": "0 or 1",
    "difficult": "0 or 1",
    "area": "a number of at least 0",
}
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_NAMES, _NAMES_RATIO = 2**26, 100  # bytes that an array of all file names may take, and so many times those of the file
_DIGITS = re.compile(r"0|-?[1-9][0-9]{0,17}")
_log = logging.getLogger(__name__)


class Image(msgspec.Struct, gc=False):
    """A record of ``images``."""

    id: _Id
    file_name: _Text | UnsetType = UNSET
    coco_url: Any = UNSET  # LVIS: in the place of a name
    height: _Side | UnsetType | None = UNSET
    width: _Side | UnsetType | None = UNSET
    neg_category_ids: Any = UNSET  # LVIS
    not_exhaustive_category_ids: Any = UNSET


class Box(msgspec.Struct, gc=False):
    """A record of ``annotations``."""

    id: _Id
    image_id: _Id
    category_id: _Id
    bbox: tuple[float, float, float, float]
    iscrowd: _Flag | UnsetType | None = UNSET
    difficult: _Flag | UnsetType | None = UNSET  # VOC's, which conversions keep
    area: _Area | UnsetType | None = UNSET


class OutlinedBox(Box, gc=False):
    """A record of ``annotations`` with its polygons or run lengths, as text that nothing has looked at."""

    segmentation: Raw | UnsetType = UNSET


class Category(msgspec.Struct, gc=False):
    """A record of ``categories``."""

    id: _Id
    name: _Text
    supercategory: Any = UNSET
    frequency: Any = UNSET  # LVIS


class Fault(NamedTuple):
    """What is wrong with a record, which is left out; or with the file as a whole (``fatal``)."""

    level: Literal["fatal", "image", "box"]
    reason: str
    message: str


@dataclass
class COCOFile:
    """What a file holds, every reference resolved; nothing of image files or of the geometry of boxes is checked."""

    images: Columns  # field -> [I] its values
    image_ids: npt.NDArray[np.int64]  # [I] their ids; 1..I where ids are text
    sizes: npt.NDArray[np.int64]  # [I, 2] height and width; 0 where there is none
    categories: Columns  # field -> [K] its values, by ascending id, or in the order of the file where ids are text
    category_ids: tuple[int, ...]  # [K] their ids; 1..K where ids are text
    boxes: Columns  # field -> [B] its values
    box_image: npt.NDArray[np.int64]  # [B] the row of the image
    labels: npt.NDArray[np.int64]  # [B] in 1..K
    xywh: npt.NDArray[np.float64]  # [B, 4]
    iscrowd: npt.NDArray[np.bool_]  # [B]
    difficult: npt.NDArray[np.bool_]  # [B]
    area: npt.NDArray[np.float64]  # [B] NaN where there is none
    images_read: int  # records of images, those that were left out included
    boxes_read: int  # records of boxes, those that were left out included
    orphans: int  # boxes that were left out because their image was
    faults: list[Fault]  # in the order of the file
    counts: dict[str, int]  # what else is to be told of it


@dataclass
class _Section:
    """The sound records of a list, their places in it, the faults of the others by their place, and the ids of those."""

    columns: Columns
    places: Sequence[int]
    faults: list[tuple[int, Fault]] = field(default_factory=list)
    lost: dict[Key, Any] = field(default_factory=dict)  # id -> file name

    def __len__(self) -> int:
        return len(self.places)

    def keep(self, rows: list[int]) -> None:
        """Leave out all other records."""
        self.columns = {name: [values[row] for row in rows] for name, values in self.columns.items()}
        self.places = [self.places[row] for row in rows]


def read_coco_file(
    path: str | os.PathLike[str], segmentations: bool = False, strict: bool = False, content: Any = None
) -> COCOFile:
    """Read an annotation file, or ``content``, what another file says in the terms of COCO.

    Ids may be whole numbers or text. Text such as "17" is the number; where an image or a category has other text for an id, all
    are numbered. A category without boxes that is the ``supercategory`` of all others, as hubs export it, is left out.

    ``segmentations`` lets boxes have their ``segmentation``; ``strict`` looks for keys that an object has twice, also those that
    are not read, which takes several times as long. A DataError if the file cannot be read, is no JSON, has a key twice, or one
    of its three lists is not there.
    """
    box = OutlinedBox if segmentations else Box
    kinds = {"images": Image, "annotations": box, "categories": Category}
    parts = _read(Path(path), kinds, strict) if content is None else _decode_each(path, kinds, content)
    images, boxes, categories = (parts[name] for name in ("images", "annotations", "categories"))
    images_read, boxes_read = (len(part) + len(part.faults) for part in (images, boxes))
    counts: dict[str, int] = {}
    _name_by_address(images.columns)
    _drop_repeated_images(images)
    _check_names(images.columns, Path(path))
    _keep_classes(categories, boxes, counts)
    orphans = _keep_resolvable(boxes, images, categories)
    own, b = images.columns, boxes.columns
    sizes = [[0 if side in (None, UNSET) else side for side in own[name]] for name in ("height", "width")]
    return COCOFile(
        images=own,
        image_ids=_numbers(own["id"], path, "images"),
        sizes=np.array(sizes, dtype=np.float64).astype(np.int64).T,
        categories=categories.columns,
        category_ids=tuple(_numbers(categories.columns["id"], path, "categories").tolist()),
        boxes=b,
        box_image=_array(b["image"], np.int64),
        labels=_array(b["category"], np.int64) + 1,
        xywh=np.fromiter(chain.from_iterable(b["bbox"]), np.float64, count=4 * len(boxes)).reshape(-1, 4),
        iscrowd=_array(b["iscrowd"], np.bool_),
        difficult=_array(b["difficult"], np.bool_),
        area=_array([math.nan if value is UNSET or value is None else value for value in b["area"]], np.float64),
        images_read=images_read,
        boxes_read=boxes_read,
        orphans=orphans,
        faults=[fault for part in (categories, images, boxes) for _, fault in sorted(part.faults)],
        counts=counts,
    )


def read_coco_images(path: str | os.PathLike[str]) -> tuple[Columns, npt.NDArray[np.int64]]:
    """Read the images of an annotation file, which need not have boxes: their fields, and their ids, 1..I where some are text.

    A DataError if the file cannot be read, or an image is not as it must be.
    """
    images = _read(Path(path), {"images": Image}, strict=False)["images"]
    _name_by_address(images.columns)
    _drop_repeated_images(images)
    if images.faults:
        raise DataError(f"{path}: {min(images.faults)[1].message}; correct the file")
    return images.columns, _numbers(images.columns["id"], path, "images")


def _read(path: Path, kinds: dict[str, type[msgspec.Struct]], strict: bool) -> dict[str, _Section]:
    """The records of some lists of a file."""
    with paused_collection():
        sections = None if strict else _decode(path, kinds)
        return _decode_each(path, kinds, load_json(path)) if sections is None else sections


def _decode(path: Path, kinds: dict[str, type[msgspec.Struct]]) -> dict[str, _Section] | None:
    """Decode all records at once; None where a record, or the file, is not as it must be."""
    refuse_special(path)
    try:
        data = path.read_bytes().removeprefix(BYTE_ORDER_MARK)
        if not data.isascii():
            data.decode()  # msgspec leaves text unchecked that is not read
        top = msgspec.json.decode(data, type=dict[str, Raw])
        lists = {name: msgspec.json.decode(top[name], type=_list_of(kind)) for name, kind in kinds.items()}
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, KeyError, OSError):
        return None
    sections = {name: _Section(_columns(lists.pop(name), kind), range(0)) for name, kind in kinds.items()}
    for name, section in sections.items():
        section.places = range(len(section.columns["id"]))
        if data.count(b'"%b"' % name.encode()) != 1 or not _is_written_once(bytes(top[name]), section.columns):
            return None
    return sections


def _is_written_once(text: bytes, columns: Columns) -> bool:
    """Whether a list has each key only as often as its records do."""
    present = {name: len(values) - values.count(UNSET) for name, values in columns.items()}
    return all(text.count(b'"%b"' % name.encode()) == count for name, count in present.items() if count)


_fields = cache(msgspec.structs.fields)  # takes a millisecond each time


def _list_of(kind: type[msgspec.Struct]) -> Any:
    return list[kind]  # pyright: ignore[reportInvalidTypeForm]


def _columns(records: list[Any], kind: type[msgspec.Struct]) -> Columns:
    names = [one.name for one in _fields(kind)]
    columns = {name: list(map(attrgetter(name), records)) for name in names}
    return columns | {name: _keys(columns[name]) for name in ("id", "image_id", "category_id") if name in columns}


def _decode_each(
    path: str | os.PathLike[str], kinds: dict[str, type[msgspec.Struct]], content: Any
) -> dict[str, _Section]:
    """Decode record by record, and name the faults of those that are not as they must be."""
    names = ", ".join(kinds)
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected an object with {names}, got {shorten(content)}")
    sections = {}
    for name, kind in kinds.items():
        if name not in content:
            raise DataError(f"{path}: the top-level key {name!r} is missing; COCO files have {names}")
        records = content[name]
        if not isinstance(records, list):
            raise DataError(f"{path}: {name} must be a list of objects, got {shorten(records)}")
        sound, places, faults, lost = [], [], [], {}
        for place, record in enumerate(records):
            if not isinstance(record, dict):
                raise DataError(f"{path}: {name}[{place}] must be an object, got {shorten(record)}")
            values, wrong, text = _values(record, kind)
            if wrong:
                faults.append((place, _fault(name, place, record, wrong, text)))
                lost |= {key: record.get("file_name") for key in _keys([values["id"]] if "id" in values else [])}
            else:
                sound.append(kind(**values))
                places.append(place)
        sections[name] = _Section(_columns(sound, kind), places, faults, lost)
    return sections


def _values(record: dict[str, Any], kind: type[msgspec.Struct]) -> tuple[dict[str, Any], str, str]:
    """The fields of a record; the first that is not as it must be, and what is wrong with it."""
    values: dict[str, Any] = {}
    for one in _fields(kind):
        name = one.name
        if name not in record:
            if one.required:
                missing = f"must be {_EXPECTED[name]}, got None" if kind is Category else "is missing"
                return values, name, missing
        elif name == "segmentation":
            values[name] = Raw(msgspec.json.encode(record[name]))
        else:
            try:
                values[name] = msgspec.convert(record[name], one.type)
            except (msgspec.ValidationError, OverflowError):
                return values, name, f"must be {_EXPECTED[name]}, got {shorten(record[name])}"
    return values, "", ""


def _fault(section: str, place: int, record: dict[str, Any], wrong: str, text: str) -> Fault:
    what = {"images": "image", "annotations": "annotation", "categories": "category"}[section]
    named = f" ({record.get('file_name')})" if section == "images" else ""
    where = f"{section}[{place}]" if wrong == "id" else f"{what} id {record['id']}{named}"
    message = f"{where}: field {wrong} {text}"
    if section == "categories":
        return Fault("fatal", "bad category", message)
    return Fault("image" if section == "images" else "box", f"bad {wrong}", message)


def _name_by_address(images: Columns) -> None:
    """Name images without a file name by the last two parts of their address in the set, as LVIS means it."""
    pairs = zip(images["file_name"], images.pop("coco_url"), strict=True)
    images["file_name"] = [name_in_address(address) if name is UNSET else name for name, address in pairs]


def name_in_address(address: Any) -> Any:
    """The file that an address of COCO's images means, with its folder: ``train2017/1.jpg``; UNSET where there is no address.

    Example:
        >>> name_in_address("http://images.cocodataset.org/train2017/000000391895.jpg")
        'train2017/000000391895.jpg'
    """
    parts = address.partition("?")[0].split("/")[-2:] if isinstance(address, str) else ()
    return "/".join(filter(None, parts)) or UNSET


def _drop_repeated_images(images: _Section) -> None:
    """Of several images with the same id the first stays."""
    keys, names = images.columns["id"], images.columns["file_name"]
    first: dict[Key, Any] = dict(images.lost)
    if len(first | dict.fromkeys(keys)) == len(first) + len(keys):
        return
    kept = []
    for row, (key, name) in enumerate(zip(keys, names, strict=True)):
        if key in first:
            message = f"image id {key} is there twice: file_name {first[key]!r} and {name!r}"
            images.faults.append((images.places[row], Fault("fatal", "duplicate image id", message)))
        else:
            kept.append(row)
        first.setdefault(key, name)
    images.keep(kept)


def _check_names(images: Columns, path: Path) -> None:
    """Refuse names that take too much memory as an array, in which each has the room of the longest."""
    names = [str(name or key) for name, key in zip(images["file_name"], images["id"], strict=True)]
    longest = max(map(len, names), default=0)
    if 4 * longest * len(names) > _NAMES + _NAMES_RATIO * path.stat().st_size:
        raise DataError(
            f"{path}: one of {len(names)} images has a name of {longest} characters, which takes too much memory; correct it"
        )


def _keep_classes(categories: _Section, boxes: _Section, counts: dict[str, int]) -> None:
    """Keep the categories that are classes, by ascending id."""
    keys, names, above = (categories.columns[field] for field in ("id", "name", "supercategory"))
    kept: list[int] = []
    seen: set[Key] = set()
    seen_names: set[str] = set()
    for row, (key, name) in enumerate(zip(keys, names, strict=True)):
        if key in seen or name in seen_names:
            message = f"category id {key}, name {name!r}: the id or the name is there twice"
            categories.faults.append((categories.places[row], Fault("fatal", "duplicate category", message)))
        else:
            kept.append(row)
        seen.add(key)
        seen_names.add(name)
    if not categories.faults and not kept:
        message = "categories is empty; at least one class is needed"
        categories.faults.append((0, Fault("fatal", "bad category", message)))
    for name in [above[row] for row in kept[:2]]:  # a root is what all others name, so one of the first two does
        root = next((row for row in kept if names[row] == name), None)
        if root is None or any(above[row] != name for row in kept if row != root):
            continue
        if above[root] not in names and keys[root] not in boxes.columns["category_id"]:
            counts["classes skipped: the supercategory of all others, without boxes"] = 1
            kept.remove(root)
            break
    if not any(isinstance(key, str) for key in keys):
        kept.sort(key=keys.__getitem__)
    categories.keep(kept)


def _keep_resolvable(boxes: _Section, images: _Section, categories: _Section) -> int:
    """Keep the boxes with an id of their own and a known image and category; how many are of images that were left out."""
    owners = (("image", images), ("category", categories))
    ids = boxes.columns["id"]
    places = {owner: _places(boxes.columns[f"{owner}_id"], section.columns["id"]) for owner, section in owners}
    boxes.columns |= {owner: found.tolist() for owner, found in places.items()}
    if len(set(ids)) == len(ids) and all((found >= 0).all() for found in places.values()):
        return 0
    kept, orphans = [], 0
    first: dict[Key, int] = {}
    there = {owner: _shown(section.columns["id"]) for owner, section in owners}
    for row, (place, key) in enumerate(zip(boxes.places, ids, strict=True)):
        unknown = next((owner for owner, found in places.items() if found[row] < 0), None)
        if boxes.columns["image_id"][row] in images.lost and places["image"][row] < 0:
            orphans += 1
        elif unknown is not None:
            wanted = f"{boxes.columns[f'{unknown}_id'][row]}, which no {unknown} has (there are {there[unknown]})"
            message = f"annotation id {key}: field {unknown}_id is {wanted}"
            boxes.faults.append((place, Fault("box", f"bad {unknown}_id", message)))
        elif first.setdefault(key, place) != place:
            message = f"annotation id {key} is there twice: annotations[{first[key]}] and annotations[{place}]"
            boxes.faults.append((place, Fault("box", "duplicate id", message)))
        else:
            kept.append(row)
    boxes.keep(kept)
    return orphans


def _places(wanted: list[Key], known: list[Key]) -> npt.NDArray[np.int64]:
    """Where each id is among those that are known; -1 where it is not."""
    if not known or str in set(map(type, chain(known, wanted))):
        places = {key: place for place, key in enumerate(known)}
        return _array([places.get(key, -1) for key in wanted], np.int64)
    numbers, asked = _array(known, np.int64), _array(wanted, np.int64)
    order = np.argsort(numbers)
    found = order[np.searchsorted(numbers, asked, sorter=order).clip(max=len(known) - 1)]
    return np.where(numbers[found] == asked, found, -1)


def _shown(keys: list[Key]) -> str:
    return shorten(sorted(keys, key=lambda key: (isinstance(key, str), key)))


def _keys(values: list[Any]) -> list[Key]:
    """Ids with whole numbers as such, however they are written."""
    if set(map(type, values)) <= {int}:
        return values
    return list(map(as_key, values))


def as_key(value: Any) -> Any:
    """Return an id, a whole number as such where it is written as text or with a decimal point.

    Example:
        >>> [as_key(value) for value in (17, 17.0, "17", "017", 1.5)]
        [17, 17, 17, '017', 1.5]
    """
    whole = value.is_integer() if isinstance(value, float) else isinstance(value, str) and _DIGITS.fullmatch(value)
    return int(value) if whole else value


def _numbers(keys: list[Key], path: str | os.PathLike[str], what: str) -> npt.NDArray[np.int64]:
    """The ids, or the numbers that stand for them where some are text."""
    text = next((key for key in keys if isinstance(key, str)), None)
    if text is None:
        return _array(keys, np.int64)
    _log.warning("%s: the ids of %s are text, such as %r: they are numbered from 1, as in the file", path, what, text)
    return np.arange(1, len(keys) + 1)


def _array(values: list[Any], kind: Any) -> npt.NDArray[Any]:
    return np.fromiter(values, dtype=kind, count=len(values))
