"""Classification data in ImageNet's layout: a folder a split, in it a folder a class.

::

    root/
      train/n01440764/n01440764_10026.JPEG     folders below that of the class are searched too
      val/n01440764/ILSVRC2012_val_00000293.JPEG

Labels are 0..K-1 in the order of the names of the class folders in ``train``, by code points: capitals come first.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from detpipe.datasets.annotations import check_pixels
from detpipe.datasets.classification import ClassificationData, LabeledImages, LabeledSplit, pack_names
from detpipe.datasets.decode import IMAGE_SUFFIXES
from detpipe.datasets.faults import SHOWN, Faults, OnBad
from detpipe.datasets.formats.folders import visible, walk_folders
from detpipe.support.errors import DataError
from detpipe.support.suggest import did_you_mean
from detpipe.types import RGB

_LAYOUT = "expected ROOT/train/CLASS/IMAGE and ROOT/val/CLASS/IMAGE"


class ImageFolder(ClassificationData):
    """Images in ImageNet's layout: ``root/train/CLASS/IMAGE`` and ``root/val/CLASS/IMAGE``.

    Args:
        root: the folder of the set.
        train: name of the folder to train on.
        val: name of the folder to validate on; its classes are among those of ``train``.
        common: what all such data sets have, see :class:`~detpipe.datasets.classification.ClassificationData`.
    """

    def __init__(self, root: str, train: str = "train", val: str = "val", **common: Any) -> None:
        super().__init__(**common)
        if not train or not val:
            raise ValueError(f"train and val must name folders below the root, got {train!r} and {val!r}")
        self.root = str(root)
        self.folders: dict[LabeledSplit, str] = {"train": train, "val": val}

    def load(self, split: LabeledSplit) -> LabeledImages:
        """List the images of a split; the classes are those of ``train``."""
        root = Path(self.root)
        if not root.is_dir():
            raise DataError(f"{root}: no such folder; {_LAYOUT}")
        class_names = find_classes(root / self.folders["train"])
        folder = root / self.folders[split]
        present = find_classes(folder)
        unknown = [name for name in present if name not in class_names]
        if unknown:
            raise DataError(
                f"{folder} has {len(unknown)} class folders that {self.folders['train']} lacks: "
                f"{', '.join(map(repr, unknown[:SHOWN]))}{did_you_mean(unknown[0], class_names)}; make their names equal"
            )
        return read_image_folder(root, self.folders[split], class_names, self.on_bad, present)


def find_classes(folder: Path) -> tuple[str, ...]:
    """List the class folders of a split, sorted by code points; hidden ones are none.

    A DataError if the folder is missing, holds images beside the class folders, a link that leads nowhere, or no class folder.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; {_LAYOUT}")
    found = visible(folder)
    stray = [entry.name for entry in found if _is_image(entry)]
    if stray:
        raise DataError(
            f"{folder} holds {len(stray)} images outside class folders, such as {stray[0]}; move each into a folder named "
            "after its class"
        )
    broken = [entry.path for entry in found if entry.is_symlink() and not os.path.exists(entry.path)]
    if broken:
        raise DataError(f"{broken[0]} is a link that leads nowhere; mend or remove it")
    classes = tuple(entry.name for entry in found if entry.is_dir())
    if not classes:
        raise DataError(f"{folder} holds no class folders; {_LAYOUT}")
    return classes


def read_image_folder(
    root: Path, split: str, class_names: tuple[str, ...], on_bad: OnBad, present: Sequence[str]
) -> LabeledImages:
    """List the images of a split, class by class, sorted by name within each; ``present`` are the classes that have a folder.

    ``on_bad="skip"`` decodes every image, and leaves unreadable ones out and counts them. A DataError for a class without images,
    or names of images that are no files.
    """
    faults, others = Faults(on_bad, RGB), Counter[str]()
    faults.source = root / split
    names: list[str] = []
    labels: list[int] = []
    empty: list[str] = []
    for name in tqdm(present, f"listing {split}", unit="class", disable=None, leave=False):
        found = sorted(_list_below(root, f"{split}/{name}", faults, others))
        names += found
        labels += [class_names.index(name)] * len(found)
        empty += [] if found else [name]
    faults.check()
    if empty:
        raise DataError(
            f"{root / split}: {len(empty)} class folders hold no image: {', '.join(map(repr, empty[:SHOWN]))} (looked for "
            f"{' '.join(IMAGE_SUFFIXES)}); fill or remove them"
        )
    kinds = ", ".join(suffix or "no suffix" for suffix in sorted(others)[:SHOWN])
    counts = {f"files that are no images ({kinds})": others.total(), **faults.skipped}
    images = LabeledImages(root, pack_names(names), np.array(labels, dtype=np.int32), class_names, counts)
    return _readable(images, faults) if faults.decodes else images


def _list_below(root: Path, folder: str, faults: Faults, others: Counter[str]) -> Iterator[str]:
    """All images in a folder and those below it; other files are counted by suffix."""
    start = len(os.path.join(root, ""))
    for entry in chain.from_iterable(files for _, files in walk_folders(root / folder)):
        if not _is_image(entry):
            others[os.path.splitext(entry.name)[1].lower()] += 1
        elif entry.is_file():
            yield entry.path[start:].replace(os.sep, "/")
        else:
            faults.image("no file", f"{entry.path} is a link that leads nowhere, or no file but a pipe or the like")


def _is_image(entry: os.DirEntry[str]) -> bool:
    name = entry.name.lower()  # an array beside an image is how a program keeps it decoded
    return name.endswith(IMAGE_SUFFIXES) and not name.endswith(".npy") and not entry.is_dir()


def _readable(images: LabeledImages, faults: Faults) -> LabeledImages:
    damaged = check_pixels(range(len(images)), lambda row: (images.path(row), None), faults)
    keep = np.delete(np.arange(len(images)), damaged)
    bare = np.setdiff1d(images.labels, images.labels[keep]).tolist()
    if bare:
        classes = ", ".join(repr(images.class_names[label]) for label in bare[:SHOWN])
        first = faults.messages[0]
        raise DataError(
            f"{faults.source}: {len(bare)} classes have no readable image: {classes}; the first fault: {first}"
        )
    faults.check()
    counts = {**images.counts, **faults.skipped}
    return replace(images, names=images.names[keep], labels=images.labels[keep], counts=counts)
