"""One image with its target, read when a data worker asks for it; packed annotations are shared between the workers."""

from __future__ import annotations

import gc
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from detpipe.datasets.annotations import check_size
from detpipe.datasets.augment.augmentation import Augment
from detpipe.datasets.augment.settings import Neighbors
from detpipe.datasets.batches import Key, Repeat, draws_again
from detpipe.datasets.decode import Reduced, read_image, read_reduced
from detpipe.datasets.resize import Resize, resample
from detpipe.datasets.segmentations import check_segmentations, draw_masks
from detpipe.datasets.workers import share_with_workers
from detpipe.images import Size, targets_to_batch
from detpipe.support.errors import DataError
from detpipe.types import RGB, Annotations, PixelType, Segmentations, Target

share_with_workers(Annotations, Segmentations)

Proposals = Mapping[int, npt.NDArray[np.floating]]  # image id -> [P, 4] xyxy in pixels of the image file


class Contents(Protocol):
    """The bytes of the image files of a split, where they are not files of their own."""

    def name(self, index: int) -> str:
        """What a message calls the image."""
        ...

    def size(self, index: int) -> int:
        """How many bytes its file has."""
        ...

    def read(self, index: int) -> bytes:
        """The bytes of its file."""
        ...


@dataclass(eq=False)
class DetectionDataset(Dataset[tuple[Tensor, Target]]):
    """Images and targets of one split, keyed by ``(epoch, index)``.

    The epoch is part of the key because the augmentation is drawn from (seed, epoch, index): the same in every worker,
    another one in every epoch.

    Raises:
        DataError: the augmentation needs more images, or instance masks that the annotations do not have.
        ValueError: a transform of the augmentation has arguments that it does not take, or is not for such pixels.
    """

    annotations: Annotations  # the ground truth of the split
    augment: Augment | None = None  # what is done to image, boxes and proposals
    seed: int = 0  # decides every draw, with the key
    proposals: Proposals | None = None  # precomputed boxes by image id, which then ride in the target
    contents: Contents | None = None  # where the image files are, if not at their names
    resize: Resize | None = None  # to which size images are brought, after the augmentation
    pixels: PixelType = RGB  # the channels and values of images

    def __post_init__(self) -> None:
        if self.augment is not None:
            _check(self.augment, self.annotations, self.pixels)

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, key: Key) -> tuple[Tensor, Target]:
        """Read one image, ``[C, H, W]`` uint8 or float32 in 0..1, channels last in memory, and its target.

        The key is the epoch and the index of the image, and where the epoch has it again, how often before; a `Repeat` marks its
        target as ``repeated``. A DataError if the image, or one that is combined with it, cannot be read, or is not of the
        annotated size.
        """
        epoch, index, *again = key
        draws = (self.seed, epoch, index, *draws_again(again))
        height, width = self.annotations.sizes[index].tolist()
        side, near = 0, (height, width)
        if self.resize is not None:
            side = self.resize.draw(draws)
            near = self.resize.size_to_read(near, side, self.augment.magnification if self.augment else 1.0)
        image, target = self._read(index, near)
        if self.augment is not None:
            masks = None if self.annotations.segmentations is None else self.masks
            image, target = self.augment(image, target, draws, Neighbors(len(self), index, self.read, masks))
        if self.resize is not None:
            image, target = self.resize(image, target, side)
            if self.augment is None:  # else there may be no way back
                target["file_size"] = (height, width)
        if isinstance(key, Repeat):
            target["repeated"] = True
        return image, target

    def read(self, index: int) -> tuple[Tensor, Target]:
        """Read one image as it is in its file, with its target; errors are those of an item."""
        height, width = self.annotations.sizes[index].tolist()
        return self._read(index, (height, width))

    def masks(self, index: int) -> npt.NDArray[np.bool_]:
        """The instance masks of one image, ``[G, H, W]``, in pixels of its file."""
        return draw_masks(self.annotations, index)

    def _read(self, index: int, size: Size) -> tuple[Tensor, Target]:
        """An image and its target at a size that is not above that of the file."""
        height, width = self.annotations.sizes[index].tolist()
        if self.contents is None:
            path, content = self.annotations.root / str(self.annotations.file_names[index]), None
        else:
            path, content = self.contents.name(index), self.contents.read(index)
        if self.annotations.windows is None:
            decoded = read_reduced(path, size, content, self.pixels)
        else:
            whole = read_image(path, content, self.pixels)
            x1, y1, x2, y2 = self.annotations.windows[index].tolist()
            part = whole[:, y1:y2, x1:x2]
            decoded = Reduced(part, (part.shape[1], part.shape[2]), 1)
        check_size(path, decoded.size, (height, width))
        if size == (height, width):
            return decoded.pixels, self.target(index)
        image = resample(decoded.pixels, size, (height / decoded.factor, width / decoded.factor))
        return image, targets_to_batch([self.target(index)], [(height, width)], [size])[0]

    def target(self, index: int) -> Target:
        """The ground truth of one image, in pixels of its file; nothing is read."""
        a = self.annotations
        rows = slice(*a.offsets[index : index + 2].tolist())
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


def _check(augment: Augment, annotations: Annotations, pixels: PixelType) -> None:
    combine = augment.combine
    if len(annotations) < combine.images:
        raise DataError(f"{annotations.root}: {combine.too_few(len(annotations))}")
    if combine.masks:
        check_segmentations(annotations)
    augment.check(pixels)


def start_worker(_: int) -> None:
    """Give a data worker one thread: the workers are what runs in parallel.

    What came with the fork is taken from the collector of cycles, which would write to all of it, and so copy it. A signal that
    asks the training to stop reaches the workers too (Ctrl-C, a cluster's preemption); they go on, since the main process still
    needs batches to finish its step, and ends them itself: by a message, or by SIGTERM where that does not help.
    """
    gc.freeze()
    torch.set_num_threads(1)
    for name in ("SIGINT", "SIGHUP", "SIGUSR1"):
        if hasattr(signal, name):  # Windows has the first alone
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    # the first is ignored, the next one ends this process
    signal.signal(signal.SIGTERM, lambda number, _: signal.signal(number, signal.SIG_DFL))
