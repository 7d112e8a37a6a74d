"""Augmentation of an image together with its boxes and proposals: the one adapter over albumentations.

Three things are kept from albumentations. It returns labels as floats, so that 16777217 becomes 16777216: only row
numbers pass through it. It raises for boxes that stick out of the image: they are clipped before. It gives each
transform of a pipeline the same seed, which would tie a crop to a flip: each gets its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from detpipe.types import Target

if TYPE_CHECKING:
    import albumentations


LARGEST_CROP = 0.2  # largest part that a crop cuts from each side


@dataclass(frozen=True)
class Augment:
    """What may happen to a training image, its boxes and its proposals.

    Args:
        flip: probability of a left-right flip, 0 to 1.
        scale_jitter: smallest and largest zoom, such as ``[0.8, 1.25]``; the image keeps its size: what is zoomed in is
            cut at a random place, what is zoomed out is put at a random place on a grey ground. Null for none.
        crop: probability of cutting a random part, up to a fifth, from each side, 0 to 1.
        color: strength of the change of brightness, contrast and saturation, 0 (none) to 1; 0.4 means a factor of 0.6
            to 1.4. The hue turns by up to a tenth of it.
        min_visibility: boxes of which less than this fraction is left in the picture are removed, 0 to 1.
        vertical_flip: probability of a top-bottom flip, 0 to 1; for images without an upright, such as microscopy.
    """

    flip: float = 0.5
    scale_jitter: tuple[float, float] | None = None
    crop: float = 0.0
    color: float = 0.0
    min_visibility: float = 0.25
    vertical_flip: float = 0.0

    def __post_init__(self) -> None:
        for name in ("flip", "vertical_flip", "crop", "color", "min_visibility"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in 0..1, got {getattr(self, name)}")
        if self.scale_jitter is not None:
            object.__setattr__(self, "scale_jitter", tuple(self.scale_jitter))  # a list could not be hashed
            if len(self.scale_jitter) != 2 or not 0.1 <= self.scale_jitter[0] <= self.scale_jitter[1] <= 10:
                raise ValueError(f"scale_jitter must be [smallest, largest] within 0.1..10, got {self.scale_jitter}")

    @property
    def magnification(self) -> float:
        """By how much a part of the picture may be enlarged compared with the whole, if the result has the size of the whole."""
        cut = 1 / (1 - 2 * LARGEST_CROP) if self.crop else 1.0
        return cut * max(1.0, self.scale_jitter[1] if self.scale_jitter else 1.0)

    def __call__(self, image: Tensor, target: Target, seed: int | Sequence[int]) -> tuple[Tensor, Target]:
        """Transform one image with everything that belongs to it.

        Args:
            image: ``[3, H, W]`` uint8.
            target: boxes in pixels of the image, and what else is known of them; not changed.
            seed: non-negative numbers that decide every draw, such as (seed, epoch, index).

        Returns:
            The new image ``[3, H', W']`` uint8, channels last in memory, and its target. Boxes, and all that is said of them, and
            proposals are those that are still visible; the area shrinks and grows with the box.
        """
        from detpipe.datasets.transforms_pipeline import (
            build_pipeline,
        )  # takes seconds to import, and only training needs it

        pipeline = build_pipeline(self)
        reseed(pipeline, seed)
        boxes, rows = _stack(target, image.shape[2], image.shape[1])
        out = pipeline(image=np.ascontiguousarray(image.permute(1, 2, 0).numpy()), bboxes=boxes, rows=rows)
        moved = torch.from_numpy(np.ascontiguousarray(out["image"])).permute(2, 0, 1)
        return moved, _unstack(
            target, np.asarray(out["bboxes"]), np.asarray(out["rows"]), moved.shape[2], moved.shape[1]
        )


def reseed(pipeline: albumentations.Compose, seed: int | Sequence[int]) -> None:
    """Draw an own seed for every transform; costs tens of microseconds.

    Args:
        pipeline: whose transforms get other seeds.
        seed: non-negative numbers that decide them.
    """
    seeds = np.random.SeedSequence(seed).generate_state(len(pipeline.transforms))
    for transform, own in zip(pipeline.transforms, seeds.tolist(), strict=True):
        transform.set_random_seed(own)


def _stack(target: Target, width: int, height: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Boxes, then proposals, clipped to the image [M, 4], and their row numbers [M]; those outside are left out."""
    empty = torch.empty(0, 4)
    both = torch.cat([target.get("boxes", empty), target.get("proposals", empty)]).double().numpy()
    clipped = both.clip(0, [width, height, width, height])
    rows = np.flatnonzero((clipped[:, 2:] > clipped[:, :2]).all(1))
    return clipped[rows], rows


def _unstack(target: Target, boxes: npt.NDArray[Any], rows: npt.NDArray[Any], width: int, height: int) -> Target:
    """Distribute what is left of the stack [M', 4] to boxes and proposals again."""
    box = torch.from_numpy(boxes.reshape(-1, 4).clip(0, [width, height, width, height])).float()
    row = torch.from_numpy(rows.reshape(-1).astype(np.int64))
    sized = (box[:, 2:] > box[:, :2]).all(1)
    box, row = box[sized], row[sized]
    before = target.get("boxes", torch.empty(0, 4))
    kept, moved = row[row < len(before)], box[row < len(before)]
    result = target.copy()
    result["boxes"] = moved
    for name in ("labels", "iscrowd", "difficult"):
        if (values := target.get(name)) is not None:
            result[name] = values[kept]
    if (area := target.get("area")) is not None:
        result["area"] = area[kept] * _area(moved) / _area(before[kept])
    if "proposals" in target:
        result["proposals"] = box[row >= len(before)]
    return result


def _area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).prod(1)
