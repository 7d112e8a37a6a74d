"""Several sources as one: what one of them misses another may find."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.ops import nms

from detpipe.proposals.image_source import Floats, Image, ImageProposals
from detpipe.stages import ImageList, Losses, ProposalSource
from detpipe.support.numbers import check_numbers, check_whole
from detpipe.types import Features, PixelFormat, Target


class Union(ProposalSource):
    """Take turns among the boxes of several sources, and leave out those that are nearly the same.

    The first box of each source comes first, then the second one of each, and so on, so that a cut at any number of boxes is
    fair to all sources.

    Args:
        sources: the sources; networks such as an RPN among them are trained along, and their losses returned.
        max_boxes: keep at most this many of an image; None keeps all.
        duplicate_iou: leave out a box whose overlap (IoU) with an earlier one is above this; 1 leaves out none.
        pixel_format: how the images of a batch were normalized, given on to the sources that look at pixels; None leaves
            them theirs.

    Raises:
        ValueError: no sources, ``max_boxes`` is not positive, or ``duplicate_iou`` not in 0..1.

    Example:
        >>> from detpipe.proposals import DenseGrid
        >>> union = Union([DenseGrid(scales=[32], spacing=0), DenseGrid(scales=[32, 64], spacing=0)])
        >>> boxes, losses = union(ImageList(torch.zeros(1, 3, 64, 64), [(64, 64)]), {})
        >>> len(boxes[0]) < 48 + 96
        True
    """

    name: str = "union"

    def __init__(
        self,
        sources: Sequence[ProposalSource],
        max_boxes: int | None = 2000,
        duplicate_iou: float = 0.9,
        pixel_format: PixelFormat | None = None,
    ) -> None:
        super().__init__()
        if not sources:
            raise ValueError("a union needs at least one source")
        check_whole(max_boxes=max_boxes)
        check_numbers("must be in 0..1, above 0", duplicate_iou=duplicate_iou)
        self.sources = nn.ModuleList(sources)
        if pixel_format is not None:
            self.set_pixel_format(pixel_format)
        self.max_boxes, self.duplicate_iou = max_boxes, duplicate_iou

    def set_pixel_format(self, pixel_format: PixelFormat) -> None:
        """Tell the sources that look at pixels how the images of a batch are normalized."""
        for source in self.sources:
            if isinstance(source, ImageProposals | Union):
                source.set_pixel_format(pixel_format)

    @property
    def settings(self) -> dict[str, Any]:
        """What decides about the boxes, as JSON can hold it."""
        return {
            "sources": [{"source": source.name, "settings": source.settings} for source in self._offline()],
            "max_boxes": self.max_boxes,
            "duplicate_iou": self.duplicate_iou,
        }

    def propose(self, image: Image) -> tuple[Floats, Floats]:
        """Propose boxes for one image ``[H, W, 3]`` uint8 RGB.

        Returns:
            Boxes ``[P, 4]`` xyxy in pixels of the image, in the order of their turns, and scores ``[P]``: 1 / (turn + 1).

        Raises:
            TypeError: a source among them needs a network's features.
            DataError: the image is too small for one of the sources.
        """
        boxes, turns = self._merge([torch.from_numpy(source.propose(image)[0]) for source in self._offline()])
        return boxes.numpy(), (1 / (1 + turns)).numpy().astype(np.float32)

    def forward(
        self, images: ImageList, features: Features, targets: list[Target] | None = None
    ) -> tuple[list[Tensor], Losses]:
        """Ask all sources.

        Returns:
            N tensors ``[P_i, 4]`` xyxy in pixels of the batch, and the losses of all sources; a name that two sources use gets
            the number of the source.
        """
        found, losses = [], {}
        for number, source in enumerate(self.sources):
            before = source.training
            source.training = self.training  # decides between losses and boxes; the layers inside stay as they are
            try:
                boxes, own = source(images, features, targets)
            finally:
                source.training = before
            found.append(boxes)
            losses |= {f"{name}_{number}" if name in losses else name: value for name, value in own.items()}
        return [self._merge(list(boxes))[0] for boxes in zip(*found, strict=True)], losses

    def _offline(self) -> list[ImageProposals]:
        for source in self.sources:
            if not hasattr(source, "propose") or not hasattr(source, "settings"):
                raise TypeError(
                    f"{type(source).__name__} needs the features of a network: a union with it works in a detector only"
                )
        return list(self.sources)  # type: ignore[arg-type]

    def _merge(self, parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Take turns, and leave out duplicates: boxes ``[P, 4]`` and their turns ``[P]`` float32."""
        boxes = torch.cat([part.float() for part in parts])
        turns = torch.cat([torch.arange(len(part), device=part.device) for part in parts])
        turns, order = turns.sort(stable=True)
        boxes = boxes[order]
        if self.duplicate_iou < 1 and len(boxes):
            kept = nms(boxes, -torch.arange(len(boxes), dtype=torch.float32, device=boxes.device), self.duplicate_iou)
            boxes, turns = boxes[kept], turns[kept]
        return boxes[: self.max_boxes], turns[: self.max_boxes].float()
