"""Reads a table of boxes: a row a box, columns found by their names in the first line.

=============  =================================================================================================
column         names that are understood; capitals, spaces and hyphens do not matter
=============  =================================================================================================
image          ``file_name``, ``filename``, ``file``, ``image``, ``image_path``, ``path``
box            ``x1 y1 x2 y2`` or ``xmin ymin xmax ymax``; or ``x1``/``xmin``/``x`` and ``y1``/``ymin``/``y`` with
               ``w h`` or ``width height``: pixel edges counted from 0
class          ``label``, ``class``, ``class_name``, ``category``, ``name``
may be there   ``split``, ``difficult``, ``iscrowd``, ``area``, ``image_id``; others are not looked at
=============  =================================================================================================

A quote before a name that begins as a formula does, as spreadsheets want it, is not part of the name: ``'=a`` is ``=a``.

A row with an image and nothing in the columns of the box is an image without objects. The values are separated by commas,
semicolons or tabs.
"""

from __future__ import annotations

import csv
import io
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

from tqdm import tqdm

from detpipe.datasets.decode import image_size
from detpipe.datasets.faults import Faults
from detpipe.datasets.formats.folders import Entries
from detpipe.datasets.records import RecordBuilder, Records, read_number, read_whole
from detpipe.support.errors import DataError
from detpipe.support.files import refuse_special
from detpipe.support.strict_json import shorten
from detpipe.support.suggest import did_you_mean

ALIASES = {
    "file_name": ("file_name", "filename", "file", "image", "image_path", "path"),
    "x1": ("x1", "xmin", "x"),
    "y1": ("y1", "ymin", "y"),
    "x2": ("x2", "xmax"),
    "y2": ("y2", "ymax"),
    "w": ("w", "width", "box_width"),
    "h": ("h", "height", "box_height"),
    "label": ("label", "class", "class_name", "category", "name"),
    "split": ("split", "set", "subset"),
    "difficult": ("difficult",),
    "iscrowd": ("iscrowd",),
    "area": ("area",),
    "image_id": ("image_id",),
}
_FORMULA, _QUOTED = re.compile(r"'*[=+\-@\t\r]"), re.compile(r"'+[=+\-@\t\r]")  # what a spreadsheet would compute
_LONGEST_HEADER = 2**14  # bytes
_NEEDED = ("file_name", "x1", "y1", "label")


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Args:
        line: its number in the file, from 1.
        values: what its columns hold, by the first of their names above; spaces around are gone.
        broken: what is wrong with the line as a whole; its values cannot be trusted.
    """

    line: int
    values: dict[str, str]
    broken: str = ""


class Table:
    """The rows of a file.

    Args:
        path: of the file.

    Attributes:
        columns: meaning -> what the file calls it.
        header: all columns of the file.
        rows: those that are not empty.

    Raises:
        DataError: the file cannot be read, or lacks columns.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        text = _read(path)
        first = text.partition("\n")[0]
        delimiter = max(",;\t", key=first.count)
        records = _records(path, text, delimiter)
        self.header = [name.strip() for _, names in [next(records, (1, []))] for name in names]
        self.columns = _find_columns(path, self.header)
        places = {meaning: self.header.index(name) for meaning, name in self.columns.items()}
        self.rows = [self._row(line, values, places) for line, values in records if any(map(str.strip, values))]

    @property
    def sized(self) -> bool:
        """Whether boxes are given by width and height instead of the right and lower edge."""
        return "w" in self.columns

    def column(self, meaning: str) -> str:
        """How a message calls a column."""
        return self.columns[meaning]

    def _row(self, line: int, values: list[str], places: dict[str, int]) -> Row:
        if len(values) != len(self.header):
            broken = f"has {len(values)} values, but the header {len(self.header)} columns"
            return Row(line, {}, broken)
        cells = {meaning: values[place].strip() for meaning, place in places.items()}
        return Row(line, {meaning: cell[bool(_QUOTED.match(cell)) :] for meaning, cell in cells.items()})


def _find_columns(path: Path, header: list[str]) -> dict[str, str]:
    """Meaning -> column; see `Table`."""
    names = [name.lower().replace(" ", "_").replace("-", "_") for name in header]
    found: dict[str, str] = {}
    for meaning, aliases in ALIASES.items():
        places = [i for alias in aliases for i, name in enumerate(names) if name == alias]
        if meaning in ("file_name", "label", "split") and places:
            places = (
                places[:1] if names.count(names[places[0]]) == 1 else places
            )  # "class" and "name": the first counts
        if len(places) > 1:
            both = " and ".join(repr(header[i]) for i in places)
            raise DataError(f"{path}: the columns {both} mean the same; keep one of them")
        if places:
            found[meaning] = header[places[0]]
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


def is_table(path: Path) -> bool:
    """Whether the first line of a file names the columns of a table of boxes."""
    with path.open("rb") as stream:
        first = stream.readline(_LONGEST_HEADER).decode("utf-8-sig", errors="replace").strip()
    try:
        return bool(_find_columns(path, [name.strip(' "') for name in first.split(max(",;\t", key=first.count))]))
    except DataError:
        return False  # some other table


def quoted(text: str) -> str:
    """Put a quote before what a spreadsheet would take for a formula; reading takes it away again."""
    return f"'{text}" if _FORMULA.match(text) else text


def _read(path: Path) -> str:
    refuse_special(path)
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            return stream.read()
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; expected a table of boxes") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8 text; save the table as UTF-8") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def _records(path: Path, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The number of the first line and the values of each record; a value in quotes may hold line breaks."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    line = 1
    while True:
        try:
            values = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{path}: line {line}: not a valid table ({error}); check its quotes") from error
        if values is None:
            return
        yield line, values
        line = reader.line_num + 1


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
        self.prefix = ""
        self._entries = Entries()
        self._moved: dict[str, str] = {}  # names that lead out -> what they mean here
        self.images: dict[str, str] = {}  # file name -> where it is first named, in the order of the tables
        self.ids: dict[str, tuple[int, str]] = {}  # file name -> image id and where it is given
        self.owners: dict[int, str] = {}  # image id -> file name
        self.empty: dict[str, str] = {}  # file name -> the line that says that it has no objects
        self.boxes: list[tuple[float, ...]] = []  # x1, y1, x2, y2
        self.box_of: list[tuple[str, int, bool, bool, float]] = []  # file name, label, difficult, crowd, area
        self.where: list[str] = []
        self.boxes_read = 0

    def read(self, table: Table, split: str | None, prefix: str = "") -> int:
        """Read the rows of a split.

        Args:
            table: the rows.
            split: what their column ``split`` holds; None reads all rows.
            prefix: the folder that file names are relative to, below that of the images.

        Returns:
            How many rows there were.
        """
        other: dict[str, str] = {}  # file name -> another split that it is in
        rows = 0
        self.prefix = prefix
        for row in table.rows:
            if row.broken:
                self.boxes_read += 1
                self.faults.box("wrong number of values", f"{table.path}: line {row.line}: {row.broken}")
            elif split is None or row.values["split"] == split:
                rows += 1
                self._row(table, row)
            else:
                other.setdefault(self._name(row), row.values["split"])
        for name in self.images:
            if name in other and split is not None:
                self.faults.fatal(
                    "image in two splits",
                    f"{self.images[name]}: {name!r} is in the split {split!r}, but other rows put it into {other[name]!r}",
                )
        return rows

    def _name(self, row: Row) -> str:
        """The image of a row; a path of another machine means the longest end of it that is there."""
        name = normal_name(row.values["file_name"])
        if not _leads_out(name):
            return f"{self.prefix}{name}" if name else ""
        if name not in self._moved:
            here = self.folder / self.prefix
            inside = name.startswith("..") or (self.faults.allow_links and Path(name).is_file())
            found = (
                None if inside else self._entries.find(here, name.removeprefix(PureWindowsPath(name).drive).lstrip("/"))
            )
            self._moved[name] = name if found is None else found.relative_to(self.folder).as_posix()
        return self._moved[name]

    def _row(self, table: Table, row: Row) -> None:
        where = f"{table.path}: line {row.line}"
        name = self._name(row)
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
        if "\0" in name or (_leads_out(name) and not self.faults.allow_links):
            self.faults.fatal(
                "leads out of the folder",
                f"{self.images[name]}: {name!r} leads out of {self.folder}; allow_links: true permits it",
            )
            return None
        path = self.folder / name
        try:
            return image_size(path)
        except DataError as error:
            reason = "unreadable" if path.exists() else "file missing"
            self.faults.image(reason, f"{self.images[name]}: {error}")
            return None


def _leads_out(name: str) -> bool:
    return name.startswith(("../", "/")) or name[1:2] == ":"


def normal_name(name: str) -> str:
    """A file name without detours: ``./a//b.jpg`` and ``a/b.jpg`` are the same image."""
    return os.path.normpath(name.replace("\\", "/")).replace(os.sep, "/") if name else ""
