"""What every head of ours shares: train on sampled proposals, or detect among all and tell where it looked.

N images, P proposals an image, S sampled RoIs an image, K foreground classes, B = K boxes a RoI (1 if class-agnostic), T
glimpses of a RoI, M points of the outline of one, D detections of an image.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from detpipe import boxes as box_ops
from detpipe import matching
from detpipe.heads.postprocess import Postprocess
from detpipe.heads.sampling import RoISampler, RoITargets
from detpipe.stages import Losses, RoIHead
from detpipe.types import Detection, Features, GlimpsedDetection, Target

ROIS_PER_PASS = 4096  # at inference; bounds the memory of pooled features


class Found(NamedTuple):
    """What a head says about boxes."""

    scores: Tensor  # [N, P, K] in 0..1
    boxes: Tensor  # [N, P, B, 4] xyxy
    glimpses: Tensor  # [N, P, T, M, 2] (x, y): outlines of where it looked beside the proposal, in order; T may be 0


class ProposalHead(RoIHead, ABC):
    """A head that is trained on sampled proposals, and classifies and refines all of them to detect.

    Args:
        num_classes: K, foreground classes; there is one output more for the background.
        strides: image pixels a cell of each level that the pooler shall use.
        fc: widths of the shared fully connected layers.
        sampler: which RoIs are trained on.
        postprocess: what becomes a detection.

    Attributes:
        return_glimpses: whether detections are :class:`detpipe.types.GlimpsedDetection`, with the proposal that each came
            from and where the head looked; False unless set.

    Raises:
        ValueError: ``num_classes`` below 1, no layer in ``fc``, or no level in ``strides``.
    """

    def __init__(
        self,
        num_classes: int,
        strides: dict[str, int],
        fc: Sequence[int],
        sampler: RoISampler,
        postprocess: Postprocess,
    ) -> None:
        super().__init__()
        if num_classes < 1 or not fc or min(fc) < 1 or not strides:
            raise ValueError(
                f"expected num_classes >= 1, at least one layer in fc and one level in strides; got {num_classes=}, "
                f"{fc=}, {strides=}"
            )
        self.num_classes, self.strides = num_classes, dict(strides)
        self.sampler, self.postprocess = sampler, postprocess
        self.return_glimpses = False

    @abstractmethod
    def losses(
        self, features: Features, rois: RoITargets, image_sizes: list[tuple[int, int]], targets: list[Target]
    ) -> Losses:
        """Compute the losses on sampled RoIs; names other than ``loss_*`` are numbers to log, without gradient."""

    @abstractmethod
    def detect(self, features: Features, boxes: Tensor, image_sizes: list[tuple[int, int]]) -> Found:
        """Classify and refine boxes ``[N, P, 4]``, which are finite and have an area."""

    def forward(
        self,
        features: Features,
        proposals: list[Tensor],
        image_sizes: list[tuple[int, int]],
        targets: list[Target] | None = None,
    ) -> tuple[list[Detection], Losses]:
        """Train on sampled proposals, or detect among all.

        Args:
            features: level name -> ``[N, C, H_l, W_l]``.
            proposals: N tensors ``[P_i, 4]`` xyxy in pixels of the batch.
            image_sizes: height and width of each image inside the padded batch.
            targets: N targets with ``boxes`` and ``labels``; needed in training.

        Returns:
            In training ``[]`` and the losses; else N detections and ``{}``.

        Raises:
            ValueError: training without targets.
        """
        if self.training:
            if targets is None:
                raise ValueError("the head is in training mode and needs targets; call eval() to detect")
            return [], self.losses(features, self.sampler(proposals, targets), image_sizes, targets)
        boxes, present = matching.pad(proposals)
        valid = present & box_ops.valid(boxes)
        boxes = box_ops.fill(boxes, valid)
        found = self._detect_in_parts(features, boxes, image_sizes)
        detections, rows = self.postprocess.select(found.scores, found.boxes, valid, image_sizes)
        if not self.return_glimpses:
            return detections, {}
        glimpsed = [
            GlimpsedDetection(**detection, proposals=boxes[image, kept], glimpses=found.glimpses[image, kept])
            for image, (detection, kept) in enumerate(zip(detections, rows, strict=True))
        ]
        return list[Detection](glimpsed), {}

    def _detect_in_parts(self, features: Features, boxes: Tensor, image_sizes: list[tuple[int, int]]) -> Found:
        """Detect, a bounded number of RoIs at a time."""
        size = max(1, ROIS_PER_PASS // len(boxes))
        parts = [self.detect(features, part, image_sizes) for part in boxes.split(size, dim=1)]
        return Found(*(torch.cat(part, dim=1) for part in zip(*parts, strict=True)))


def outlines(boxes: Tensor) -> Tensor:
    """Draw boxes as outlines of four corners, clockwise from the upper left.

    Args:
        boxes: ``[..., 4]`` xyxy.

    Returns:
        ``[..., 4, 2]`` (x, y).
    """
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack((x1, y1, x2, y1, x2, y2, x1, y2), dim=-1).unflatten(-1, (4, 2))
