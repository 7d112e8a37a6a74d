"""Data in a table: a CSV file with a row a box, beside the images that it names.

::

    root/
      annotations.csv      split,file_name,x1,y1,x2,y2,label: see csv_table.py for the columns
      images/a.jpg         wherever file_name says, relative to the table

The table may have another name, be one of several, a split each (``train.csv``, ``train/_annotations.csv``), and its images may lie
beside it, in ``images``, or in a folder that is called as the split.

Messages name the line and column of whatever is wrong.

Written are ``annotations.csv``, ``images/SPLIT`` and ``detpipe.json``, the list of classes.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from detpipe.datasets.annotations import AnnotationBuilder
from detpipe.datasets.datamodule import FolderData, Split
from detpipe.datasets.faults import Faults, OnBad
from detpipe.datasets.formats import export
from detpipe.datasets.formats.class_list import ClassList, ids_of, read_class_list, write_class_list
from detpipe.datasets.formats.csv_table import RowReader, Table, is_nearly_table, is_table, normal_name, quoted
from detpipe.datasets.formats.export import Images, Splits, Written
from detpipe.datasets.formats.folders import (
    ALL,
    IMAGE_FOLDERS,
    SPLIT_WORDS,
    find_image_folder,
    split_of,
    take_split,
    visible,
)
from detpipe.datasets.formats.outline_files import write_outlines
from detpipe.datasets.image_files import PLAIN_FILES, ImageFiles
from detpipe.datasets.stored_proposals import file_key
from detpipe.support.errors import DataError
from detpipe.support.suggest import did_you_mean
from detpipe.types import Annotations

_LOOKED_AT = 20  # rows whose images are looked for to find their folder
NAME = "annotations.csv"


# a table, and what its column ``split`` holds in the rows of the split; None: all are of it
CSVSplit = tuple[Path, str | None]


def find_splits(root: Path) -> dict[str, CSVSplit]:
    """Find the splits of a folder with tables of boxes, or of a table; nothing if there is no table of boxes.

    They are the values of the column ``split`` of ``annotations.csv`` or the only table, ``all`` where it has none; or the
    tables, by their names or those of their folders. A DataError if the table cannot be read.
    """
    if root.is_file() or (root / NAME).is_file():
        return _of_column(root if root.is_file() else root / NAME)
    folders = [folder for folder in sorted(root.iterdir()) if folder.is_dir()]
    files = [_files(root), [path for folder in folders for path in _files(folder)]]
    tables = next(filter(None, (list(filter(is_table, some)) for some in files)), [])
    for path in filter(is_nearly_table, chain(*files) if not tables else ()):
        Table(path)  # says what it lacks
    named = split_of(tables[0].relative_to(root).with_suffix("").parts) if len(tables) == 1 else ""
    if len(tables) == 1 and (not named or named.lower() in SPLIT_WORDS):
        by_column = _of_column(tables[0])
        if not named or ALL not in by_column:
            return by_column
    found: dict[str, CSVSplit] = {}
    for path in tables:
        name = split_of(path.relative_to(root).with_suffix("").parts) or path.stem
        if name in found:
            raise DataError(f"{root}: {found[name][0]} and {path} may each be the split {name!r}: name the tables")
        found[name] = (path, None)
    return found


def _of_column(table: Path) -> dict[str, CSVSplit]:
    values = splits_of(Table(table))
    return {value: (table, value) for value in values} or {ALL: (table, None)}


def _files(folder: Path) -> list[Path]:
    return [Path(entry.path) for entry in visible(folder) if entry.name.lower().endswith(".csv") and entry.is_file()]


def says_layout(root: Path, splits: dict[str, CSVSplit]) -> str:
    """Say in which layout a folder is, in half a line: "annotations.csv"."""
    base = root.parent if root.is_file() else root
    return ", ".join(dict.fromkeys(table.relative_to(base).as_posix() for table, _ in splits.values()))


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


class CSVBoxes(FolderData):
    """Detection data in a table with a row a box.

    Args:
        root: the folder of tables and images.
        train: the training split: what the column ``split`` of ``annotations.csv`` holds, or a table of its own, a path that
            ends in ``.csv``, relative to the root; or several.
        format: how tables are to be understood: class names, the name of the table, where images are.
        common: in a proposal store an image is called by its file, relative to the images.
    """

    image_key = staticmethod(file_key)

    def __init__(
        self,
        root: str,
        train: str | list[str] = "train",
        val: str | list[str] = "val",
        test: str | list[str] | None = None,
        format: CSVFormat = CSVFormat(),
        **common: Any,
    ) -> None:
        super().__init__(root, train, val, test, **common)
        self.format = format
        self._class_names: tuple[str, ...] | None = None

    def load(self, split: Split, faults: Faults | None = None) -> Annotations:
        """Read the rows of a split."""
        images = Path(self.root) / self.format.images
        return load_csv(self._tables(split), images, self._names(), faults=faults or self.faults())

    def split_names(self) -> tuple[str, ...]:
        """The splits that the root holds."""
        table = Path(self.root) / self.format.file
        return tuple(find_splits(table if table.is_file() else Path(self.root)))

    def _names(self) -> tuple[str, ...]:
        if self._class_names is None:
            names = self.format.class_names
            tables = self._tables("train") if names == "auto" and self.splits["train"] else []
            self._class_names = find_classes([path for path, _ in tables]) if names == "auto" else tuple(names)
        return self._class_names

    def _tables(self, split: Split) -> list[CSVSplit]:
        """The files of a split, each with what its column ``split`` must hold."""
        folder, names = Path(self.root), self.source_of(split, "a value of the column split, or a .csv file")
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder; the argument root must name the folder of the tables")
        listed = [names] if isinstance(names, str) else names
        file = self.format.file
        return [(folder / n, None) if n.lower().endswith(".csv") else _find(folder, n, file) for n in listed]


def load_csv(
    tables: str | Path | Sequence[tuple[str | Path, str | None]],
    images: str | Path | None = None,
    class_names: Sequence[str] | Literal["auto"] = "auto",
    on_bad: OnBad = "error",
    faults: Faults | None = None,
) -> Annotations:
    """Read a table of boxes, or some of its rows, and check it against its images.

    Images are numbered 1, 2, ... in the order in which they are named, unless a column ``image_id`` numbers them. Their sizes
    are read from their headers. Boxes are pixel edges ``x1, y1, x2, y2`` counted from 0.

    Args:
        tables: a file; or files with what their column ``split`` must hold, None for all rows.
        images: the folder that file names are relative to; that of the first table by default.
        class_names: as of `CSVFormat`, of the first table.
        on_bad: ``"error"`` refuses a table with any faulty row; ``"skip"`` leaves these rows out and counts them.
        faults: takes all faults, in place of ``on_bad``.

    Returns:
        Images in the order in which they are named. A DataError for anything wrong names file, line, column and value.
    """
    wanted = [(tables, None)] if isinstance(tables, str | Path) else list(tables)
    paths = [Path(path) for path, _ in wanted]
    folder = paths[0].parent if images is None else Path(images)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such image folder; it should hold the images of {paths[0]}")
    splits = [split for _, split in wanted if split is not None]
    faults = faults or Faults(on_bad)
    faults.source = f"{paths[0]} ({', '.join(splits)})" if splits else paths[0]
    names = find_classes(paths) if class_names == "auto" else tuple(class_names)
    built = AnnotationBuilder(faults, names, ids_of(names, read_class_list(paths[0].parent)))
    reader = RowReader(built, folder)
    read: dict[Path, Table] = {}
    for path, (_, split) in zip(paths, wanted, strict=True):
        table = read[path] if path in read else read.setdefault(path, Table(path))
        if split is not None and "split" not in table.columns:
            raise DataError(f"{path}: has no column 'split', but the split {split!r} is wanted")
        known = splits_of(table)
        value = split if split is None else take_split(path, split, known) or split
        if not reader.read(table, value, _prefix(table, folder)) and split is not None:
            raise DataError(
                f"{path}: no row of the split {split!r}; there are {', '.join(known)}{did_you_mean(split, known)}"
            )
    reader.finish()
    return built.build(folder, [folder])


def find_classes(paths: Sequence[Path]) -> tuple[str, ...]:
    """The classes of tables: those of ``detpipe.json`` beside the first of them, or else those that occur, sorted.

    A DataError if a table cannot be read, or none names a class.
    """
    known = read_class_list(paths[0].parent) if paths else None
    if known:
        return known.class_names
    rows = [(row, table.ends) for table in map(Table, paths) for row in table.rows]
    names = {row.values["label"] for row, ends in rows if any(map(row.values.get, ends))} - {""}
    if not names:
        broken = next((f" (line {row.line} {row.broken})" for row, _ in rows if row.broken), "")
        where = ", ".join(map(str, paths))
        raise DataError(f"{where}: no row names a class; class_names 'auto' has nothing to read{broken}")
    return tuple(sorted(names))


def splits_of(table: Table) -> tuple[str, ...]:
    """What the column ``split`` holds, in the order of the rows; nothing if there is no such column."""
    return tuple(dict.fromkeys(row.values["split"] for row in table.rows if row.values.get("split")))


def _prefix(table: Table, folder: Path) -> str:
    """The folder below that of the images which the first names of a table are relative to; empty where they are relative to it."""
    rows = [row for row in table.rows[:_LOOKED_AT] if not row.broken]
    names = list(dict.fromkeys(normal_name(row.values["file_name"]) for row in rows if row.values["file_name"]))
    beside, own = table.path.parent, split_of((table.path.stem,))
    near = [
        path for path in sorted(beside.iterdir()) if path.is_dir() and path.name.lower() in (*IMAGE_FOLDERS, "data")
    ]
    near = [folder, beside, *near, *(base / own for base in (beside, *near) if own)]
    place = find_image_folder(folder, [path for path in near if path.is_relative_to(folder)], names, own)
    return "" if place in (None, folder) else f"{place.relative_to(folder).as_posix()}/"


def _find(folder: Path, name: str, file: str) -> CSVSplit:
    """The table of a split, and what its column ``split`` must hold."""
    if (folder / file).is_file() or file != NAME:
        only = name == ALL and (folder / file).is_file() and "split" not in Table(folder / file).columns
        return folder / file, None if only else name
    splits = find_splits(folder)
    found = take_split(folder, name, splits)
    if found is None and splits:
        raise DataError(
            f"{folder}: no table of the split {name!r}; there are {', '.join(splits)}{did_you_mean(name, splits)}"
        )
    return (folder / file, name) if found is None else splits[found]


_COLUMNS = ("split", "file_name", "image_id", "x1", "y1", "x2", "y2", "label", "difficult", "iscrowd", "area")


def write_csv(splits: Splits, folder: str | Path, images: Images = "copy", source: ImageFiles = PLAIN_FILES) -> Written:
    """Write a data set as a table of boxes.

    The splits, name -> annotations, go into a new folder; ``images`` and ``source`` are those of
    :class:`~detpipe.datasets.formats.export.Export`; without images, file names stay relative to the folder of the source. A
    DataError if the folder is there already, or the classes of splits differ.
    """
    names, ids = export.one_class_list(splits)
    keep_ids, remarks = export.ids_are_kept(splits)
    roots = {str(a.root) for a in splits.values()}
    if images == "none":
        if len(roots) > 1:
            raise DataError(f"the images lie in several folders ({', '.join(sorted(roots))}): copy or link them")
        remarks.append(f"file names are relative to {roots.pop()}")
    with (
        export.new_folder(folder, splits, images, source) as made,
        (made.out / NAME).open("w", encoding="utf-8", newline="") as stream,
    ):
        made.remarks += remarks
        write_class_list(made.out, ClassList(names, ids))
        table = csv.writer(stream, lineterminator="\n")
        table.writerow(_COLUMNS)
        for split, a in splits.items():
            named = made.place(split, f"images/{export.file_name_of(split)}", own=True)
            table.writerows(_rows(split, a, named, keep_ids))
            made.remarks += write_outlines(made.out, split, a, named)
    return made.written(splits)


def _rows(split: str, a: Annotations, files: list[str], keep_ids: bool) -> Iterator[list[object]]:
    areas = export.own_area(a)
    for i, name in enumerate(files):
        start = [quoted(split), quoted(name), int(a.image_ids[i]) if keep_ids else ""]
        if not a.rows_of(i):
            yield [*start, *[""] * 8]
        for b in a.rows_of(i):
            flags = [int(a.difficult[b]), int(a.iscrowd[b])]
            area = export.number(a.area[b]) if areas[b] else ""
            yield [
                *start,
                *map(export.number, a.boxes[b].tolist()),
                quoted(a.class_names[int(a.labels[b]) - 1]),
                *flags,
                area,
            ]
