"""What every attention module can do: weight a map, and show its weights.

N images, C channels, H x W cells, M branches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
import torch.fx
from torch import Tensor, nn

from detpipe.support.numbers import check_whole

Gates = dict[str, Tensor]


class Attention(nn.Module, ABC):
    """Feature maps weighted by gates, which can be looked at."""

    @abstractmethod
    def gates(self, features: Tensor) -> Gates:
        """Compute the gates.

        Args:
            features: ``[N, C, H, W]``.

        Returns:
            by what the gates tell apart: "channel" ``[N, C, 1, 1]`` and "spatial" ``[N, 1, H, W]``, in 0..1; "branch"
            ``[N, M, C, 1, 1]``, which sum to one over the branches.
        """


class Gating(Attention):
    """Attention that leaves the shape as it is: ``[N, C, H, W]`` -> ``[N, C, H, W]``."""

    domain: ClassVar[str] = "channel"  # what the gates tell apart

    @abstractmethod
    def weights(self, features: Tensor) -> Tensor:
        """Compute what the features are multiplied by, in a shape that broadcasts to ``[N, C, H, W]``."""

    def gates(self, features: Tensor) -> Gates:
        """Compute the gates of ``[N, C, H, W]``, by what they tell apart: see :meth:`Attention.gates`."""
        return {self.domain: self.weights(features)}

    def forward(self, features: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """Apply the gates, and add a shortcut in the same pass over memory.

        Args:
            features: ``[N, C, H, W]``.
            shortcut: ``[N, C, H, W]`` or None.

        Returns:
            ``[N, C, H, W]``: the gated features, plus the shortcut if there is one.
        """
        return gated(features, self.weights(features), shortcut)


def gated(features: Tensor, weights: Tensor, shortcut: Tensor | None) -> Tensor:
    """Compute ``features * weights``, plus ``shortcut`` if there is one."""
    return features * weights if shortcut is None else torch.addcmul(shortcut, features, weights)


def squeeze(features: Tensor) -> Tensor:
    """Average each channel, in float32 where the features have half precision: ``[N, C, H, W]`` -> ``[N, C, 1, 1]``."""
    return _mean(features)  # found here by its name, which is what torch.fx wraps


@torch.fx.wrap  # one node of a traced graph: its choice by data type cannot be traced
def _mean(features: Tensor) -> Tensor:
    half = features.dtype in (torch.float16, torch.bfloat16)
    return features.mean((2, 3), keepdim=True, dtype=torch.float32 if half else None).to(features.dtype)


def squeezed_width(channels: int, reduction: int, divisor: int = 8) -> int:
    """Divide channels by a reduction, rounded to a multiple of ``divisor``, halves up, and at least one of it.

    A divisor of 1 rounds down, as the papers' figures.

    Raises:
        ValueError: a number below 1, or ``reduction`` above ``channels``.
    """
    check_whole(channels=channels, reduction=reduction, divisor=divisor)
    if reduction > channels:
        raise ValueError(f"reduction must be in 1..channels ({channels}), got {reduction}")
    if divisor == 1:
        return channels // reduction
    return max(divisor, int(channels / reduction + divisor / 2) // divisor * divisor)


def check_kernel(kernel_size: int) -> None:
    """Refuse sides of a kernel that are even, or no whole numbers of at least 1, by a ValueError."""
    check_whole(kernel_size=kernel_size)
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd, got {kernel_size}")
