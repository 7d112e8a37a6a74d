"""Random boxes and feature maps that several test folders share."""

from __future__ import annotations

import torch
from torch import Tensor

from detpipe.types import Target


def random_boxes(count: int, height: float = 60, width: float = 80, whole: bool = False, smallest: float = 2) -> Tensor:
    """Boxes ``[count, 4]`` inside an image; whole numbers make overlaps hit thresholds exactly."""
    low = torch.rand(count, 2) * torch.tensor([width - smallest, height - smallest])
    size = smallest + torch.rand(count, 2) * (torch.tensor([width, height]) - low - smallest)
    boxes = torch.cat((low, low + size), dim=1)
    if whole:
        boxes = torch.cat((boxes[:, :2].floor(), boxes[:, 2:].ceil()), dim=1)
    return boxes


def random_target(objects: int, classes: int = 3, height: float = 60, width: float = 80) -> Target:
    """Objects of random classes, none of them crowd or difficult."""
    return Target(
        boxes=random_boxes(objects, height, width, smallest=8), labels=torch.randint(1, classes + 1, (objects,))
    )


def pyramid(
    images: int, strides: dict[str, int], channels: int = 4, height: int = 64, width: int = 96
) -> dict[str, Tensor]:
    """Random feature maps of a batch of images ``[height, width]``."""
    return {
        level: torch.rand(images, channels, -(-height // stride), -(-width // stride))
        for level, stride in strides.items()
    }
