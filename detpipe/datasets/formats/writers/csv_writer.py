"""Writes a table of boxes, ``annotations.csv``, beside ``images/SPLIT`` and ``detpipe.json``, the list of classes."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from detpipe.datasets.formats.class_list import ClassList, write_class_list
from detpipe.datasets.formats.csv import NAME
from detpipe.datasets.formats.csv_table import quoted
from detpipe.datasets.formats.export import (
    Images,
    Names,
    Splits,
    Written,
    file_name_of,
    ids_are_kept,
    new_folder,
    number,
    one_class_list,
    own_area,
    rows_of,
    totals,
    transfer,
)
from detpipe.datasets.formats.outline_files import write_outlines
from detpipe.datasets.image_files import PLAIN_FILES, ImageFiles, image_paths
from detpipe.support.errors import DataError
from detpipe.types import Annotations

_COLUMNS = ("split", "file_name", "image_id", "x1", "y1", "x2", "y2", "label", "difficult", "iscrowd", "area")


def write_csv(
    splits: Splits,
    folder: str | Path,
    images: Images = "copy",
    source: ImageFiles = PLAIN_FILES,
) -> Written:
    """Write a data set as a table of boxes.

    Args:
        splits: name -> annotations, whose classes are the same.
        folder: a new folder.
        images: ``"copy"``, ``"link"`` or ``"none"``: then the file names stay relative to the folder of the source.
        source: where the images are.

    Returns:
        What was written.

    Raises:
        DataError: the folder is there already, or classes differ.
    """
    names, ids = one_class_list(splits)
    keep_ids, remarks = ids_are_kept(splits)
    roots = {str(a.root) for a in splits.values()}
    if images == "none":
        if len(roots) > 1:
            raise DataError(f"the images lie in several folders ({', '.join(sorted(roots))}): copy or link them")
        remarks.append(f"file names are relative to {roots.pop()}")
    with new_folder(folder, splits) as out:
        write_class_list(out, ClassList(names, ids))
        with (out / NAME).open("w", encoding="utf-8", newline="") as stream:
            table = csv.writer(stream, lineterminator="\n")
            table.writerow(_COLUMNS)
            for split, a in splits.items():
                files = a.file_names.tolist()
                if images != "none":
                    files = [f"images/{file_name_of(split)}/{name}" for name in Names(flat=False).of(split, a)]
                    transfer(image_paths(a), [out / name for name in files], images, source)
                table.writerows(_rows(split, a, files, keep_ids))
                remarks += write_outlines(out, split, a, files)
    return Written(Path(folder), tuple(splits), *totals(splits), tuple(remarks))


def _rows(split: str, a: Annotations, files: list[str], keep_ids: bool) -> Iterator[list[object]]:
    areas = own_area(a)
    for i, name in enumerate(files):
        start = [quoted(split), quoted(name), int(a.image_ids[i]) if keep_ids else ""]
        if not rows_of(a, i):
            yield [*start, *[""] * 8]
        for b in rows_of(a, i):
            flags = [int(a.difficult[b]), int(a.iscrowd[b])]
            area = number(a.area[b]) if areas[b] else ""
            yield [*start, *map(number, a.boxes[b].tolist()), quoted(a.class_names[int(a.labels[b]) - 1]), *flags, area]
