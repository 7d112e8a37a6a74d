"""Images with one label each, for pretraining: packed lists that data workers share, views of equal size, and the data module.

What a classifier sees is a random crop in training and the center in evaluation: Szegedy et al., "Going Deeper with Convolutions",
2014, arXiv 1409.4842, section 6.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from detpipe.datasets.augment.settings import HUE, check_parts, check_range, color_jitter
from detpipe.datasets.batches import Key, draws_again
from detpipe.datasets.datamodule import Loader, SplitData
from detpipe.datasets.decode import read_image
from detpipe.datasets.faults import OnBad
from detpipe.datasets.sampling import Presence
from detpipe.support.terminal import printable

if TYPE_CHECKING:
    import albumentations

LabeledSplit = Literal["train", "val"]
Sample = tuple[Tensor, int, str]  # [3, size, size] uint8, label in 0..K-1, file name
_SMALLEST = 2  # images a training batch: batch norm cannot normalize a single one whose map is one cell


@dataclass(frozen=True)
class Views:
    """How images of any size become squares.

    Args:
        size: side of the square, pixels.
        scale: smallest and largest part of the image's area that a training crop covers, within 0..1.
        ratio: smallest and largest width / height of a training crop, before it is resized to the square.
        flip: probability of a left-right flip in training, 0 to 1.
        color: strength of the change of brightness, contrast and saturation in training, 0 (none) to 1; 0.4 means a factor of
            0.6 to 1.4. The hue turns by up to a tenth of it.
        center: in evaluation, the side of the square over the shorter side of the resized image, of which it is the center.

    Raises:
        ValueError: a number outside its range.
    """

    size: int = 224
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    color: float = 0.0
    center: float = 0.875

    def __post_init__(self) -> None:
        check_range(self, "views.", "scale", 0, 1)
        check_range(self, "views.", "ratio", 0.1, 10)
        check_parts(self, "views.", "flip", "color")
        if not 8 <= self.size <= 4096:
            raise ValueError(f"views.size must be 8 to 4096 pixels, got {self.size}")
        if self.scale[0] == 0:
            raise ValueError(f"views.scale must begin above 0, got {list(self.scale)}")
        if not 0.1 <= self.center <= 1:
            raise ValueError(f"views.center must lie in 0.1..1, got {self.center}")

    def training(self, image: Tensor, seed: int | Sequence[int]) -> Tensor:
        """Cut, resize, flip and recolor ``[3, H, W]`` uint8 to ``[3, size, size]``, every draw decided by non-negative numbers."""
        return _apply(_steps(self, True), image, seed)

    def evaluation(self, image: Tensor) -> Tensor:
        """Resize and cut out the center: ``[3, H, W]`` uint8 -> ``[3, size, size]`` uint8."""
        return _apply(_steps(self, False), center_square(image), 0)


def center_square(image: Tensor) -> Tensor:
    """Cut the largest square from the middle of ``[3, H, W]``, a view, so that a strip of an image is never resized as a whole."""
    height, width = image.shape[1:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return image[:, top : top + side, left : left + side]


@lru_cache(maxsize=8)
def _steps(views: Views, training: bool) -> tuple[albumentations.BasicTransform, ...]:
    # first: it keeps albumentations from the network, and OpenCV from threads that a fork does not survive
    from detpipe.datasets.augment.steps import named_step  # isort: skip
    import albumentations  # takes seconds

    size, averaged = (views.size, views.size), {"area_for_downscale": "image", "p": 1.0}
    if not training:
        side = max(views.size, round(views.size / views.center))
        return albumentations.Resize(side, side, **averaged), albumentations.CenterCrop(*size, p=1.0)
    crop = albumentations.RandomResizedCrop(size, views.scale, views.ratio, **averaged)
    flip = albumentations.HorizontalFlip(p=views.flip)
    color = color_jitter(views.color, views.color, views.color, HUE * views.color)
    return (crop, flip, named_step(color)) if views.color else (crop, flip)


def _apply(steps: Sequence[albumentations.BasicTransform], image: Tensor, seed: int | Sequence[int]) -> Tensor:
    from detpipe.datasets.augment.steps import own_seeds  # as above

    out = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    for step, own in zip(steps, own_seeds(seed, len(steps)), strict=True):
        step.set_random_seed(own)
        out = step(image=out)["image"]
    return torch.from_numpy(np.ascontiguousarray(out)).permute(2, 0, 1)


@dataclass(frozen=True)
class LabeledImages:
    """One split of a classification data set."""

    root: Path  # the folder that the names are relative to
    names: npt.NDArray[np.bytes_]  # [I] as `pack_names` packs them: processes share an array, but not a list of text
    labels: npt.NDArray[np.int32]  # [I] in 0..K-1
    class_names: tuple[str, ...]  # [K]
    counts: dict[str, int] = field(default_factory=dict)  # "images skipped: unreadable" and the like

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> Path:
        """The file of an image."""
        return self.root / self.name(index)

    def name(self, index: int) -> str:
        """The name of an image."""
        return os.fsdecode(self.names[index])


def pack_names(names: Iterable[str]) -> npt.NDArray[np.bytes_]:
    """Pack file names, whatever bytes the file system has in them."""
    return np.array([os.fsencode(name) for name in names], dtype=np.bytes_)


class LabeledImageDataset(Dataset[Sample]):
    """The views of one split, keyed by ``(epoch, index)``: drawn at random for training, else the center.

    The epoch is part of the key because the view is drawn from (seed, epoch, index): the same in every worker, another one in
    every epoch.
    """

    def __init__(self, images: LabeledImages, views: Views, seed: int = 0, training: bool = False) -> None:
        self.images, self.views, self.seed, self.training = images, views, seed, training

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: Key) -> Sample:
        """The view of one image, ``[3, size, size]`` uint8 RGB, its label, and the file name; a DataError if it cannot be read.

        The key is the epoch and the index of the image, and where the epoch has it again, how often before.
        """
        epoch, index, *again = key
        image = read_image(self.images.path(index))
        seed = (self.seed, epoch, index, *draws_again(again))
        view = self.views.training(image, seed) if self.training else self.views.evaluation(image)
        return view, int(self.images.labels[index]), self.images.name(index)


def collate_labeled(samples: list[Sample]) -> tuple[Tensor, Tensor, list[str]]:
    """Stack views: ``[N, 3, size, size]`` uint8 in the channels-last memory format, labels ``[N]`` int64, and file names."""
    images, labels, names = zip(*samples, strict=True)
    stacked = torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)
    return stacked, torch.tensor(labels), list(names)


class ClassificationData(SplitData):
    """Base of all classification data sets: a subclass only says how to `load` a split.

    Args:
        loader: how images are loaded and batched.
        views: how images of any size become squares.
        seed: decides the order of the batches and every draw of the views, with the epoch.
        on_bad: ``error`` stops at an image that cannot be read; ``skip`` decodes every image once at the start, and leaves
            unreadable ones out and counts them.
    """

    def __init__(
        self, loader: Loader = Loader(), views: Views = Views(), seed: int = 0, on_bad: OnBad = "error"
    ) -> None:
        super().__init__(loader, seed, on_bad)
        self.views = views

    @abstractmethod
    def load(self, split: LabeledSplit) -> LabeledImages:
        """List the images of ``"train"`` or ``"val"``, checked; a DataError if the data are faulty."""

    def images(self, split: LabeledSplit) -> LabeledImages:
        """The images of ``"train"`` or ``"val"``, listed once; a DataError if the data are faulty."""
        if split not in self._of_split:
            self._of_split[split] = self.load(split)
        return self._of_split[split]

    read = images

    def setup(self, stage: str) -> None:
        """List what a stage of Lightning needs, so that faults are found before the first step."""
        for split in ("train", "val") if stage == "fit" else ("val",):
            self.images(split)

    def dataset(self, split: LabeledSplit, training: bool = False) -> LabeledImageDataset:
        """The views of a split, by ``(epoch, index)``, drawn at random for training; batches come from the loaders."""
        return LabeledImageDataset(self.images(split), self.views, self.seed, training)

    def presence(self, split: LabeledSplit) -> Presence:
        """Which class is in which image of a split."""
        images = self.images(split)
        labels = np.asarray(images.labels, dtype=np.int64)
        return Presence(len(images), np.arange(len(images)), labels, tuple(images.class_names))

    def describe(self, split: LabeledSplit) -> str:
        """One line about a split: images, classes, and everything that was left out."""
        listed = self.images(split)
        images = np.bincount(listed.labels, minlength=self.num_classes)
        line = f"{len(listed)} images of {int((images > 0).sum())} classes, {images.min()} to {images.max()} of each"
        return printable("; ".join([f"{split}: {line}", *(f"{key}: {n}" for key, n in listed.counts.items() if n)]))

    def _dataloader(self, split: LabeledSplit, training: bool) -> DataLoader:
        sizes = np.broadcast_to(np.int32(self.views.size), (len(self.images(split)), 2))
        dataset = self.dataset(split, training)
        return self._load(dataset, sizes, training, collate_labeled, _SMALLEST)
