"""The same number of channels at every level, by one 1 x 1 convolution each."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

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
        """C of the result.

        Raises:
            ValueError: the levels keep their own, unequal widths.
        """
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
