"""Data in YOLO's text layout: ``data.yaml``, folders or lists of images, and a text file of boxes an image.

::

    root/
      data.yaml                   see yolo_yaml.py
      images/train/a.jpg
      labels/train/a.txt          see below; a missing or empty one is an image without objects

Which images and label files a split has: see yolo_images.py.

A label file has a line an object, in parts of the width and height of the image.

::

    2 0.5 0.25 0.1 0.2            class, x and y of the center, width, height
    2 0.1 0.1 0.4 0.1 0.4 0.3     class and the points of a polygon, three at least: its bounding box is taken

With ``kpt_shape`` in ``data.yaml`` a line has a box and then that many keypoints, which are checked and left out.

Writing. Numbers have all the digits of a double, so that boxes come back within 1e-9 pixels. ``data.yaml`` has no ``path``, since
other programs take that to be relative to where they are started.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import yaml
from tqdm import tqdm

from detpipe.datasets.annotations import AnnotationBuilder, BadBoxError, read_finite, read_number
from detpipe.datasets.datamodule import FolderData, Split
from detpipe.datasets.decode import IMAGE_SUFFIXES
from detpipe.datasets.faults import Faults, OnBad
from detpipe.datasets.formats import export
from detpipe.datasets.formats.export import Images, Splits, Written
from detpipe.datasets.formats.folders import ListedImage
from detpipe.datasets.formats.outline_files import write_outlines
from detpipe.datasets.formats.yolo_images import ImageFinder, label_path
from detpipe.datasets.formats.yolo_yaml import NAME, find_file, has_labels, read_yolo
from detpipe.datasets.image_files import PLAIN_FILES, ImageFiles
from detpipe.datasets.stored_proposals import file_key
from detpipe.support.errors import DataError
from detpipe.support.files import refuse_special
from detpipe.support.strict_json import shorten
from detpipe.types import Annotations, Segmentations

_FIELDS = ("x", "y", "width", "height")
_ROUNDING = 1e-6  # what six digits can be beyond 0..1


class LabelReader:
    """Adds the objects of one label file after the other.

    ``points`` is how many keypoints each line has behind the box, and how many numbers each; None: lines are boxes or polygons.
    ``outlined`` keeps the polygons.
    """

    def __init__(self, built: AnnotationBuilder, points: tuple[int, int] | None, outlined: bool) -> None:
        self.built, self.points, self.outlined = built, points, outlined
        self.polygons = 0
        self.outlines: list[bytes] = []  # of the boxes, as COCO's JSON; empty of a line that is no polygon

    def add(self, root: Path, item: ListedImage) -> None:
        """Add an image and its objects; a missing file says that it has none."""
        size = self.built.size_in_file(root, item.file_name, f"image {item.image_id}")
        if size is None:
            return self.skip(item.labels)
        lines = self.lines(item.labels)
        if lines is None:
            return None
        (height, width), image = size, self.built.add_image(item.file_name, item.image_id, size)
        self.built.boxes_read += len(lines)
        for number, values in lines:
            where = f"{item.labels}: line {number}"
            try:
                label = self._label(values[0], where)
                x1, y1, x2, y2 = self._box(values[1:], where)
            except BadBoxError as bad:
                self.built.faults.box(*bad.args)
            else:
                pixels = (x1 * width, y1 * height, x2 * width, y2 * height)
                self.built.add_box(image, pixels, label, f"{where}: box {shorten(' '.join(values))}")
                polygon = self._is_polygon(values[1:])
                self.polygons += polygon
                if self.outlined:
                    corners = [float(text) * (height if k % 2 else width) for k, text in enumerate(values[1:])]
                    self.outlines.append(msgspec.json.encode([corners]) if polygon else b"")
        return None

    def skip(self, labels: Path) -> None:
        """Count the boxes of an image that is left out."""
        count = len(self.lines(labels) or ())
        self.built.boxes_read += count
        self.built.faults.boxes_of_skipped_image(count)

    def lines(self, path: Path) -> list[tuple[int, list[str]]] | None:
        """The numbers and values of the lines that are not empty; None, and a fault, if the file cannot be read."""
        try:
            refuse_special(path)
            text = path.read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            return []
        except (OSError, UnicodeDecodeError, DataError) as error:
            return self.built.faults.image("labels unreadable", f"{path}: cannot be read as text ({error})")
        split = ((number, line.split()) for number, line in enumerate(text.split("\n"), start=1))
        return [(number, values) for number, values in split if values]

    def _label(self, text: str, where: str) -> int:
        value, names = read_number(text), self.built.class_names
        if value is None or not value.is_integer():  # an infinity is none, and NaN is none
            raise BadBoxError("bad class", f"{where}: class must be a whole number, got {shorten(text)}")
        if not 0 <= value < len(names):
            known = shorten(", ".join(names), 100).strip("'")
            expected = f"expected 0 to {len(names) - 1} ({known})"
            raise BadBoxError("class out of range", f"{where}: class is {shorten(text)}: {expected}")
        return int(value) + 1

    def _box(self, texts: list[str], where: str) -> tuple[float, ...]:
        polygon = self._is_polygon(texts)
        expected = "class, x, y, width and height, or class and the x and y of three points or more"
        wrong = len(texts) != 4 and not polygon
        if self.points is not None:
            count, numbers_each = self.points
            wrong = len(texts) != 4 + count * numbers_each
            expected = (
                f"class, x, y, width, height and {count} points of {numbers_each} numbers, {5 + count * numbers_each} in all, "
                "by the kpt_shape of the data set"
            )
        if wrong:
            six = self.points is None and len(texts) == 5
            more = "; a confidence or an angle behind the box is not read" if six else ""
            text = f"{where}: has {len(texts) + 1} values: expected {expected}{more}"
            raise BadBoxError("wrong number of values", text)
        numbers = [self._number(i, text, polygon, where) for i, text in enumerate(texts)]
        if polygon:
            return min(numbers[::2]), min(numbers[1::2]), max(numbers[::2]), max(numbers[1::2])
        x, y, width, height = numbers[:4]
        return x - width / 2, y - height / 2, x + width / 2, y + height / 2

    def _is_polygon(self, numbers: Sequence[object]) -> bool:
        return self.points is None and len(numbers) >= 6 and len(numbers) % 2 == 0

    def _number(self, i: int, text: str, polygon: bool, where: str) -> float:
        """The i-th number behind the class; most are parts of the width or height."""
        if polygon:
            field, bounded = f"{'xy'[i % 2]} of point {i // 2 + 1}", True
        elif i < 4 or self.points is None:
            field, bounded = _FIELDS[i], True
        else:
            point, k = divmod(i - 4, self.points[1])
            field, bounded = f"{('x', 'y', 'visibility')[k]} of point {point + 1}", k < 2
        value = read_finite(text, where, field)
        if bounded and not -_ROUNDING <= value <= 1 + _ROUNDING:
            expected = "expected 0 to 1, a part of the image's width or height"
            raise BadBoxError("outside 0..1", f"{where}: {field} is {text}: {expected}")
        return value


class YOLO(FolderData):
    """Detection data in YOLO's text layout.

    Args:
        root: the folder with ``data.yaml``, ``obj.data`` or ``classes.txt``, or such a file under any name.
        train: the training split: a key of the file, or several; where it names no splits a folder such as ``train``, or ``all``.
        val: the validation split, in the same way; ``val``, ``valid`` and ``validation`` are the same.
        common: in a proposal store an image is called by its file, relative to the root.
    """

    image_key = staticmethod(file_key)

    def load(self, split: Split, faults: Faults | None = None) -> Annotations:
        """Read the images and labels of a split."""
        source = self.source_of(split, "a key of data.yaml")
        return load_yolo(self.root, source, segmentations=self.reads_outlines(split), faults=faults or self.faults())

    def split_names(self) -> tuple[str, ...]:
        """The splits that the root holds."""
        return tuple(read_yolo(self.root).splits)


def load_yolo(
    root: str | Path,
    split: str | Sequence[str],
    on_bad: OnBad = "error",
    segmentations: bool = False,
    faults: Faults | None = None,
) -> Annotations:
    """Read one split of a data set in YOLO layout and check it against its images.

    Images are numbered 1, 2, ... in the order of the split (folders by name), skipped ones included; that number is the
    ``image_id``. Their sizes are read from their headers. Polygons become their bounding boxes and are counted.

    Args:
        root: as of `YOLO`.
        split: as the training split of `YOLO`; several are read in turn.
        on_bad: ``"error"`` refuses a split with any faulty record; ``"skip"`` leaves these records out and counts them.
        segmentations: whether polygons are kept beside their boxes, if there are any.
        faults: takes all faults, in place of ``on_bad``.

    Returns:
        The images of the split. A DataError for anything wrong names file, line, field and value.
    """
    file = read_yolo(root)
    splits = (split,) if isinstance(split, str) else tuple(split)
    faults = faults or Faults(on_bad)
    faults.source = f"{file.path} ({', '.join(splits)})"
    finder = ImageFinder(file, splits, faults)
    built = AnnotationBuilder(faults, file.class_names, file.category_ids)
    built.images_read = finder.lines + len(finder.orphans)
    reader = LabelReader(built, file.points, segmentations)
    for item in tqdm(finder.found, desc="reading labels", unit="image", disable=None, leave=False):
        reader.add(finder.root, item)
    for labels in finder.orphans:
        faults.image("file missing", f"{labels}: there is no image of this name for these labels")
        reader.skip(labels)
    if reader.polygons:
        built.counts["boxes from polygons"] = reader.polygons
        built.segmentations = Segmentations.pack(reader.outlines, source=str(file.path)) if segmentations else None
    longer = np.array(built.sizes, dtype=np.int64).reshape(-1, 2)[np.array(built.box_image, dtype=np.int64)]
    rounding = 1e-6 * longer.max(axis=1, initial=1)[:, None]  # six digits, as most tools write
    return built.build(finder.root, finder.folders, rounding)


def find_splits(root: Path) -> dict[str, tuple[str, ...]]:
    """Find the splits of a folder in YOLO layout, or of its file: name -> folders and lists of images, relative to the root.

    Those that the file names though nothing of them is there, as hubs do, are left out, unless that is all of them. Nothing if the
    layout is another. A DataError if what describes it cannot be read, or does not say what the classes are.
    """
    found = find_file(root) if root.is_dir() else root
    if (found is None or found.suffix.lower() in (".json", ".txt")) and not has_labels(root):
        return {}
    file = read_yolo(root)
    absent = file.absent_splits()
    return {name: entries for name, entries in file.splits.items() if name not in absent} or file.splits


Flags = Literal["refuse", "drop", "leave out"]


def write_yolo(
    splits: Splits,
    folder: str | Path,
    images: Images = "copy",
    flags: Flags = "refuse",
    source: ImageFiles = PLAIN_FILES,
) -> Written:
    """Write a data set in YOLO layout.

    The splits, name -> annotations, go into a new folder; ``images`` and ``source`` are those of
    :class:`~detpipe.datasets.formats.export.Export`. The only split that begins with ``train``, ``val`` or ``test`` goes by that
    key. ``flags`` says of crowd regions and difficult objects, which the layout cannot tell from others: ``"refuse"`` to write
    them, ``"drop"`` the flag, so that they become ordinary objects, or ``"leave out"`` these boxes. A DataError if the folder is
    there already, the classes of splits differ, or there are flags that are refused.
    """
    names, ids = export.one_class_list(splits)
    export.check_suffixes(splits, IMAGE_SUFFIXES, "YOLO")
    splits, remarks = _without_flags(splits, flags)
    remarks += _losses(splits)
    keys = _keys(list(splits))
    with export.new_folder(folder, splits, images, source) as made:
        made.remarks += remarks
        content: dict[str, object] = {key: f"images/{export.file_name_of(split)}" for split, key in keys.items()}
        content["names"] = dict(enumerate(names))
        if list(ids) != list(range(len(ids))):
            content["category_ids"] = list(ids)
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
        (made.out / NAME).write_text(text, encoding="utf-8")
        for split, a in splits.items():
            named = made.place(split, f"images/{export.file_name_of(split)}")
            for i, name in enumerate(named):
                path = made.out / label_path(Path(name))
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(_label_lines(a, i), encoding="utf-8")
            made.remarks += write_outlines(made.out, keys[split], a, named)
    return made.written(keys.values())


def _keys(splits: list[str]) -> dict[str, str]:
    kinds = {split: next((kind for kind in ("train", "val", "test") if split.startswith(kind)), "") for split in splits}
    count = Counter(kinds.values())
    return {split: kind if kind and count[kind] == 1 else export.file_name_of(split) for split, kind in kinds.items()}


def _without_flags(splits: Splits, flags: Flags) -> tuple[Splits, list[str]]:
    if flags not in ("refuse", "drop", "leave out"):
        raise ValueError(f"flags must be 'refuse', 'drop' or 'leave out', got {flags!r}")
    crowd = sum(int(a.iscrowd.sum()) for a in splits.values())
    difficult = sum(int(a.difficult.sum()) for a in splits.values())
    if not crowd + difficult:
        return splits, []
    which = f"{crowd} crowd regions and {difficult} difficult objects"
    if flags == "refuse":
        raise DataError(
            f"{which} are flagged, which YOLO layout cannot hold: --drop-flags writes them as ordinary objects, --drop-flagged "
            "leaves them out"
        )
    if flags == "leave out":
        kept = {name: a.keep_boxes(~(a.iscrowd | a.difficult)) for name, a in splits.items()}
        return kept, [f"{which} are left out"]
    return splits, [f"{which} are written as ordinary objects: their flags are dropped"]


def _losses(splits: Splits) -> list[str]:
    remarks = []
    if any(not np.array_equal(a.image_ids, np.arange(1, len(a) + 1)) for a in splits.values()):
        remarks.append("image ids are not kept: images are numbered by the order of their names")
    areas = sum(int(export.own_area(a).sum()) for a in splits.values())
    if areas:
        remarks.append(f"areas of {areas} boxes, which are not those of the boxes, are not kept")
    return remarks


def _label_lines(a: Annotations, image: int) -> str:
    height, width = a.sizes[image].tolist()
    lines = []
    for b in a.rows_of(image):
        x1, y1, x2, y2 = a.boxes[b].tolist()
        numbers = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
        lines.append(f"{int(a.labels[b]) - 1} {' '.join(map(repr, numbers))}\n")
    return "".join(lines)
