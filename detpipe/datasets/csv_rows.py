"""Turns the rows of a table of boxes into records, and names the line and column of whatever is wrong."""

from __future__ import annotations

import math
import os
from pathlib import Path

from tqdm import tqdm

from detpipe.datasets.csv_table import Row, Table
from detpipe.datasets.decode import image_size
from detpipe.datasets.faults import Faults
from detpipe.datasets.records import RecordBuilder, Records, read_number, read_whole
from detpipe.errors import DataError
from detpipe.strict_json import shorten
from detpipe.suggest import did_you_mean

_FLAGS = {"": False, "0": False, "1": True, "false": False, "true": True}


class RowReader:
    """Collects the boxes of one table after the other.

    Args:
        names: [K] the classes.
        folder: what file names are relative to.
        faults: where rows that cannot be used are noted.
    """

    def __init__(self, names: tuple[str, ...], folder: Path, faults: Faults) -> None:
        self.names = names
        self.label_of = {name: label for label, name in enumerate(names, start=1)}
        self.folder = folder
        self.faults = faults
        self.images: dict[str, str] = {}  # file name -> where it is first named, in the order of the tables
        self.ids: dict[str, tuple[int, str]] = {}  # file name -> image id and where it is given
        self.owners: dict[int, str] = {}  # image id -> file name
        self.empty: dict[str, str] = {}  # file name -> the line that says that it has no objects
        self.boxes: list[tuple[float, ...]] = []  # x1, y1, x2, y2
        self.box_of: list[tuple[str, int, bool, bool, float]] = []  # file name, label, difficult, crowd, area
        self.where: list[str] = []
        self.boxes_read = 0

    def read(self, table: Table, split: str | None) -> int:
        """Read the rows of a split.

        Args:
            table: the rows.
            split: what their column ``split`` holds; None reads all rows.

        Returns:
            How many rows there were.
        """
        other: dict[str, str] = {}  # file name -> another split that it is in
        rows = 0
        for row in table.rows:
            if row.broken:
                self.boxes_read += 1
                self.faults.box("wrong number of values", f"{table.path}: line {row.line}: {row.broken}")
            elif split is None or row.values["split"] == split:
                rows += 1
                self._row(table, row)
            else:
                other.setdefault(_normal(row.values["file_name"]), row.values["split"])
        for name in self.images:
            if name in other and split is not None:
                self.faults.fatal(
                    "image in two splits",
                    f"{self.images[name]}: {name!r} is in the split {split!r}, but other rows put it into {other[name]!r}",
                )
        return rows

    def _row(self, table: Table, row: Row) -> None:
        where = f"{table.path}: line {row.line}"
        name = _normal(row.values["file_name"])
        ends = ("x1", "y1", "w", "h") if table.sized else ("x1", "y1", "x2", "y2")
        texts = [row.values[meaning] for meaning in ends]
        self.boxes_read += any(texts) or not name
        if not name:
            column = table.column("file_name")
            return self.faults.box(
                "no image", f"{where}: column {column!r} is empty: expected the name of an image file"
            )
        self.images.setdefault(name, where)
        self._image_id(table, row, name, where)
        if not any(texts):
            self.empty.setdefault(name, where)
            return None
        values = self._numbers(table, dict(zip(ends, texts, strict=True)), where)
        label = self._label(table, row.values["label"], where) if values else None
        flags = [self._flag(table, row, meaning, where) for meaning in ("difficult", "iscrowd")] if label else []
        area = self._area(table, row, where) if label and None not in flags else None
        if values and label and area is not None:
            x1, y1, a, b = values
            self.boxes.append((x1, y1, x1 + a, y1 + b) if table.sized else (x1, y1, a, b))
            self.box_of.append((name, label, bool(flags[0]), bool(flags[1]), area))
            self.where.append(f"{where} ({name}): box {', '.join(texts)}")
        return None

    def _image_id(self, table: Table, row: Row, name: str, where: str) -> None:
        text = row.values.get("image_id", "")
        if not text:
            return None
        image_id = read_whole(text)
        if image_id is None:
            column = table.column("image_id")
            return self.faults.fatal(
                "bad image_id", f"{where}: column {column!r} must be a whole number, got {shorten(text)}"
            )
        known = self.ids.setdefault(name, (image_id, where))
        owner = self.owners.setdefault(image_id, name)
        if known[0] != image_id or owner != name:
            was = f"{name!r} has {known[0]} in {known[1]}" if known[0] != image_id else f"{owner!r} has it"
            self.faults.fatal("duplicate image id", f"{where}: image_id of {name!r} is {text}, but {was}")
        return None

    def _numbers(self, table: Table, texts: dict[str, str], where: str) -> list[float] | None:
        values: list[float] = []
        for meaning, text in texts.items():
            value = read_number(text)
            if value is None or not math.isfinite(value):
                got = shorten(text) if text else "nothing, but other columns of the box are filled"
                self.faults.box(
                    "not a number", f"{where}: column {table.column(meaning)!r} must be a finite number, got {got}"
                )
                return None
            values.append(value)
        return values

    def _label(self, table: Table, text: str, where: str) -> int | None:
        if text in self.label_of:
            return self.label_of[text]
        known = shorten(", ".join(self.names), 300).strip("'")
        self.faults.box(
            "unknown class name",
            f"{where}: column {table.column('label')!r} is {text!r}, which is not among the classes ({known})"
            f"{did_you_mean(text, self.names)}",
            alike=f"class {text}",
        )
        return None

    def _flag(self, table: Table, row: Row, meaning: str, where: str) -> bool | None:
        text = row.values.get(meaning, "")
        if text.lower() not in _FLAGS:
            self.faults.box(
                f"bad {meaning}", f"{where}: column {table.column(meaning)!r} must be 0 or 1, got {shorten(text)}"
            )
            return None
        return _FLAGS[text.lower()]

    def _area(self, table: Table, row: Row, where: str) -> float | None:
        """The area; NaN for that of the box; None for a fault."""
        text = row.values.get("area", "")
        value = read_number(text) if text else math.nan
        if value is None or (text and not 0 <= value < math.inf):
            column = table.column("area")
            self.faults.box(
                "bad area", f"{where}: column {column!r} must be a number of at least 0, got {shorten(text)}"
            )
            return None
        return value

    def records(self, category_ids: tuple[int, ...]) -> Records:
        """Read the sizes of the images, and turn what was read into arrays."""
        boxed = {name for name, *_ in self.box_of}
        for name in sorted(self.empty.keys() & boxed):
            self.faults.fatal(
                "box beside none", f"{self.empty[name]}: {name!r} has no objects here, but boxes in other rows"
            )
        built = RecordBuilder(self.names, category_ids)
        taken, rows = set(self.owners), {}  # file name -> row
        number = 0
        for name in tqdm(self.images, desc="reading image sizes", unit="image", disable=None, leave=False):
            number += 1
            while name not in self.ids and number in taken:
                number += 1
            size = self._size(name)
            if size:
                rows[name] = len(built.images)
                built.add_image(name, self.ids[name][0] if name in self.ids else number, size)
        for box, (name, label, difficult, crowd, area), where in zip(self.boxes, self.box_of, self.where, strict=True):
            if name in rows:
                built.add_box(rows[name], box, label, where, difficult, crowd, area)
            else:
                self.faults.skipped["boxes skipped: image skipped"] += 1
        return built.records(self.folder, [self.folder], len(self.images), self.boxes_read)

    def _size(self, name: str) -> tuple[int, int] | None:
        """Height and width; None, and a fault, where there is no such image."""
        if name.startswith(("../", "/")) or "\0" in name or name[1:2] == ":":
            self.faults.fatal("leads out of the folder", f"{self.images[name]}: {name!r} leads out of {self.folder}")
            return None
        path = self.folder / name
        try:
            return image_size(path)
        except DataError as error:
            reason = "unreadable" if path.exists() else "file missing"
            self.faults.image(reason, f"{self.images[name]}: {error}")
            return None


def _normal(name: str) -> str:
    """A file name without detours: ``./a//b.jpg`` and ``a/b.jpg`` are the same image."""
    return os.path.normpath(name.replace("\\", "/")).replace(os.sep, "/") if name else ""
