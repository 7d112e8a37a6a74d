"""The stages of the pipeline as abstract modules: what a part must do to take the place of ours.

The signatures are torchvision's, so that a part of ours works in its ``FasterRCNN`` (backbone, rpn, roi_heads)
and torchvision's parts work here. As in torchvision, ``module.training`` decides between losses and detections.

``RoIPooler`` is a plain ``torch.nn.Module`` and lives in :mod:`detpipe.roi_pooling`, which can be imported without
Lightning; it is re-exported here, so that this page lists all four stages.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from detpipe.roi_pooling.pooler import RoIPooler
from detpipe.types import Detection, Features, PixelFormat, Target

__all__ = [
    "Backbone",
    "Detection",
    "Features",
    "ImageList",
    "Losses",
    "PixelFormat",
    "ProposalSource",
    "RoIHead",
    "RoIPooler",
    "Target",
]

Losses = dict[str, Tensor]  # "loss_*" scalars are summed and trained on; other scalars are only logged


def mark_class_outputs(layer: nn.Module, background: int, each: int) -> None:
    """Say that rows of a layer's weight and bias belong to classes, so that fine-tuning takes them over class by class.

    Args:
        layer: whose tensors have ``background + each * K`` rows.
        background: rows before those of the first class.
        each: rows of a class.
    """
    vars(layer)["class_outputs"] = (background, each)


def initialize(network: nn.Module) -> None:
    """Initialize convolutions for a network of ReLUs: He et al. 2015, arXiv 1502.01852."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


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

    @property
    def input_dtype(self) -> torch.dtype | None:
        """Data type of the images that it takes, that of its parameters; None without any."""
        return next((parameter.dtype for parameter in self.parameters()), None)

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
    """Images and features to boxes worth a look; fits ``FasterRCNN.rpn``.

    A module of another library that takes the same three arguments, such as torchvision's ``RegionProposalNetwork``, counts as
    a subclass.

    Attributes:
        fills_up: whether it may give more boxes than it found, those beyond without an area; set for a call, by what the head says.
    """

    fills_up: bool = False

    @classmethod
    def __subclasshook__(cls, other: type) -> bool:
        return _fits_slot(other, arguments=3) if cls is ProposalSource else NotImplemented

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
    """Features and boxes to detections; fits ``FasterRCNN.roi_heads``.

    A module of another library that takes the same four arguments, such as torchvision's ``RoIHeads``, counts as a subclass.

    Attributes:
        drops_empty: whether it leaves out proposals without an area, as if they were not there.
    """

    drops_empty: bool = False

    @classmethod
    def __subclasshook__(cls, other: type) -> bool:
        return _fits_slot(other, arguments=4) if cls is RoIHead else NotImplemented

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


def _fits_slot(other: type, arguments: int) -> bool:
    """Whether a module that is no stage of detpipe's may take the place of one, by what its ``forward`` takes.

    ``NotImplemented``, which leaves the answer to inheritance, if it may not.
    """
    ours = (Backbone, ProposalSource, RoIHead)
    if not issubclass(other, nn.Module) or other.forward is nn.Module.forward or {*ours} & {*other.__mro__}:
        return NotImplemented
    parameters = [*inspect.signature(other.forward).parameters.values()][1:]
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        return True
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = any(p.kind is p.KEYWORD_ONLY and p.default is p.empty for p in parameters)
    return True if len(positional) == arguments and not needed else NotImplemented


def check_tensor(where: str, key: str, value: object, letters: str, sizes: Sequence[int | None]) -> None:
    """Refuse a result of a stage that is no tensor of a shape.

    Args:
        where: the class that returned it.
        key: what it was returned as.
        value: what was returned.
        letters: the shape in letters, for the message.
        sizes: the shape; None for any number.

    Raises:
        ValueError: it is another; expected and found shapes are named.
    """
    shape = tuple(value.shape) if isinstance(value, Tensor) else None
    if shape is None or len(shape) != len(sizes) or any(b not in (a, None) for a, b in zip(shape, sizes, strict=True)):
        names = letters.split(", ") if letters else []
        wanted = ", ".join(name if size is None else str(size) for name, size in zip(names, sizes, strict=True))
        numbers = "" if wanted == letters else f" = [{wanted}]"
        expected = f"a tensor of shape [{letters}]{numbers}" if letters else "a tensor without dimensions"
        got = f"one of shape {[*shape]}" if shape is not None else f"a value of type {type(value).__name__}"
        raise ValueError(f"{where}: {key} must be {expected}, got {got}")


def check_features(backbone: Backbone, features: Any, images: Tensor) -> Features:
    """Refuse what a backbone returned for ``images`` if its maps are not those that it declares.

    Raises:
        ValueError: a level is missing, has another width, or its cells cannot have the declared stride.
    """
    name, widths, strides = type(backbone).__name__, backbone.level_channels, backbone.strides
    if not isinstance(features, dict) or not strides.keys() <= features.keys():
        got = sorted(features) if isinstance(features, dict) else f"a value of type {type(features).__name__}"
        raise ValueError(
            f"{name} must return a dict with a map for each level of its strides, {sorted(strides)}; got {got}"
        )
    for level, stride in strides.items():
        found = features[level]
        check_tensor(name, f"features[{level!r}]", found, "N, C, H, W", (len(images), widths[level], None, None))
        for cells, pixels in zip(found.shape[2:], images.shape[2:], strict=True):
            # convolutions without padding lose some cells; a wrong stride is wrong by a factor
            if min(cells, pixels // stride) >= 4 and not 0.5 < cells * stride / pixels < 2:
                raise ValueError(
                    f"{name}: strides says {stride} pixels a cell of {level!r}, but {pixels} pixels gave {cells} cells"
                )
    return features


def check_proposals(source: nn.Module, returned: Any, images: int) -> tuple[list[Tensor], Losses]:
    """Refuse what a source returned if it is not the boxes of each image and losses.

    Raises:
        ValueError: it is something else; the class, the place, and expected and found shapes are named.
    """
    name = type(source).__name__
    boxes, losses = _pair(name, returned, "boxes")
    if len(boxes) != images:
        raise ValueError(f"{name} returned the boxes of {len(boxes)} images for {images} images")
    for index, part in enumerate(boxes):
        check_tensor(name, f"boxes[{index}]", part, "P, 4", (None, 4))
    return boxes, losses


def check_detections(head: nn.Module, returned: Any) -> tuple[list[Detection], Losses]:
    """Refuse what a head returned if it is not detections and losses.

    Raises:
        ValueError: it is something else; the class, the key, and expected and found shapes are named.
    """
    name = type(head).__name__
    detections, losses = _pair(name, returned, "detections")
    for index, found in enumerate(detections):
        where = f"detections[{index}]"
        if not isinstance(found, Mapping) or not {"boxes", "scores", "labels"} <= found.keys():
            got = sorted(found) if isinstance(found, Mapping) else f"a value of type {type(found).__name__}"
            raise ValueError(f"{name}: {where} must be a dict with 'boxes', 'scores' and 'labels', got {got}")
        check_tensor(name, f"{where}['boxes']", found["boxes"], "D, 4", (None, 4))
        for key in ("scores", "labels"):
            check_tensor(name, f"{where}[{key!r}]", found[key], "D", (len(found["boxes"]),))
    return detections, losses


def _pair(name: str, returned: Any, first: str) -> tuple[Any, Any]:
    """A list and losses, each a scalar."""
    pair = returned if isinstance(returned, tuple) and len(returned) == 2 else (None, None)
    if not isinstance(pair[0], list | tuple) or not isinstance(pair[1], Mapping):
        got = [type(value).__name__ for value in returned] if isinstance(returned, tuple) else type(returned).__name__
        raise ValueError(
            f"{name} must return a pair, a list of {first} and a dict of losses, got {got}".replace("'", "")
        )
    for key, value in pair[1].items():
        check_tensor(name, f"losses[{key!r}]", value, "", ())
    return pair


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
