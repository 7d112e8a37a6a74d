"""Settings of the augmentation beyond flips and zooms: checked here, without importing albumentations.

Papers: IoU-safe crops: Liu et al., "SSD", 2016, arXiv 1512.02325, section 2.2; mosaic: Bochkovskiy et al., "YOLOv4", 2020, arXiv
2004.10934, section 3.3; mix-up of images with boxes: Zhang et al., "Bag of Freebies", 2019, arXiv 1902.04103, section 3.1;
copy-paste: Ghiasi et al., 2021, arXiv 2012.07177.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from torch import Tensor

from detpipe.datasets.augment.allowed_transforms import check_name
from detpipe.support.numbers import check_numbers
from detpipe.types import Target

Scalar = bool | int | float | str | None
Value = Scalar | list[Scalar] | list[list[Scalar]]  # what an argument may be: data, never a class or a function
Range = tuple[float, float]
LARGEST_CROP = 0.2  # largest part that a crop cuts from each side
HUE = 0.1  # of the strength of the other color changes


@dataclass(frozen=True)
class SafeCrop:
    """Cut a random window that no kept box loses too much by, and that keeps at least one object.

    Where the window would lose all objects, another is drawn, up to 50 times; then the image stays whole. Unlike SSD, the part of
    a box inside the window is measured, not the IoU of box and window, and a box is judged by it instead of by its center.

    Args:
        p: probability, 0 to 1.
        min_visibility: boxes of which less than this part stays are removed, and at least one object keeps as much, above 0 to 1;
            that of the whole augmentation, where it is larger. Crowd regions are judged by that of the whole augmentation only.
        scale: smallest and largest side of the window over that of the image, within 0.05..1.
        ratio: smallest and largest (width / height) of the window over that of the image, within 0.1..10.
    """

    p: float = 0.5
    min_visibility: float = 0.5
    scale: Range = (0.3, 1.0)
    ratio: Range = (0.5, 2.0)

    def __post_init__(self) -> None:
        check_parts(self, "safe_crop.", "p", "min_visibility")
        if self.min_visibility == 0:
            raise ValueError(
                "safe_crop.min_visibility must be above 0, or nothing is promised; for plain cuts set crop"
            )
        check_range(self, "safe_crop.", "scale", 0.05, 1)
        check_range(self, "safe_crop.", "ratio", 0.1, 10)


@dataclass(frozen=True)
class Photometric:
    """Change the colors of an image.

    Args:
        p: probability that brightness, contrast, saturation and hue change together, in random order, 0 to 1.
        brightness: 0.4 means a factor of 0.6 to 1.4; 0 to 1.
        contrast: in the same way.
        saturation: in the same way.
        hue: largest turn of the hue, 0 to 0.5 of the circle.
        gray: probability that all color is taken away, 0 to 1.
    """

    p: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.04
    gray: float = 0.0

    def __post_init__(self) -> None:
        check_parts(self, "photometric.", "p", "brightness", "contrast", "saturation", "gray")
        if not 0 <= self.hue <= 0.5:
            raise ValueError(f"photometric.hue must lie in 0..0.5, got {self.hue}")


@dataclass(frozen=True)
class Degrade:
    """Spoil an image as cameras and files do, without moving anything.

    Args:
        blur: probability of a Gaussian blur with a standard deviation of 0.4 to 2 pixels, 0 to 1.
        noise: probability of Gaussian noise with a standard deviation of 2 to 10% of white, 0 to 1.
        jpeg: probability of a JPEG compression of quality 30 to 90, 0 to 1.
    """

    blur: float = 0.0
    noise: float = 0.0
    jpeg: float = 0.0

    def __post_init__(self) -> None:
        check_parts(self, "degrade.", "blur", "noise", "jpeg")


@dataclass(frozen=True)
class Mosaic:
    """Put four images together into one of the size of the first.

    Each image fills one quadrant: a random window of it, with the shape of the quadrant, is resized. Unlike YOLOv4, the size does
    not change and no ground is seen.

    Args:
        p: probability, 0 to 1.
        center: where the quadrants meet, over width and over height, drawn from this range within 0.1..0.9.
        zoom: how much an image is enlarged beyond filling its quadrant, drawn from this range within 1..4.
    """

    p: float = 0.5
    center: Range = (0.3, 0.7)
    zoom: Range = (1.0, 1.5)

    def __post_init__(self) -> None:
        check_parts(self, "mosaic.", "p")
        check_range(self, "mosaic.", "center", 0.1, 0.9)
        check_range(self, "mosaic.", "zoom", 1, 4)


@dataclass(frozen=True)
class MixUp:
    """Blend another image into this one; the boxes of both are kept.

    The other image is resized to fit into this one, whole and at a random place; outside of it this image stays as it is. Unlike
    in the paper, the size does not change and losses are not weighted, so that an even blend is the sensible one.

    Args:
        p: probability, 0 to 1.
        alpha: the weight of this image is drawn from Beta(alpha, alpha) and kept within 0.2..0.8: 1.5 in the paper, 8 is mostly
            between 0.3 and 0.7; 0.1 to 1000.
    """

    p: float = 0.15
    alpha: float = 8.0

    def __post_init__(self) -> None:
        check_parts(self, "mixup.", "p")
        if not 0.1 <= self.alpha <= 1000:
            raise ValueError(f"mixup.alpha must lie in 0.1..1000, got {self.alpha}")


@dataclass(frozen=True)
class CopyPaste:
    """Paste objects of another image, cut out along their masks.

    Needs instance masks: data in COCO layout with ``segmentation``, or YOLO's polygons. Crowd regions and difficult objects
    are not pasted. What a pasted object covers is taken from the objects below: their boxes shrink to what is still seen.

    Args:
        p: probability, 0 to 1.
        objects: probability that an object of the other image is pasted, above 0 to 1; one is in any case.
        scale: the other image is resized by a factor from this range within 0.1..4, and put at a random place.
        flip: probability that it is flipped left to right before, 0 to 1.
    """

    p: float = 0.3
    objects: float = 0.5
    scale: Range = (0.5, 1.5)
    flip: float = 0.5

    def __post_init__(self) -> None:
        check_parts(self, "copy_paste.", "p", "objects", "flip")
        if self.objects == 0:
            raise ValueError("copy_paste.objects must be above 0; for no copy-paste set copy_paste to null")
        check_range(self, "copy_paste.", "scale", 0.1, 4)


@dataclass(frozen=True)
class Combine:
    """What takes several images, in this order, before anything else; the others are drawn by (seed, epoch, index).

    Args:
        copy_paste: objects of another image; null for none.
        mosaic: four images in one; null for none.
        mixup: two images blended; null for none.
    """

    copy_paste: CopyPaste | None = None
    mosaic: Mosaic | None = None
    mixup: MixUp | None = None

    @property
    def images(self) -> int:
        """How many images a set must have."""
        needs = [n for n, one in ((2, self.copy_paste), (4, self.mosaic), (2, self.mixup)) if one and one.p > 0]
        return max(needs, default=1)

    def too_few(self, count: int) -> str:
        """What is wrong with a set of ``count`` images where more are needed."""
        what = "mosaic needs" if self.images == 4 else "mixup and copy_paste need"
        return f"augment.combine: {what} {self.images} images or more, got {count}; set it to null, or add images"

    @property
    def masks(self) -> bool:
        """Whether instance masks are needed."""
        return self.copy_paste is not None and self.copy_paste.p > 0


@dataclass(frozen=True)
class Transform:
    """A transform of albumentations, by its name.

    Args:
        name: of a class of albumentations that moves boxes as it moves pixels, such as ``Affine``.
        arguments: of its constructor, ``p`` among them, as numbers, texts and lists of them.
    """

    name: str
    arguments: dict[str, Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_name(self.name)

    def __hash__(self) -> int:
        return hash((self.name, json.dumps(self.arguments, sort_keys=True)))


def color_jitter(brightness: float, contrast: float, saturation: float, hue: float, p: float = 1.0) -> Transform:
    """Change brightness, contrast and saturation, each by a factor of 0.6 to 1.4 for a strength of 0.4, and turn the hue."""
    factors = {"brightness": brightness, "contrast": contrast, "saturation": saturation}
    ranges: dict[str, Value] = {name: [1 - strength, 1 + strength] for name, strength in factors.items()}
    return Transform("ColorJitter", {**ranges, "hue": [-hue, hue], "p": p})


@dataclass(frozen=True)
class Neighbors:
    """The set that an image belongs to, for what takes several images."""

    count: int  # of the images of the set
    index: int  # of this image, which is never its own neighbor
    # an index -> image ``[C, H, W]`` and its target, as in the files; errors are passed on
    read: Callable[[int], tuple[Tensor, Target]]
    # an index -> ``[G, H, W]`` bool, a mask for each box of the target; None where there are none
    masks: Callable[[int], npt.NDArray[np.bool_]] | None = None


def check_parts(settings: object, owner: str, *names: str) -> None:
    """Refuse probabilities and strengths outside of 0 to 1; ``owner``, such as ``"mosaic."``, stands before their names."""
    check_numbers("must be in 0..1", owner, **{name: getattr(settings, name) for name in names})


def check_range(settings: object, owner: str, name: str, least: float, most: float) -> None:
    """Refuse what is no ``[smallest, largest]`` within two numbers, and make it a tuple: a list could not be hashed."""
    value = tuple(getattr(settings, name))
    object.__setattr__(settings, name, value)
    if len(value) != 2 or not least <= value[0] <= value[1] <= most:
        raise ValueError(f"{owner}{name} must be [smallest, largest] within {least}..{most}, got {list(value)}")
