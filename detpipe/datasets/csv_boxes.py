"""Data in a table: a CSV file with a row a box, beside the images that it names.

::

    root/
      annotations.csv      split,file_name,x1,y1,x2,y2,label: see csv_table.py for the columns
      images/a.jpg         wherever file_name says, relative to the table
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from detpipe.datasets.class_list import ids_of, read_class_list
from detpipe.datasets.csv_rows import RowReader
from detpipe.datasets.csv_table import Table
from detpipe.datasets.datamodule import DetectionData, Split
from detpipe.datasets.faults import Faults, Policy
from detpipe.datasets.records import build_annotations
from detpipe.datasets.stored_proposals import file_key
from detpipe.errors import DataError
from detpipe.suggest import did_you_mean
from detpipe.types import Annotations

NAME = "annotations.csv"


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
        names = self.splits[split]
        if not names:
            raise DataError(
                f"no {split} split: set the argument {split} to a value of the column split, or a .csv file"
            )
        tables = _tables(self.root, names, self.format.file)
        return load_csv(tables, Path(self.root) / self.format.images, self._names(), self.on_bad)

    def _names(self) -> tuple[str, ...]:
        """The class names of all splits, those of the training split's tables for ``auto``."""
        if self._class_names is None:
            names = self.format.class_names
            tables = _tables(self.root, self.splits["train"] or [], self.format.file)
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
    wanted = [(tables, None)] if isinstance(tables, str | Path) else list(tables)
    paths = [Path(path) for path, _ in wanted]
    folder = paths[0].parent if images is None else Path(images)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such image folder; it should hold the images of {paths[0]}")
    splits = [split for _, split in wanted if split is not None]
    faults = Faults(f"{paths[0]} ({', '.join(splits)})" if splits else paths[0], on_bad)
    names = find_classes(paths) if class_names == "auto" else tuple(class_names)
    if not names or len(set(names)) != len(names):
        raise DataError(f"class_names must be distinct and at least one, got {list(names)}")
    reader = RowReader(names, folder, faults)
    read: dict[Path, Table] = {}
    for path, (_, split) in zip(paths, wanted, strict=True):
        table = read[path] if path in read else read.setdefault(path, Table(path))
        if split is not None and "split" not in table.columns:
            raise DataError(f"{path}: has no column 'split', but the split {split!r} is wanted")
        if not reader.read(table, split) and split is not None:
            known = splits_of(table)
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


def _tables(root: str, names: str | list[str], file: str) -> list[tuple[Path, str | None]]:
    """The files of a split, each with what its column ``split`` must hold."""
    folder = Path(root)
    if not folder.is_dir():
        raise DataError(f"{root}: no such folder; the argument root must name the folder of the tables")
    listed = [names] if isinstance(names, str) else names
    return [(folder / name, None) if name.lower().endswith(".csv") else (folder / file, name) for name in listed]
