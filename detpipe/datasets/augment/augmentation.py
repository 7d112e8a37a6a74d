"""Augmentation of training images together with their boxes and proposals, in a fixed order.

copy-paste, mosaic, mix-up (several images) -> flips -> zoom -> crops -> transforms of one's own -> colors -> degradation

Every draw is decided by the seed that is given, such as (seed, epoch, index).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from detpipe.datasets.augment import settings
from detpipe.types import RGB, PixelType, Target

if TYPE_CHECKING:
    from detpipe.datasets.augment.steps import Step

_DEGRADING: tuple[tuple[str, str, dict[str, settings.Value]], ...] = (  # setting, transform, its arguments
    ("blur", "GaussianBlur", {"blur_limit": 0, "sigma_limit": [0.4, 2.0]}),
    ("noise", "GaussNoise", {"std_range": [0.02, 0.1]}),
    ("jpeg", "ImageCompression", {"quality_range": [30, 90]}),
)


@dataclass(frozen=True)
class Augment:
    """What may happen to a training image, its boxes and its proposals; docs/augmentation.md shows it.

    Args:
        flip: probability of a left-right flip, 0 to 1.
        scale_jitter: smallest and largest zoom, such as ``[0.8, 1.25]``; the image keeps its size: what is zoomed in is
            cut at a random place, what is zoomed out is put at a random place on a grey ground. Null for none.
        crop: probability of cutting a random part, up to a fifth, from each side, 0 to 1.
        color: strength of the change of brightness, contrast and saturation, 0 (none) to 1; 0.4 means a factor of 0.6
            to 1.4. The hue turns by up to a tenth of it.
        min_visibility: boxes of which less than this fraction is left in the picture are removed, 0 to 1.
        vertical_flip: probability of a top-bottom flip, 0 to 1; for images without an upright, such as microscopy.
        safe_crop: a random window that keeps objects; null for none.
        photometric: changes of the colors, each with a probability; null for none.
        degrade: blur, noise and compression; null for none.
        combine: mosaic, mix-up and copy-paste, which take several images.
        transforms: transforms of albumentations by name, in their order.
    """

    flip: float = 0.5
    scale_jitter: tuple[float, float] | None = None
    crop: float = 0.0
    color: float = 0.0
    min_visibility: float = 0.25
    vertical_flip: float = 0.0
    safe_crop: settings.SafeCrop | None = None
    photometric: settings.Photometric | None = None
    degrade: settings.Degrade | None = None
    combine: settings.Combine = settings.Combine()
    transforms: tuple[settings.Transform, ...] = ()

    def __post_init__(self) -> None:
        settings.check_parts(self, "", "flip", "vertical_flip", "crop", "color", "min_visibility")
        if self.scale_jitter is not None:
            settings.check_range(self, "", "scale_jitter", 0.1, 10)
        object.__setattr__(self, "transforms", tuple(self.transforms))

    @property
    def magnification(self) -> float:
        """By how much a part of the picture may be enlarged compared with the whole, if the result has the size of the whole.

        Infinite where other images, their masks or free windows take part: then the pixels of the files are needed.
        """
        if self.combine.images > 1 or self.safe_crop is not None or self.transforms:
            return math.inf
        cut = 1 / (1 - 2 * settings.LARGEST_CROP) if self.crop else 1.0
        return cut * max(1.0, self.scale_jitter[1] if self.scale_jitter else 1.0)

    def check(self, pixels: PixelType = RGB) -> None:
        """Find what images cannot be done, or what is imported late is told wrongly, before the first image.

        A ValueError for a change of colors where there are none, or a transform that has arguments that it does not take, or that
        does not take such images.
        """
        jpeg = self.degrade is not None and self.degrade.jpeg > 0 and pixels.channels != 1
        for key, needs_colors in (("color", self.color), ("photometric", self.photometric), ("degrade.jpeg", jpeg)):
            if needs_colors and pixels.channels != 3:
                raise ValueError(
                    f"augment.{key} is for RGB images, but channels is {pixels.channels}; set it to "
                    f"{'null' if key == 'photometric' else 0}"
                )
        if self.transforms:
            from detpipe.datasets.augment.steps import try_transforms

            build_steps(self)
            try_transforms(self.transforms, pixels)

    def __call__(
        self, image: Tensor, target: Target, seed: int | Sequence[int], neighbors: settings.Neighbors | None = None
    ) -> tuple[Tensor, Target]:
        """Transform one image ``[C, H, W]``, uint8 or float32 in 0..1, with everything that belongs to it.

        The target, whose boxes are in pixels of the image, is not changed. The seed, non-negative numbers such as (seed, epoch,
        index), decides every draw. ``neighbors`` are where other images come from, for ``combine``: a ValueError if there are
        none, too few, or none with masks.

        Returns:
            The new image ``[C, H', W']`` of the same type, channels last in memory, and its target. Boxes, what is said of them and
            proposals are those that are still visible, of all images that were combined, those of this image first;
            ``image_id`` and ``file_name`` stay. The area shrinks and grows with the box.
        """
        # take seconds to import, and only training needs them
        from detpipe.datasets.augment import steps  # isort: skip (it keeps albumentations from the network)
        from detpipe.datasets.augment.mix import combine
        from detpipe.datasets.augment.sample import finish, scene_of

        now = scene_of(image, target)
        if self.combine.images > 1:
            if neighbors is None:
                raise ValueError("combine needs the other images of the set: give neighbors")
            draws = np.random.SeedSequence(seed, spawn_key=(1,))
            now = combine(self.combine, now, neighbors, draws, self.min_visibility)
        built = build_steps(self)
        for step, own in zip(built, steps.own_seeds(seed, len(built)), strict=True):
            now = step(now, own)
        return finish(now, self.min_visibility)


@lru_cache(maxsize=8)
def build_steps(augment: Augment) -> tuple[Step, ...]:
    """Build what is done to one image, in its order, once a process; a ValueError for arguments that a transform does not take."""
    from detpipe.datasets.augment import steps  # isort: skip (as above)

    built: list[Step] = [partial(steps.flip_by_chance, augment.flip, 1)]
    if augment.vertical_flip:
        built.append(partial(steps.flip_by_chance, augment.vertical_flip, 0))
    if augment.scale_jitter is not None:
        built.append(partial(steps.zoom, augment.scale_jitter))
    if augment.crop:
        built.append(partial(steps.crop_by_chance, augment.crop))
    if augment.safe_crop is not None:
        built.append(partial(steps.safe_crop, augment.safe_crop, augment.min_visibility))
    transforms = list(augment.transforms)
    if (color := augment.color) > 0:
        transforms.append(settings.color_jitter(color, color, color, settings.HUE * color))
    if (s := augment.photometric) is not None:
        transforms.append(settings.color_jitter(s.brightness, s.contrast, s.saturation, s.hue, s.p))
        transforms += [settings.Transform("ToGray", {"p": s.gray})] if s.gray else []
    for setting, name, arguments in _DEGRADING if augment.degrade else ():
        if p := getattr(augment.degrade, setting):
            transforms.append(settings.Transform(name, {**arguments, "p": p}))
    return (*built, *(partial(steps.transformed, steps.named_step(transform)) for transform in transforms))
