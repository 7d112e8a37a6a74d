"""Put several splits of a data set together into one."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from detpipe.datasets.formats.class_list import compare_classes
from detpipe.types import BOX_FIELDS, Annotations, Segmentations


def join(splits: Mapping[str, Annotations]) -> tuple[Annotations, int]:
    """Pool splits; an image file that several of them name is taken once, from the first.

    All images in their order, numbered anew from 1 if ids repeat; and how many repeated images were left out. A DataError if the
    splits have other classes.
    """
    compare_classes(splits)
    first = next(iter(splits.values()))
    seen: set[Path] = set()
    kept: list[Annotations] = []
    for split in splits.values():
        paths = [Path(os.path.abspath(split.root / str(name))) for name in split.file_names]
        kept.append(split.subset(np.array([i for i, path in enumerate(paths) if path not in seen], dtype=np.int64)))
        seen.update(paths)
    root = Path(os.path.commonpath([os.path.abspath(a.root) for a in kept])) if len(kept) > 1 else first.root
    names = [
        os.path.relpath(a.root / str(name), root) if len(kept) > 1 else str(name) for a in kept for name in a.file_names
    ]
    ids = np.concatenate([a.image_ids for a in kept])
    boxes: dict[str, Any] = {name: np.concatenate([getattr(a, name) for a in kept]) for name in BOX_FIELDS}
    joined = Annotations(
        root=root,
        file_names=np.array([name.replace(os.sep, "/") for name in names], dtype=np.str_),
        image_ids=ids if len(np.unique(ids)) == len(ids) else np.arange(1, len(ids) + 1),
        sizes=np.concatenate([a.sizes for a in kept]),
        offsets=np.cumsum(np.concatenate([[0], *(np.diff(a.offsets) for a in kept)])),
        class_names=first.class_names,
        category_ids=first.category_ids,
        segmentations=_joined_outlines(kept),
        **boxes,
    )
    return joined, sum(map(len, splits.values())) - len(joined)


def _joined_outlines(parts: Sequence[Annotations]) -> Segmentations | None:
    if all(part.segmentations is None for part in parts):
        return None
    return Segmentations.concat([part.segmentations or Segmentations.pack([b""] * len(part.boxes)) for part in parts])
