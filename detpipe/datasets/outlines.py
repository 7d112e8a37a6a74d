"""Outlines of objects as they are in files, for conversions that shall not lose them: nothing here draws or checks them.

COCO has them in its annotations, YOLO in the lines that are polygons. Layouts that only have boxes get a file beside them,
``segmentations_SPLIT.json``, with a list an image, in the order of its boxes, of what COCO calls ``segmentation``, or null::

    {"JPEGImages/a.jpg": [[[1, 2, 9, 2, 9, 8]], null], "JPEGImages/b.jpg": [{"size": [40, 60], "counts": "..."}]}
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from detpipe.datasets.formats.yolo_images import label_path
from detpipe.datasets.segmentations import matched_records
from detpipe.support.errors import DataError
from detpipe.support.strict_json import load_json, shorten
from detpipe.types import Annotations

PerBox = list[Any]  # [B], the segmentation of each box as in COCO's files; None where there is none
Outlines = dict[str, PerBox]  # path of an image -> those of its boxes
NO_OUTLINES: Outlines = {}  # not to be changed


def coco_outlines(path: Path, annotations: Annotations) -> PerBox:
    """Read the segmentations of a COCO file again.

    Args:
        path: the file that the annotations were read from, perhaps without faulty records.
        annotations: of the split.

    Returns:
        The segmentations in the order of the boxes.

    Raises:
        DataError: the file is another one by now.
    """
    return [record.get("segmentation") or None for record in matched_records(path, annotations)]


def yolo_outlines(annotations: Annotations) -> PerBox:
    """Read the polygons of YOLO's label files again.

    Args:
        annotations: of the split.

    Returns:
        A polygon where a line is one, in the order of the boxes.

    Raises:
        DataError: a file has other lines than it had, or some were left out as faulty.
    """
    a = annotations
    found: PerBox = []
    for i, name in enumerate(a.file_names.tolist()):
        path = label_path(a.root / name)
        lines = [line.split() for line in path.read_text(encoding="utf-8-sig").split("\n")] if path.is_file() else []
        lines = [values for values in lines if values]
        if len(lines) != a.offsets[i + 1] - a.offsets[i]:
            raise DataError(
                f"{path}: has {len(lines)} lines, of which some are faulty: mend them, or polygons would be lost"
            )
        height, width = a.sizes[i].tolist()
        for values in lines:
            polygon = [float(text) * (height if k % 2 else width) for k, text in enumerate(values[1:])]
            found.append([polygon] if len(polygon) > 4 else None)
    return found


def by_image(outlines: PerBox, annotations: Annotations) -> Outlines:
    """Sort outlines by the image that they are in, so that splits can be divided and joined.

    Args:
        outlines: ``[B]``.
        annotations: of the split.

    Returns:
        Those of each image that has some.
    """
    offsets = annotations.offsets.tolist()
    parts = {_key(annotations, i): outlines[offsets[i] : offsets[i + 1]] for i in range(len(annotations))}
    return {key: part for key, part in parts.items() if any(part)}


def merge(parts: Sequence[Outlines]) -> Outlines:
    """Put the outlines of several splits together.

    Raises:
        DataError: they differ for an image of two splits.
    """
    merged: Outlines = {}
    for part in parts:
        for key, outlines in part.items():
            if merged.setdefault(key, outlines) != outlines:
                raise DataError(f"{key}: has other segmentations in another split: convert the splits one at a time")
    return merged


def outlines_of(outlines: Outlines, annotations: Annotations, image: int) -> PerBox:
    """Those of the boxes of an image; None for each where there are none."""
    count = int(annotations.offsets[image + 1] - annotations.offsets[image])
    return outlines.get(_key(annotations, image)) or [None] * count


def keep_boxes(outlines: Outlines, annotations: Annotations, keep: npt.NDArray[np.bool_]) -> Outlines:
    """The outlines of some of the boxes, ``keep`` is ``[B]``."""
    kept = [
        one
        for i in range(len(annotations))
        for one, wanted in zip(
            outlines_of(outlines, annotations, i),
            keep[annotations.offsets[i] : annotations.offsets[i + 1]].tolist(),
            strict=True,
        )
        if wanted
    ]
    ends = np.concatenate([[0], np.cumsum(keep)])[annotations.offsets]
    return by_image(kept, replace(annotations, offsets=ends))


def _key(annotations: Annotations, image: int) -> str:
    return os.path.abspath(annotations.root / str(annotations.file_names[image]))


def write_outlines(
    folder: Path, split: str, annotations: Annotations, names: Sequence[str], outlines: Outlines
) -> list[str]:
    """Write the file beside a layout that has boxes only; none if there are no outlines.

    Args:
        folder: the root of the data set.
        split: its name.
        annotations: of the split.
        names: [I] of the images as they will be read.
        outlines: of images of this split and others.

    Returns:
        What is to be said of it.
    """
    content = {name: outlines_of(outlines, annotations, i) for i, name in enumerate(names)}
    content = {name: part for name, part in content.items() if any(part)}
    if not content:
        return []
    path = folder / f"segmentations_{split}.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    count = sum(one is not None for part in content.values() for one in part)
    return [f"{split}: {count} segmentations are in {path.name}, for a conversion back; this layout has boxes only"]


def stored_outlines(folder: Path, split: str, annotations: Annotations) -> PerBox:
    """Read the file beside a layout that has boxes only.

    Args:
        folder: the root of the data set.
        split: its name.
        annotations: of the split.

    Returns:
        The outlines, None for all boxes where there is no such file.

    Raises:
        DataError: it does not fit the boxes.
    """
    path = folder / f"segmentations_{split}.json"
    if not path.is_file():
        return [None] * len(annotations.boxes)
    content = load_json(path)
    found: PerBox = []
    for i, name in enumerate(annotations.file_names.tolist()):
        count = int(annotations.offsets[i + 1] - annotations.offsets[i])
        here = content.get(name, [None] * count) if type(content) is dict else None
        if type(here) is not list or len(here) != count:
            raise DataError(
                f"{path}: {name!r} has {count} boxes, but here {shorten(here)}; the boxes were changed since: remove the file, and "
                "outlines are not kept"
            )
        found += here
    return found
