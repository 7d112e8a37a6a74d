"""The albumentations pipelines behind `Views`; importing this module imports albumentations and OpenCV."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

# first: it keeps albumentations from the network, and OpenCV from threads that a fork does not survive
from detpipe.datasets.transforms_pipeline import color_jitter  # isort: skip

import albumentations

from detpipe.datasets.transforms import reseed
from detpipe.datasets.views import Views


def training(views: Views, seed: int | Sequence[int]) -> albumentations.Compose:
    """The pipeline of training.

    Args:
        views: how images become squares.
        seed: non-negative numbers that decide every draw.

    Returns:
        A pipeline over ``image``, valid until the next call.
    """
    pipeline = _training(views)
    reseed(pipeline.transforms, seed)
    return pipeline


@lru_cache(maxsize=8)
def evaluation(views: Views) -> albumentations.Compose:
    """The pipeline of evaluation, over a square ``image``."""
    side = max(views.size, round(views.size / views.center))
    return albumentations.Compose(
        [
            albumentations.Resize(side, side, area_for_downscale="image"),
            albumentations.CenterCrop(views.size, views.size),
        ]
    )


@lru_cache(maxsize=8)
def _training(views: Views) -> albumentations.Compose:
    steps: list[Any] = [
        albumentations.RandomResizedCrop(
            (views.size, views.size), views.scale, views.ratio, area_for_downscale="image", p=1.0
        ),
        albumentations.HorizontalFlip(p=views.flip),
    ]
    if views.color:
        steps.append(color_jitter(views.color))
    return albumentations.Compose(steps)
