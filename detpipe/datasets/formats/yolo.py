"""Data in YOLO's text layout: ``data.yaml``, folders or lists of images, and a text file of boxes an image.

::

    root/
      data.yaml                   see yolo_yaml.py
      images/train/a.jpg
      labels/train/a.txt          see below; a missing or empty one is an image without objects

The images of a split lie in folders, which are searched to their end, or are listed; each has a label file.

The labels of ``.../images/train/a.jpg`` are in ``.../labels/train/a.txt``: the last folder called ``images`` is exchanged.
Where there is none, ``a.txt`` is beside ``a.jpg``.

A label file has a line an object, in parts of the width and height of the image.

::

    2 0.5 0.25 0.1 0.2            class, x and y of the center, width, height
    2 0.1 0.1 0.4 0.1 0.4 0.3     class and the points of a polygon, three at least: its bounding box is taken
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from detpipe.datasets.datamodule import DetectionData, Split
from detpipe.datasets.decode import IMAGE_SUFFIXES, image_names, image_size
from detpipe.datasets.faults import Faults, Policy
from detpipe.datasets.formats.yolo_yaml import YOLOFile, read_yolo_yaml
from detpipe.datasets.records import RecordBuilder, build_annotations, read_number
from detpipe.datasets.stored_proposals import file_key
from detpipe.support.errors import DataError
from detpipe.support.files import refuse_special
from detpipe.support.strict_json import shorten
from detpipe.types import Annotations


@dataclass(frozen=True)
class ListedImage:
    """An image of a split; it need not exist.

    Args:
        image_id: its number in the split, from 1.
        file_name: relative to the root, with forward slashes.
        image: path of the image.
        labels: path of its label file.
    """

    image_id: int
    file_name: str
    image: Path
    labels: Path


def label_path(image: Path) -> Path:
    """The label file of an image, whether or not it exists."""
    folders = list(image.parts[:-1])
    if "images" in folders:
        folders[len(folders) - 1 - folders[::-1].index("images")] = "labels"
    return Path(*folders, f"{image.stem}.txt")


class ImageFinder:
    """Collects the images of a split.

    Args:
        file: what ``data.yaml`` says.
        split: the splits that are read in turn.
        faults: where images that cannot be used are noted.

    Attributes:
        root: the folder that file names are relative to: that of the layout, unless images lie beside it.
        folders: where images may lie.
        found: the images.
        orphans: label files without an image.
        lines: how many images were listed, those that cannot be used included.
    """

    def __init__(self, file: YOLOFile, split: tuple[str, ...], faults: Faults) -> None:
        self.faults = faults
        self.found: list[ListedImage] = []
        self.orphans: list[Path] = []
        self.lines = 0
        self._by_labels: dict[Path, ListedImage] = {}
        entries = [_locate(file, name, entry) for name in split for entry in file.entries(name)]
        self.root = _root(file.root, [path for path in entries if path.is_dir()])
        self.folders = [path if path.is_dir() else self.root for path in entries]
        for path in entries:
            if path.is_dir():
                self._folder(path)
            else:
                self._list(path)
        if not self.lines:
            raise DataError(f"{file.path}: the split {', '.join(split)} has no images ({' '.join(IMAGE_SUFFIXES)})")
        if self.found and not any(item.labels.is_file() for item in self.found):
            raise DataError(
                f"{file.path}: none of the {len(self.found)} images of {', '.join(split)} has a label file; looked for "
                f"{self.found[0].labels} and the like; an image without objects may have an empty one"
            )

    def _folder(self, folder: Path) -> None:
        first = len(self.found)
        for path in _walk(folder, set()):
            self._add(path, str(path))
        expected = {item.labels for item in self.found}
        for labels in sorted({item.labels.parent for item in self.found[first:]} - {folder}):
            if any(item.image.parent == labels for item in self.found[first:]):
                continue  # labels beside images: other texts may be there
            files = (path for path in sorted(labels.glob("*.txt")) if path.name != "classes.txt")
            self.orphans += [path for path in files if path not in expected]

    def _list(self, path: Path) -> None:
        refuse_special(path)
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read as a list of images ({error})") from error
        for number, line in enumerate(lines, start=1):
            name = line.strip()
            if name:
                self._add(Path(os.path.normpath(path.parent / name)), f"{path}: line {number}: {name!r}")

    def _add(self, path: Path, where: str) -> None:
        self.lines += 1
        name = os.path.relpath(path, self.root).replace(os.sep, "/")
        if name.startswith("../") or "\0" in name:
            return self.faults.fatal("leads out of the folder", f"{where} leads out of {self.root}")
        item = ListedImage(self.lines, name, path, label_path(path))
        other = self._by_labels.setdefault(item.labels, item)
        if other is not item and other.image == path:
            return self.faults.image("listed twice", f"{where} is listed twice")
        if other is not item:
            return self.faults.image(
                "labels of two images", f"{where} and {other.image} have the same label file {item.labels}; rename one"
            )
        self.found.append(item)
        return None


def _locate(file: YOLOFile, split: str, entry: str) -> Path:
    """The folder or list that an entry names."""
    path = file.root / entry
    if not path.exists() and entry.startswith("../") and (file.root / entry[3:]).exists():
        path = file.root / entry[3:]  # as written by Roboflow, whose root is a folder further down
    if path.is_dir() or (path.is_file() and path.suffix == ".txt"):
        return Path(os.path.normpath(path))
    problem = "is neither a folder nor a .txt list" if path.exists() else "does not exist"
    raise DataError(f"{file.path}: {split} is {entry!r}, but {path} {problem}; entries are relative to {file.root}")


def _root(root: Path, folders: list[Path]) -> Path:
    """The root, or the innermost folder that holds it and all images."""
    if all(not os.path.relpath(folder, root).startswith("..") for folder in folders):
        return root
    return Path(os.path.commonpath([os.path.abspath(path) for path in (root, *folders)]))


def _walk(folder: Path, seen: set[tuple[int, int]]) -> Iterator[Path]:
    """All images in a folder and those below it, by name; hidden files are none, no folder is entered twice."""
    status = folder.stat()
    if (status.st_dev, status.st_ino) in seen:
        return
    seen.add((status.st_dev, status.st_ino))
    with os.scandir(folder) as entries:
        visible = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    images = set(image_names(entry.name for entry in visible))
    for entry in visible:
        if entry.is_dir():
            yield from _walk(folder / entry.name, seen)
        elif entry.name in images:
            yield folder / entry.name


_FIELDS = ("x", "y", "width", "height")
_ROUNDING = 1e-6  # what six digits can be beyond 0..1


class LabelReader:
    """Collects the objects of one label file after the other.

    Args:
        built: takes the objects.
        faults: where lines that cannot be used are noted.
    """

    def __init__(self, built: RecordBuilder, faults: Faults) -> None:
        self.built, self.class_names = built, built.class_names
        self.faults = faults
        self.boxes_read = 0
        self.polygons = 0

    def read(self, path: Path, size: tuple[int, int]) -> bool:
        """Read the labels of the image that is added next; a missing file says that it has no objects.

        Args:
            path: of the label file.
            size: height and width of the image.

        Returns:
            Whether the file can be read, or is missing.
        """
        lines = self.lines(path)
        if lines is None:
            return False
        for number, values in lines:
            self.boxes_read += 1
            where = f"{path}: line {number}"
            label = self._label(values[0], where)
            box = label and self._box(values[1:], where)
            if label and box:
                (height, width), (x1, y1, x2, y2) = size, box
                pixels = (x1 * width, y1 * height, x2 * width, y2 * height)
                self.built.add_box(len(self.built.images), pixels, label, f"{where}: box {shorten(' '.join(values))}")
        return True

    def lines(self, path: Path) -> list[tuple[int, list[str]]] | None:
        """The numbers and values of the lines that are not empty; None, and a fault, if the file cannot be read."""
        try:
            refuse_special(path)
            text = path.read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            return []
        except (OSError, UnicodeDecodeError, DataError) as error:
            self.faults.image("labels unreadable", f"{path}: cannot be read as text ({error})")
            return None
        split = ((number, line.split()) for number, line in enumerate(text.split("\n"), start=1))
        return [(number, values) for number, values in split if values]

    def _label(self, text: str, where: str) -> int | None:
        value = read_number(text)
        if value is None or not value.is_integer():  # an infinity is none, and NaN is none
            self.faults.box("bad class", f"{where}: class must be a whole number, got {shorten(text)}")
            return None
        if not 0 <= value < len(self.class_names):
            known = shorten(", ".join(self.class_names), 100).strip("'")
            self.faults.box(
                "class out of range",
                f"{where}: class is {shorten(text)}: expected 0 to {len(self.class_names) - 1} ({known})",
            )
            return None
        return int(value) + 1

    def _box(self, texts: list[str], where: str) -> tuple[float, ...] | None:
        polygon = len(texts) >= 6 and len(texts) % 2 == 0
        if len(texts) != 4 and not polygon:
            self.faults.box(
                "wrong number of values",
                f"{where}: has {len(texts) + 1} values: expected class, x, y, width and height, or class and the x and y of "
                "three points or more",
            )
            return None
        numbers: list[float] = []
        for i, text in enumerate(texts):
            field = f"{'xy'[i % 2]} of point {i // 2 + 1}" if polygon else _FIELDS[i]
            value = read_number(text)
            if value is None or not math.isfinite(value):
                self.faults.box("not a number", f"{where}: {field} must be a finite number, got {shorten(text)}")
                return None
            if not -_ROUNDING <= value <= 1 + _ROUNDING:
                self.faults.box(
                    "outside 0..1",
                    f"{where}: {field} is {text}: expected 0 to 1, a part of the image's width or height",
                )
                return None
            numbers.append(value)
        self.polygons += polygon
        return _bounds(numbers) if polygon else _corners(numbers)


def _corners(numbers: Sequence[float]) -> tuple[float, ...]:
    x, y, width, height = numbers
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _bounds(numbers: Sequence[float]) -> tuple[float, ...]:
    x, y = numbers[::2], numbers[1::2]
    return min(x), min(y), max(x), max(y)


class YOLO(DetectionData):
    """Detection data in YOLO's text layout.

    Args:
        root: the folder with ``data.yaml``, or such a file under any name.
        train: the training split: a key of ``data.yaml``, or several.
        val: the validation split, in the same way.
        test: the split for the final test, in the same way; none by default.
        common: what all data sets have: ``loader``, ``augment``, ``seed``, ``on_bad``, ``proposals`` and ``resize`` of
            :class:`~detpipe.datasets.datamodule.DetectionData`.
            In a proposal store an image is called by its file, relative to the root.
    """

    image_key = staticmethod(file_key)

    def __init__(
        self,
        root: str,
        train: str | list[str] = "train",
        val: str | list[str] = "val",
        test: str | list[str] | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.root = str(root)
        self.splits = {"train": train, "val": val, "test": test}

    def load(self, split: Split) -> Annotations:
        """Read the images and labels of a split."""
        keys = self.splits[split]
        if not keys:
            raise DataError(f"no {split} split: set the argument {split} to a key of data.yaml, such as {split}")
        return load_yolo(self.root, keys, self.on_bad)


def load_yolo(root: str | Path, split: str | Sequence[str], on_bad: Policy = "error") -> Annotations:
    """Read one split of a data set in YOLO layout and check it against its images.

    Images are numbered 1, 2, ... in the order of the split (folders by name), skipped ones included; that number is the
    ``image_id``. Their sizes are read from their headers. Polygons become their bounding boxes and are counted.

    Args:
        root: the folder with ``data.yaml``, or such a file under any name.
        split: a key of ``data.yaml``, or several, which are read in turn.
        on_bad: ``"error"`` refuses a split with any faulty record; ``"skip"`` leaves these records out and counts them.

    Returns:
        The annotations of the images of the split.

    Raises:
        DataError: for anything wrong, naming the file, the line, the field and its value.
    """
    file = read_yolo_yaml(root)
    splits = (split,) if isinstance(split, str) else tuple(split)
    faults = Faults(f"{file.path} ({', '.join(splits)})", on_bad)
    finder = ImageFinder(file, splits, faults)
    built = RecordBuilder(file.class_names, file.category_ids)
    reader = LabelReader(built, faults)
    for item in tqdm(finder.found, desc="reading labels", unit="image", disable=None, leave=False):
        size = _size(item, faults)
        if size is None:
            _skip(item.labels, reader)
        elif reader.read(item.labels, size):
            built.add_image(item.file_name, item.image_id, size)
    for labels in finder.orphans:
        faults.image("file missing", f"{labels}: there is no image of this name for these labels")
        _skip(labels, reader)
    records = built.records(finder.root, finder.folders, finder.lines + len(finder.orphans), reader.boxes_read)
    longer = records.sizes[records.box_image].max(axis=1, initial=1)[:, None]
    records.clip_tolerance = 1e-6 * longer  # six digits, as most tools write
    records.counts = {"boxes from polygons": reader.polygons} if reader.polygons else {}
    return build_annotations(records, faults)


def _size(item: ListedImage, faults: Faults) -> tuple[int, int] | None:
    """Height and width; None, and a fault, where the file has none."""
    try:
        return image_size(item.image)
    except DataError as error:
        faults.image("unreadable" if item.image.exists() else "file missing", f"image {item.image_id}: {error}")
        return None


def _skip(labels: Path, reader: LabelReader) -> None:
    """Count the boxes of an image that is left out."""
    count = len(reader.lines(labels) or ())
    reader.boxes_read += count
    reader.faults.skipped["boxes skipped: image skipped"] += count
