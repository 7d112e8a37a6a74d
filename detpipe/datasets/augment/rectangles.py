"""Maps of one rectangle of whole pixels onto another: images and boxes move by exactly the same.

A rectangle is ``x1, y1, x2, y2`` in whole pixels, right and lower edge excluded. Importing this module imports OpenCV.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

Rectangle = tuple[int, int, int, int]
Pixels = npt.NDArray[Any]  # uint8, or float32 in 0..1
Boxes = npt.NDArray[np.float64]

GROUND = (124, 116, 104)  # RGB, the mean color of ImageNet: what a network calls zero

cv2.setNumThreads(0)  # data workers are what runs in parallel; threads of OpenCV do not survive a fork


def resized(image: Pixels, source: Rectangle, goal: Rectangle) -> Pixels:
    """Cut out a rectangle and resize it.

    Args:
        image: ``[H, W, C]`` or ``[H, W]``, uint8 or float32.
        source: inside the image.
        goal: whose size is wanted.

    Returns:
        ``[h, w, C]`` or ``[h, w]`` of the same type, as large as the goal; averaged where it shrinks.
    """
    x1, y1, x2, y2 = source
    u1, v1, u2, v2 = goal
    shrinks = (u2 - u1) * (v2 - v1) < (x2 - x1) * (y2 - y1)
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    cut, size = image[y1:y2, x1:x2], (u2 - u1, v2 - v1)
    # OpenCV averages no more than four channels, and drops the axis of a single one
    parts = [cut] if cut.ndim == 2 else [cut[:, :, k : k + 4] for k in range(0, cut.shape[2], 4)]
    out = [np.asarray(cv2.resize(part, size, interpolation=interpolation), dtype=image.dtype) for part in parts]
    if cut.ndim == 2:
        return out[0]
    return out[0].reshape(*size[::-1], -1) if len(out) == 1 else np.dstack(out)


def ground(image: Pixels) -> Pixels:
    """What an image is filled up with, a value a channel: the mean color, its three values repeated.

    Args:
        image: ``[H, W, C]``.

    Returns:
        ``[C]`` of the same type.
    """
    color = np.array([GROUND[k % 3] for k in range(image.shape[2])])
    return (color if image.dtype == np.uint8 else color / 255).astype(image.dtype)


def moved(boxes: Boxes, source: Rectangle, goal: Rectangle) -> Boxes:
    """Move boxes as :func:`resized` moves pixels.

    Args:
        boxes: ``[M, 4]`` xyxy in the frame of the source, which may reach beyond it.
        source: mapped onto the goal.
        goal: in another frame.

    Returns:
        ``[M, 4]`` in the frame of the goal, not clipped.
    """
    start, length = np.array(source[:2]), np.subtract(source[2:], source[:2])
    to, reach = np.array(goal[:2]), np.subtract(goal[2:], goal[:2])
    return (boxes - np.tile(start, 2)) * np.tile(reach / length, 2) + np.tile(to, 2)


def areas(boxes: Boxes) -> npt.NDArray[np.float64]:
    """Areas ``[M]`` of boxes ``[M, 4+]``; 0 where a box has no size."""
    return (boxes[:, 2:4] - boxes[:, :2]).clip(min=0).prod(1)


def clipped(boxes: Boxes, frame: Rectangle | Boxes) -> Boxes:
    """Cut boxes ``[M, 4]`` off at a rectangle; those outside are left without a size."""
    x1, y1, x2, y2 = frame
    return boxes.clip([x1, y1, x1, y1], [x2, y2, x2, y2])
