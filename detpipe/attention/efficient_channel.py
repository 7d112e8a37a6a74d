"""Efficient channel attention: each channel is weighted by the means of its neighbors among the channels.

Wang et al., "ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks", 2020, arXiv 1910.03151, equations 6
and 12.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from detpipe.attention.base import Gating, check_kernel, squeeze
from detpipe.support.numbers import check_whole


class ECA(Gating):
    """Multiply each channel by a gate in 0..1 computed from the means of k neighboring channels.

    Args:
        channels: C of the input.
        kernel_size: k, odd; None takes the odd number next to (log2(C) + 1) / 2 (equation 12 with gamma 2 and b 1).

    Raises:
        ValueError: ``channels`` below 1, or a ``kernel_size`` that is even or below 1.

    Example:
        >>> eca = ECA(256)
        >>> eca(torch.ones(2, 256, 5, 7)).shape, eca.conv.kernel_size
        (torch.Size([2, 256, 5, 7]), (5,))
    """

    def __init__(self, channels: int, kernel_size: int | None = None) -> None:
        super().__init__()
        check_whole(channels=channels)
        if kernel_size is None:
            nearest = int(abs(math.log2(channels) + 1) / 2)
            kernel_size = nearest if nearest % 2 else nearest + 1
        check_kernel(kernel_size)
        self.conv = nn.Conv1d(1, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def weights(self, features: Tensor) -> Tensor:
        """Compute the gates: ``[N, C, H, W]`` -> ``[N, C, 1, 1]`` in 0..1."""
        means = squeeze(features).flatten(1)[:, None]  # [N, 1, C]
        return torch.sigmoid(self.conv(means))[:, 0, :, None, None]
