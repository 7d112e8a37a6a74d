"""What the regions of a segmented image look like: size, box, neighbors, and histograms of color and texture.

Uijlings, van de Sande, Gevers, Smeulders, "Selective Search for Object Recognition", 2013, section 3.2.

Shapes: H, W image, C channels, R regions, E pairs of neighbors.
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

Image = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]

COLOR_BINS = 25  # for each channel
TEXTURE_BINS = 20  # for each channel and direction; the paper has 10 for each of 8 half directions
STEEPEST = 32.0  # gray levels a pixel, in the last texture bin


class Regions(NamedTuple):
    """The parts that an image is divided into."""

    sizes: Floats  # [R] pixels
    boxes: Floats  # [R, 4] xyxy
    first: Ints  # [E] one region of each pair of neighbors
    second: Ints  # [E] the other one, with the higher number
    color: Floats  # [R, C * COLOR_BINS], the sum of a row is 1
    texture: Floats  # [R, C * 4 * TEXTURE_BINS], the sum of a row is 1


def describe(labels: Ints, color_bins: Image, texture_bins: Image) -> Regions:
    """Describe the regions of labels ``[H, W]``, numbered from 0 without gaps, by bins ``[H, W, C]`` and ``[H, W, 4 * C]``."""
    count = int(labels.max()) + 1
    return Regions(
        np.bincount(labels.ravel(), minlength=count).astype(np.float32),
        bounding_boxes(labels, count),
        *neighbors(labels, count),
        _histograms(labels, count, color_bins, COLOR_BINS),
        _histograms(labels, count, texture_bins, TEXTURE_BINS),
    )


def quantize_color(image: Image) -> Image:
    """Sort values ``[H, W, C]`` in 0..255 into bins of equal width, 0..COLOR_BINS - 1."""
    return (image.astype(np.uint16) * COLOR_BINS >> 8).astype(np.uint8)


def quantize_texture(image: Image) -> Image:
    """Sort derivatives of ``[H, W, C]`` in four directions into bins, narrower ones for smaller slopes.

    The paper takes Gaussian derivatives in eight directions; those of opposite directions differ only in their sign.

    Returns:
        ``[H, W, 4 * C]`` in 0..TEXTURE_BINS - 1, for the directions 0, 90, 45 and -45 degrees.
    """
    smooth = cv2.GaussianBlur(image.astype(np.float32), (0, 0), 1.0).reshape(image.shape)
    x, y = (cv2.Sobel(smooth, -1, *axis, ksize=1).reshape(image.shape) / 2 for axis in ((1, 0), (0, 1)))
    half = np.float32(np.sqrt(0.5))
    bins = []
    for slope in (x, y, (x + y) * half, (x - y) * half):
        size = np.sqrt(np.minimum(np.abs(slope) / np.float32(STEEPEST), 1))
        signed = np.copysign(size, slope) * (TEXTURE_BINS // 2) + TEXTURE_BINS // 2
        bins.append(np.minimum(signed, TEXTURE_BINS - 1).astype(np.uint8))
    return np.concatenate(bins, axis=2)


def bounding_boxes(labels: Ints, count: int) -> Floats:
    """Find the box ``[R, 4]`` xyxy around each region of labels ``[H, W]``; zeros for a region without pixels.

    Example:
        >>> bounding_boxes(np.array([[0, 1, 1], [0, 0, 1]], np.int32), 2).tolist()
        [[0.0, 0.0, 2.0, 2.0], [1.0, 0.0, 3.0, 2.0]]
    """
    height, width = labels.shape
    boxes = np.zeros((count, 4), np.float32)
    # of several values that are assigned to one place the last one stays
    by_row, rows = labels.ravel(), np.repeat(np.arange(height), width)
    boxes[by_row[::-1], 1] = rows[::-1]
    boxes[by_row, 3] = rows + 1
    by_column, columns = labels.T.ravel(), np.repeat(np.arange(width), height)
    boxes[by_column[::-1], 0] = columns[::-1]
    boxes[by_column, 2] = columns + 1
    return boxes


def neighbors(labels: Ints, count: int) -> tuple[Ints, Ints]:
    """Find the pairs of regions of labels ``[H, W]`` that share a border between two pixels, beside or above each other.

    Returns:
        ``[E]`` and ``[E]``: the lower and the higher number of each pair, sorted.

    Example:
        >>> [side.tolist() for side in neighbors(np.array([[0, 1], [2, 2]], np.int32), 3)]
        [[0, 0, 1], [1, 2, 2]]
    """
    pairs = []
    for one, other in ((labels[:, :-1], labels[:, 1:]), (labels[:-1], labels[1:])):
        border = one != other
        first, second = one[border].astype(np.int64), other[border].astype(np.int64)
        pairs.append(np.minimum(first, second) * count + np.maximum(first, second))
    both = np.unique(np.concatenate(pairs))
    return (both // count).astype(np.int32), (both % count).astype(np.int32)


def _histograms(labels: Ints, count: int, bins: Image, number: int) -> Floats:
    """Count the bins in each region: ``[R, channels * number]``, rows of sum 1."""
    channels = bins.shape[2]
    width = channels * number
    start = labels.ravel().astype(np.int64) * width
    counts = np.zeros(count * width, np.int64)
    for channel in range(channels):
        counts += np.bincount(
            start + (bins[:, :, channel].ravel().astype(np.int64) + channel * number), minlength=count * width
        )
    histograms = counts.reshape(count, width).astype(np.float32)
    return histograms / histograms.sum(axis=1, keepdims=True)
