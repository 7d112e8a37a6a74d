"""Any classification network of torchvision or timm as a backbone, at one level or several.

Deviations from a plain cut:
1. ``padding`` adds zeros (the mean color) around the image before the network sees it, for networks whose own convolutions
   are not padded. SqueezeNet's first cell at stride 16 is centered on pixel 15.5; with ``padding: 8`` it is centered on 7.5,
   half a pixel from where RoI pooling takes it to be, and no cell is lost at the border.
2. timm's networks of patches or windows see images padded at the right and the bottom to a multiple of the coarsest stride.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from detpipe.attention.base import Attention
from detpipe.backbones.bodies import Body, Level, TorchvisionBody
from detpipe.backbones.input_channels import check_channels, format_of
from detpipe.backbones.laterals import Laterals, ProjectedBackbone, Width
from detpipe.backbones.pretrained import TIMM
from detpipe.backbones.regime import Regime, convert_norm, find_modules, freeze
from detpipe.backbones.timm_body import TimmBody
from detpipe.support.numbers import check_whole
from detpipe.types import Features, PixelFormat

__all__ = ["Extractor", "Level"]

PROBES = (128, 256)  # sides of the images that check the declared strides
# what PyTorch says of images that leave nothing of a map
TOO_SMALL = ("is too small", "greater than actual input size")


class Extractor(ProjectedBackbone):
    """Feature maps of a torchvision or timm network.

    Args:
        network: name of a torchvision classification network, such as ``resnet50``; or ``timm/`` and a name of timm's, such as
            ``timm/convnext_tiny``, also with the tag of its weights, such as ``timm/convnext_tiny.fb_in22k``.
        levels: level name -> where it is cut, finest first. For timm also a list of names such as ``[c3, c4, c5]``: c_k is
            timm's last map of stride 2^k.
        weights: None for random ones; a local file (``.pth``, ``.pt``, ``.safetensors``, or ``.ckpt`` of a run; never
            downloads); or a name, which downloads once: torchvision's (``DEFAULT``, ``IMAGENET1K_V1``), or for timm ``DEFAULT``
            or a tag (``fb_in22k``). A file holds the whole network or, for timm, its features; the classifier and what lies
            beyond the last level may be missing or of other shapes, and everything else must fit.
        pixel_format: what the weights expect; None takes torchvision's, or what timm says of the network. One of three channels
            is spread over ``in_channels``.
        out_channels: project every level to this width; None keeps the width, for a single level; "own" lets each level
            keep its own, for an FPN.
        padding: zeros added on every side before the network, in pixels.
        regime: how it is trained. Frozen normalization, the default, is advised with pretrained weights and small batches.
            ``frozen`` names modules of ``body``, such as ``features.0``; ``drop_path`` is that of the network's last block.
        in_channels: C of the images; weights of three channels are spread over others. In a configuration it follows the data.

    Raises:
        UsageError: an unknown network, level, node or module (near names are listed), or timm is not installed.
        CheckpointError: the weights are missing or belong to another network.
        ValueError: a declared stride that the network does not have, unequal widths without ``out_channels``, a network that
            takes images of one size only, or a regime that it cannot follow.

    Example:
        >>> backbone = Extractor("squeezenet1_1", {"c4": Level("features.12", 16)}, padding=8)
        >>> list(backbone(torch.zeros(1, 3, 64, 96))["c4"].shape)
        [1, 512, 4, 6]
    """

    def __init__(
        self,
        network: str,
        levels: dict[str, Level] | list[str],
        weights: str | None = None,
        pixel_format: PixelFormat | None = None,
        out_channels: Width = None,
        padding: int = 0,
        regime: Regime = Regime(norm="frozen"),  # noqa: B008 (frozen)
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        if not levels:
            raise ValueError("levels must name at least one place to cut the network, for example c4: {node, stride}")
        check_whole(0, padding=padding)
        kind = TimmBody if network.startswith(TIMM) else TorchvisionBody
        body: Body = kind(network.removeprefix(TIMM), levels, weights, regime, check_channels(in_channels))
        self.name, self.padding, self.strides = network, padding, body.strides
        self.pixel_format = format_of(pixel_format or body.pixel_format, in_channels)
        self.body = convert_norm(body.network, regime.norm, regime.eps)
        self._body = body
        self._frozen = find_modules(self.body, regime.frozen)
        self.laterals = Laterals(self._probe(), out_channels)
        if regime.checkpointing:
            body.checkpoint()
        self.train()  # a new module is in training mode, its frozen parts must not be

    def forward(self, images: Tensor) -> Features:
        """Compute the levels: ``[N, C, H, W]`` -> level name -> ``[N, C, H_l, W_l]``.

        Raises:
            ValueError: the images are smaller than the coarsest stride, or so small that nothing is left of a level.
        """
        self.check_size(images)
        return self.laterals(self._maps(images))

    def depths(self) -> dict[str, int]:
        """Tell how deep each parameter of the network lies; attention that was added to it is new."""
        gates = tuple(f"{name}." for name, module in self.body.named_modules() if isinstance(module, Attention))
        return {f"body.{name}": depth for name, depth in self._body.depths().items() if not name.startswith(gates)}

    def train(self, mode: bool = True) -> Extractor:
        """Switch to training, except for what is frozen."""
        super().train(mode)
        freeze(self._frozen)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Give a copy the mode of its original: torchvision's graphs are in training mode after each deep copy."""
        super().__setstate__(state)
        if isinstance(self.body, fx.GraphModule):
            self.body.train(self.training)
            freeze(self._frozen)

    def _maps(self, images: Tensor) -> dict[str, Tensor]:
        height, width = images.shape[-2:]
        below, right = (-side % self._body.multiple for side in (height + 2 * self.padding, width + 2 * self.padding))
        pad = self.padding
        if pad or below or right:
            images = F.pad(images, [pad, pad + right, pad, pad + below])
        try:
            maps = self._body.maps(images)
        except RuntimeError as error:
            if not any(text in str(error) for text in TOO_SMALL):
                raise
            raise self._too_small(height, width, max(self.strides, key=lambda level: self.strides[level])) from error
        for level in self.strides:
            if 0 in maps[level].shape[2:]:
                raise self._too_small(height, width, level)
        return {level: maps[level] for level in self.strides}

    def _too_small(self, height: int, width: int, level: str) -> ValueError:
        return ValueError(
            f"an image of {height} x {width} pixels is too small for level {level!r} of {self.name}, whose stride is "
            f"{self.strides[level]}; give larger images or a finer level"
        )

    @torch.no_grad()
    def _probe(self) -> dict[str, int]:
        """Measure the width of each level, and hold the declared strides against what the network does."""
        self.eval()
        channels = self.pixel_format.channels
        try:
            small, large = (self._maps(torch.zeros(1, channels, side, side)) for side in PROBES)
        except (AssertionError, RuntimeError) as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise ValueError(
                f"{self.name} does not take images of any size: {reason}; give a network that does"
            ) from error
        for level, stride in self.strides.items():
            shape = list(large[level].shape)
            more = shape[-1] - small[level].shape[-1]  # cells; the difference is free of what is lost at the borders
            if len(shape) != 4 or more < 1:
                raise ValueError(
                    f"level {level!r}: expected a map [1, C, H, W] that grows with the image, but an image of "
                    f"{PROBES[1]} pixels gives {shape}; cut elsewhere"
                )
            real = round((PROBES[1] - PROBES[0]) / more)
            if stride != real:
                raise ValueError(f"level {level!r}: stride {stride} is declared, but it is {real}; declare {real}")
        return {level: large[level].shape[1] for level in self.strides}
