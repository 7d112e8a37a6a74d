"""One image with its target, read when a data worker asks for it; packed annotations are shared between the workers."""

from __future__ import annotations

import gc
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from detpipe.datasets.batches import Key
from detpipe.datasets.decode import read_image
from detpipe.datasets.records import check_size
from detpipe.datasets.transforms import Augment
from detpipe.types import Annotations, Target

Proposals = Mapping[int, npt.NDArray[np.floating]]  # image id -> [P, 4] xyxy in pixels of the image file


class DetectionDataset(Dataset[tuple[Tensor, Target]]):
    """Images and targets of one split, keyed by ``(epoch, index)``.

    The epoch is part of the key because the augmentation is drawn from (seed, epoch, index): the same in every worker,
    another one in every epoch.

    Args:
        annotations: the ground truth of the split.
        augment: what is done to image, boxes and proposals; None for nothing.
        seed: decides every draw, with the key.
        proposals: precomputed boxes by image id, which then ride in the target as ``proposals``.
    """

    def __init__(
        self,
        annotations: Annotations,
        augment: Augment | None = None,
        seed: int = 0,
        proposals: Proposals | None = None,
    ) -> None:
        self.annotations = annotations
        self.augment = augment
        self.seed = seed
        self.proposals = proposals

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, key: Key) -> tuple[Tensor, Target]:
        """Read one image.

        Args:
            key: the epoch and the index of the image.

        Returns:
            The image, ``[3, H, W]`` uint8 RGB, and its target.

        Raises:
            DataError: if the image cannot be read, or is not of the annotated size.
        """
        epoch, index = key
        path = self.annotations.root / str(self.annotations.file_names[index])
        image = read_image(path)
        height, width = self.annotations.sizes[index].tolist()
        check_size(path, (image.shape[1], image.shape[2]), (height, width))
        target = self.target(index)
        if self.augment is not None:
            image, target = self.augment(image, target, (self.seed, epoch, index))
        return image, target

    def target(self, index: int) -> Target:
        """The ground truth of one image, in pixels of its file; nothing is read."""
        a = self.annotations
        rows = slice(int(a.offsets[index]), int(a.offsets[index + 1]))
        image_id = int(a.image_ids[index])
        target = Target(
            boxes=torch.tensor(a.boxes[rows], dtype=torch.float32),
            labels=torch.tensor(a.labels[rows]),
            image_id=image_id,
            iscrowd=torch.tensor(a.iscrowd[rows]),
            difficult=torch.tensor(a.difficult[rows]),
            area=torch.tensor(a.area[rows], dtype=torch.float32),
            file_name=str(a.file_names[index]),
        )
        if self.proposals is not None:
            target["proposals"] = torch.tensor(np.asarray(self.proposals[image_id]), dtype=torch.float32)
        return target


def collate(samples: list[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    """Keep the images of a batch apart: they are resized and padded together on the device.

    Args:
        samples: pairs of image and target.

    Returns:
        The images, and their targets in the same order.
    """
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)


def start_worker(_: int) -> None:
    """Give a data worker one thread: the workers are what runs in parallel.

    What came with the fork is taken from the collector of cycles, which would write to all of it, and so copy it.
    """
    gc.freeze()
    torch.set_num_threads(1)
