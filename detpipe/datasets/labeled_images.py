"""Images with one label each: packed lists that data workers share, and the data set that reads from them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from detpipe.datasets.batches import Key, draws_again
from detpipe.datasets.decode import read_image
from detpipe.datasets.views import Views

Sample = tuple[Tensor, int, str]  # [3, size, size] uint8, label in 0..K-1, file name


@dataclass(frozen=True)
class PackedNames:
    """Text in two arrays: processes share it, which they would not do with a list of text (its counts are written to)."""

    data: npt.NDArray[np.uint8]  # the bytes of all names
    ends: npt.NDArray[np.int64]  # [I]

    @classmethod
    def pack(cls, names: Iterable[str]) -> PackedNames:
        """Pack file names, whatever bytes the file system has in them."""
        encoded = [os.fsencode(name) for name in names]
        ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self.ends):
            raise IndexError(f"name {index} of {len(self.ends)}")
        start = int(self.ends[index - 1]) if index else 0
        return os.fsdecode(self.data[start : int(self.ends[index])].tobytes())


@dataclass(frozen=True)
class LabeledImages:
    """One split of a classification data set."""

    root: Path  # the folder that the names are relative to
    names: PackedNames  # [I]
    labels: npt.NDArray[np.int32]  # [I] in 0..K-1
    class_names: tuple[str, ...]  # [K]
    counts: dict[str, int] = field(default_factory=dict)  # "images skipped: unreadable" and the like

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> Path:
        """The file of an image."""
        return self.root / self.names[index]

    def describe(self) -> str:
        """Images, classes, and everything that was left out, in one line."""
        images = np.bincount(self.labels, minlength=len(self.class_names))
        line = f"{len(self)} images of {int((images > 0).sum())} classes, {images.min()} to {images.max()} of each"
        return "; ".join([line, *(f"{key}: {n}" for key, n in self.counts.items() if n)])


class LabeledImageDataset(Dataset[Sample]):
    """The views of one split, keyed by ``(epoch, index)``.

    The epoch is part of the key because the view is drawn from (seed, epoch, index): the same in every worker, another
    one in every epoch.

    Args:
        images: the split.
        views: what is seen of an image.
        seed: decides every draw, with the key.
        training: draw views at random; False for the center.
    """

    def __init__(self, images: LabeledImages, views: Views, seed: int = 0, training: bool = False) -> None:
        self.images, self.views, self.seed, self.training = images, views, seed, training

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: Key) -> Sample:
        """Read one image.

        Args:
            key: the epoch and the index of the image, and where the epoch has it again, how often before.

        Returns:
            The view, ``[3, size, size]`` uint8 RGB, its label, and the file name.

        Raises:
            DataError: if the image cannot be read; the message names it.
        """
        epoch, index, *again = key
        image = read_image(self.images.path(index))
        seed = (self.seed, epoch, index, *draws_again(again))
        view = self.views.training(image, seed) if self.training else self.views.evaluation(image)
        return view, int(self.images.labels[index]), self.images.names[index]


def collate_labeled(samples: list[Sample]) -> tuple[Tensor, Tensor, list[str]]:
    """Stack views of one size.

    Args:
        samples: triples of view, label and name.

    Returns:
        Images ``[N, 3, size, size]`` uint8 in the channels-last memory format, labels ``[N]`` int64, and the names.
    """
    images, labels, names = zip(*samples, strict=True)
    stacked = torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)
    return stacked, torch.tensor(labels), list(names)
