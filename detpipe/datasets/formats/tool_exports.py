"""What labeling tools and hubs export beside COCO, VOC, YOLO and tables, read as the content of a COCO annotation file.

=============  ===========================================================================================================
tool           what is read
=============  ===========================================================================================================
CreateML       a JSON list of ``image`` and ``annotations`` with ``coordinates``, x and y of the center
CVAT           ``annotations.xml`` or ``labels.xml`` of "CVAT for images"
Hugging Face   ``metadata.jsonl`` of an image folder: ``file_name`` and ``objects`` with ``bbox`` [x, y, width, height]
KITTI          a folder of ``NAME.txt``: class, three numbers, x1 y1 x2 y2, and what is known in space
Label Studio   JSON and JSON-MIN; of several people who labeled an image, the first
LabelMe        a folder of ``NAME.json`` with ``shapes`` and ``imagePath``
Supervisely    a folder of ``NAME.jpg.json`` with ``size`` and ``objects``; rectangles have their last pixels, not their edges
VIA            JSON (project or annotations) and ``via*.csv``
=============  ===========================================================================================================

Polygons, circles, ellipses and rotated boxes have the box that bounds them, polygons their outline as well. What has no box, such
as points and lines, is left out and counted.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit
from xml.etree.ElementTree import Element, ParseError

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import fromstring
from tqdm import tqdm

from detpipe.datasets.formats.folders import visible
from detpipe.support.errors import DataError
from detpipe.support.files import refuse_special
from detpipe.support.strict_json import is_number, load_json, parse_json, read_text, require, require_numbers, shorten
from detpipe.support.tables import read_table

_CLASS = ("class", "label", "name", "type", "category", "object")  # what people call the attribute that is the class
_LOOKED_AT = 20  # files of a folder that are looked at to tell its tool
Points = Sequence[tuple[float, float]]
Record = Mapping[str, Any]


class Shape(NamedTuple):
    """An object: two corners of its box or more of its outline; no points where it has no box."""

    label: str
    points: Points
    outlined: bool = False


class Picture(NamedTuple):
    """An image with its objects; the sides are None where the tool does not say them."""

    name: str
    shapes: list[Shape]
    height: float | None = None
    width: float | None = None


@dataclass(frozen=True)
class Export:
    """What a tool has written, and the classes that it lists, whether or not they occur."""

    tool: str
    pictures: list[Picture]
    listed: tuple[str, ...] = ()

    @property
    def class_names(self) -> tuple[str, ...]:
        """Those listed, in their order, then others that occur, sorted."""
        occurring = {shape.label for picture in self.pictures for shape in picture.shapes if shape.points}
        return (*self.listed, *sorted(occurring - set(self.listed)))

    @property
    def left_out(self) -> int:
        """How many shapes have no box."""
        return sum(not shape.points for picture in self.pictures for shape in picture.shapes)

    def content(self, class_names: Iterable[str]) -> dict[str, list[dict[str, Any]]]:
        """What a COCO file holds that says the same; ``class_names`` are at least those of this export."""
        number = {name: k for k, name in enumerate(class_names, 1)}
        images, boxes = [], []
        for i, (name, shapes, height, width) in enumerate(self.pictures, 1):
            size = {"height": height, "width": width} if height and width else {}
            images.append({"id": i, "file_name": name, **size})
            for k, (label, points, outlined) in enumerate(shapes):
                if points:
                    (x1, x2), (y1, y2) = ((min(side), max(side)) for side in zip(*points, strict=True))
                    polygon = [n for point in points for n in point]
                    outline = {"segmentation": [polygon]} if outlined and len(points) > 2 else {}
                    key = {"id": f"{name}#{k}", "image_id": i, "category_id": number[label]}
                    boxes.append({**key, "bbox": [x1, y1, x2 - x1, y2 - y1], **outline})
        categories = [{"id": k, "name": name} for name, k in number.items()]
        return {"images": images, "annotations": boxes, "categories": categories}


def may_be_export(name: str) -> bool:
    """Whether a file may be of a tool, by its name."""
    name = name.lower()
    return (
        name.endswith(".json")
        or name in ("annotations.xml", "labels.xml", "metadata.jsonl")
        or (name[:3], name[-4:]) == ("via", ".csv")
    )


def read_export(path: Path) -> Export | None:
    """Read what a tool has written: a file, or a folder with a file an image; None if it is of no tool that is known.

    A DataError names the file, the record and the field where it is not as the tool writes it.
    """
    if path.is_dir():
        return _read_folder(path)
    suffix = path.suffix.lower()
    if suffix == ".xml":
        return _cvat(path)
    if suffix == ".csv":
        return Export("VIA", list(_via_table(path)))
    if suffix == ".jsonl":
        lines = enumerate(read_text(path, "file of JSON lines").splitlines(), 1)
        content = [parse_json(line, f"{path}: line {k}") for k, line in lines if line.strip()]
    else:
        content = load_json(path)
    return _of_json(content, path)


def _of_json(content: Any, path: Path) -> Export | None:
    tool = next((tool for tool, (fits, _) in _FILES.items() if _fits(fits, content)), None)
    return Export(tool, list(_FILES[tool][1](content, str(path)))) if tool else None


def glance(path: Path) -> Export | None:
    """As `read_export`, of what may be anything: of a folder the first files, and None for a file called ``.json`` that is none."""
    if path.is_dir():
        return _read_folder(path, _LOOKED_AT)
    if path.suffix.lower() == ".json":
        try:
            content = load_json(path)
        except DataError:
            return None
        return _of_json(content, path)
    return read_export(path)


def _fits(fits: Callable[[Any], bool], content: Any) -> bool:
    try:
        return bool(content) and fits(content)
    except (KeyError, TypeError, IndexError, AttributeError, StopIteration):  # of another form altogether
        return False


def _corners(x: float, y: float, width: float, height: float, degrees: float = 0.0, *, center: bool = False) -> Points:
    """The corners of a box, turned about the first of them or about its center."""
    corners = [(x, y), (x + width, y + height), (x + width, y), (x, y + height)]
    if not degrees:
        return corners[:2]
    px, py = (x + width / 2, y + height / 2) if center else (x, y)
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    moved = [(x - px, y - py) for x, y in corners]
    return [(px + cos * x - sin * y, py + sin * x + cos * y) for x, y in moved]


def _ellipse(x: float, y: float, rx: float, ry: float, degrees: float = 0.0) -> Points:
    """The box that bounds an ellipse, which is turned about its center."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    across, down = math.hypot(rx * cos, ry * sin), math.hypot(rx * sin, ry * cos)
    return [(x - across, y - down), (x + across, y + down)]


def _of_pixels(points: Points) -> Points:
    """The corners of a box whose own give its first and its last pixels."""
    (x1, x2), (y1, y2) = ((min(side), max(side)) for side in zip(*points, strict=True))
    return [(x1, y1), (x2 + 1, y2 + 1)]


def _numbers(record: Any, where: str, *fields: str) -> list[float]:
    return [require(record, field, float, where) for field in fields]


def _records(record: Any, field: str, where: str) -> Iterator[tuple[dict[str, Any], str]]:
    """The objects of a list, which may be missing, each with how a message calls it."""
    values = require(record, field, list, where) if not isinstance(record, dict) or record.get(field) else []
    return _objects(values, f"{where}: {field}")


def _objects(values: Sequence[Any], where: str) -> Iterator[tuple[dict[str, Any], str]]:
    for k, one in enumerate(values):
        if not isinstance(one, dict):
            raise DataError(f"{where}[{k}]: expected an object, got {shorten(one)}")
        yield one, f"{where}[{k}]"


def _points(values: Any, where: str) -> Points:
    """Points that are lists of two numbers, or all numbers in one list."""
    flat = [n for value in values for n in (value if isinstance(value, list) else [value])]
    if not all(map(is_number, flat)) or len(flat) % 2:
        raise DataError(f"{where}: expected pairs of finite numbers, got {shorten(values)}")
    return list(zip(flat[::2], flat[1::2], strict=True))


def _side(record: Any, field: str) -> float | None:
    """A side of an image, if there is one: whether it is sound is looked at with the image."""
    value = record.get(field)
    return value if is_number(value) else None


# tools with a file an image: what its content is told by, and how it is read


def _labelme(content: Any, where: str, _: str) -> Picture:
    shapes = []
    for shape, at in _objects(require(content, "shapes", list, where), f"{where}: shapes"):
        label, kind = require(shape, "label", str, at), shape.get("shape_type") or "polygon"
        points = _points(require(shape, "points", list, at), at)
        if kind == "circle" and len(points) == 2:
            radius = math.dist(*points)
            points = _ellipse(*points[0], radius, radius)
        if kind == "mask" and points:
            points = _of_pixels(points)
        has_box = kind in ("rectangle", "circle", "polygon", "mask", "rotation", "oriented_rectangle")
        shapes.append(Shape(label, points if has_box else (), kind in ("polygon", "rotation")))
    name = require(content, "imagePath", str, where).replace("\\", "/")
    return Picture(name.rpartition("../")[2], shapes, _side(content, "imageHeight"), _side(content, "imageWidth"))


def _supervisely(content: Any, where: str, name: str) -> Picture:
    shapes = []
    for item, at in _objects(require(content, "objects", list, where), f"{where}: objects"):
        label, kind = require(item, "classTitle", str, at), item.get("geometryType")
        has_box = kind in ("polygon", "rectangle")
        exterior = require(require(item, "points", dict, at), "exterior", list, at) if has_box else []
        points = _points(exterior, at)
        shapes.append(Shape(label, _of_pixels(points) if kind == "rectangle" and points else points, kind == "polygon"))
    height, width = _numbers(require(content, "size", dict, where), f"{where}: size", "height", "width")
    return Picture(name.removesuffix(".json"), shapes, height, width)


def _kitti(lines: Sequence[str], where: str, name: str) -> Picture:
    shapes = []
    for k, line in enumerate(lines, 1):
        if not _is_kitti(line):
            raise DataError(f"{where}: line {k}: expected a class and 14 numbers, got {shorten(line)}")
        label, *numbers = line.split()
        shapes.append(Shape(label, () if label == "DontCare" else _points(list(map(float, numbers[3:7])), where)))
    return Picture(os.path.splitext(name)[0], shapes)


def _is_kitti(line: str) -> bool:
    label, *numbers = map(_number, line.split())
    return isinstance(label, str) and len(numbers) in (14, 15) and all(map(is_number, numbers))


# the suffix of the files, the keys that all of them have, and how one is read
_FOLDERS: dict[str, tuple[str, set[str], Callable[[Any, str, str], Picture]]] = {
    "LabelMe": (".json", {"shapes", "imagePath"}, _labelme),
    "Supervisely": (".json", {"size", "objects"}, _supervisely),
    "KITTI": (".txt", set(), _kitti),
}


def tool_of_folder(folder: Path, names: Sequence[str]) -> tuple[str, list[str]] | None:
    """The tool that has written a file an image into a folder, by the first of its sorted names, and these; None if none has."""
    for suffix in (".json", ".txt"):
        files = [name for name in names if name.lower().endswith(suffix)]
        for name in files[:_LOOKED_AT]:  # those of KITTI may be empty, and others may lie between
            try:
                content = _load(folder / name)
            except DataError:  # whoever reads the file names what is wrong with it
                continue
            if suffix == ".txt" and content and _is_kitti(content[0]):
                return "KITTI", files
            for tool, (of_tool, keys, _) in _FOLDERS.items():
                if keys and of_tool == suffix and isinstance(content, dict) and keys <= content.keys():
                    return tool, files
    return None


def _load(path: Path) -> Any:
    if path.suffix.lower() == ".json":
        return load_json(path)
    return [line for line in read_text(path, "text file").splitlines() if line.strip()]


def _read_folder(folder: Path, most: int | None = None) -> Export | None:
    found = tool_of_folder(folder, [entry.name for entry in visible(folder) if entry.is_file()])
    if found is None:
        return None
    tool, names = found
    _, keys, read = _FOLDERS[tool]
    bar = tqdm([folder / name for name in names[:most]], desc=f"reading {tool}", unit="file", disable=None, leave=False)
    files = ((path, _load(path)) for path in bar)
    own = ((path, one) for path, one in files if not keys or (isinstance(one, dict) and not keys.isdisjoint(one)))
    return Export(tool, [read(one, str(path), path.name) for path, one in own])


# tools with one file of all images


def _createml(content: Any, path: str) -> Iterator[Picture]:
    for one, where in _objects(content, f"{path}: "):
        shapes = []
        for item, at in _records(one, "annotations", where):
            coordinates = require(item, "coordinates", dict, at)
            x, y, width, height = _numbers(coordinates, at, "x", "y", "width", "height")
            shapes.append(
                Shape(require(item, "label", str, at), _corners(x - width / 2, y - height / 2, width, height))
            )
        yield Picture(require(one, "image", str, where), shapes)


def _via(content: Any, path: str) -> Iterator[Picture]:
    for key, one in content.get("_via_img_metadata", content).items():
        where = f"{path}: {key}"
        name, regions = require(one, "filename", str, where), one.get("regions")
        listed = {"regions": list(regions.values()) if isinstance(regions, dict) else regions}
        shapes = [_via_shape(region, at) for region, at in _records(listed, "regions", where)]
        yield Picture(name, shapes)


def _via_shape(region: Any, where: str) -> Shape:
    shape, attributes = (require(region, f"{part}_attributes", dict, where) for part in ("shape", "region"))
    label, kind = _via_class(attributes, where), shape.get("name")
    if kind == "polygon":
        x, y = (require(shape, f"all_points_{axis}", list, where) for axis in "xy")
        return Shape(label, _points([[*pair] for pair in zip(x, y, strict=False)], where), True)
    if kind == "rect":
        return Shape(label, _corners(*_numbers(shape, where, "x", "y", "width", "height")))
    if kind in ("circle", "ellipse"):
        radii = ("r", "r") if kind == "circle" else ("rx", "ry")
        return Shape(label, _ellipse(*_numbers(shape, where, "cx", "cy", *radii)))
    return Shape(label, ())


def _via_class(attributes: Record, where: str) -> str:
    """The only attribute, or the one that is called as a class is; of checkboxes, the one that is set."""
    named = [attributes[name] for word in _CLASS for name in attributes if name.lower().startswith(word)]
    values = named or list(attributes.values())
    value = values[0] if named or len(values) == 1 else None
    if isinstance(value, dict):
        chosen = [name for name, is_set in value.items() if is_set]
        value = chosen[0] if len(chosen) == 1 else None
    if not isinstance(value, str) or not value.strip():
        raise DataError(
            f"{where}: expected a region with one class, such as {{'class': 'cat'}}, got {shorten(attributes)}"
        )
    return value.strip()


def _via_table(path: Path) -> Iterator[Picture]:
    rows = read_table(path)
    header = [name for _, names in [next(rows, (1, []))] for name in names]
    found: dict[str, list[Shape]] = {}
    for line, values in rows:
        where, row = f"{path}: line {line}", dict(zip(header, values, strict=False))
        shapes = found.setdefault(require(row, "filename", str, where), [])
        parts = {f"{part}_attributes": row.get(f"region_{name}attributes") for part, name in _VIA_COLUMNS}
        region = {name: parse_json(text, where) for name, text in parts.items() if text}
        if region.get("shape_attributes"):
            shapes.append(_via_shape(region, where))
    yield from (Picture(name, shapes) for name, shapes in found.items())


_VIA_COLUMNS = (("shape", "shape_"), ("region", ""))


def _label_studio(content: Any, path: str) -> Iterator[Picture]:
    for task, where in _objects(content, f"{path}: "):
        if "data" in task:
            data = require(task, "data", dict, where)
            people = [one for one in _records(task, "annotations", where) if not one[0].get("was_cancelled")]
            results = _records(people[0][0], "result", people[0][1]) if people else ()
            found = [({**one, **require(one, "value", dict, at)}, at) for one, at in results if "value" in one]
        else:  # JSON-MIN: what is labeled lies beside the image
            data, lists = task, [(key, values) for key, values in task.items() if isinstance(values, list)]
            found = [one for key, values in lists for one in _objects(values, f"{where}: {key}")]
        names = [data[key] for key in ("image", "img", *data) if isinstance(data.get(key), str)]
        if not names:
            raise DataError(f"{where}: expected the address of an image as 'image', got {shorten(data)}")
        areas = [(one, at) for one, at in found if any(key.endswith("labels") for key in one)]
        sides = [_side(areas[0][0], f"original_{side}") for side in ("height", "width")] if areas else ()
        yield Picture(_of_address(names[0], where), [_label_studio_shape(one, at) for one, at in areas], *sides)


def _label_studio_shape(found: Record, where: str) -> Shape:
    kind = next(key for key in found if key.endswith("labels"))
    labels = require(found, kind, list, where)
    if len(labels) != 1 or not isinstance(labels[0], str):
        raise DataError(f"{where}: expected one class, got {shorten(labels)}")
    width, height = _numbers(found, where, "original_width", "original_height")
    degrees = require({"rotation": 0.0, **found}, "rotation", float, where)
    across, down = width / 100, height / 100  # of a percent
    if kind == "polygonlabels":
        outline = _points(require(found, "points", list, where), where)
        return Shape(labels[0], [(x * across, y * down) for x, y in outline], True)
    if kind == "ellipselabels":
        x, y, rx, ry = _numbers(found, where, "x", "y", "radiusX", "radiusY")
        return Shape(labels[0], _ellipse(x * across, y * down, rx * across, ry * down, degrees))
    if kind == "rectanglelabels":
        x, y, w, h = _numbers(found, where, "x", "y", "width", "height")
        return Shape(labels[0], _corners(x * across, y * down, w * across, h * down, degrees))
    return Shape(labels[0], ())


def _of_address(address: str, where: str) -> str:
    """The file that an address means: what is asked for (``?d=images/a.jpg``), or its path."""
    try:
        parts = urlsplit(address)
    except ValueError as error:
        raise DataError(f"{where}: {shorten(address)} is no address of an image ({error})") from error
    return parse_qs(parts.query).get("d", [unquote(parts.path)])[0].lstrip("/")


def _hugging_face(content: Any, path: str) -> Iterator[Picture]:
    for one, where in _objects(content, f"{path}: "):
        name, objects = require(one, "file_name", str, where), one.get("objects") or {"bbox": []}
        boxes = require(objects, "bbox", list, where)
        labels = next((objects[key] for key in _HUGGING_FACE if isinstance(objects.get(key), list)), [])
        if len(labels) != len(boxes) or not all(type(label) in (int, str) for label in labels):
            raise DataError(f"{where}: expected a category for each of {len(boxes)} boxes, got {shorten(labels)}")
        corners = (_corners(*require_numbers({"bbox": box}, "bbox", 4, where)) for box in boxes)
        shapes = [Shape(str(label), points) for label, points in zip(labels, corners, strict=True)]
        yield Picture(name, shapes, _side(one, "height"), _side(one, "width"))


_HUGGING_FACE = ("categories", "category", "labels", "label", "class", "classes", "category_id")


_FILES: dict[str, tuple[Callable[[Any], bool], Callable[[Any, str], Iterator[Picture]]]] = {
    "CreateML": (lambda content: {"image", "annotations"} <= content[0].keys(), _createml),
    "VIA": (
        lambda content: (
            {"filename", "regions"} <= next(iter(content.get("_via_img_metadata", content).values())).keys()
        ),
        _via,
    ),
    "Label Studio": (
        lambda content: (
            {"data", "annotations"} <= content[0].keys() or any("original_width" in f"{t}" for t in content[:9])
        ),
        _label_studio,
    ),
    "Hugging Face": (lambda content: "objects" in content[0] and "file_name" in content[0], _hugging_face),
}


def _cvat(path: Path) -> Export | None:
    refuse_special(path)
    try:
        root = fromstring(path.read_bytes())
    except (ParseError, DefusedXmlException, OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as XML ({type(error).__name__}: {error})") from error
    if root.tag != "annotations":
        return None
    if root.find("track") is not None:
        raise DataError(f"{path}: is CVAT's format for video, which has no images: export 'CVAT for images', or COCO")
    listed = [(name.text or "").strip() for name in root.iterfind("meta//labels/label/name")]
    return Export(
        "CVAT", [_cvat_image(image, str(path)) for image in root.iterfind("image")], tuple(dict.fromkeys(listed))
    )


def _cvat_image(image: Element, path: str) -> Picture:
    where = f"{path}: image {image.get('name')}"
    name, folder = require(dict(image.attrib), "name", str, where), image.get("subset")
    shapes = []
    for k, element in enumerate(image):
        if element.tag == "tag":
            continue  # of the image as a whole
        at, values = f"{where}: {element.tag} {k}", {key: _number(text) for key, text in element.attrib.items()}
        label = require(dict(element.attrib), "label", str, at)
        degrees = require({"rotation": 0.0, **values}, "rotation", float, at)
        points: Points = ()
        if element.tag == "box":
            x1, y1, x2, y2 = _numbers(values, at, "xtl", "ytl", "xbr", "ybr")
            points = _corners(x1, y1, x2 - x1, y2 - y1, degrees, center=True)
        elif element.tag == "ellipse":
            x, y, rx, ry = _numbers(values, at, "cx", "cy", "rx", "ry")
            points = _ellipse(x, y, rx, ry, degrees)
        elif element.tag == "mask":
            points = _corners(*_numbers(values, at, "left", "top", "width", "height"))
        elif element.tag == "polygon":
            points = _points([[*map(_number, pair.split(","))] for pair in element.get("points", "").split(";")], at)
        shapes.append(Shape(label, points, element.tag == "polygon"))
    size = {side: _number(image.get(side, "")) for side in ("height", "width")}
    return Picture(f"{folder}/{name}" if folder else name, shapes, _side(size, "height"), _side(size, "width"))


def _number(text: str) -> float | str:
    """The number that a text is; what is none is refused where a number is needed."""
    try:
        return float(text)
    except ValueError:
        return text
