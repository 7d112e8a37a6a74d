"""The embedded demo set: scenes of real handwritten digits, generated on first use, read in COCO or in VOC layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from detpipe.datasets.coco_json import load_coco
from detpipe.datasets.datamodule import DetectionData, Split
from detpipe.datasets.demo_files import DEFAULT_SCENES, DemoScenes, write_demo
from detpipe.datasets.demo_scenes import CLASS_NAMES
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
        common: what all data sets have: ``loader``, ``augment``, ``seed``, ``on_bad``, ``proposals`` and ``resize`` of
            :class:`~detpipe.datasets.datamodule.DetectionData`.
    """

    def __init__(
        self,
        root: str = "data/demo",
        layout: Literal["coco", "voc"] = "coco",
        scenes: DemoScenes = DEFAULT_SCENES,
        **common: Any,
    ) -> None:
        super().__init__(**common)
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
