"""Edge boxes: boxes that many whole contours lie inside of, by OpenCV, on edges that need no trained model.

Zitnick, Dollar, "Edge Boxes: Locating Object Proposals from Edges", 2014, as implemented in OpenCV's extra module ximgproc.

Deviation: the paper takes its edges from structured forests, a trained model that has to be downloaded. Here the strength of an
edge is the gradient of the smoothed image, the steepest of three channels, and edges are thinned across their direction.
"""

from __future__ import annotations

import math
from typing import ClassVar

import cv2
import numpy as np

from detpipe.proposals.image_source import Candidates, Floats, Image, ImageProposals
from detpipe.proposals.opencv_contrib import ximgproc
from detpipe.types import PixelFormat

FLAT = 0.01  # smaller slopes are rounding errors on an even ground; a step of one gray level has 1.6 at sigma 2


class EdgeBoxes(ImageProposals):
    """Propose boxes by the contours that they hold.

    Args:
        alpha: overlap (IoU) of neighboring windows of the search.
        beta: boxes that overlap a better one by more (IoU) are left out.
        sigma: standard deviation of the smoothing before the gradient, in pixels.
        min_strength: weaker edges are not looked at; 1 is the strength of the strongest hundredth of the pixels. Smaller
            values cost time.
        max_aspect_ratio: longest side divided by the shorter one.
        max_boxes: keep at most this many of an image, the best ones; None keeps 10,000.
        min_size: leave out boxes that are less wide or less high, in pixels.
        pixel_format: how the images of a batch were normalized: that of the backbone; None for the default one.

    Raises:
        ValueError: a number out of its range.
        UsageError: OpenCV's extra modules are not installed.
    """

    name: str = "edge_boxes"
    smallest_image: ClassVar[int] = 16

    def __init__(
        self,
        alpha: float = 0.65,
        beta: float = 0.75,
        sigma: float = 2.0,
        min_strength: float = 0.2,
        max_aspect_ratio: float = 3.0,
        max_boxes: int | None = 2000,
        min_size: float = 4.0,
        pixel_format: PixelFormat | None = None,
    ) -> None:
        super().__init__(max_boxes, min_size, pixel_format)
        parts = all(0 < value < 1 for value in (alpha, beta, min_strength))
        if not (parts and 0 < sigma < math.inf and 1 <= max_aspect_ratio < math.inf):
            raise ValueError(
                "expected alpha, beta and min_strength between 0 and 1, sigma above 0 and max_aspect_ratio of at least 1; got "
                f"{alpha=}, {beta=}, {min_strength=}, {sigma=}, {max_aspect_ratio=}"
            )
        self.alpha, self.beta, self.sigma = alpha, beta, sigma
        self.min_strength, self.max_aspect_ratio = min_strength, max_aspect_ratio
        ximgproc(self.name)

    def find(self, image: Image) -> Candidates:
        """Find edges, and let OpenCV search for boxes."""
        search = ximgproc(self.name).createEdgeBoxes(
            alpha=self.alpha,
            beta=self.beta,
            edgeMinMag=self.min_strength,
            maxBoxes=self.max_boxes or 10_000,
            maxAspectRatio=self.max_aspect_ratio,
            minBoxArea=max(4.0, self.min_size**2),
        )
        edges, orientation = find_edges(image, self.sigma)
        boxes, scores = search.getBoundingBoxes(edges, orientation)
        boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]  # from x, y, width, height
        scores = np.asarray(scores, np.float32).reshape(-1)[: len(boxes)]  # without boxes it is None
        sound = np.isfinite(scores)  # OpenCV divides by 0 for a box of one pixel
        return Candidates(boxes[sound], scores[sound])


def find_edges(image: Image, sigma: float) -> tuple[Floats, Floats]:
    """Find edges of one pixel's width.

    Args:
        image: ``[H, W, 3]`` uint8.
        sigma: standard deviation of the smoothing, in pixels.

    Returns:
        The strength ``[H, W]`` of the edge at each pixel, 1 for all beyond the strongest hundredth (where fewer pixels have a
        slope, for the strongest one), 0 away from edges; and the direction across the edge ``[H, W]`` in radians, 0..pi, 0 along x.
    """
    smooth = cv2.GaussianBlur(image.astype(np.float32), (0, 0), sigma)
    x, y = cv2.Sobel(smooth, -1, 1, 0, ksize=3), cv2.Sobel(smooth, -1, 0, 1, ksize=3)
    steepest = (x * x + y * y).argmax(axis=2)[..., None]
    x, y = (np.take_along_axis(slope, steepest, axis=2)[..., 0] for slope in (x, y))
    strength = np.sqrt(x * x + y * y)
    top = float(np.quantile(strength, 0.99))
    if top < FLAT:
        top = float(strength.max())
    strength = np.minimum(strength / top, 1).astype(np.float32) if top >= FLAT else np.zeros_like(strength)
    orientation = np.mod(np.arctan2(y, x), np.pi).astype(np.float32)
    return _thin(strength, orientation), orientation


def _thin(strength: Floats, orientation: Floats) -> Floats:
    """Keep the pixels that are not weaker than what lies one pixel away across the edge, on both sides."""
    rows, columns = np.indices(strength.shape, dtype=np.float32)
    x, y = np.cos(orientation), np.sin(orientation)
    keep = np.ones(strength.shape, bool)
    for side in (-1, 1):
        beyond = cv2.remap(
            strength, columns + side * x, rows + side * y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
        )
        keep &= strength >= beyond
    return np.where(keep, strength, 0).astype(np.float32)
