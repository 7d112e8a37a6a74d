"""The embedded demo set: scenes of real handwritten digits, generated on first use, read in COCO or in VOC layout.

It is written once, in both::

    data/demo/
      demo.json   what the set was made with; its presence says that the set is complete
      CREDITS.txt
      coco/       annotations/instances_{train,val}.json, train/*.jpg, val/*.jpg
      voc/        Annotations/*.xml, ImageSets/Main/{train,val}.txt, JPEGImages/*.jpg (hard links to those of coco/), detpipe.json

Both layouts carry the same boxes: they are whole pixels, so that VOC's 1-based inclusive integers lose nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from PIL import Image

from detpipe.datasets.annotations import AnnotationBuilder
from detpipe.datasets.datamodule import DetectionData, Split
from detpipe.datasets.faults import Faults
from detpipe.datasets.formats.class_list import CLASS_LIST
from detpipe.datasets.formats.coco import coco_content, load_coco
from detpipe.datasets.formats.voc import load_voc, write_voc
from detpipe.demo.scenes import CLASS_NAMES, Scene, compose_scene, load_stock
from detpipe.support.errors import DataError, UsageError
from detpipe.support.files import atomic_folder, atomic_remove, remove_orphans
from detpipe.types import Annotations

T = TypeVar("T")
VERSION = 1  # of the generator: another one makes other scenes
MARKER = "demo.json"
JPEG_QUALITY = 92
SPLITS = ("train", "val")

CREDITS = """\
The scenes in this folder were generated. They are made of:

Digits
  Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak (1998), UCI Machine Learning Repository,
  https://archive.ics.uci.edu/dataset/80 (for the license see there); the copy that scikit-learn bundles
  (sklearn.datasets.load_digits).
  Changes: enlarged, rotated, sheared, colored.

Backgrounds
  The photographs that scikit-learn bundles (sklearn.datasets.load_sample_images), both CC BY 2.0,
  https://creativecommons.org/licenses/by/2.0/. Changes: cropped, scaled, mirrored, contrast and brightness altered.
  china.jpg by danielbuechele, https://www.flickr.com/photos/danielbuechele/6061409035/
  flower.jpg by vultilion, https://www.flickr.com/photos/vultilion/6056698931/
"""


@dataclass(frozen=True)
class DemoScenes:
    """What decides the content of a demo set, to the byte.

    Args:
        train: number of scenes to train on.
        val: number of scenes to validate on, made of other digits than those to train on.
        size: side of the square scenes, pixels, 64 to 1024.
        seed: equal seeds give equal files; it has nothing to do with the seed of a training run.
    """

    train: int = 800
    val: int = 200
    size: int = 160
    seed: int = 0

    def __post_init__(self) -> None:
        if self.train < 1 or self.val < 1:
            raise UsageError(f"scenes.train and scenes.val must be at least 1, got {self.train} and {self.val}")
        if not 64 <= self.size <= 1024:
            raise UsageError(f"scenes.size must be 64 to 1024 pixels, got {self.size}")
        if self.seed < 0:
            raise UsageError(f"scenes.seed must not be negative, got {self.seed}")

    def names(self, split: str) -> list[str]:
        """File names without suffix: numbers from 1, first those of ``train``, then those of ``val``."""
        first, count = (1, self.train) if split == "train" else (1 + self.train, self.val)
        return [f"{number:06d}" for number in range(first, first + count)]


DEFAULT_SCENES = DemoScenes()


def write_demo(root: str | os.PathLike[str], scenes: DemoScenes = DEFAULT_SCENES) -> Path:
    """Generate the demo set in a folder, unless it is there, which is returned as a path.

    The folder appears under its name only when it is complete; of two processes that generate it at once, the first to finish
    wins. A set of other scenes, or by another version of the generator, is replaced, provided that the folder holds nothing else.

    Raises:
        DataError: ``root`` exists and is not a demo set, or holds other files besides.
        UsageError: scikit-learn is not installed.
    """
    root = Path(root)
    wanted = (VERSION, scenes)
    if _made_with(root) == wanted:
        return root
    _check_replaceable(root)
    remove_orphans(root.parent)
    with atomic_folder(root) as folder:
        _generate(folder, root, scenes)
        if _made_with(root) not in (None, wanted):
            _check_replaceable(root)
            atomic_remove(root)
    if _made_with(root) != wanted:
        raise DataError(
            f"another process has just generated other scenes in {root}: give each a folder (root) of its own"
        )
    return root


def _made_with(root: Path) -> tuple[int, DemoScenes] | None:
    """The generator's version and the scenes of the set in a folder, None where there is no folder or an empty one."""
    return read_marker(
        root, MARKER, "a demo set", lambda content: (int(content["version"]), DemoScenes(**content["scenes"]))
    )


def read_marker(root: Path, name: str, what: str, read: Callable[[Any], T]) -> T | None:
    """What the marker of a folder that was generated says; None where there is no folder or an empty one.

    A DataError if the folder is something else, or its marker is damaged.
    """
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return None
    marker, remedy = root / name, "name another folder (root), or remove this one"
    if not marker.is_file():
        raise DataError(f"{root} exists and is not {what} (it has no {name}): {remedy}")
    try:
        return read(json.loads(marker.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{marker} is not the marker of {what} ({error!r}): {remedy}") from error


def _check_replaceable(root: Path) -> None:
    made = _made_with(root)
    if made is None:
        return
    found = {path.relative_to(root).as_posix() for path in root.rglob("*") if not path.is_dir()}
    foreign = sorted(found - set(_file_names(made[1])))
    if foreign:
        raise DataError(
            f"{root} holds a demo set of other scenes, which would be replaced, and {len(foreign)} files that do not "
            f"belong to it, such as {foreign[0]}: move them away, or name another folder (root)"
        )


def _file_names(scenes: DemoScenes) -> Iterator[str]:
    yield from (MARKER, "CREDITS.txt", f"voc/{CLASS_LIST}")
    for split in SPLITS:
        yield f"coco/annotations/instances_{split}.json"
        yield f"voc/ImageSets/Main/{split}.txt"
        for name in scenes.names(split):
            yield from (f"coco/{split}/{name}.jpg", f"voc/JPEGImages/{name}.jpg", f"voc/Annotations/{name}.xml")


def _generate(folder: Path, root: Path, scenes: DemoScenes) -> None:
    """Write a whole set to a temporary folder, the marker last."""
    print(f"Generating {scenes.train + scenes.val} demo scenes in {root} ...", end=" ", file=sys.stderr, flush=True)
    start = time.perf_counter()
    stocks = load_stock(scenes.seed)
    splits = {}
    for number, split in enumerate(SPLITS):
        made: dict[str, Scene] = {}
        for index, name in enumerate(scenes.names(split)):
            # keyed on the scene, so that a larger set begins with the scenes of a smaller one
            rng = np.random.default_rng(np.random.SeedSequence(scenes.seed, spawn_key=(number, index)))
            made[name] = compose_scene(rng, stocks[split], scenes.size)
        splits[split] = _write_coco(folder / "coco", split, made)
    _write_voc(folder / "voc", splits)
    (folder / "CREDITS.txt").write_text(CREDITS, encoding="utf-8")
    boxes = {split: len(a.boxes) for split, a in splits.items()}
    marker = {"version": VERSION, "scenes": asdict(scenes), "boxes": boxes, "sha256": _digest(folder, scenes)}
    (folder / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
    print(f"done in {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)


def _write_coco(root: Path, split: str, scenes: dict[str, Scene]) -> Annotations:
    (root / split).mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    built = AnnotationBuilder(Faults(), CLASS_NAMES, range(1, len(CLASS_NAMES) + 1))
    samples: list[int] = []  # of each box, which of scikit-learn's digits it is
    for name, scene in scenes.items():
        Image.fromarray(scene.image).save(root / split / f"{name}.jpg", format="JPEG", quality=JPEG_QUALITY)
        row = built.add_image(f"{name}.jpg", int(name), scene.image.shape[:2])
        for box, label in zip(scene.boxes.tolist(), scene.labels.tolist(), strict=True):
            built.add_box(row, box, label, name)
        samples += scene.samples.tolist()
    made = built.build(root / split, [root / split])
    content = coco_content(made, made.file_names.tolist())
    for record, sample in zip(content["annotations"], samples, strict=True):
        record["sample"] = sample
    content["info"] = {"description": f"detpipe demo set, {split}; for the credits see CREDITS.txt"}
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content), encoding="utf-8")
    return made


def _write_voc(folder: Path, splits: dict[str, Annotations]) -> None:
    """Write the same splits in VOC layout, over links to the images, or copies on file systems that know no hard links."""
    numbered = {name: replace(a, image_ids=np.arange(1, len(a) + 1)) for name, a in splits.items()}
    try:
        write_voc(numbered, folder, "link")
    except DataError:
        write_voc(numbered, folder, "copy")


def _digest(folder: Path, scenes: DemoScenes) -> str:
    """One hash over the names and contents of all files but the marker."""
    digest = hashlib.sha256()
    for name in sorted(set(_file_names(scenes)) - {MARKER}):
        content = (folder / name).read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


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

    def load(self, split: Split, faults: Faults | None = None) -> Annotations:
        """Read the annotations of a split, generating the set first where it is missing."""
        if split == "test":
            raise DataError("no test split: the demo set has train and val only")
        root = write_demo(Path(self.root), self.scenes)
        if self.layout == "coco":
            annotations = root / "coco" / "annotations" / f"instances_{split}.json"
            return load_coco(annotations, root / "coco" / split, faults=faults or self.faults())
        return load_voc(root / "voc", split, CLASS_NAMES, faults=faults or self.faults())
