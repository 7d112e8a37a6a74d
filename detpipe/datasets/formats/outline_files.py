"""Outlines of objects in layouts that only have boxes, for conversions that shall not lose them.

Beside such a data set lies a file, ``segmentations_SPLIT.json``, with a list an image, in the order of its boxes, of what COCO
calls ``segmentation``, or null::

    {"JPEGImages/a.jpg": [[[1, 2, 9, 2, 9, 8]], null], "JPEGImages/b.jpg": [{"size": [40, 60], "counts": "..."}]}
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec import Raw

from detpipe.support.errors import DataError
from detpipe.support.strict_json import load_json, shorten
from detpipe.types import Annotations, Segmentations


def write_outlines(folder: Path, split: str, annotations: Annotations, names: Sequence[str]) -> list[str]:
    """Write the file beside a layout that has boxes only; none if there are no outlines. What is to be said of it.

    ``names`` are those of the images as they will be read.
    """
    outlines = annotations.segmentations
    if outlines is None or not len(outlines.text):
        return []
    texts = {name: [outlines[b] for b in annotations.rows_of(i)] for i, name in enumerate(names)}
    content = {name: [Raw(text or b"null") for text in here] for name, here in texts.items() if any(here)}
    path = folder / f"segmentations_{split}.json"
    path.write_bytes(msgspec.json.encode(content))
    count = sum(bool(text) for here in texts.values() for text in here)
    return [f"{split}: {count} segmentations are in {path.name}, for a conversion back; this layout has boxes only"]


def read_outlines(folder: Path, split: str, annotations: Annotations) -> Segmentations | None:
    """The outlines of the file beside a layout that has boxes only, None if there is none; a DataError if they do not fit."""
    path = folder / f"segmentations_{split}.json"
    if not path.is_file():
        return None
    content = load_json(path)
    found: list[bytes] = []
    for i, name in enumerate(annotations.file_names.tolist()):
        count = len(annotations.rows_of(i))
        here = content.get(name, [None] * count) if type(content) is dict else None
        if type(here) is not list or len(here) != count:
            raise DataError(
                f"{path}: {name!r} has {count} boxes, but here {shorten(here)}; the boxes were changed since: remove the file, and "
                "outlines are not kept"
            )
        found += [b"" if one is None else msgspec.json.encode(one) for one in here]
    return Segmentations.pack(found, source=str(path))
