"""Writes YOLO's text layout: ``data.yaml``, ``images/SPLIT`` and ``labels/SPLIT``.

Numbers have all the digits of a double, so that boxes come back within 1e-9 pixels. ``data.yaml`` has no ``path``, since other
programs take that to be relative to where they are started.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import yaml

from detpipe.datasets.decode import IMAGE_SUFFIXES
from detpipe.datasets.formats.export import (
    Images,
    Names,
    Splits,
    Written,
    check_suffixes,
    file_name_of,
    new_folder,
    one_class_list,
    own_area,
    rows_of,
    totals,
    transfer,
)
from detpipe.datasets.formats.outline_files import write_outlines
from detpipe.datasets.formats.yolo_images import label_path
from detpipe.datasets.formats.yolo_yaml import NAME
from detpipe.datasets.image_files import PLAIN_FILES, ImageFiles, image_paths
from detpipe.support.errors import DataError
from detpipe.types import Annotations

Flags = Literal["refuse", "drop", "leave out"]


def write_yolo(
    splits: Splits,
    folder: str | Path,
    images: Images = "copy",
    flags: Flags = "refuse",
    source: ImageFiles = PLAIN_FILES,
) -> Written:
    """Write a data set in YOLO layout.

    Args:
        splits: name -> annotations, whose classes are the same. The only one that begins with ``train``, ``val`` or ``test``
            goes by that key.
        folder: a new folder.
        images: ``"copy"``, ``"link"`` or ``"none"``.
        flags: of crowd regions and difficult objects, which the layout cannot tell from others: ``"refuse"`` to write them,
            ``"drop"`` the flag, so that they become ordinary objects, or ``"leave out"`` these boxes.
        source: where the images are.

    Returns:
        What was written.

    Raises:
        DataError: the folder is there already, classes differ, or there are flags.
    """
    names, ids = one_class_list(splits)
    check_suffixes(splits, IMAGE_SUFFIXES, "YOLO")
    splits, remarks = _without_flags(splits, flags)
    remarks += _losses(splits)
    keys = _keys(list(splits))
    renamed = 0
    with new_folder(folder, splits) as out:
        content: dict[str, object] = {key: f"images/{file_name_of(split)}" for split, key in keys.items()}
        content["names"] = dict(enumerate(names))
        if list(ids) != list(range(len(ids))):
            content["category_ids"] = list(ids)
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
        (out / NAME).write_text(text, encoding="utf-8")
        for split, a in splits.items():
            naming = Names(flat=False)
            targets = [out / "images" / file_name_of(split) / name for name in naming.of(split, a)]
            transfer(image_paths(a), targets, images, source)
            for i, target in enumerate(targets):
                path = out / label_path(target.relative_to(out))
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(_lines(a, i), encoding="utf-8")
            named = [target.relative_to(out).as_posix() for target in targets]
            remarks += write_outlines(out, keys[split], a, named)
            renamed += naming.renamed
    if renamed:
        remarks.append(f"{renamed} images are renamed: others have the same name but for the suffix")
    return Written(Path(folder), tuple(keys.values()), *totals(splits), tuple(remarks))


def _keys(splits: list[str]) -> dict[str, str]:
    """Split -> its key in data.yaml."""
    kinds = {split: next((kind for kind in ("train", "val", "test") if split.startswith(kind)), "") for split in splits}
    count = Counter(kinds.values())
    return {split: kind if kind and count[kind] == 1 else file_name_of(split) for split, kind in kinds.items()}


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
        return {name: _unflagged(a) for name, a in splits.items()}, [f"{which} are left out"]
    return splits, [f"{which} are written as ordinary objects: their flags are dropped"]


def _unflagged(a: Annotations) -> Annotations:
    """Without the boxes that are flagged."""
    keep = ~(a.iscrowd | a.difficult)
    return replace(
        a,
        offsets=np.concatenate([[0], np.cumsum(keep)])[a.offsets],
        boxes=a.boxes[keep],
        labels=a.labels[keep],
        iscrowd=a.iscrowd[keep],
        difficult=a.difficult[keep],
        area=a.area[keep],
        segmentations=None if a.segmentations is None else a.segmentations.take(np.flatnonzero(keep)),
    )


def _losses(splits: Splits) -> list[str]:
    remarks = []
    if any(not np.array_equal(a.image_ids, np.arange(1, len(a) + 1)) for a in splits.values()):
        remarks.append("image ids are not kept: images are numbered by the order of their names")
    areas = sum(int(own_area(a).sum()) for a in splits.values())
    if areas:
        remarks.append(f"areas of {areas} boxes, which are not those of the boxes, are not kept")
    return remarks


def _lines(a: Annotations, image: int) -> str:
    height, width = a.sizes[image].tolist()
    lines = []
    for b in rows_of(a, image):
        x1, y1, x2, y2 = a.boxes[b].tolist()
        numbers = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
        lines.append(f"{int(a.labels[b]) - 1} {' '.join(map(repr, numbers))}\n")
    return "".join(lines)
