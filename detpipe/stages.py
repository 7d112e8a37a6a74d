"""The stages of the pipeline as abstract modules: what a part must do to take the place of ours.

The signatures are torchvision's, so that a part of ours works in its ``FasterRCNN`` (backbone, rpn, roi_heads)
and torchvision's parts work here. As in torchvision, ``module.training`` decides between losses and detections.

``RoIPooler`` is a plain ``torch.nn.Module`` and lives in :mod:`detpipe.roi_pooling`, which can be imported without
Lightning; it is re-exported here, so that this page lists all four stages.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

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
        pixel_format: what the network expects of its pixels, and how many channels an image has.
        new_layers: names of modules that are not of the network that weights are for, such as projections.
    """

    out_channels: int
    strides: dict[str, int]
    pixel_format: PixelFormat
    new_layers: tuple[str, ...] = ()

    @property
    def level_channels(self) -> dict[str, int]:
        """Channels of each level; they differ only where a pyramid is still to be built on the levels."""
        return dict.fromkeys(self.strides, self.out_channels)

    @property
    def roi_strides(self) -> dict[str, int]:
        """Image pixels a cell of the levels that RoIs are pooled from: all, unless some are there for proposals only."""
        return self.strides

    def depths(self) -> dict[str, int]:
        """Tell how deep the parameters of the network lie, which have learning rates of their own.

        Returns:
            Name of a parameter -> depth, 0 for the stem; new layers are left out. Of a backbone around another, ``backbone``,
            all others are new layers.
        """
        inner = getattr(self, "backbone", None)
        if isinstance(inner, Backbone):
            return {f"backbone.{name}": depth for name, depth in inner.depths().items()}
        return depths_of(self, self.new_layers)

    @abstractmethod
    def forward(self, images: Tensor) -> Features:
        """Compute features.

        Args:
            images: ``[N, C, H, W]`` normalized, padded at the right and the bottom.

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


def depths_of(network: nn.Module, new_layers: tuple[str, ...] = ()) -> dict[str, int]:
    """Number the parts of a network in the order of its children.

    Args:
        network: entries of its lists and dictionaries of modules count one by one; a norm counts with the part before it. Of a
            network in a single part, the children of this are counted.
        new_layers: names of modules that are left out.

    Returns:
        Name of a parameter -> depth, from 0 on; parameters outside of all children have depth 0.
    """
    new = tuple(f"{name}." for name in new_layers)
    depths = {name: 0 for name, _ in network.named_parameters() if not name.startswith(new)}
    depth = -1
    for part, module in _parts(network, "", new):
        depth += depth < 0 or any(parameter.ndim > 1 for parameter in module.parameters())
        depths.update({name: depth for name, _ in module.named_parameters(part) if name in depths})
    return depths


def _parts(module: nn.Module, prefix: str, new: tuple[str, ...]) -> Iterator[tuple[str, nn.Module]]:
    children = [(f"{prefix}{name}", child) for name, child in module.named_children()]
    held = [
        (name, child)
        for name, child in children
        if next(child.parameters(), None) is not None and not f"{name}.".startswith(new)
    ]
    for name, child in held:
        if isinstance(child, nn.ModuleList | nn.ModuleDict) or (len(held) == 1 and [*child.children()]):
            yield from _parts(child, f"{name}.", new)
        else:
            yield name, child
