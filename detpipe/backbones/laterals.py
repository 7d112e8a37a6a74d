"""The same number of channels at every level, by one 1 x 1 convolution each."""

from __future__ import annotations

from torch import Tensor, nn

from detpipe.types import Features


class Laterals(nn.Module):
    """Project levels of different widths to one width, or leave a single level as it is.

    Args:
        widths: channels of each level, finest first.
        out_channels: C of the result; None keeps the width, which needs equal widths.

    Raises:
        ValueError: several widths and no ``out_channels``.
    """

    def __init__(self, widths: dict[str, int], out_channels: int | None) -> None:
        super().__init__()
        if out_channels is None and len(set(widths.values())) > 1:
            raise ValueError(f"levels of unequal width {widths} need out_channels, for example out_channels=256")
        self.out_channels = next(iter(widths.values())) if out_channels is None else out_channels
        self.projections = nn.ModuleDict()
        if out_channels is not None:
            self.projections.update({level: nn.Conv2d(width, out_channels, 1) for level, width in widths.items()})

    def forward(self, features: dict[str, Tensor]) -> Features:
        """Project each level: ``[N, C_l, H_l, W_l]`` -> ``[N, C, H_l, W_l]``."""
        if not self.projections:
            return features
        return {level: projection(features[level]) for level, projection in self.projections.items()}
