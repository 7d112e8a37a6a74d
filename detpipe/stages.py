"""The stages of the pipeline as abstract modules: what a part must do to take the place of ours.

The signatures are torchvision's, so that a part of ours works in its ``FasterRCNN`` (backbone, rpn, roi_heads)
and torchvision's parts work here. As in torchvision, ``module.training`` decides between losses and detections.

``RoIPooler`` is a plain ``torch.nn.Module`` and lives in :mod:`detpipe.roi_pooling`, which can be imported without
Lightning; it is re-exported here, so that this page lists all four stages.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from lightning import LightningModule
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from detpipe.roi_pooling.pooler import RoIPooler
from detpipe.types import Detection, Features, PixelFormat, Target

__all__ = ["Backbone", "ImageList", "ProposalSource", "RoIHead", "RoIPooler"]

Losses = dict[str, Tensor]  # "loss_*" scalars are summed and trained on; other scalars are only logged


def mark_class_outputs(layer: nn.Module, background: int, each: int) -> None:
    """Say that rows of a layer's weight and bias belong to classes, so that fine-tuning takes them over class by class.

    Args:
        layer: whose tensors have ``background + each * K`` rows.
        background: rows before those of the first class.
        each: rows of a class.
    """
    vars(layer)["class_outputs"] = (background, each)


class Backbone(LightningModule, ABC):
    """Images to feature maps.

    Attributes:
        out_channels: C, the same at every level.
        strides: image pixels a cell for each level, finest first: declared, never guessed from shapes.
        pixel_format: what the network expects of its pixels.
    """

    out_channels: int
    strides: dict[str, int]
    pixel_format: PixelFormat

    @property
    def level_channels(self) -> dict[str, int]:
        """Channels of each level; they differ only where a pyramid is still to be built on the levels."""
        return dict.fromkeys(self.strides, self.out_channels)

    @property
    def roi_strides(self) -> dict[str, int]:
        """Image pixels a cell of the levels that RoIs are pooled from: all, unless some are there for proposals only."""
        return self.strides

    @abstractmethod
    def forward(self, images: Tensor) -> Features:
        """Compute features.

        Args:
            images: ``[N, 3, H, W]`` normalized, padded at the right and the bottom.

        Returns:
            level name -> ``[N, C, H / stride, W / stride]``, rounded up.
        """


class ProposalSource(LightningModule, ABC):
    """Images and features to boxes worth a look; fits ``FasterRCNN.rpn``."""

    @abstractmethod
    def forward(
        self, images: ImageList, features: Features, targets: list[Target] | None = None
    ) -> tuple[list[Tensor], Losses]:
        """Propose boxes.

        Args:
            images: the padded batch and the height and width of each image in it.
            features: what the backbone made of it.
            targets: one a image; carry precomputed proposals, and in training the ground truth.

        Returns:
            N boxes tensors ``[P_i, 4]`` xyxy in pixels of the batch, and losses (empty where nothing is learned).
        """


class RoIHead(LightningModule, ABC):
    """Features and boxes to detections; fits ``FasterRCNN.roi_heads``."""

    @abstractmethod
    def forward(
        self,
        features: Features,
        proposals: list[Tensor],
        image_sizes: list[tuple[int, int]],
        targets: list[Target] | None = None,
    ) -> tuple[list[Detection], Losses]:
        """Classify and refine boxes.

        Args:
            features: level name -> ``[N, C, H_l, W_l]``.
            proposals: N tensors ``[P_i, 4]`` xyxy in pixels of the batch.
            image_sizes: height and width of each image inside the padded batch.
            targets: the ground truth; needed in training.

        Returns:
            In training an empty list and the losses; else N detections in pixels of the batch and no losses.
        """
