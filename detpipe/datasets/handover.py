"""How a batch gets from a data worker to the main process: its pixels in one piece of shared memory, all else by value.

A tensor that leaves a worker costs a file in shared memory and a message over a socket, each; a batch of eight images has some
fifty of them (boxes, labels, flags, ...). Small arrays travel faster inside the message about the batch itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from detpipe.types import Target

Batch = tuple[list[Tensor], list[Target]]


@dataclass(frozen=True)
class PackedBatch:
    """A batch on its way.

    Args:
        pixels: ``[B]`` uint8, the images one after the other, row by row, three channels a pixel.
        sizes: N times height and width.
        targets: N targets, with arrays in place of tensors.
    """

    pixels: Tensor
    sizes: list[tuple[int, int]]
    targets: list[dict[str, Any]]

    def unpack(self) -> Batch:
        """N images ``[3, H_i, W_i]`` uint8, channels last in memory, and N targets; no pixels are copied."""
        parts = self.pixels.split([3 * height * width for height, width in self.sizes])
        images = [p.view(h, w, 3).permute(2, 0, 1) for p, (h, w) in zip(parts, self.sizes, strict=True)]
        targets = [
            {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in target.items()}
            for target in self.targets
        ]
        return images, [cast(Target, target) for target in targets]

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory, all pixels by one copy; the data loader calls this where it is to pin."""
        images, targets = PackedBatch(self.pixels.pin_memory(), self.sizes, self.targets).unpack()
        pinned = [{k: v.pin_memory() if isinstance(v, Tensor) else v for k, v in target.items()} for target in targets]
        return images, [cast(Target, target) for target in pinned]


def collate(samples: list[tuple[Tensor, Target]]) -> Batch | PackedBatch:
    """Keep the images of a batch apart: they are padded, and resized where the data have not, together on the device.

    Args:
        samples: pairs of image, ``[3, H, W]`` uint8, and target.

    Returns:
        In the main process the images and their targets, in the same order; in a data worker both packed.
    """
    images, targets = (list(column) for column in zip(*samples, strict=True))
    if get_worker_info() is None:
        return images, targets
    return pack(images, targets)


def pack(images: list[Tensor], targets: list[Target]) -> PackedBatch:
    """Copy images into shared memory, once.

    Args:
        images: N images ``[3, H_i, W_i]`` uint8.
        targets: N targets.

    Returns:
        The packed batch.
    """
    total = sum(image.numel() for image in images)
    # as torch's default_collate does: written where the main process will read it
    pixels = torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(total))
    sizes = [(image.shape[1], image.shape[2]) for image in images]
    parts = pixels.split([image.numel() for image in images])
    for part, image in zip(parts, images, strict=True):
        part.view(image.shape[1], image.shape[2], 3).copy_(image.permute(1, 2, 0))
    arrays = [{k: v.numpy() if isinstance(v, Tensor) else v for k, v in target.items()} for target in targets]
    return PackedBatch(pixels, sizes, arrays)
