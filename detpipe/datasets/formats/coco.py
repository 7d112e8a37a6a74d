"""Data in COCO layout: the official folders, or any annotation file with its image folder.

::

    root/
      annotations/instances_train2017.json     a split is named by what stands between instances_ and .json
      train2017/000000000009.jpg               and its images lie in the folder of that name
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from detpipe.datasets.datamodule import DetectionData, Split
from detpipe.datasets.formats.coco_json import load_coco
from detpipe.datasets.segmentations import read_segmentations
from detpipe.support.errors import DataError
from detpipe.types import Annotations, Segmentations

_log = logging.getLogger(__name__)

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_VALIDATION = ("val", "valid", "validation")  # one split under the names that tools give it
_DEPTH = 2  # folders below the root in which annotation files are looked for
_SPLITS = 50  # a folder with more JSON files has one an image
_PLAIN = ("labels", "annotations", "_annotations", "_annotations.coco", "instances", "coco")  # say nothing of the split


@dataclass(frozen=True)
class COCOFiles:
    """A split whose files do not follow the official names.

    Args:
        annotations: the annotation file, relative to the root (or absolute).
        images: the folder that its file names are relative to, relative to the root (or absolute).
    """

    annotations: str
    images: str


class COCO(DetectionData):
    """Detection data in COCO layout.

    Args:
        root: the folder that holds ``annotations`` and the image folders.
        train: the training split: a name such as ``train2017``, or ``annotations`` and ``images`` for other files.
        val: the validation split, in the same way.
        test: the split for the final test, in the same way; none by default.
        common: what all data sets have: ``loader``, ``augment``, ``seed``, ``on_bad``, ``proposals`` and ``resize`` of
            :class:`~detpipe.datasets.datamodule.DetectionData`.
    """

    def __init__(
        self,
        root: str,
        train: str | COCOFiles = "train2017",
        val: str | COCOFiles = "val2017",
        test: str | COCOFiles | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.root = str(root)
        self.splits = {"train": train, "val": val, "test": test}

    def load(self, split: Split) -> Annotations:
        """Read the annotation file of a split."""
        annotations, images = self.files(split)
        return load_coco(annotations, images, self.on_bad)

    def segmentations(self, split: Split) -> Segmentations:
        """Read the annotation file again, for polygons and run lengths."""
        return read_segmentations(self.files(split)[0], self.annotations(split))

    def files(self, split: Split) -> tuple[Path, Path]:
        """The annotation file and the image folder of a split.

        Raises:
            DataError: there is no such split.
        """
        root, files = Path(self.root), self.splits[split]
        if not root.is_dir():
            raise DataError(f"{root}: no such folder; the argument root must name the folder of the COCO data")
        if files is None:
            raise DataError(f"no {split} split: set the argument {split} to the name of one, such as val2017")
        if isinstance(files, COCOFiles):
            return root / files.annotations, root / files.images
        found = find_splits(root)
        name = files if files in found else next((name for name in _also_called(files) if name in found), None)
        if name is None:
            wanted = root / "annotations" / f"instances_{files}.json"
            raise DataError(
                f"{wanted}: no such file, wanted for {split}={files!r}; splits found in {root}: "
                f"{', '.join(sorted(found)) or 'none'}; name one of them, or give the annotations and images of {split} apart"
            )
        if name != files:
            _log.warning("%s: there is no split %r; its split %r is read", root, files, name)
        return root / found[name].annotations, root / found[name].images


class _ImageName(msgspec.Struct):
    file_name: str


class _Content(msgspec.Struct):
    """What tells a COCO annotation file from other JSON."""

    images: list[_ImageName]
    annotations: msgspec.Raw
    categories: msgspec.Raw


def _also_called(split: str) -> tuple[str, ...]:
    """The other names of a split."""
    return _VALIDATION if split in _VALIDATION else ()


def find_splits(root: Path) -> dict[str, COCOFiles]:
    """Find the splits of a folder in COCO layout, as the official sets, labeling tools and hubs write it.

    ::

        annotations/instances_SPLIT.json   images in SPLIT/ or images/SPLIT/; other files are then not looked at
        SPLIT/_annotations.coco.json       images beside it; any other name does as well
        annotations/SPLIT.json, SPLIT.json images in the folder in which the first of them is found: SPLIT, images/SPLIT,
                                           images, data, or that of the file
        labels.json                        a name that says nothing of the split: it is that of the image folder

    Args:
        root: the folder.

    Returns:
        Split -> its files, relative to the root; empty if there are none.
    """
    official = sorted(root.glob("annotations/instances_*.json"))
    if official:
        found: dict[str, COCOFiles] = {}
        for path in official:
            name = path.stem.removeprefix("instances_")
            places = [name, f"images/{name}"]
            images = next((place for place in places if (root / place).is_dir()), name)
            found[name] = COCOFiles(f"annotations/{path.name}", images)
        return found
    contents = {path: first for path in _json_files(root, _DEPTH) if (first := _first_image(path)) is not None}
    count = Counter(path.parent for path in contents)
    found = {}
    for path, first in contents.items():
        name, images = _place(root, path, first, count[path.parent] == 1)
        place = path.relative_to(root)
        name = str(place.with_suffix("")) if name in found else name
        found[name] = COCOFiles(place.as_posix(), images.relative_to(root).as_posix())
    return found


def _json_files(folder: Path, depth: int) -> list[Path]:
    """The JSON files in a folder and in those below it, by name."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as scan:
        entries = sorted(scan, key=lambda entry: entry.name)
    files = [Path(entry.path) for entry in entries if entry.name.lower().endswith(".json") and entry.is_file()]
    files = files if len(files) <= _SPLITS else []
    below = [Path(entry.path) for entry in entries if depth and not entry.name.startswith(".") and entry.is_dir()]
    return files + [file for inner in below for file in _json_files(inner, depth - 1)]


def _first_image(path: Path) -> str | None:
    """The first file name of an annotation file, "" if it has no images; None if it is no COCO file."""
    try:
        images = msgspec.json.decode(path.read_bytes().removeprefix(BYTE_ORDER_MARK), type=_Content).images
    except (msgspec.MsgspecError, OSError, RecursionError):
        return None
    return images[0].file_name if images else ""


def _place(root: Path, path: Path, first: str, alone: bool) -> tuple[str, Path]:
    """The name of the split of an annotation file, which may be the only one of its folder, and the folder of its images."""
    beside, stem = path.parent, path.stem.removeprefix("instances_")
    bases = [beside] if beside == root else [beside, beside.parent]
    places = [base / part for base in bases for part in (stem, f"images/{stem}", "images", "data", ".")]
    places = [place for place in places if place.is_dir()]
    images = next((place for place in places if find_image(place, first)), places[0])
    if alone and images == beside and (beside != root or stem in _PLAIN):
        return beside.resolve().name, images
    if stem not in _PLAIN:
        return stem, images
    return (images if beside == root or beside.name == "annotations" else beside).name, images


def find_image(folder: Path, name: str) -> str | None:
    """Find an image file whose name has backslashes, or folders before it that are not there.

    Args:
        folder: of the images.
        name: as in an annotation file.

    Returns:
        Its path from the folder with forward slashes: the name, or the longest end of it that is there; None if none is.
    """
    parts = name.replace("\\", "/").split("/")
    if not name or "\0" in name or parts[0] == "" or parts[0].endswith(":") or ".." in parts:
        return None
    ends = [name, *("/".join(parts[k:]) for k in range(len(parts)))]
    return next((end for end in ends if end and (folder / end).is_file()), None)
