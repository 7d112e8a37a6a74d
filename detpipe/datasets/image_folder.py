"""Classification data in ImageNet's layout: a folder a split, in it a folder a class.

::

    root/
      train/n01440764/n01440764_10026.JPEG     folders below that of the class are searched too
      val/n01440764/ILSVRC2012_val_00000293.JPEG

Labels are 0..K-1 in the alphabetical order of the class folders in ``train``.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from detpipe.datasets.classification import DEFAULT_VIEWS, ClassificationData, LabeledSplit
from detpipe.datasets.datamodule import DEFAULT_LOADER, Loader
from detpipe.datasets.decode import IMAGE_SUFFIXES, read_image
from detpipe.datasets.faults import SHOWN, Faults, OnBad
from detpipe.datasets.labeled_images import LabeledImages, PackedNames
from detpipe.datasets.views import Views
from detpipe.errors import DataError
from detpipe.suggest import did_you_mean

_LAYOUT = "expected ROOT/train/CLASS/IMAGE and ROOT/val/CLASS/IMAGE"


class ImageFolder(ClassificationData):
    """Images in ImageNet's layout: ``root/train/CLASS/IMAGE`` and ``root/val/CLASS/IMAGE``.

    Args:
        root: the folder of the set.
        train: name of the folder to train on.
        val: name of the folder to validate on; its classes are among those of ``train``.
        loader: how images are loaded and batched.
        views: how images of any size become squares.
        seed: decides the order of the batches and every draw of the views, with the epoch.
        on_bad: ``error`` stops at an image that cannot be read; ``skip`` decodes every image once at the start, and leaves
            unreadable ones out and counts them.
    """

    def __init__(
        self,
        root: str,
        train: str = "train",
        val: str = "val",
        loader: Loader = DEFAULT_LOADER,
        views: Views = DEFAULT_VIEWS,
        seed: int = 0,
        on_bad: OnBad = "error",
    ) -> None:
        super().__init__(loader, views, seed, on_bad)
        self.root = str(root)
        self.folders: dict[LabeledSplit, str] = {"train": train, "val": val}

    def load(self, split: LabeledSplit) -> LabeledImages:
        """List the images of a split; the classes are those of ``train``."""
        root = Path(self.root)
        if not root.is_dir():
            raise DataError(f"{root}: no such folder; {_LAYOUT}")
        class_names = find_classes(root / self.folders["train"])
        folder = root / self.folders[split]
        if split == "val":
            found = find_classes(folder)
            unknown = [name for name in found if name not in class_names]
            if unknown:
                raise DataError(
                    f"{folder} has {len(unknown)} class folders that {self.folders['train']} lacks: "
                    f"{', '.join(map(repr, unknown[:SHOWN]))}{did_you_mean(unknown[0], class_names)}; make their names equal"
                )
            return read_image_folder(root, self.folders[split], class_names, self.on_bad, present=found)
        return read_image_folder(root, self.folders[split], class_names, self.on_bad)


def find_classes(folder: Path) -> tuple[str, ...]:
    """List the class folders of a split; hidden ones are none.

    Args:
        folder: of the split.

    Returns:
        Their names, sorted.

    Raises:
        DataError: the folder is missing, holds images beside the class folders, or holds no class folder.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; {_LAYOUT}")
    with os.scandir(folder) as entries:
        visible = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    stray = [entry.name for entry in visible if _is_image(entry)]
    if stray:
        raise DataError(
            f"{folder} holds {len(stray)} images outside class folders, such as {stray[0]}; move each into a folder named "
            "after its class"
        )
    classes = tuple(entry.name for entry in visible if entry.is_dir())
    if not classes:
        raise DataError(f"{folder} holds no class folders; {_LAYOUT}")
    return classes


def read_image_folder(
    root: Path, split: str, class_names: tuple[str, ...], on_bad: OnBad, present: Sequence[str] | None = None
) -> LabeledImages:
    """List the images of a split.

    Args:
        root: the folder of the set.
        split: name of the split's folder.
        class_names: [K] of labels 0..K-1.
        on_bad: ``"skip"`` decodes every image, and leaves unreadable ones out and counts them.
        present: the classes that have a folder; None for all.

    Returns:
        The images, class by class, sorted by name within each.

    Raises:
        DataError: a class without images.
    """
    names: list[str] = []
    labels: list[int] = []
    others: Counter[str] = Counter()
    empty = []
    for label, name in enumerate(class_names):
        if present is not None and name not in present:
            continue
        found = sorted(_images_below(root, f"{split}/{name}", others, set()))
        if not found:
            empty.append(name)
        names += found
        labels += [label] * len(found)
    if empty:
        raise DataError(
            f"{root / split}: {len(empty)} class folders hold no image: {', '.join(map(repr, empty[:SHOWN]))} (looked for "
            f"{' '.join(IMAGE_SUFFIXES)}); fill or remove them"
        )
    images = LabeledImages(
        root,
        PackedNames.pack(names),
        np.array(labels, dtype=np.int32),
        class_names,
        {"files that are no images": others.total()},
    )
    return _readable(images, split) if on_bad == "skip" else images


def _images_below(root: Path, folder: str, others: Counter[str], seen: set[tuple[int, int]]) -> list[str]:
    """Names of all images in a folder and those below it, links followed but no folder entered twice."""
    status = (root / folder).stat()
    if (status.st_dev, status.st_ino) in seen:
        return []
    seen.add((status.st_dev, status.st_ino))
    names: list[str] = []
    with os.scandir(root / folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                names += _images_below(root, f"{folder}/{entry.name}", others, seen)
            elif _is_image(entry):
                names.append(f"{folder}/{entry.name}")
            else:
                others[os.path.splitext(entry.name)[1]] += 1
    return names


def _is_image(entry: os.DirEntry[str]) -> bool:
    return entry.name.lower().endswith(IMAGE_SUFFIXES) and not entry.is_dir()


def _readable(images: LabeledImages, split: str) -> LabeledImages:
    """Decode every image, and leave out those of which that fails; decoders let threads run side by side."""
    faults = Faults(images.root / split, "skip")

    def fault(index: int) -> str | None:
        try:
            read_image(images.path(index))
        except DataError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        found = pool.map(fault, range(len(images)), chunksize=64)
        reasons = list(tqdm(found, "checking images", len(images), unit="image", disable=None, leave=False))
    for reason in reasons:
        if reason is not None:
            faults.image("unreadable", reason)
    faults.check()
    keep = [index for index, reason in enumerate(reasons) if reason is None]
    bare = sorted(set(images.labels.tolist()) - set(images.labels[keep].tolist()))
    if bare:
        classes = ", ".join(repr(images.class_names[label]) for label in bare[:SHOWN])
        first = next(reason for reason in reasons if reason is not None)
        raise DataError(
            f"{images.root / split}: {len(bare)} classes have no readable image: {classes}; the first fault: {first}"
        )
    names = PackedNames.pack(images.names[index] for index in keep)
    counts = {**images.counts, **faults.skipped}
    return LabeledImages(images.root, names, images.labels[keep], images.class_names, counts)
