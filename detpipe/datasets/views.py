"""What a classifier sees of an image: a random crop in training, the center in evaluation; the adapter over albumentations.

Szegedy et al., "Going Deeper with Convolutions", 2014, arXiv 1409.4842, section 6: crops of random area and shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from detpipe.datasets.augment.augmentation import reseed

if TYPE_CHECKING:
    import albumentations


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
        object.__setattr__(self, "scale", tuple(self.scale))  # a list could not be hashed
        object.__setattr__(self, "ratio", tuple(self.ratio))
        if not 8 <= self.size <= 4096:
            raise ValueError(f"views.size must be 8 to 4096 pixels, got {self.size}")
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"views.scale must be [smallest, largest] within 0..1, got {self.scale}")
        if len(self.ratio) != 2 or not 0.1 <= self.ratio[0] <= self.ratio[1] <= 10:
            raise ValueError(f"views.ratio must be [smallest, largest] within 0.1..10, got {self.ratio}")
        if not 0 <= self.flip <= 1 or not 0 <= self.color <= 1 or not 0.1 <= self.center <= 1:
            raise ValueError(
                f"views: expected flip and color in 0..1 and center in 0.1..1, got {self.flip}, {self.color}, {self.center}"
            )

    def training(self, image: Tensor, seed: int | Sequence[int]) -> Tensor:
        """Cut, resize, flip and recolor at random.

        Args:
            image: ``[3, H, W]`` uint8.
            seed: non-negative numbers that decide every draw, such as (seed, epoch, index).

        Returns:
            ``[3, size, size]`` uint8.
        """
        pipeline = _training(self)
        reseed(pipeline.transforms, seed)
        return _applied(pipeline, image)

    def evaluation(self, image: Tensor) -> Tensor:
        """Resize and cut out the center: ``[3, H, W]`` uint8 -> ``[3, size, size]`` uint8."""
        return _applied(_evaluation(self), center_square(image))


def center_square(image: Tensor) -> Tensor:
    """Cut the largest square from the middle, so that a strip of an image is never resized as a whole.

    Args:
        image: ``[3, H, W]``.

    Returns:
        ``[3, min(H, W), min(H, W)]``, a view.
    """
    height, width = image.shape[1:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return image[:, top : top + side, left : left + side]


@lru_cache(maxsize=8)
def _training(views: Views) -> albumentations.Compose:
    # first: it keeps albumentations from the network, and OpenCV from threads that a fork does not survive
    from detpipe.datasets.augment.steps import color_jitter  # isort: skip
    import albumentations  # takes seconds

    steps: list[Any] = [
        albumentations.RandomResizedCrop(
            (views.size, views.size), views.scale, views.ratio, area_for_downscale="image", p=1.0
        ),
        albumentations.HorizontalFlip(p=views.flip),
    ]
    if views.color:
        steps.append(color_jitter(views.color))
    return albumentations.Compose(steps)


@lru_cache(maxsize=8)
def _evaluation(views: Views) -> albumentations.Compose:
    """The pipeline of evaluation, over a square image."""
    from detpipe.datasets.augment import steps  # noqa: F401 (as above)  # isort: skip
    import albumentations

    side = max(views.size, round(views.size / views.center))
    resize = albumentations.Resize(side, side, area_for_downscale="image")
    return albumentations.Compose([resize, albumentations.CenterCrop(views.size, views.size)])


def _applied(pipeline: Any, image: Tensor) -> Tensor:
    out = pipeline(image=np.ascontiguousarray(image.permute(1, 2, 0).numpy()))["image"]
    return torch.from_numpy(np.ascontiguousarray(out)).permute(2, 0, 1)
