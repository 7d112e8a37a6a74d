"""The embedded demo set: scenes of real handwritten digits, generated on first use, read in COCO or in VOC layout."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from detpipe.datasets.coco_json import load_coco
from detpipe.datasets.datamodule import DEFAULT_LOADER, DetectionData, Loader, Split
from detpipe.datasets.demo_files import DEFAULT_SCENES, DemoScenes, write_demo
from detpipe.datasets.demo_scenes import CLASS_NAMES
from detpipe.datasets.faults import OnBad
from detpipe.datasets.resize import Resize
from detpipe.datasets.transforms import Augment
from detpipe.datasets.voc_xml import load_voc
from detpipe.errors import DataError, UsageError
from detpipe.types import Annotations

__all__ = ["Demo", "DemoScenes", "write_demo"]


class Demo(DetectionData):
    """Scenes of handwritten digits over photographs, with fragments of digits as clutter: ten classes, "0" to "9".

    Args:
        root: the folder of the set; generated there on first use, in seconds and without a network.
        layout: read the annotations from the COCO or from the VOC layout; the boxes are the same.
        scenes: what to generate.
        loader: how images are loaded and batched.
        augment: what is done to training images and their boxes; null for nothing.
        seed: decides the order of the batches and every draw of the augmentation, with the epoch.
        on_bad: ``error`` refuses data with any fault; ``skip`` leaves faulty records out and counts them.
        proposals: split -> proposal store, whose boxes then ride in the targets of that split; see
            :class:`detpipe.PrecomputedProposals`.
        resize: to which size images are brought by the data workers; null leaves it to the detector.
    """

    def __init__(
        self,
        root: str = "data/demo",
        layout: Literal["coco", "voc"] = "coco",
        scenes: DemoScenes = DEFAULT_SCENES,
        loader: Loader = DEFAULT_LOADER,
        augment: Augment | None = None,
        seed: int = 0,
        on_bad: OnBad = "error",
        proposals: dict[str, str] | None = None,
        resize: Resize | None = None,
    ) -> None:
        super().__init__(loader, augment, seed, on_bad, proposals, resize)
        if layout not in ("coco", "voc"):
            raise UsageError(f"layout must be 'coco' or 'voc', got {layout!r}")
        self.root = str(root)
        self.layout = layout
        self.scenes = scenes

    def prepare_data(self) -> None:
        """Generate the set unless it is there; Lightning calls this in one process only."""
        write_demo(self.root, self.scenes)

    def load(self, split: Split) -> Annotations:
        """Read the annotations of a split, generating the set first where it is missing."""
        if split == "test":
            raise DataError("no test split: the demo set has train and val only")
        root = write_demo(Path(self.root), self.scenes)
        if self.layout == "coco":
            annotations = root / "coco" / "annotations" / f"instances_{split}.json"
            return load_coco(annotations, root / "coco" / split, self.on_bad)
        return load_voc(root / "voc", split, CLASS_NAMES, on_bad=self.on_bad)
