"""Data in COCO layout: the official folders, or any annotation file with its image folder.

::

    root/
      annotations/instances_train2017.json     a split is named by what stands between instances_ and .json
      train2017/000000000009.jpg               and its images lie in the folder of that name
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detpipe.datasets.datamodule import DetectionData, Split
from detpipe.datasets.formats.coco_json import load_coco
from detpipe.datasets.segmentations import read_segmentations
from detpipe.support.errors import DataError
from detpipe.types import Annotations, Segmentations


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
        annotations, images = root / "annotations" / f"instances_{files}.json", root / files
        if not annotations.is_file():
            found = sorted(p.stem.removeprefix("instances_") for p in root.glob("annotations/instances_*.json"))
            raise DataError(
                f"{annotations}: no such file, wanted for {split}={files!r}; splits found in {root}: "
                f"{', '.join(found) or 'none'}; name one of them, or give the annotations and images of {split} apart"
            )
        return annotations, images
