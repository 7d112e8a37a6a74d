"""Proposals that somebody else made: they ride in the targets, so that flips and crops move them like boxes."""

from __future__ import annotations

import torch
from torch import Tensor

from detpipe import boxes as box_ops
from detpipe.stages import ImageList, Losses, ProposalSource
from detpipe.support.numbers import check_numbers, check_whole
from detpipe.types import Features, Target


class PrecomputedProposals(ProposalSource):
    """Take the proposals that come with each target.

    Flips, crops and resizing have moved them by then; what they leave of a box may be small, or the same for two boxes.

    Args:
        max_boxes: use at most this many of each image, from the first on; None uses all.
        min_size: leave out boxes that are not wider and higher than this, in pixels of the batch.
        remove_duplicates: keep the first of several boxes that are equal to within a sixteenth of a pixel.

    Raises:
        ValueError: ``max_boxes`` is not positive, or ``min_size`` is negative.
    """

    def __init__(self, max_boxes: int | None = 2000, min_size: float = 1.0, remove_duplicates: bool = True) -> None:
        super().__init__()
        check_whole(max_boxes=max_boxes)
        check_numbers("must not be negative or infinite", min_size=min_size)
        self.max_boxes, self.min_size, self.remove_duplicates = max_boxes, min_size, remove_duplicates

    def forward(
        self, images: ImageList, features: Features, targets: list[Target] | None = None
    ) -> tuple[list[Tensor], Losses]:
        """Read the boxes of each target and clip them to its image.

        Args:
            images: the padded batch.
            features: not used.
            targets: N targets with ``proposals`` ``[P_i, 4]`` xyxy in pixels of the batch, best first.

        Returns:
            N tensors ``[at most max_boxes, 4]``, of the type of the batch, float32 at least, and no losses.

        Raises:
            ValueError: there are no targets, or one has no proposals or proposals of a wrong shape or that are not finite;
                it is named.
        """
        if targets is None:
            raise ValueError("precomputed proposals ride in the targets: pass targets=[{'proposals': boxes}, ...]")
        boxes = []
        for index, (target, (height, width)) in enumerate(zip(targets, images.image_sizes, strict=True)):
            name = target.get("file_name", target.get("image_id", f"targets[{index}]"))
            if "proposals" not in target:
                raise ValueError(f"image {name} has no proposals: add 'proposals' [P, 4] to its target")
            proposals = target["proposals"]
            if proposals.ndim != 2 or proposals.shape[1] != 4:
                raise ValueError(f"image {name}: proposals must be [P, 4], got {list(proposals.shape)}")
            if not proposals.isfinite().all():
                row = int((~proposals.isfinite().all(dim=1)).nonzero()[0])
                raise ValueError(f"image {name}: proposal {row} is not finite: {proposals[row].tolist()}")
            proposals = proposals.to(images.tensors.device, torch.promote_types(images.tensors.dtype, torch.float32))
            boxes.append(self._select(box_ops.clip(proposals, height, width)))
        return boxes, {}

    def chosen(self, boxes: Tensor) -> Tensor:
        """Say which boxes a call keeps, by operations that do not depend on how many those are.

        Args:
            boxes: ``[N, P, 4]`` xyxy, clipped to their images.

        Returns:
            ``[N, P]`` bool.
        """
        keep = box_ops.valid(boxes, self.min_size)
        if self.remove_duplicates:
            place = torch.arange(boxes.shape[1], device=boxes.device)
            x1, y1, x2, y2 = (boxes.double() * 16).round().long().unbind(-1)
            key = ((x1 * 2**16 + y1) * 2**16 + x2) * 2**16 + y2  # of boxes up to 4096 pixels
            key = key.masked_fill(~keep, -1)
            earlier = (key[:, :, None] == key[:, None]) & (place[:, None] > place)
            keep = keep & ~earlier.any(dim=2)
        return keep if self.max_boxes is None else keep & (keep.cumsum(1) <= self.max_boxes)

    def _select(self, boxes: Tensor) -> Tensor:
        """``[P, 4]`` -> the first of those that are large enough and differ."""
        boxes = boxes[box_ops.valid(boxes, self.min_size)]
        if self.remove_duplicates and len(boxes):
            _, group = (boxes.double() * 16).round().unique(dim=0, return_inverse=True)
            order = torch.arange(len(boxes), device=boxes.device)
            first = order.new_full((len(boxes),), len(boxes)).scatter_reduce_(0, group, order, "amin")
            boxes = boxes[first[first < len(boxes)].sort().values]
        return boxes[: self.max_boxes]
