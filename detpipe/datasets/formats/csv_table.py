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
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from detpipe.support.errors import DataError
from detpipe.support.files import refuse_special
from detpipe.support.strict_json import shorten

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
