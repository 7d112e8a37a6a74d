"""Random boxes and feature maps that several test folders share."""

from __future__ import annotations

from collections.abc import Sequence

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


def overlap(one: Sequence[float], other: Sequence[float], over_first: bool = False) -> float:
    """The IoU of two boxes, or the part of the first that is covered, from the definition; 0 where nothing is shared."""
    width, height = (min(one[k + 2], other[k + 2]) - max(one[k], other[k]) for k in (0, 1))
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return width * height / (areas[0] if over_first else sum(areas) - width * height)


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
