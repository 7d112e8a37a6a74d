"""Proposals that somebody else made: they ride in the targets, so that flips and crops move them like boxes."""

from __future__ import annotations

from torch import Tensor

from detpipe import boxes as box_ops
from detpipe.stages import ImageList, Losses, ProposalSource
from detpipe.types import Features, Target


class PrecomputedProposals(ProposalSource):
    """Take the proposals that come with each target.

    Args:
        max_boxes: use at most this many of each image, from the first on; None uses all.

    Raises:
        ValueError: ``max_boxes`` is not positive.
    """

    def __init__(self, max_boxes: int | None = 2000) -> None:
        super().__init__()
        if max_boxes is not None and max_boxes < 1:
            raise ValueError(f"max_boxes must be positive or null, got {max_boxes}")
        self.max_boxes = max_boxes

    def forward(
        self, images: ImageList, features: Features, targets: list[Target] | None = None
    ) -> tuple[list[Tensor], Losses]:
        """Read the boxes of each target and clip them to its image.

        Args:
            images: the padded batch.
            features: not used.
            targets: N targets with ``proposals`` ``[P_i, 4]`` xyxy in pixels of the batch, best first.

        Returns:
            N tensors ``[min(P_i, max_boxes), 4]`` and no losses.

        Raises:
            ValueError: there are no targets, or one has no proposals or proposals of a wrong shape; it is named.
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
            proposals = proposals[: self.max_boxes].to(images.tensors)
            boxes.append(box_ops.clip(proposals, height, width))
        return boxes, {}
