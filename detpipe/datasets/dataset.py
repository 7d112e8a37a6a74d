"""One image with its target, read when a data worker asks for it; packed annotations are shared between the workers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from detpipe.datasets.batches import Key
from detpipe.datasets.decode import read_reduced
from detpipe.datasets.records import check_size
from detpipe.datasets.resize import Resize, resample
from detpipe.datasets.transforms import Augment
from detpipe.images import Size, targets_to_batch
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
        resize: to which size images are brought, after the augmentation; None leaves them as they are.
    """

    def __init__(
        self,
        annotations: Annotations,
        augment: Augment | None = None,
        seed: int = 0,
        proposals: Proposals | None = None,
        resize: Resize | None = None,
    ) -> None:
        self.annotations = annotations
        self.augment = augment
        self.seed = seed
        self.proposals = proposals
        self.resize = resize

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, key: Key) -> tuple[Tensor, Target]:
        """Read one image.

        Args:
            key: the epoch and the index of the image.

        Returns:
            The image, ``[3, H, W]`` uint8 RGB, channels last in memory, and its target.

        Raises:
            DataError: if the image cannot be read, or is not of the annotated size.
        """
        epoch, index = key
        draws = (self.seed, epoch, index)
        height, width = self.annotations.sizes[index].tolist()
        side, near = 0, (height, width)
        if self.resize is not None:
            side = self.resize.draw(draws)
            near = self.resize.size_to_read(near, side, self.augment.magnification if self.augment else 1.0)
        image, target = self._read(index, near)
        if self.augment is not None:
            image, target = self.augment(image, target, draws)
        if self.resize is not None:
            image, target = self.resize(image, target, side)
            if self.augment is None:  # else there may be no way back
                target["file_size"] = (height, width)
        return image, target

    def _read(self, index: int, size: Size) -> tuple[Tensor, Target]:
        """An image and its target at a size that is not above that of the file."""
        path = self.annotations.root / str(self.annotations.file_names[index])
        height, width = self.annotations.sizes[index].tolist()
        decoded = read_reduced(path, size)
        check_size(path, decoded.size, (height, width))
        image = resample(decoded.pixels, size, (height / decoded.factor, width / decoded.factor))
        return image, targets_to_batch([self.target(index)], [(height, width)], [size])[0]

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


def start_worker(_: int) -> None:
    """Give a data worker one thread: the workers are what runs in parallel."""
    torch.set_num_threads(1)
