"""Selective search: boxes of regions that grow together from small segments, by several notions of likeness.

Uijlings, van de Sande, Gevers, Smeulders, "Selective Search for Object Recognition", 2013. Segments: Felzenszwalb,
Huttenlocher, "Efficient Graph-Based Image Segmentation", 2004, as implemented by scikit-image.

Deviations: see :mod:`detpipe.proposals.region_grouping`; the order of the boxes (section 3.4: place in the hierarchy times a
random number) is drawn from a seed, so that it is the same every time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import cv2
import numpy as np

from detpipe.proposals.image_source import Candidates, Image, ImageProposals
from detpipe.proposals.region_grouping import SIMILARITIES, Grouping, group
from detpipe.proposals.regions import Regions, describe, quantize_color, quantize_texture
from detpipe.regions.superpixels import check_scikit_image
from detpipe.support.numbers import check_numbers, check_whole
from detpipe.support.suggest import did_you_mean
from detpipe.types import PixelFormat

COLOR_SPACES = ("rgb", "hsv", "lab", "rgi", "gray")
DEFAULT_STRATEGIES = (("color", "texture", "size", "fill"), ("size", "fill"))


class SelectiveSearch(ImageProposals):
    """Propose the boxes of regions that grow together.

    More color spaces, scales and strategies find more objects with more boxes (the paper's diversification, section 3.3). The
    time goes into the segmentations: one for each color space and scale, about .3 s for 640 x 480 pixels.

    Args:
        color_spaces: "rgb", "hsv", "lab", "rgi" (red and green divided by intensity, and intensity) or "gray".
        scales: ``k`` of the segmentation; smaller values make more and smaller first segments.
        strategies: for each the similarities that decide about merging, out of "color", "texture", "size" and "fill".
        min_region: smallest first segment in pixels; None takes the value of the scale, as the paper's authors do.
        sigma: standard deviation of the smoothing before the segmentation, in pixels.
        max_boxes: keep at most this many of an image, the best ones; None keeps all.
        min_size: leave out boxes that are less wide or less high, in pixels.
        seed: of the random part of the order.
        pixel_format: how the images of a batch were normalized: that of the backbone; None for the default one.

    Raises:
        ValueError: an unknown name, an empty list, or a number that is not positive.
        UsageError: scikit-image is not installed.

    Example:
        >>> image = np.zeros((32, 48, 3), np.uint8)
        >>> image[8:24, 8:24] = 255
        >>> boxes, scores = SelectiveSearch(scales=[50], sigma=0.5).propose(image)
        >>> [8, 8, 24, 24] in boxes.round().tolist()
        True
    """

    name: str = "selective_search"
    smallest_image: ClassVar[int] = 8

    def __init__(
        self,
        color_spaces: Sequence[str] = ("hsv", "lab"),
        scales: Sequence[float] = (50,),
        strategies: Sequence[Sequence[str]] = DEFAULT_STRATEGIES,
        min_region: int | None = None,
        sigma: float = 0.8,
        max_boxes: int | None = 2000,
        min_size: float = 4.0,
        seed: int = 0,
        pixel_format: PixelFormat | None = None,
    ) -> None:
        super().__init__(max_boxes, min_size, pixel_format)
        _check_names("color_spaces", color_spaces, COLOR_SPACES)
        for strategy in strategies or [[]]:
            _check_names("strategies", strategy, SIMILARITIES)
        if not scales:
            raise ValueError(f"scales need at least one number, got {scales!r}")
        check_numbers("must be positive and finite", scales=scales, sigma=sigma)
        check_whole(min_region=min_region)
        check_whole(0, seed=seed)
        check_scikit_image(self.name)
        self.color_spaces, self.scales = tuple(color_spaces), tuple(scales)
        self.strategies = tuple(tuple(strategy) for strategy in strategies)
        self.min_region, self.sigma, self.seed = min_region, sigma, seed

    def find(self, image: Image) -> Candidates:
        """Segment, group, and order the boxes of all regions; duplicates of several hierarchies are still there."""
        segmentations = [part for space in self.color_spaces for part in self._segment(convert(image, space))]
        grouping = group(segmentations, self.strategies, float(image.shape[0] * image.shape[1]))
        return in_random_order(grouping, self.seed)

    def _segment(self, image: Image) -> list[Regions]:
        from skimage.segmentation import felzenszwalb

        color, texture = quantize_color(image), quantize_texture(image)
        parts = []
        for scale in self.scales:
            min_size = self.min_region if self.min_region is not None else max(1, round(scale))
            labels = felzenszwalb(image, scale=scale, sigma=self.sigma, min_size=min_size)
            parts.append(describe(labels.astype(np.int32), color, texture))
        return parts


def in_random_order(grouping: Grouping, seed: int) -> Candidates:
    """Order regions by their place in the hierarchy times a random number (section 3.4).

    Without chance the first boxes would all be large ones, and those that all hierarchies agree on.
    """
    chance = np.random.default_rng(seed).random(len(grouping.rank))
    return Candidates(grouping.boxes, (-grouping.rank * chance).astype(np.float32))


def convert(image: Image, space: str) -> Image:
    """Convert ``[H, W, 3]`` uint8 RGB to one of `COLOR_SPACES`: ``[H, W, C]`` uint8 that uses the whole range 0..255."""
    if space == "rgb":
        return image
    if space == "rgi":
        values = image.astype(np.float32)
        total = values.sum(axis=2, keepdims=True)
        return np.concatenate((255 * values[:, :, :2] / (total + 1), total / 3), axis=2).astype(np.uint8)
    code = {"hsv": cv2.COLOR_RGB2HSV_FULL, "lab": cv2.COLOR_RGB2LAB, "gray": cv2.COLOR_RGB2GRAY}[space]
    return np.asarray(cv2.cvtColor(image, code), np.uint8).reshape(*image.shape[:2], -1)


def _check_names(argument: str, names: Sequence[str], known: Sequence[str]) -> None:
    if isinstance(names, str) or not names:
        raise ValueError(f"{argument} must be a list of at least one of {', '.join(known)}; got {names!r}")
    for name in names:
        if name not in known:
            raise ValueError(f"{argument}: unknown {name!r}{did_you_mean(name, known)}; expected {', '.join(known)}")
