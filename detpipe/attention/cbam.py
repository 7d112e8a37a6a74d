"""Channel attention, then spatial attention on what it leaves: the mixed domain.

Woo et al., "CBAM: Convolutional Block Attention Module", 2018, arXiv 1807.06521, equations 2 and 3.

Deviations:
1. The squeezed width is rounded to a multiple of 8, at least 8; ``divisor=1`` gives the paper's C / r.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from detpipe.attention.base import Gates, Gating, check_kernel, gated, squeeze, squeezed_width


class CBAM(Gating):
    """Multiply channels, then places, by gates in 0..1, both from means and maxima.

    Args:
        channels: C of the input.
        reduction: the squeezed width of the channel gate is ``channels / reduction``.
        kernel_size: side of the convolution of the spatial gate, odd.
        bias: of the layers of the channel gate.
        divisor: the squeezed width is rounded to a multiple of it, at least one.
        batch_norm: normalize the map before the spatial gate's sigmoid, as the authors' code does and equation 3 does not.

    Raises:
        ValueError: ``reduction``, ``channels`` or ``divisor`` below 1, ``reduction`` above ``channels``, or a ``kernel_size``
            that is even or below 1.

    Example:
        >>> CBAM(32)(torch.ones(2, 32, 5, 7)).shape
        torch.Size([2, 32, 5, 7])
    """

    def __init__(
        self,
        channels: int,
        reduction: int = 16,
        kernel_size: int = 7,
        bias: bool = True,
        divisor: int = 8,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        check_kernel(kernel_size)
        width = squeezed_width(channels, reduction, divisor)
        self.squeeze = nn.Conv2d(channels, width, 1, bias=bias)
        self.excite = nn.Conv2d(width, channels, 1, bias=bias)
        self.spatial = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=not batch_norm)
        self.norm = nn.BatchNorm2d(1) if batch_norm else nn.Identity()

    def weights(self, features: Tensor) -> Tensor:
        """Compute the product of both gates: ``[N, C, H, W]`` -> ``[N, C, H, W]`` in 0..1."""
        channel = self._channel(features)
        return channel * self._spatial(features * channel)

    def forward(self, features: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """Apply the gates, and add a shortcut in the same pass over memory; see :meth:`Gating.forward`."""
        features = features * self._channel(features)
        return gated(features, self._spatial(features), shortcut)

    def gates(self, features: Tensor) -> Gates:
        """Compute the gates: ``[N, C, H, W]`` -> "channel" ``[N, C, 1, 1]`` and "spatial" ``[N, 1, H, W]`` in 0..1."""
        channel = self._channel(features)
        return {"channel": channel, "spatial": self._spatial(features * channel)}

    def _channel(self, features: Tensor) -> Tensor:
        squeezed = (squeeze(features), features.amax((2, 3), keepdim=True))
        mean, largest = (self.excite(torch.relu(self.squeeze(values))) for values in squeezed)
        return torch.sigmoid(mean + largest)

    def _spatial(self, features: Tensor) -> Tensor:
        squeezed = torch.cat((features.mean(1, keepdim=True), features.amax(1, keepdim=True)), dim=1)
        return torch.sigmoid(self.norm(self.spatial(squeezed)))
