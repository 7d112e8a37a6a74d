"""Data in a table: a CSV file with a row a box, beside the images that it names.

::

    root/
      annotations.csv      split,file_name,x1,y1,x2,y2,label: see csv_table.py for the columns
      images/a.jpg         wherever file_name says, relative to the table

The table may have another name, be one of several, a split each (``train.csv``, ``train/_annotations.csv``), and its images may lie
beside it, in ``images``, or in a folder that is called as the split.

Messages name the line and column of whatever is wrong.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from detpipe.datasets.datamodule import DetectionData, Split
from detpipe.datasets.decode import image_size
from detpipe.datasets.faults import Faults, Policy
from detpipe.datasets.formats.class_list import ids_of, read_class_list
from detpipe.datasets.formats.csv_table import Row, Table, is_table
from detpipe.datasets.formats.folders import ALL, IMAGE_FOLDERS, find_split, split_of
from detpipe.datasets.records import RecordBuilder, Records, build_annotations, read_number, read_whole
from detpipe.datasets.stored_proposals import file_key
from detpipe.support.errors import DataError
from detpipe.support.strict_json import shorten
from detpipe.support.suggest import did_you_mean
from detpipe.types import Annotations

_LOOKED_AT = 20  # rows whose images are looked for to find their folder
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
        name = _normal(row.values["file_name"])
        return f"{self.prefix}{name}" if name and not name.startswith(("/", "../")) else name

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
        outside = name.startswith(("../", "/")) or name[1:2] == ":"
        if "\0" in name or (outside and not self.faults.allow_links):
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


def _normal(name: str) -> str:
    """A file name without detours: ``./a//b.jpg`` and ``a/b.jpg`` are the same image."""
    return os.path.normpath(name.replace("\\", "/")).replace(os.sep, "/") if name else ""


NAME = "annotations.csv"


@dataclass(frozen=True)
class CSVSplit:
    """A split.

    Args:
        table: path of its table.
        value: what the column ``split`` holds in its rows; None: all rows are of it.
    """

    table: Path
    value: str | None


def find_splits(root: Path) -> dict[str, CSVSplit]:
    """Find the splits of a folder with tables of boxes.

    Args:
        root: the folder; or a table, for the values of its column ``split``.

    Returns:
        name -> split: the values of the column ``split`` of ``annotations.csv`` or the only table, ``all`` where it has none;
        or the tables, by their names or those of their folders; nothing if there is no table of boxes.

    Raises:
        DataError: the table cannot be read.
    """
    if root.is_file() or (root / NAME).is_file():
        return _of_column(root if root.is_file() else root / NAME)
    tables = [path for path in _files(root) if is_table(path)]
    tables = tables or [
        path for folder in sorted(root.iterdir()) if folder.is_dir() for path in _files(folder) if is_table(path)
    ]
    if len(tables) == 1 and not split_of(tables[0].relative_to(root).with_suffix("").parts):
        return _of_column(tables[0])
    found: dict[str, CSVSplit] = {}
    for path in tables:
        name = split_of(path.relative_to(root).with_suffix("").parts) or path.stem
        if name in found:
            raise DataError(f"{root}: {found[name].table} and {path} may each be the split {name!r}: name the tables")
        found[name] = CSVSplit(path, None)
    return found


def _of_column(table: Path) -> dict[str, CSVSplit]:
    values = splits_of(Table(table))
    return {value: CSVSplit(table, value) for value in values} or {ALL: CSVSplit(table, None)}


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("*")) if path.suffix.lower() == ".csv" and path.is_file()]


def says_layout(root: Path, splits: dict[str, CSVSplit]) -> str:
    """Say in which layout a folder is, in half a line: "annotations.csv"."""
    base = root.parent if root.is_file() else root
    return ", ".join(dict.fromkeys(split.table.relative_to(base).as_posix() for split in splits.values()))


@dataclass(frozen=True)
class CSVFormat:
    """How tables are to be understood.

    Args:
        class_names: the classes, in the order of their labels; ``auto`` for those of ``detpipe.json`` beside the table, or
            else those that occur, sorted: in the whole table of the training split, whatever its column ``split`` says.
        file: the table that splits are looked for in, relative to the root.
        images: the folder that file names are relative to, relative to the root.
    """

    class_names: list[str] | Literal["auto"] = "auto"
    file: str = NAME
    images: str = "."


_USUAL = CSVFormat()


class CSVBoxes(DetectionData):
    """Detection data in a table with a row a box.

    Args:
        root: the folder of tables and images.
        train: the training split: what the column ``split`` of ``annotations.csv`` holds, or a table of its own, a path that
            ends in ``.csv``, relative to the root; or several.
        val: the validation split, in the same way.
        test: the split for the final test, in the same way; none by default.
        format: how tables are to be understood: class names, the name of the table, where images are.
        common: what all data sets have: ``loader``, ``augment``, ``seed``, ``on_bad``, ``proposals`` and ``resize`` of
            :class:`~detpipe.datasets.datamodule.DetectionData`.
            In a proposal store an image is called by its file, relative to the images.
    """

    image_key = staticmethod(file_key)

    def __init__(
        self,
        root: str,
        train: str | list[str] = "train",
        val: str | list[str] = "val",
        test: str | list[str] | None = None,
        format: CSVFormat = _USUAL,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.root = str(root)
        self.splits = {"train": train, "val": val, "test": test}
        self.format = format
        self._class_names: tuple[str, ...] | None = None

    def load(self, split: Split) -> Annotations:
        """Read the rows of a split."""
        names = self.source_of(split, "a value of the column split, or a .csv file")
        tables = _tables(self.root, names, self.format.file)
        return _load(tables, Path(self.root) / self.format.images, self._names(), self.on_bad, self.allow_links)

    def split_names(self) -> tuple[str, ...]:
        """The splits that the root holds."""
        table = Path(self.root) / self.format.file
        return tuple(find_splits(table if table.is_file() else Path(self.root)))

    def _names(self) -> tuple[str, ...]:
        """The class names of all splits, those of the training split's tables for ``auto``."""
        if self._class_names is None:
            names = self.format.class_names
            source = (
                self.source_of("train", "a value of the column split, or a .csv file") if self.splits["train"] else []
            )
            tables = _tables(self.root, source, self.format.file)
            self._class_names = find_classes([path for path, _ in tables]) if names == "auto" else tuple(names)
        return self._class_names


def load_csv(
    tables: str | Path | Sequence[tuple[str | Path, str | None]],
    images: str | Path | None = None,
    class_names: Sequence[str] | Literal["auto"] = "auto",
    on_bad: Policy = "error",
) -> Annotations:
    """Read a table of boxes, or some of its rows, and check it against its images.

    Images are numbered 1, 2, ... in the order in which they are named, unless a column ``image_id`` numbers them. Their sizes
    are read from their headers. Boxes are pixel edges ``x1, y1, x2, y2`` counted from 0.

    Args:
        tables: a file; or files with what their column ``split`` must hold, None for all rows.
        images: the folder that file names are relative to; that of the first table by default.
        class_names: the classes of labels 1..K in order; ``"auto"`` for those of ``detpipe.json`` beside the first table, or
            else those that occur, sorted.
        on_bad: ``"error"`` refuses a table with any faulty row; ``"skip"`` leaves these rows out and counts them.

    Returns:
        The annotations, images in the order in which they are named.

    Raises:
        DataError: for anything wrong, naming the file, the line, the column and its value.
    """
    return _load(tables, images, class_names, on_bad)


def _load(
    tables: str | Path | Sequence[tuple[str | Path, str | None]],
    images: str | Path | None,
    class_names: Sequence[str] | Literal["auto"],
    on_bad: Policy,
    allow_links: bool = False,
) -> Annotations:
    wanted = [(tables, None)] if isinstance(tables, str | Path) else list(tables)
    paths = [Path(path) for path, _ in wanted]
    folder = paths[0].parent if images is None else Path(images)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such image folder; it should hold the images of {paths[0]}")
    splits = [split for _, split in wanted if split is not None]
    faults = Faults(f"{paths[0]} ({', '.join(splits)})" if splits else paths[0], on_bad, allow_links)
    names = find_classes(paths) if class_names == "auto" else tuple(class_names)
    if not names or len(set(names)) != len(names):
        raise DataError(f"class_names must be distinct and at least one, got {list(names)}")
    reader = RowReader(names, folder, faults)
    read: dict[Path, Table] = {}
    for path, (_, split) in zip(paths, wanted, strict=True):
        table = read[path] if path in read else read.setdefault(path, Table(path))
        if split is not None and "split" not in table.columns:
            raise DataError(f"{path}: has no column 'split', but the split {split!r} is wanted")
        known = splits_of(table)
        value = split if split is None else find_split(split, known) or split
        if not reader.read(table, value, _prefix(table, folder)) and split is not None:
            raise DataError(
                f"{path}: no row of the split {split!r}; there are {', '.join(known)}{did_you_mean(split, known)}"
            )
    ids = ids_of(names, read_class_list(paths[0].parent))
    return build_annotations(reader.records(ids), faults)


def find_classes(paths: Sequence[Path]) -> tuple[str, ...]:
    """The classes of tables.

    Args:
        paths: of the tables.

    Returns:
        Those of ``detpipe.json`` beside the first of them, or else those that occur, sorted.

    Raises:
        DataError: a table cannot be read, or none names a class.
    """
    known = read_class_list(paths[0].parent) if paths else None
    if known:
        return known.class_names
    names = {row.values.get("label", "") for path in paths for row in Table(path).rows} - {""}
    if not names:
        raise DataError(f"{', '.join(map(str, paths))}: no row names a class; class_names 'auto' has nothing to read")
    return tuple(sorted(names))


def splits_of(table: Table) -> tuple[str, ...]:
    """What the column ``split`` holds, in the order of the rows; nothing if there is no such column."""
    return tuple(dict.fromkeys(row.values["split"] for row in table.rows if row.values.get("split")))


def _prefix(table: Table, folder: Path) -> str:
    """The folder below that of the images which the first names of a table are relative to; empty where they are relative to it."""
    names = [_normal(row.values.get("file_name", "")) for row in table.rows[:_LOOKED_AT]]
    names = [name for name in dict.fromkeys(names) if name and not name.startswith(("../", "/"))]
    beside = table.path.parent
    near = [
        path for path in sorted(beside.iterdir()) if path.is_dir() and path.name.lower() in (*IMAGE_FOLDERS, "data")
    ]
    own = split_of((table.path.stem,))
    near += [base / own for base in (beside, *near) if own]
    for place in (folder, beside, *near):
        if place.is_relative_to(folder) and any((place / name).is_file() for name in names):
            return "" if place == folder else f"{place.relative_to(folder).as_posix()}/"
    return ""


def _tables(root: str, names: str | list[str], file: str) -> list[tuple[Path, str | None]]:
    """The files of a split, each with what its column ``split`` must hold."""
    folder = Path(root)
    if not folder.is_dir():
        raise DataError(f"{root}: no such folder; the argument root must name the folder of the tables")
    listed = [names] if isinstance(names, str) else names
    return [(folder / name, None) if name.lower().endswith(".csv") else _find(folder, name, file) for name in listed]


def _find(folder: Path, name: str, file: str) -> tuple[Path, str | None]:
    """The table of a split, and what its column ``split`` must hold."""
    if (folder / file).is_file() or file != NAME:
        only = name == ALL and (folder / file).is_file() and "split" not in Table(folder / file).columns
        return folder / file, None if only else name
    splits = find_splits(folder)
    found = find_split(name, splits)
    if found is None and splits:
        raise DataError(
            f"{folder}: no table of the split {name!r}; there are {', '.join(splits)}{did_you_mean(name, splits)}"
        )
    return (folder / file, name) if found is None else (splits[found].table, splits[found].value)
