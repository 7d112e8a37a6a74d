"""Data in COCO layout: the official folders, or any annotation file with its image folder.

::

    root/
      annotations/instances_train2017.json     a split is named by what stands between instances_ and .json
      train2017/000000000009.jpg               and its images lie in the folder of that name
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from detpipe.datasets.coco_json import load_coco
from detpipe.datasets.datamodule import DEFAULT_LOADER, DetectionData, Loader, Split
from detpipe.datasets.faults import OnBad
from detpipe.datasets.resize import Resize
from detpipe.datasets.segmentations import read_segmentations
from detpipe.datasets.transforms import Augment
from detpipe.errors import DataError
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
        loader: how images are loaded and batched.
        augment: what is done to training images and their boxes; null for nothing.
        seed: decides the order of the batches and every draw of the augmentation, with the epoch.
        on_bad: ``error`` refuses data with any fault; ``skip`` leaves faulty records out and counts them, and decodes
            every image once at the start to find damaged ones.
        proposals: split -> proposal store, whose boxes then ride in the targets of that split; see
            :class:`detpipe.PrecomputedProposals`.
        resize: to which size images are brought by the data workers; null leaves it to the detector.
    """

    def __init__(
        self,
        root: str,
        train: str | COCOFiles = "train2017",
        val: str | COCOFiles = "val2017",
        test: str | COCOFiles | None = None,
        loader: Loader = DEFAULT_LOADER,
        augment: Augment | None = None,
        seed: int = 0,
        on_bad: OnBad = "error",
        proposals: dict[str, str] | None = None,
        resize: Resize | None = None,
    ) -> None:
        super().__init__(loader, augment, seed, on_bad, proposals, resize)
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
