"""The one face that pretraining sees of every classification data set: splits, class names, and loaders of batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import numpy as np
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from detpipe.datasets.datamodule import DEFAULT_LOADER, Loader
from detpipe.datasets.faults import OnBad
from detpipe.datasets.labeled_images import LabeledImageDataset, LabeledImages, collate_labeled
from detpipe.datasets.sampling import Presence
from detpipe.datasets.views import Views
from detpipe.support.terminal import printable

LabeledSplit = Literal["train", "val"]
DEFAULT_VIEWS = Views()
_SMALLEST = 2  # images a training batch: batch norm cannot normalize a single one whose map is one cell


class ClassificationData(LightningDataModule, ABC):
    """Base of all classification data sets: a subclass only says how to `load` a split.

    Args:
        loader: how images are loaded and batched.
        views: how images of any size become squares.
        seed: decides the order of the batches and every draw of the views, with the epoch.
        on_bad: ``error`` stops at an image that cannot be read; ``skip`` decodes every image once at the start, and leaves
            unreadable ones out and counts them.

    Raises:
        ValueError: a negative seed, or another policy.
    """

    def __init__(
        self,
        loader: Loader = DEFAULT_LOADER,
        views: Views = DEFAULT_VIEWS,
        seed: int = 0,
        on_bad: OnBad = "error",
    ) -> None:
        super().__init__()
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        if on_bad not in ("error", "skip"):
            raise ValueError(f"on_bad must be 'error' or 'skip', got {on_bad!r}")
        self.loader, self.views, self.seed = loader, views, seed
        self.on_bad: OnBad = on_bad
        self._images: dict[LabeledSplit, LabeledImages] = {}

    @abstractmethod
    def load(self, split: LabeledSplit) -> LabeledImages:
        """List the images of a split.

        Args:
            split: ``"train"`` or ``"val"``.

        Returns:
            The checked images.

        Raises:
            DataError: if the data are faulty.
        """

    def images(self, split: LabeledSplit) -> LabeledImages:
        """The images of a split, listed once.

        Args:
            split: ``"train"`` or ``"val"``.

        Returns:
            The images.

        Raises:
            DataError: if the data are faulty.
        """
        if split not in self._images:
            self._images[split] = self.load(split)
        return self._images[split]

    @property
    def class_names(self) -> tuple[str, ...]:
        """[K], the name of label 0 first."""
        known = next(iter(self._images.values())) if self._images else self.images("val")
        return known.class_names

    @property
    def num_classes(self) -> int:
        """K, the number of classes."""
        return len(self.class_names)

    def setup(self, stage: str) -> None:
        """List what a stage of Lightning needs, so that faults are found before the first step."""
        for split in ("train", "val") if stage == "fit" else ("val",):
            self.images(split)

    def dataset(self, split: LabeledSplit, training: bool = False) -> LabeledImageDataset:
        """The views of a split; for single images, batches come from the loaders.

        Args:
            split: ``"train"`` or ``"val"``.
            training: draw views at random; False for the center.

        Returns:
            A data set with the keys ``(epoch, index)``.
        """
        return LabeledImageDataset(self.images(split), self.views, self.seed, training)

    def train_dataloader(self) -> DataLoader:
        """Batches ``([N, 3, size, size] uint8, labels [N], file names)``, shuffled and drawn by (seed, epoch).

        Where a single image would be left for the last batch of an epoch, another one each time, it is left out.
        """
        return self._dataloader("train", training=True)

    def val_dataloader(self) -> DataLoader:
        """Batches of the validation split, every image once, in an order that never changes, its center."""
        return self._dataloader("val", training=False)

    def presence(self, split: LabeledSplit) -> Presence:
        """Which class is in which image of a split."""
        images = self.images(split)
        labels = np.asarray(images.labels, dtype=np.int64)
        return Presence(len(images), np.arange(len(images)), labels, tuple(images.class_names))

    def describe(self, split: LabeledSplit) -> str:
        """One line about a split: images, classes, and everything that was left out."""
        return printable(f"{split}: {self.images(split).describe()}")

    def _dataloader(self, split: LabeledSplit, training: bool) -> DataLoader:
        sizes = np.broadcast_to(np.int32(self.views.size), (len(self.images(split)), 2))
        dataset = self.dataset(split, training)
        return self.loader.load(
            dataset, sizes, self.seed, training, collate_labeled, _SMALLEST, presence=self.presence(split)
        )
