"""Squeeze-and-excitation: channels weighted by what the whole map contains, places by what their channels contain, or both.

Hu et al., "Squeeze-and-Excitation Networks", 2018, arXiv 1709.01507, equations 2 to 4; the spatial and the concurrent form:
Roy et al., "Concurrent Spatial and Channel Squeeze & Excitation in Fully Convolutional Networks", 2018, arXiv 1803.02579.

Deviations:
1. The linear layers are 1 x 1 convolutions, with a bias unless it says otherwise.
2. The squeezed width is rounded to a multiple of 8, at least 8, as in timm; ``divisor=1`` gives the paper's C / r.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from detpipe.attention.base import Gates, Gating, squeeze, squeezed_width
from detpipe.support.numbers import check_whole


class SqueezeExcitation(Gating):
    """Multiply each channel by a gate in 0..1 computed from the mean of all channels.

    Args:
        channels: C of the input.
        reduction: the squeezed width is ``channels / reduction``.
        bias: of both layers.
        divisor: the squeezed width is rounded to a multiple of it, at least one.

    Raises:
        ValueError: ``reduction``, ``channels`` or ``divisor`` below 1, or ``reduction`` above ``channels``.

    Example:
        >>> SqueezeExcitation(32)(torch.ones(2, 32, 5, 7)).shape
        torch.Size([2, 32, 5, 7])
    """

    def __init__(self, channels: int, reduction: int = 16, bias: bool = True, divisor: int = 8) -> None:
        super().__init__()
        width = squeezed_width(channels, reduction, divisor)
        self.squeeze = nn.Conv2d(channels, width, 1, bias=bias)
        self.excite = nn.Conv2d(width, channels, 1, bias=bias)

    def weights(self, features: Tensor) -> Tensor:
        """Compute the gates: ``[N, C, H, W]`` -> ``[N, C, 1, 1]`` in 0..1."""
        return torch.sigmoid(self.excite(torch.relu(self.squeeze(squeeze(features)))))


class SpatialSqueezeExcitation(Gating):
    """Multiply each place by a gate in 0..1 computed from its channels (Roy et al. 2018, section 2.2: sSE).

    Args:
        channels: C of the input.

    Raises:
        ValueError: ``channels`` below 1.

    Example:
        >>> SpatialSqueezeExcitation(32)(torch.ones(2, 32, 5, 7)).shape
        torch.Size([2, 32, 5, 7])
    """

    domain = "spatial"

    def __init__(self, channels: int) -> None:
        super().__init__()
        check_whole(channels=channels)
        self.squeeze = nn.Conv2d(channels, 1, 1)

    def weights(self, features: Tensor) -> Tensor:
        """Compute the gates: ``[N, C, H, W]`` -> ``[N, 1, H, W]`` in 0..1."""
        return torch.sigmoid(self.squeeze(features))


class ConcurrentSqueezeExcitation(Gating):
    """Gate channels and places side by side (Roy et al. 2018, section 2.3: scSE).

    Args:
        channels: C of the input.
        reduction: the squeezed width of the channel gate is ``channels / reduction``; 2 in the paper.
        combine: how the two gated maps become one: "sum", as in the paper, or the element-wise "max".
        bias: of both layers of the channel gate.
        divisor: the squeezed width is rounded to a multiple of it, at least one.

    Raises:
        ValueError: as for :class:`SqueezeExcitation`, or an unknown ``combine``.

    Example:
        >>> ConcurrentSqueezeExcitation(32)(torch.ones(2, 32, 5, 7)).shape
        torch.Size([2, 32, 5, 7])
    """

    def __init__(
        self,
        channels: int,
        reduction: int = 2,
        combine: Literal["sum", "max"] = "sum",
        bias: bool = True,
        divisor: int = 8,
    ) -> None:
        super().__init__()
        if combine not in ("sum", "max"):
            raise ValueError(f"combine must be 'sum' or 'max', got {combine!r}")
        self.combine = combine
        self.channel = SqueezeExcitation(channels, reduction, bias, divisor)
        self.spatial = SpatialSqueezeExcitation(channels)

    def weights(self, features: Tensor) -> Tensor:
        """Compute the joint gates: ``[N, C, H, W]`` -> ``[N, C, H, W]`` in 0..2 (sum) or 0..1 (max)."""
        channel, spatial = self.channel.weights(features), self.spatial.weights(features)
        if self.combine == "sum":
            return channel + spatial
        # the larger product: of two gates the larger one where the feature is positive, else the smaller one
        return torch.where(features > 0, torch.maximum(channel, spatial), torch.minimum(channel, spatial))

    def gates(self, features: Tensor) -> Gates:
        """Compute the gates: ``[N, C, H, W]`` -> "channel" ``[N, C, 1, 1]`` and "spatial" ``[N, 1, H, W]`` in 0..1."""
        return {"channel": self.channel.weights(features), "spatial": self.spatial.weights(features)}
