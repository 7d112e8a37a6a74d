"""The albumentations pipeline behind `Augment`; importing this module imports albumentations and OpenCV."""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # or the import asks the network for a newer version

import albumentations
import cv2
import numpy as np
import numpy.typing as npt
from albumentations.core.type_definitions import Targets

from detpipe.datasets.transforms import LARGEST_CROP, Augment

_GROUND = (124, 116, 104)  # RGB, the mean color of ImageNet: what a network calls zero
_LEAST = 0.01  # pixels; or a box that has left the image stays, without a size, and raises
_HUE = 0.1  # of the strength of the other color changes

cv2.setNumThreads(0)  # data workers are what runs in parallel; threads of OpenCV do not survive a fork


@lru_cache(maxsize=8)
def build_pipeline(augment: Augment) -> albumentations.Compose:
    """Build the pipeline of a configuration, once a process.

    Args:
        augment: what may happen to an image.

    Returns:
        A pipeline over ``image``, ``bboxes`` and ``rows``. Boxes are clipped and judged by their visible part at
        the very end, so that the steps before do not hide how much of a box was lost.
    """
    steps: list[Any] = [albumentations.HorizontalFlip(p=augment.flip)]
    if augment.vertical_flip:
        steps.append(albumentations.VerticalFlip(p=augment.vertical_flip))
    if augment.scale_jitter is not None:
        steps.append(Zoom(augment.scale_jitter))
    if augment.crop:
        steps.append(albumentations.RandomCropFromBorders(*[LARGEST_CROP] * 4, p=augment.crop))
    if augment.color:
        steps.append(color_jitter(augment.color))
    params = albumentations.BboxParams(
        format="pascal_voc",
        label_fields=["rows"],
        min_visibility=augment.min_visibility,
        min_width=_LEAST,
        min_height=_LEAST,
        check_each_transform=False,
    )
    return albumentations.Compose(steps, bbox_params=params)


def color_jitter(strength: float) -> albumentations.ColorJitter:
    """Change brightness, contrast, saturation and, by less, the hue.

    Args:
        strength: 0 to 1; 0.4 means a factor of 0.6 to 1.4.

    Returns:
        A transform that is always applied.
    """
    change, hue = (1 - strength, 1 + strength), (-_HUE * strength, _HUE * strength)
    return albumentations.ColorJitter(change, change, change, hue, p=1.0)


class Zoom(albumentations.DualTransform):
    """Zoom the content of an image without changing the size of the image.

    Zooming in cuts a random window and enlarges it to the image; zooming out shrinks the image and puts it at a random
    place. Both are a map of one rectangle of whole pixels onto another, so the boxes move exactly as the pixels do.

    Args:
        scale: smallest and largest zoom factor; the logarithm of the factor is uniform.
    """

    _targets = (Targets.IMAGE, Targets.BBOXES)

    def __init__(self, scale: tuple[float, float]) -> None:
        super().__init__(p=1.0)
        self.scale = scale

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draw the zoom factor and the place; rectangles are ``x1, y1, x2, y2``."""
        height, width = params["shape"][:2]
        factor = float(np.exp(self.py_random.uniform(*np.log(self.scale))))
        part = factor if factor < 1 else 1 / factor  # the smaller rectangle, as a part of the image
        w, h = max(1, round(width * part)), max(1, round(height * part))
        x, y = self.py_random.randint(0, width - w), self.py_random.randint(0, height - h)
        whole, window = (0, 0, width, height), (x, y, x + w, y + h)
        return {"source": whole, "goal": window} if factor < 1 else {"source": window, "goal": whole}

    def apply(self, img: npt.NDArray[np.uint8], source: Any, goal: Any, **params: Any) -> npt.NDArray[np.uint8]:
        """Resize the source rectangle of ``[H, W, 3]`` into the goal rectangle of a grey image."""
        x1, y1, x2, y2 = source
        u1, v1, u2, v2 = goal
        shrinks = u2 - u1 < x2 - x1
        content = cv2.resize(
            img[y1:y2, x1:x2], (u2 - u1, v2 - v1), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        )
        out = np.empty_like(img)
        out[:] = _GROUND
        out[v1:v2, u1:u2] = content
        return out

    def apply_to_bboxes(
        self, bboxes: npt.NDArray[np.float64], source: Any, goal: Any, **params: Any
    ) -> npt.NDArray[np.float64]:
        """Move boxes ``[M, 4+]``, which albumentations measures in image sizes."""
        height, width = params["shape"][:2]
        size = np.array([width, height, width, height], dtype=np.float64)
        start, length = np.array(source[:2]), np.array(source[2:]) - source[:2]
        to, reach = np.array(goal[:2]), np.array(goal[2:]) - goal[:2]
        moved = bboxes.astype(np.float64)
        moved[:, :4] = ((moved[:, :4] * size - np.tile(start, 2)) * np.tile(reach / length, 2) + np.tile(to, 2)) / size
        return moved
