"""Reads a table of boxes: a row a box, columns found by their names in the first line.

=============  ======================================================================================================
column         names that are understood; capitals, spaces, hyphens and underscores do not matter
=============  ======================================================================================================
image          ``file_name``, ``file``, ``image``, ``image_path``, ``image_name``, ``path``; or else ``image_id``
box            ``x1 y1 x2 y2``, ``xmin ymin xmax ymax`` or ``left top right bottom``; or the first two of them, or ``x y``,
               with ``w h`` or ``width height``: pixel edges counted from 0
class          ``label``, ``class``, ``class_name``, ``category``, ``name``, ``label_name``, ``class_id``
may be there   ``split``, ``difficult``, ``iscrowd``, ``area``, ``image_id``; others are not looked at
=============  ======================================================================================================

Of Open Images, ``IsGroupOf`` is ``iscrowd`` (-1, not known, is 0), and ``LabelName`` is given its name by the file
``*class-descriptions*.csv`` beside the table, or ``metadata/classes.csv``.

Where no number of the boxes of a table is above 1, they are parts of the width and height of the image, and a line of the log says
so. An image may be named without its suffix.

A quote before a name that begins as a formula does, as spreadsheets want it, is not part of the name: ``'=a`` is ``=a``.

A table without names of columns is understood in three orders: ``file_name,x1,y1,x2,y2,label``; with eight columns that of
makesense.ai, ``label,x,y,w,h,file_name`` and the size of the image; with eleven that of AutoML, ``split,file_name,label`` and
corners.

A row with an image and nothing in the columns of the box is an image without objects. The values are separated by commas,
semicolons or tabs.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path

from tqdm import tqdm

from detpipe.datasets import annotations as fields
from detpipe.datasets.formats.folders import Entries, is_image
from detpipe.support.errors import DataError
from detpipe.support.strict_json import shorten
from detpipe.support.tables import read_table

_ALIASES = {
    "file_name": ("filename", "file", "image", "imagepath", "imagename", "path"),
    "x1": ("x1", "xmin", "left", "x"),
    "y1": ("y1", "ymin", "top", "y"),
    "x2": ("x2", "xmax", "right"),
    "y2": ("y2", "ymax", "bottom"),
    "w": ("w", "width", "boxwidth"),
    "h": ("h", "height", "boxheight"),
    "label": ("label", "class", "classname", "category", "name", "labelname", "classid"),
    "split": ("split", "set", "subset"),
    "difficult": ("difficult",),
    "iscrowd": ("iscrowd", "isgroupof"),
    "area": ("area",),
    "image_id": ("imageid",),
}
# of columns of these meanings the first counts: "class" before "name", "w" of the box before "width" of the image
_FIRST_COUNTS = ("file_name", "label", "split", "w", "h")
_FORMULA, _QUOTED = re.compile(r"'*[=+\-@\t\r]"), re.compile(r"'+[=+\-@\t\r]")  # what a spreadsheet would compute
_LONGEST_HEADER = 2**14  # bytes
_log = logging.getLogger(__name__)
_NEEDED = ("file_name", "x1", "y1", "label")
_UNNAMED = {
    6: ("file_name", "x1", "y1", "x2", "y2", "label"),
    8: ("label", "x", "y", "w", "h", "file_name", "image_width", "image_height"),
    11: ("split", "file_name", "label", "x1", "y1", "", "", "x2", "y2", "", ""),
}


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    line: int  # its number in the file, from 1
    values: dict[str, str]  # what its columns hold, by the first of their names above; spaces around are gone
    broken: str = ""  # what is wrong with the line as a whole; its values cannot be trusted


class Table:
    """The rows of a file that are not empty, and what the file calls each of its columns.

    ``columns`` maps a meaning to what the file calls it, ``header`` is all columns. A DataError if the file cannot be read, or
    lacks columns.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        records = read_table(path, ",;\t")
        first = next(records, (1, []))
        self.header = [name.strip() for name in first[1]]
        unnamed = _unnamed(self.header)
        if unnamed:
            self.header, records = list(unnamed), chain([first], records)
        self.columns = _find_columns(path, self.header)
        places = {meaning: self.header.index(name) for meaning, name in self.columns.items()}
        self._display = _display_names(path) if _plain(self.columns["label"]) == "labelname" else {}
        self.rows = [self._row(line, values, places) for line, values in records if any(map(str.strip, values))]

    @property
    def ends(self) -> tuple[str, ...]:
        """What the four numbers of a box mean: it is given by its width and height, or its right and lower edge."""
        return ("x1", "y1", "w", "h") if "w" in self.columns else ("x1", "y1", "x2", "y2")

    @cached_property
    def is_relative(self) -> bool:
        """Whether boxes are parts of the width and height of their image."""
        fractions = False
        for text in (row.values[meaning] for row in self.rows if not row.broken for meaning in self.ends):
            value = fields.read_number(text) or 0.0
            if value > 1:
                return False
            fractions |= not value.is_integer()
        return fractions

    def column(self, meaning: str) -> str:
        """How a message calls a column."""
        return f"column {self.columns.get(meaning)!r}"

    def _row(self, line: int, values: list[str], places: dict[str, int]) -> Row:
        if len(values) != len(self.header):
            broken = f"has {len(values)} values, but the header {len(self.header)} columns"
            return Row(line, {}, broken)
        cells = {meaning: values[place].strip() for meaning, place in places.items()}
        cells = {meaning: cell[bool(_QUOTED.match(cell)) :] for meaning, cell in cells.items()}
        cells["label"] = self._display.get(cells["label"], cells["label"])
        if cells.get("iscrowd") == "-1" and _plain(self.columns["iscrowd"]) == "isgroupof":
            cells["iscrowd"] = ""
        return Row(line, cells)


def _display_names(table: Path) -> dict[str, str]:
    """What Open Images calls its classes: ``{"/m/01g317": "Person"}``; nothing where no file beside the table says it."""
    metadata = (folder.glob("metadata/*class*.csv") for folder in (table.parent, table.parent.parent))
    files = chain(table.parent.glob("*class-descriptions*.csv"), *metadata)
    rows = (values for path in sorted(set(files)) for _, values in read_table(path))
    return {values[0].strip(): values[1].strip() for values in rows if len(values) == 2}


def _find_columns(path: Path, header: list[str]) -> dict[str, str]:
    names = [_plain(name) for name in header]
    found: dict[str, str] = {}
    for meaning, aliases in _ALIASES.items():
        places = [i for alias in aliases for i, name in enumerate(names) if name == alias]
        if meaning in _FIRST_COUNTS and places and names.count(names[places[0]]) == 1:
            places = places[:1]
        if len(places) > 1:
            both = " and ".join(repr(header[i]) for i in places)
            raise DataError(f"{path}: the columns {both} mean the same; keep one of them")
        if places:
            found[meaning] = header[places[0]]
    if "file_name" not in found and "image_id" in found:
        found["file_name"] = found.pop("image_id")
    if "x2" in found or "y2" in found:  # then width and height are those of the image
        found.pop("w", None)
        found.pop("h", None)
    ends = ("x2", "y2") if "x2" in found or "y2" in found else ("w", "h")
    missing = [meaning for meaning in (*_NEEDED, *ends) if meaning not in found]
    if missing:
        wanted = ", ".join("x2 (or w)" if m == "w" else "y2 (or h)" if m == "h" else m for m in missing)
        raise DataError(
            f"{path}: line 1: the header lacks a column {wanted}; it has {shorten(header, 200)}; the first line "
            "must name the columns, such as file_name,x1,y1,x2,y2,label"
        )
    return found


def _unnamed(first: Sequence[str]) -> tuple[str, ...] | None:
    """The columns of a table whose first line is a box already, as its values say; None if it names the columns."""
    names = _UNNAMED.get(len(first))
    if names is None:
        return None
    found = [(name, text) for name, text in zip(names, first, strict=True) if name not in ("", "label", "split")]
    fits = (is_image(text) if name == "file_name" else fields.read_number(text) is not None for name, text in found)
    return names if all(fits) else None


def is_table(path: Path) -> bool:
    """Whether the first line of a file names the columns of a table of boxes, or is a box."""
    first = _first_line(path)
    try:
        return bool(_unnamed(first) or _find_columns(path, first))
    except DataError:
        return False  # some other table


def is_nearly_table(path: Path) -> bool:
    """Whether a file seems to be a table of boxes, by the first line, though it may lack columns or their names."""
    header = _first_line(path)
    return any(map(is_image, header)) or not {"x1", "xmin", "bbox"}.isdisjoint(map(_plain, header))


def _first_line(path: Path) -> list[str]:
    with path.open("rb") as stream:
        first = stream.readline(_LONGEST_HEADER).decode("utf-8-sig", errors="replace").strip()
    return [name.strip(' "') for name in first.split(max(",;\t", key=first.count))]


def _plain(name: str) -> str:
    """The name of a column by which it is told."""
    return re.sub("[ _-]", "", name.lower())


def quoted(text: str) -> str:
    """Put a quote before what a spreadsheet would take for a formula; reading takes it away again."""
    return f"'{text}" if _FORMULA.match(text) else text


class RowReader:
    """Adds the images and boxes of one table after the other; file names are relative to a folder."""

    def __init__(self, built: fields.AnnotationBuilder, folder: Path) -> None:
        self.built, self.folder, self.faults = built, folder, built.faults
        self.prefix = ""
        self._entries = Entries()
        self._names: dict[tuple[str, str], str] = {}  # prefix and name in the table -> file name
        self._taken: set[str] = set()
        # file name -> where it is first named; its row, if it can be used
        self.images: dict[str, tuple[str, int | None]] = {}
        self.ids: dict[str, tuple[int, str]] = {}  # file name -> image id and where it is given
        self.owners: dict[int, str] = {}  # image id -> file name
        self.empty: dict[str, str] = {}  # file name -> the line that says that it has no objects
        self.boxed: set[str] = set()  # file names with boxes

    def read(self, table: Table, split: str | None, prefix: str = "") -> int:
        """Read the rows whose column ``split`` holds a value, or all rows; how many there were.

        ``prefix`` is the folder that file names are relative to, below that of the images.
        """
        other: dict[str, str] = {}  # file name -> another split that it is in
        rows = 0
        self.prefix = prefix
        if table.is_relative:
            _log.warning("%s: no number of a box is above 1: they are read as parts of width and height", table.path)
        for row in tqdm(table.rows, desc="reading rows", unit="row", disable=None, leave=False):
            if row.broken:
                self.built.boxes_read += 1
                self.faults.box("wrong number of values", f"{table.path}: line {row.line}: {row.broken}")
            elif split is None or row.values["split"] == split:
                rows += 1
                self._row(table, row)
            else:
                other.setdefault(self._name(row), row.values["split"])
                if not row.values["split"]:
                    where = f"{table.path}: line {row.line}"
                    self.faults.remark("rows: of no split", f"{where}: {table.column('split')} is empty")
        for name in [name for name in self.images if name in other and split is not None]:
            self.faults.fatal(
                "image in two splits",
                f"{self.images[name][0]}: {name!r} is in the split {split!r}, but other rows put it into {other[name]!r}",
            )
        return rows

    def _name(self, row: Row) -> str:
        """The image of a row, as its file is called; a path of another machine means the longest end of it that is there."""
        key = (self.prefix, normal_name(row.values["file_name"]))
        if key not in self._names:
            name = self._look_for(key[1]) if key[1] else ""
            self._names[key] = f"{self.prefix}{key[1]}" if name in self._taken else name  # two names are never one file
            self._taken.add(name)
        return self._names[key]

    def _look_for(self, name: str) -> str:
        if not fields.leaves_folder(name):
            return self._entries.find_image(self.folder, f"{self.prefix}{name}")
        found = self._entries.find_image(self.folder / self.prefix, name, self.faults.allow_links)
        return found if fields.leaves_folder(found) else f"{self.prefix}{found}"

    def _row(self, table: Table, row: Row) -> None:
        where, name = f"{table.path}: line {row.line}", self._name(row)
        texts = [row.values[meaning] for meaning in table.ends]
        self.built.boxes_read += any(texts) or not name
        if not name:
            text = f"{where}: {table.column('file_name')} is empty: expected the name of an image file"
            return self.faults.box("no image", text)
        if name not in self.images:
            size = self.built.size_in_file(self.folder, name, where)
            self.images[name] = where, None if size is None else self.built.add_image(name, 0, size)
        self._image_id(table, row, name, where)
        if not any(texts):
            self.empty.setdefault(name, where)
            return None
        values, image = row.values, self.images[name][1]
        try:
            pairs = zip(table.ends, texts, strict=True)
            x1, y1, a, b = (fields.read_finite(text, where, table.column(meaning)) for meaning, text in pairs)
            label = self.built.label(values["label"], where, table.column("label"))
            difficult, crowd = (
                fields.read_flag(values.get(flag, ""), where, flag, table.column(flag))
                for flag in ("difficult", "iscrowd")
            )
            area = fields.read_area(values.get("area", ""), where, table.column("area"))
        except fields.BadBoxError as bad:
            return self.faults.box(*bad.args)
        self.boxed.add(name)
        if image is None:
            return self.faults.boxes_of_skipped_image(1)
        if table.is_relative:
            height, width = self.built.sizes[image]
            x1, y1, a, b = x1 * width, y1 * height, a * width, b * height
        box = (x1, y1, x1 + a, y1 + b) if "w" in table.ends else (x1, y1, a, b)
        return self.built.add_box(
            image, box, label, f"{where} ({name}): box {', '.join(texts)}", difficult, crowd, area
        )

    def _image_id(self, table: Table, row: Row, name: str, where: str) -> None:
        text = row.values.get("image_id", "")
        if not text:
            return None
        image_id = fields.read_whole(text)
        if image_id is None:
            wrong = f"{where}: {table.column('image_id')} must be a whole number, got {shorten(text)}"
            return self.faults.fatal("bad image_id", wrong)
        known = self.ids.setdefault(name, (image_id, where))
        owner = self.owners.setdefault(image_id, name)
        if known[0] != image_id or owner != name:
            was = f"{name!r} has {known[0]} in {known[1]}" if known[0] != image_id else f"{owner!r} has it"
            self.faults.fatal("duplicate image id", f"{where}: image_id of {name!r} is {text}, but {was}")
        return None

    def finish(self) -> None:
        """Number the images that no row numbers, and note what rows contradict others."""
        for name in sorted(self.empty.keys() & self.boxed):
            text = f"{self.empty[name]}: {name!r} has no objects here, but boxes in other rows"
            self.faults.fatal("box beside none", text)
        self.built.images_read = len(self.images)
        number = 0
        for name, (_, row) in self.images.items():
            number += 1
            while name not in self.ids and number in self.owners:
                number += 1
            if row is not None:
                self.built.image_ids[row] = self.ids[name][0] if name in self.ids else number


def normal_name(name: str) -> str:
    """A file name without detours: ``./a//b.jpg`` and ``a/b.jpg`` are the same image."""
    return os.path.normpath(name.replace("\\", "/")).replace(os.sep, "/") if name else ""
