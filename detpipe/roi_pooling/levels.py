"""Which pyramid level a box is pooled from.

Lin et al., "Feature Pyramid Networks for Object Detection", 2017, arXiv 1612.03144, equation 1.

Deviation: the canonical level is the one of stride 16 whatever the levels are called, and levels that do not exist are
replaced by the nearest one that does, the finer of two as near.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

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
        if not (0 < self.canonical_size < math.inf and 0 < self.canonical_stride < math.inf):
            raise ValueError(
                "canonical_size and canonical_stride must be positive and finite, got "
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
        width, height = (boxes[:, 2:] - boxes[:, :2]).unbind(1)
        nth = choose_level(width * height, self.areas(strides))  # of the different strides, finest first
        places = [list(strides).index(stride) for stride in sorted(set(strides))]
        if places == list(range(len(places))):
            return nth
        return sum(((nth == n) * place for n, place in enumerate(places)), torch.zeros_like(nth))

    def areas(self, strides: Sequence[int]) -> list[float]:
        """Say from which area in pixels on a box belongs to the next coarser of the strides.

        Args:
            strides: of the levels, in any order; of several that are the same the first counts.

        Returns:
            One area less than there are different strides, ascending.
        """
        octaves = sorted({math.log2(stride) for stride in strides})
        first = [math.floor((finer + coarser) / 2) + 1 for finer, coarser in pairwise(octaves)]
        shift = math.log2(self.canonical_stride) + 1e-6 + (0.5 if self.rounding == "nearest" else 0.0)
        return [(self.canonical_size * 2.0 ** (octave - shift)) ** 2 for octave in first]


def choose_level(area: Tensor, areas: Sequence[float]) -> Tensor:
    """Choose a level for each box by its area: ``[R]`` int64, the number of areas that it reaches."""
    level = torch.zeros_like(area, dtype=torch.int64)
    for least in areas:
        level += area >= least
    return level
