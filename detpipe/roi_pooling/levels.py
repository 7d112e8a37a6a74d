"""Which pyramid level a box is pooled from.

Lin et al., "Feature Pyramid Networks for Object Detection", 2017, arXiv 1612.03144, equation 1.

Deviation: the canonical level is the one of stride 16 whatever the levels are called, and levels that do not exist are
replaced by the nearest one that does, the finer of two as near.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FPNLevels:
    """Choose a level for each box: k = floor(k0 + log2(sqrt(w h) / 224)), as an index into the strides.

    Args:
        canonical_size: side in pixels of a box, that of an ImageNet crop, which is pooled from ...
        canonical_stride: ... the level of this stride (k0 is its logarithm).
        rounding: "floor" as in the paper, or "nearest", which moves the borders between levels by half an octave.

    Raises:
        ValueError: a number that is not positive, or another rounding.

    Example:
        >>> FPNLevels()(torch.tensor([[0.0, 0.0, 224.0, 224.0], [0.0, 0.0, 60.0, 60.0]]), [4, 8, 16, 32])
        tensor([2, 0])
    """

    canonical_size: float = 224.0
    canonical_stride: int = 16
    rounding: str = "floor"

    def __post_init__(self) -> None:
        if self.canonical_size <= 0 or self.canonical_stride <= 0:
            raise ValueError(
                "canonical_size and canonical_stride must be positive, got "
                f"{self.canonical_size} and {self.canonical_stride}"
            )
        if self.rounding not in ("floor", "nearest"):
            raise ValueError(f"rounding must be 'floor' or 'nearest', got {self.rounding!r}")

    def __call__(self, boxes: Tensor, strides: Sequence[int]) -> Tensor:
        """Choose.

        Args:
            boxes: ``[R, 4]`` xyxy in image pixels.
            strides: of the levels, finest first.

        Returns:
            ``[R]`` int64 in 0..len(strides) - 1.
        """
        side = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).clamp(min=1e-6).sqrt()
        wanted = math.log2(self.canonical_stride) + torch.log2(side / self.canonical_size) + 1e-6
        wanted = wanted.floor() if self.rounding == "floor" else wanted.round()
        offered = torch.cat([wanted.new_full((1,), math.log2(stride)) for stride in strides])
        return (wanted[:, None] - offered).abs().argmin(dim=1)
