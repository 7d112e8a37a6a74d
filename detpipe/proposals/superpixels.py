"""Boxes of superpixels, of neighboring superpixels together, and of what grows from them.

Superpixels: SLIC (Achanta et al., "SLIC Superpixels Compared to State-of-the-art Superpixel Methods", 2012, as implemented by
scikit-image) or SEEDS (Van den Bergh et al., "SEEDS: Superpixels Extracted via Energy-Driven Sampling", 2012, as
implemented by OpenCV). Growth: :mod:`detpipe.proposals.region_grouping`.

Superpixels are of similar size and follow the borders of objects: several numbers of them find objects of several sizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from detpipe.proposals.image_source import Candidates, Image, ImageProposals
from detpipe.proposals.opencv_contrib import ximgproc
from detpipe.proposals.region_grouping import group
from detpipe.proposals.regions import Floats, Ints, Regions, describe, quantize_color, quantize_texture
from detpipe.proposals.selective_search import DEFAULT_STRATEGIES, convert, in_random_order
from detpipe.regions.superpixels import check_scikit_image
from detpipe.regions.superpixels import renumber as _renumber
from detpipe.regions.superpixels import slic as _slic
from detpipe.support.numbers import check_numbers, check_whole
from detpipe.support.suggest import did_you_mean
from detpipe.types import PixelFormat

METHODS = ("slic", "seeds")


class Superpixels(ImageProposals):
    """Propose the boxes of superpixels, of pairs of neighbors, and of the regions that they merge to.

    Args:
        segments: how many superpixels an image is divided into, about; one division for each number. "seeds" makes 10 or
            more, and never more than one for 2 x 2 pixels.
        method: "slic", or "seeds", which is faster, needs OpenCV's extra modules, and divides an image into 10 or more:
            numbers that it cannot start with are moved to the nearest one that it can.
        compactness: of SLIC's superpixels; larger values make them more like squares. Not used by "seeds".
        pairs: also propose each pair of neighbors.
        grow: also propose the regions that the superpixels merge to, step by step, by their likeness.
        max_boxes: keep at most this many of an image, the best ones; None keeps all.
        min_size: leave out boxes that are less wide or less high, in pixels.
        seed: of the random part of the order.
        pixel_format: how the images of a batch were normalized: that of the backbone; None for the default one.

    Raises:
        ValueError: an unknown method, or a number that is not positive.
        UsageError: scikit-image, or for "seeds" OpenCV's extra modules, are not installed.
    """

    name: str = "superpixels"
    smallest_image: ClassVar[int] = 8

    def __init__(
        self,
        segments: Sequence[int] = (50, 100, 200, 400, 800),
        method: str = "slic",
        compactness: float = 10.0,
        pairs: bool = True,
        grow: bool = True,
        max_boxes: int | None = 2000,
        min_size: float = 4.0,
        seed: int = 0,
        pixel_format: PixelFormat | None = None,
    ) -> None:
        super().__init__(max_boxes, min_size, pixel_format)
        if method not in METHODS:
            raise ValueError(
                f"method must be one of {', '.join(METHODS)}, got {method!r}{did_you_mean(method, METHODS)}"
            )
        if not segments:
            raise ValueError(f"segments need at least one number, got {segments!r}")
        check_whole(2, segments=segments)
        check_numbers("must be positive and finite", compactness=compactness)
        check_whole(0, seed=seed)
        self.segments, self.method, self.compactness = tuple(segments), method, compactness
        self.pairs, self.grow, self.seed = pairs, grow, seed
        if method == "slic":
            check_scikit_image(self.name)
        else:
            ximgproc(f"{self.name} by SEEDS")

    def find(self, image: Image) -> Candidates:
        """Divide the image, and order the boxes."""
        color, texture = quantize_color(image), quantize_texture(image)
        divide = _slic if self.method == "slic" else _seeds
        parts = [describe(divide(image, number, self.compactness), color, texture) for number in self.segments]
        found = []
        if self.grow:
            area = float(image.shape[0] * image.shape[1])
            found.append(in_random_order(group(parts, DEFAULT_STRATEGIES, area), self.seed))
        chance = np.random.default_rng([self.seed, 1])
        for regions in parts:
            boxes = [] if self.grow else [regions.boxes]
            boxes += [_pairs(regions)] if self.pairs else []
            for some in boxes:
                # as good as the superpixels themselves, which take the last places of their hierarchy
                found.append(Candidates(some, -len(regions.sizes) * chance.random(len(some), dtype=np.float32)))
        return Candidates(*(np.concatenate(column) for column in zip(*found, strict=True)))


def _seeds(image: Image, segments: int, compactness: float) -> Ints:
    height, width, channels = image.shape
    segments = _possible(max(10, segments), height, width)
    levels = max(1, min(4, int(np.log2(max(2, min(height, width) / np.sqrt(segments))))))  # blocks of 2^levels pixels
    seeds = ximgproc("superpixels by SEEDS").createSuperpixelSEEDS(width, height, channels, segments, levels)
    seeds.iterate(convert(image, "hsv"), 10)
    return _renumber(seeds.getLabels())


def _possible(segments: int, height: int, width: int) -> int:
    """Return the number of superpixels nearest to ``segments`` that OpenCV's SEEDS can start with, and not crash.

    It lays them on a grid, which must have at least 2 rows and columns, of cells of at least 2 x 2 pixels.
    """
    rows = int(np.sqrt(segments * height / width))  # as OpenCV computes them
    possible = int(np.clip(rows, max(2, math.ceil(2 * height / width)), height // 2))
    return segments if rows == possible else math.ceil(possible**2 * width / height)


def _pairs(regions: Regions) -> Floats:
    """Return the boxes ``[E, 4]`` around each two neighbors."""
    first, second = regions.boxes[regions.first], regions.boxes[regions.second]
    return np.concatenate((np.minimum(first[:, :2], second[:, :2]), np.maximum(first[:, 2:], second[:, 2:])), axis=1)
