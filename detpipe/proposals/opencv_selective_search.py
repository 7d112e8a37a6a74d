"""OpenCV's selective search, in an order that is the same every time.

Uijlings, van de Sande, Gevers, Smeulders, "Selective Search for Object Recognition", 2013, as implemented in OpenCV's extra
module ximgproc.

Deviation: OpenCV orders boxes by the clock. Its boxes are the same each time, so they are sorted by area, and the
place in that order takes the part of the place in the hierarchy.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from detpipe.proposals.image_source import Candidates, Image, ImageProposals
from detpipe.proposals.opencv_contrib import ximgproc
from detpipe.support.numbers import check_numbers, check_whole
from detpipe.support.suggest import did_you_mean
from detpipe.types import PixelFormat

MODES = ("single", "fast", "quality")


class OpenCVSelectiveSearch(ImageProposals):
    """Propose the boxes of OpenCV's selective search.

    Args:
        mode: "single", "fast" or "quality": OpenCV's choices of color spaces, scales and similarities.
        scale: ``k`` of the first segmentation.
        increment: what is added to ``k`` for each further one; not used by "single".
        sigma: standard deviation of the smoothing before the segmentation, in pixels.
        max_boxes: keep at most this many of an image, the best ones; None keeps all.
        min_size: leave out boxes that are less wide or less high, in pixels.
        seed: of the random part of the order.
        pixel_format: how the images of a batch were normalized: that of the backbone; None for the default one.

    Raises:
        ValueError: an unknown mode, or a number that is not positive.
        UsageError: OpenCV's extra modules are not installed.
    """

    name: str = "opencv_selective_search"
    smallest_image: ClassVar[int] = 8

    def __init__(
        self,
        mode: str = "fast",
        scale: int = 150,
        increment: int = 150,
        sigma: float = 0.8,
        max_boxes: int | None = 2000,
        min_size: float = 4.0,
        seed: int = 0,
        pixel_format: PixelFormat | None = None,
    ) -> None:
        super().__init__(max_boxes, min_size, pixel_format)
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}{did_you_mean(mode, MODES)}")
        check_whole(scale=scale, increment=increment)
        check_numbers("must be positive and finite", sigma=sigma)
        check_whole(0, seed=seed)
        self.mode, self.scale, self.increment, self.sigma, self.seed = mode, scale, increment, sigma, seed
        ximgproc(self.name)

    def find(self, image: Image) -> Candidates:
        """Let OpenCV find boxes, and order them."""
        search = ximgproc(self.name).segmentation.createSelectiveSearchSegmentation()
        search.setBaseImage(np.ascontiguousarray(image[:, :, ::-1]))
        if self.mode == "single":
            search.switchToSingleStrategy(self.scale, self.sigma)
        elif self.mode == "fast":
            search.switchToSelectiveSearchFast(self.scale, self.increment, self.sigma)
        else:
            search.switchToSelectiveSearchQuality(self.scale, self.increment, self.sigma)
        boxes = np.asarray(search.process(), np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]  # from x, y, width, height
        area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
        boxes = boxes[np.lexsort((*boxes.T, -area))]
        chance = np.random.default_rng(self.seed).random(len(boxes))
        return Candidates(boxes, (-np.arange(1, len(boxes) + 1) * chance).astype(np.float32))
