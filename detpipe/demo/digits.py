"""The embedded default of pretraining: the digits of the demo scenes, cut out with what is around them.

::

    data/demo_digits/
      digits.json   what the crops were made of; its presence says that the set is complete
      CREDITS.txt
      train/7/000012_3.jpg   object 3 of the training scene 000012
      val/7/000845_1.jpg
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from PIL import Image

from detpipe.datasets.classification import ClassificationData, LabeledImages, LabeledSplit, Views
from detpipe.datasets.datamodule import Loader
from detpipe.datasets.decode import read_image
from detpipe.datasets.formats.coco import load_coco
from detpipe.datasets.image_folder import read_image_folder
from detpipe.demo.dataset import DEFAULT_SCENES, JPEG_QUALITY, SPLITS, VERSION, DemoScenes, read_marker, write_demo
from detpipe.demo.scenes import CLASS_NAMES
from detpipe.support.errors import DataError
from detpipe.support.files import atomic_folder, remove_orphans

MARKER = "digits.json"
CONTEXT = 0.25  # of the longer side of a digit's box, on every side
UPRIGHT_VIEWS = Views(size=64, scale=(0.6, 1.0), flip=0.0, center=1.0)  # a digit is another one in the mirror


class DemoDigits(ClassificationData):
    """Handwritten digits over photographs, cut out of the demo scenes: ten classes, "0" to "9".

    Args:
        root: the folder of the crops; made on first use, without a network, together with the scenes.
        demo: the folder of the demo set that they are cut out of.
        scenes: what the demo set is made of.
        loader: how images are loaded and batched.
        views: how crops of any size become squares; digits are not flipped unless it is asked for.
        common: what all such data sets have: ``seed`` and ``on_bad`` of
            :class:`~detpipe.datasets.classification.ClassificationData`.
    """

    def __init__(
        self,
        root: str = "data/demo_digits",
        demo: str = "data/demo",
        scenes: DemoScenes = DEFAULT_SCENES,
        loader: Loader = Loader(),
        views: Views = UPRIGHT_VIEWS,
        **common: Any,
    ) -> None:
        super().__init__(loader, views, **common)
        self.root, self.demo, self.scenes = str(root), str(demo), scenes

    def prepare_data(self) -> None:
        """Make the crops unless they are there; Lightning calls this in one process only."""
        write_digits(self.root, self.demo, self.scenes)

    def load(self, split: LabeledSplit) -> LabeledImages:
        """List the crops of a split, making the set first where it is missing."""
        root = write_digits(self.root, self.demo, self.scenes)
        present = [name for name in CLASS_NAMES if (root / split / name).is_dir()]
        return read_image_folder(root, split, CLASS_NAMES, self.on_bad, present)


def write_digits(root: str | Path, demo: str | Path, scenes: DemoScenes = DEFAULT_SCENES) -> Path:
    """Cut the digits out of the demo scenes, generated where they are missing, unless that has been done; the folder as a path.

    The folder appears under its name only when it is complete.

    Raises:
        DataError: ``root`` exists and is something else, or was made of other scenes.
        UsageError: scikit-learn is not installed.
    """
    root, demo = Path(root), Path(demo)
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        write_demo(demo, scenes)
        remove_orphans(root.parent)
        print(f"Cutting the digits out of the demo scenes into {root} ...", end=" ", file=sys.stderr, flush=True)
        with atomic_folder(root) as folder:
            counts = {split: _cut(demo, folder, split) for split in SPLITS}
            shutil.copyfile(demo / "CREDITS.txt", folder / "CREDITS.txt")
            content = {**_made_of(scenes), "images": counts}
            (folder / MARKER).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        print(f"{counts['train']} to train on, {counts['val']} to validate on", file=sys.stderr, flush=True)
    _check(root, scenes)
    return root


def _made_of(scenes: DemoScenes) -> dict[str, Any]:
    return {"version": VERSION, "scenes": asdict(scenes), "context": CONTEXT}


def _check(root: Path, scenes: DemoScenes) -> None:
    wanted = _made_of(scenes)
    found = read_marker(root, MARKER, "the demo digits", lambda content: {key: content[key] for key in wanted})
    if found is not None and found != wanted:
        raise DataError(
            f"{root} holds digits of other scenes, {found['scenes']}, than asked for, {asdict(scenes)}: name another folder "
            "(root), or remove this one"
        )


def _cut(demo: Path, folder: Path, split: str) -> int:
    scenes = load_coco(demo / "coco" / "annotations" / f"instances_{split}.json", demo / "coco" / split)
    (folder / split).mkdir()
    offsets = scenes.offsets.tolist()
    for row, (first, last) in enumerate(pairwise(offsets)):
        if first == last:
            continue
        name = Path(str(scenes.file_names[row]))
        pixels = read_image(scenes.root / name).permute(1, 2, 0).numpy()
        for number, index in enumerate(range(first, last)):
            x, y, side = window(scenes.boxes[index].tolist(), min(pixels.shape[:2]))
            target = folder / split / scenes.class_names[scenes.labels[index] - 1]
            target.mkdir(exist_ok=True)
            crop = Image.fromarray(pixels[y : y + side, x : x + side])
            crop.save(target / f"{name.stem}_{number}.jpg", format="JPEG", quality=JPEG_QUALITY)
    return len(scenes.boxes)


def window(box: list[float], size: int) -> tuple[int, int, int]:
    """The square around a digit's box xyxy, with context: x, y and side, moved inwards where it would leave a square image.

    Example:
        >>> window([10, 20, 30, 60], 160)
        (0, 10, 60)
    """
    x1, y1, x2, y2 = box
    side = min(size, round((1 + 2 * CONTEXT) * max(x2 - x1, y2 - y1)))
    x, y = (round((low + high - side) / 2) for low, high in ((x1, x2), (y1, y2)))
    return min(max(x, 0), size - side), min(max(y, 0), size - side), side
