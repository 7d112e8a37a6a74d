"""The same number of channels at every level, by one 1 x 1 convolution each; and the backbones that end so."""

from __future__ import annotations

from abc import ABC
from typing import Literal

from torch import Tensor, nn

from detpipe.stages import Backbone
from detpipe.support.numbers import check_whole
from detpipe.types import Features

Width = int | Literal["own"] | None


class Laterals(nn.Module):
    """Project levels of different widths to one width, or leave them as they are.

    Args:
        widths: channels of each level, finest first.
        out_channels: C of the result; None keeps the width, which needs equal widths; "own" keeps the width of each, equal
            or not, for an FPN.

    Raises:
        ValueError: unequal widths and no ``out_channels``, or text other than "own".
    """

    def __init__(self, widths: dict[str, int], out_channels: Width) -> None:
        super().__init__()
        if isinstance(out_channels, str) and out_channels != "own":
            raise ValueError(f"out_channels must be a whole number, 'own' or None, got {out_channels!r}")
        if not isinstance(out_channels, str):
            check_whole(out_channels=out_channels)
        if out_channels is None and len(set(widths.values())) > 1:
            raise ValueError(
                f"levels of unequal width {widths} need out_channels, for example out_channels=256; or 'own', in an FPN"
            )
        self.projections = nn.ModuleDict()
        if not (out_channels is None or isinstance(out_channels, str)):
            self.projections.update({level: nn.Conv2d(width, out_channels, 1) for level, width in widths.items()})
            widths = dict.fromkeys(widths, out_channels)
        self.level_channels = dict(widths)

    @property
    def out_channels(self) -> int:
        """C of the result; a ValueError where the levels keep their own, unequal widths."""
        if len(set(self.level_channels.values())) > 1:
            raise ValueError(
                f"out_channels 'own' leaves levels of unequal width {self.level_channels}, which only an FPN takes; give a "
                "number, for example out_channels=256, or put the backbone into an FPN"
            )
        return next(iter(self.level_channels.values()))

    def forward(self, features: dict[str, Tensor]) -> Features:
        """Project each level: ``[N, C_l, H_l, W_l]`` -> ``[N, C, H_l, W_l]``."""
        if not self.projections:
            return features
        return {level: projection(features[level]) for level, projection in self.projections.items()}


class ProjectedBackbone(Backbone, ABC):
    """A backbone whose levels pass through :class:`Laterals`.

    Attributes:
        laterals: what the levels pass through at the end.
    """

    laterals: Laterals
    new_layers = ("laterals", "auxiliary")

    @property
    def out_channels(self) -> int:
        """C, the same at every level; a ValueError where each level keeps its own width."""
        return self.laterals.out_channels

    @property
    def level_channels(self) -> dict[str, int]:
        """Channels of each level."""
        return dict(self.laterals.level_channels)

    def check_size(self, images: Tensor) -> None:
        """Refuse images ``[N, C, H, W]`` without a whole cell of the coarsest level, by a ValueError."""
        level, stride = max(self.strides.items(), key=lambda item: item[1])
        if min(images.shape[-2:]) < stride:
            raise ValueError(
                f"images of {images.shape[-2]} x {images.shape[-1]} pixels are smaller than the stride {stride} of level {level}: "
                f"expected at least {stride} x {stride}; enlarge them, or leave level {level} out"
            )
