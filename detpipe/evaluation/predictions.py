"""What ``detpipe predict`` writes, as detections of a data set: images are matched by their files, classes by their names."""

from __future__ import annotations

import json
import os
from collections import Counter
from itertools import chain
from pathlib import PurePath
from typing import Any

import numpy as np

from detpipe.support.errors import DataError
from detpipe.support.strict_json import read_text, require, require_numbers, shorten
from detpipe.types import Annotations, DetectionArrays

LINES = ".jsonl"
_LEVELS = 100  # of a path, at its end, that are compared


def is_predictions(content: Any) -> bool:
    """Whether the content of a JSON file is that of ``detections.json``."""
    return isinstance(content, dict) and {"class_names", "images", "failed"} <= content.keys()


def read_lines(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a file of JSON lines as the content of ``detections.json``; a DataError names a line that is none."""
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(read_text(path, "file of detpipe predict").rstrip("\n").split("\n"), start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise DataError(f"{path}: line {number} is no record of detpipe predict; is the run complete?")
        rows.append(row)
    if "class_names" not in rows[0]:
        raise DataError(f"{path}: its first line is not that of a file of detpipe predict")
    failed = [row for row in rows[1:] if "reason" in row]
    return {**rows[0], "images": [row for row in rows[1:] if "reason" not in row], "failed": failed}


def from_predictions(
    content: dict[str, Any], path: str | os.PathLike[str], annotations: Annotations
) -> DetectionArrays:
    """Match predictions with the ground truth, an image by the end of its path; one that could not be read has no detections.

    A DataError names an image that the ground truth does not have or has several of, one that comes twice or not at all, a class
    that it does not have, and a faulty record.
    """
    names = {PurePath(str(name)).as_posix(): key for name, key in _images(annotations)}
    short = Counter(PurePath(name).name for name in names)
    unique = {PurePath(name).name: key for name, key in names.items() if short[PurePath(name).name] == 1}
    label_of = {name: label for label, name in enumerate(annotations.class_names, start=1)}
    seen: set[int] = set()
    ids: list[int] = []
    rows: list[tuple[float, ...]] = []
    for record in chain(*(require(content, part, list, str(path)) for part in ("images", "failed"))):
        file = require(record, "file", str, str(path))
        key = _image_of(file, names, unique)
        where = f"{path}: image {file[:200]}"
        if key is None:
            raise DataError(f"{where}: is not an image of the ground truth, or one of several of that name")
        if key in seen:
            raise DataError(f"{where}: is there twice")
        seen.add(key)
        for found in [] if "reason" in record else require(record, "detections", list, where):
            label = label_of.get(require(found, "label", str, where))
            if label is None:
                raise DataError(f"{where}: class {found['label']!r} is not one of the ground truth")
            score = require(found, "score", float, where)
            x1, y1, x2, y2 = require_numbers(found, "box", 4, where)
            if x2 < x1 or y2 < y1:
                raise DataError(
                    f"{where}: the field 'box' is {shorten(found['box'])}: expected [x1, y1, x2, y2] with x2 >= x1, y2 >= y1"
                )
            ids.append(key)
            rows.append((label, score, x1, y1, x2, y2))
    missing = [str(name) for name, key in _images(annotations) if key not in seen]
    if missing:
        raise DataError(
            f"{path}: has no record of {len(missing)} of {len(annotations)} images, such as {', '.join(missing[:5])}; predict all "
            "images of the ground truth"
        )
    table = np.array(rows, dtype=np.float64).reshape(-1, 6)
    return DetectionArrays(np.array(ids, np.int64), table[:, 2:], table[:, 1], table[:, 0].astype(np.int64))


def _images(annotations: Annotations) -> list[tuple[str, int]]:
    return list(zip(annotations.file_names.tolist(), annotations.image_ids.tolist(), strict=True))


def _image_of(file: str, names: dict[str, int], unique: dict[str, int]) -> int | None:
    path = PurePath(file)
    parts = path.parts[-_LEVELS:]
    ends = (PurePath(*parts[k:]).as_posix() for k in range(len(parts)))
    return next((names[end] for end in ends if end in names), unique.get(path.name))
