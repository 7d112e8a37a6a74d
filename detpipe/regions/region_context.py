"""Where to look for a region: itself, larger boxes around it, the whole image; and what boxes can be looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from detpipe import boxes as box_ops
from detpipe.support.numbers import check_numbers


@dataclass(frozen=True)
class Context:
    """Where to look for each region. What is pooled there is joined, so each entry adds its own weights.

    Args:
        factors: the region is looked at once for each, enlarged about its center by this factor and clipped to the image.
        whole_image: look at the whole image, too.

    Raises:
        ValueError: no factor, or one that is not positive.
    """

    factors: tuple[float, ...] = (1.0, 2.0)
    whole_image: bool = False

    def __post_init__(self) -> None:
        check_numbers("must be positive and finite", "context.", factors=self.factors)
        if not self.factors:
            raise ValueError("context.factors: expected at least one positive number, got []")

    @property
    def places(self) -> int:
        """How many places are looked at for a region."""
        return len(self.factors) + self.whole_image


def enlarge(boxes: Tensor, factor: float, height: int, width: int) -> Tensor:
    """Enlarge boxes ``[P, 4]`` xyxy by a factor about the centers of their visible parts, inside an image of some height and width.

    Returns:
        ``[P, 4]`` with a positive size: boxes are at least one pixel wide and high before they are clipped.

    Example:
        >>> enlarge(torch.tensor([[2.0, 4.0, 6.0, 6.0]]), 2.0, 20, 7)
        tensor([[0., 3., 7., 7.]])
    """
    visible = box_ops.clip(boxes, height, width)
    low, high = visible[:, :2], visible[:, 2:]
    center, half = (low + high) / 2, ((high - low) * factor).clamp(min=1.0) / 2
    return box_ops.clip(torch.cat((center - half, center + half), dim=1), height, width)


def check_regions(images: Sequence[Tensor], boxes: Sequence[Tensor]) -> None:
    """Refuse images ``[3, H_i, W_i]`` and boxes ``[P_i, 4]`` xyxy that cannot be looked at, and say where they are.

    The values of boxes are looked at on the CPU only, where that costs nothing.

    Raises:
        ValueError: another number or shape; or a box that is not finite, has no area, or lies outside of its image.
    """
    if not len(images) or len(images) != len(boxes):
        raise ValueError(f"expected images and one tensor of boxes for each, got {len(images)} and {len(boxes)}")
    for index, (image, one) in enumerate(zip(images, boxes, strict=True)):
        if image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
            raise ValueError(f"images[{index}] must be [3, H, W] with H, W > 0, got {list(image.shape)}")
        if one.ndim != 2 or one.shape[1] != 4:
            raise ValueError(f"boxes[{index}] must be [P, 4] (x1, y1, x2, y2), got {list(one.shape)}")
        if one.device.type != "cpu":
            continue
        height, width = image.shape[1:]
        seen = box_ops.valid(one) & (box_ops.area(box_ops.clip(one, height, width)) > 0)
        for box in (~seen).nonzero()[:1, 0].tolist():
            raise ValueError(
                f"boxes[{index}], box {box}: expected finite [x1, y1, x2, y2] with x2 > x1 and y2 > y1 that meets the image of "
                f"{width} x {height} pixels, got {[round(value, 4) for value in one[box].tolist()]}"
            )
