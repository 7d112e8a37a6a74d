"""Reads the label files of the YOLO layout: a line an object, in parts of the width and height of the image.

::

    2 0.5 0.25 0.1 0.2            class, x and y of the center, width, height
    2 0.1 0.1 0.4 0.1 0.4 0.3     class and the points of a polygon, three at least: its bounding box is taken
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from detpipe.datasets.faults import Faults
from detpipe.datasets.records import RecordBuilder, read_number
from detpipe.errors import DataError
from detpipe.files import refuse_special
from detpipe.strict_json import shorten

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
