"""What of the optional packages a test needs, and the images that the tests of sources share."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
import torch

from detpipe.boxes import iou
from detpipe.proposals import ImageProposals

Image = npt.NDArray[np.uint8]

scikit_image = pytest.mark.skipif(importlib.util.find_spec("skimage") is None, reason="needs scikit-image")
contrib = pytest.mark.skipif(not hasattr(cv2, "ximgproc"), reason="needs OpenCV's extra modules (cv2.ximgproc)")

PLACES = ((12, 20, 60, 90), (40, 8, 110, 40), (70, 50, 125, 90))  # xyxy in images of 100 x 140 pixels
SIZE = (100, 140)


class Emptied(dict[Any, Any]):
    """A cache that another thread empties at once."""

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


def noise(height: int, width: int, seed: int = 0) -> Image:
    """A gray ground that is not quite even."""
    return np.random.default_rng(seed).integers(70, 90, (height, width, 3)).astype(np.uint8)


def planted(
    box: tuple[int, int, int, int], shape: str = "rectangle", seed: int = 0, size: tuple[int, int] = SIZE
) -> Image:
    """A bright rectangle, or the ellipse that fills it, on noise."""
    image = noise(*size, seed)
    x1, y1, x2, y2 = box
    rows, columns = np.mgrid[0 : size[0], 0 : size[1]] + 0.5
    if shape == "rectangle":
        inside = (rows > y1) & (rows < y2) & (columns > x1) & (columns < x2)
    else:
        inside = ((rows - (y1 + y2) / 2) / (y2 - y1) * 2) ** 2 + ((columns - (x1 + x2) / 2) / (x2 - x1) * 2) ** 2 < 1
    bright = np.random.default_rng(seed + 100).integers(190, 210, (*size, 3))
    return np.where(inside[..., None], bright + np.array([30, 0, -30]), image).clip(0, 255).astype(np.uint8)


def odd_images() -> dict[str, Image]:
    """Images that are unlike photographs."""
    gray = np.repeat(planted(PLACES[0])[:, :, :1], 3, axis=2)
    ramp = np.repeat(np.tile(np.arange(200, dtype=np.uint8), (8, 1))[..., None], 3, axis=2)
    return {
        "gray": gray,
        "black": np.zeros((40, 60, 3), np.uint8),
        "white": np.full((40, 60, 3), 255, np.uint8),
        "flat and wide": ramp,
        "narrow and high": np.ascontiguousarray(noise(200, 8)),
        "smallest": noise(8, 8),
        "strided": planted(PLACES[0])[::2, ::-2],
    }


def best_overlap(boxes: np.ndarray, box: tuple[int, int, int, int]) -> float:
    """The IoU of a box with the one of ``boxes`` that fits best."""
    return iou(torch.tensor([box], dtype=torch.float32), torch.from_numpy(boxes)).max().item()


def is_the_same_every_time(make: Callable[[], Any]) -> None:
    """Twice in one instance, and in a new one that has seen other images before."""
    image, source, other = planted(PLACES[0]), make(), make()
    boxes, scores = source.propose(image)
    other.propose(planted(PLACES[1], seed=5))
    for again in (source, other):
        assert np.array_equal(again.propose(image)[0], boxes)
        assert np.array_equal(again.propose(image)[1], scores)
    assert len(boxes) > 0
    flipped = np.ascontiguousarray(image[:, ::-1])[:, ::-1]  # the same pixels behind negative strides
    assert np.array_equal(source.propose(flipped)[0], boxes)


def boxes_are_sound(boxes: np.ndarray, scores: np.ndarray, image: Image, source: ImageProposals) -> None:
    """Inside the image, each once, best first, no smaller or more than asked for."""
    height, width = image.shape[:2]
    assert boxes.dtype == scores.dtype == np.float32
    assert boxes.shape == (len(scores), 4)
    assert np.isfinite(boxes).all()
    assert np.isfinite(scores).all()
    assert (boxes >= 0).all()
    assert (boxes[:, 2:] <= [width, height]).all()
    assert (boxes[:, 2:] - boxes[:, :2] >= max(source.min_size, 1e-6)).all()
    assert (np.diff(scores) <= 0).all()
    assert len(np.unique(boxes, axis=0)) == len(boxes) <= (source.max_boxes or 10**9)
