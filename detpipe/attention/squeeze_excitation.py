"""Squeeze-and-excitation: channels weighted by what the whole map contains.

Hu et al., "Squeeze-and-Excitation Networks", 2018, arXiv 1709.01507, equations 2 to 4.

Deviations:
1. Both linear layers are 1 x 1 convolutions with a bias.
2. The squeezed width is never below 8.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SqueezeExcitation(nn.Module):
    """Multiply each channel by a gate in 0..1 computed from the mean of all channels.

    Args:
        channels: C of the input.
        reduction: the squeezed width is ``channels // reduction``, at least 8.

    Raises:
        ValueError: ``reduction`` or ``channels`` below 1, or ``reduction`` above ``channels``.

    Example:
        >>> SqueezeExcitation(32)(torch.ones(2, 32, 5, 7)).shape
        torch.Size([2, 32, 5, 7])
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        if not 1 <= reduction <= channels:
            raise ValueError(f"reduction must be in 1..channels ({channels}), got {reduction}")
        width = max(channels // reduction, 8)
        self.squeeze = nn.Conv2d(channels, width, 1)
        self.excite = nn.Conv2d(width, channels, 1)

    def gates(self, features: Tensor) -> Tensor:
        """Compute the gates: ``[N, C, H, W]`` -> ``[N, C, 1, 1]`` in 0..1."""
        half = features.dtype in (torch.float16, torch.bfloat16)
        squeezed = features.mean((2, 3), keepdim=True, dtype=torch.float32 if half else None).to(features.dtype)
        return torch.sigmoid(self.excite(torch.relu(self.squeeze(squeezed))))

    def forward(self, features: Tensor) -> Tensor:
        """Apply the gates: ``[N, C, H, W]`` -> ``[N, C, H, W]``."""
        return features * self.gates(features)
