"""Boxes of several scales and shapes on a regular grid over the whole image: proposals that need nothing learned.

Sermanet et al., "OverFeat", 2013, arXiv 1312.6229 (dense windows); shapes as in Ren et al., "Faster R-CNN", 2015,
arXiv 1506.01497.

Deviation: large boxes stand on a coarser grid than small ones (``spacing``), because what a shift costs in overlap is
relative to the size of a box.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from detpipe import boxes as box_ops
from detpipe.proposals.image_source import Floats, Image
from detpipe.stages import ImageList, Losses, ProposalSource
from detpipe.support.numbers import check_numbers, check_whole
from detpipe.types import Features, Target

CACHED_SIZES = 256  # of images, whose boxes are kept


class DenseGrid(ProposalSource):
    """Cover each image with boxes.

    Args:
        scales: square root of the area of the boxes, in pixels of the resized image.
        ratios: height divided by width of the boxes.
        stride: least distance between the centers of neighboring boxes, in pixels of the resized image.
        spacing: least distance as a part of the box's side; 0 puts boxes of all scales on the same grid.
        max_boxes: keep at most this many of an image, thinned out evenly.

    Raises:
        ValueError: an argument that is not positive.

    Example:
        >>> grid = DenseGrid(scales=[32], ratios=[1.0], stride=16, spacing=0)
        >>> boxes, _ = grid(ImageList(torch.zeros(1, 3, 64, 64), [(64, 64)]), {})
        >>> list(boxes[0].shape), boxes[0][0].tolist()
        ([16, 4], [0.0, 0.0, 24.0, 24.0])
    """

    name: str = "dense_grid"

    def __init__(
        self,
        scales: Sequence[float] = (32, 64, 128, 256, 512),
        ratios: Sequence[float] = (0.5, 1.0, 2.0),
        stride: float = 16,
        spacing: float = 0.25,
        max_boxes: int = 4000,
    ) -> None:
        super().__init__()
        if not scales or not ratios:
            raise ValueError(f"scales and ratios need at least one number each, got {scales=}, {ratios=}")
        check_numbers("must be positive and finite", scales=scales, ratios=ratios, stride=stride)
        check_numbers("must not be negative or infinite", spacing=spacing)
        check_whole(max_boxes=max_boxes)
        self.scales, self.ratios = tuple(scales), tuple(ratios)
        self.stride, self.spacing, self.max_boxes = stride, spacing, max_boxes
        self._cache: dict[tuple[int, int, torch.device], Tensor] = {}

    def forward(
        self, images: ImageList, features: Features, targets: list[Target] | None = None
    ) -> tuple[list[Tensor], Losses]:
        """Lay the grid over each image of a padded batch, whatever its pixels.

        Returns:
            N tensors ``[P_i, 4]`` xyxy, clipped to their images, ordered by scale, shape, row and column, and no losses.
        """
        return [self.boxes(size, images.tensors.device) for size in images.image_sizes], {}

    @property
    def settings(self) -> dict[str, Any]:
        """What decides about the boxes, as JSON can hold it."""
        return {
            "scales": list(self.scales),
            "ratios": list(self.ratios),
            "stride": self.stride,
            "spacing": self.spacing,
            "max_boxes": self.max_boxes,
        }

    def propose(self, image: Image) -> tuple[Floats, Floats]:
        """Propose boxes for one image ``[H, W, 3]``, for a store; the grid lies over the image file, not over the resized image.

        Returns:
            Boxes ``[P, 4]`` xyxy, each once, in an order that spreads the first of them over all scales, shapes and places; and
            scores ``[P]`` that fall from 1.
        """
        boxes = self.boxes((image.shape[0], image.shape[1])).unique(dim=0)
        boxes = boxes[torch.randperm(len(boxes), generator=torch.Generator().manual_seed(0))]
        return boxes.numpy(), torch.linspace(1, 0, len(boxes) + 1)[:-1].numpy()

    def boxes(self, size: tuple[int, int], device: torch.device | None = None) -> Tensor:
        """Compute the boxes ``[P, 4]`` xyxy of an image of a size (height, width)."""
        key = (*size, device or torch.device("cpu"))
        found = self._cache.get(key)
        if found is None:
            if len(self._cache) >= CACHED_SIZES:
                self._cache.clear()  # in one step, whatever other threads do
            found = self._cache[key] = self._lay(*size).to(key[2])
        return found.clone()  # the caller's own, and fit for training if it was laid in inference mode

    def _lay(self, height: int, width: int) -> Tensor:
        parts = []
        for scale in self.scales:
            for ratio in self.ratios:
                box_height, box_width = scale * math.sqrt(ratio), scale / math.sqrt(ratio)
                y = _centers(height, max(self.stride, self.spacing * box_height))
                x = _centers(width, max(self.stride, self.spacing * box_width))
                cy, cx = torch.meshgrid(y, x, indexing="ij")
                center = torch.stack((cx, cy), dim=-1).reshape(-1, 2)
                half = torch.tensor((box_width, box_height), dtype=torch.float32) / 2
                parts.append(torch.cat((center - half, center + half), dim=1))
        boxes = box_ops.clip(torch.cat(parts), height, width)
        if len(boxes) > self.max_boxes:
            boxes = boxes[torch.linspace(0, len(boxes) - 1, self.max_boxes, dtype=torch.float64).long()]
        return boxes


def _centers(length: int, step: float) -> Tensor:
    """Divide a side into equal parts of about ``step`` pixels and return their middles."""
    count = max(1, round(length / step))
    return (torch.arange(count, dtype=torch.float32) + 0.5) * (length / count)
