"""Which pyramid level a box is pooled from.

Lin et al., "Feature Pyramid Networks for Object Detection", 2017, arXiv 1612.03144, equation 1.

Deviation: the canonical level is the one of stride 16 whatever the levels are called, and levels that do not exist are
replaced by the nearest one that does, the finer of two as near.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from detpipe.boxes import constants

CANONICAL_SIZE = 224.0  # a box of this side, the size of an ImageNet crop, ...
CANONICAL_STRIDE = 16  # ... is pooled from the level of this stride


def assign_levels(boxes: Tensor, strides: Sequence[int]) -> Tensor:
    """Choose a level for each box: k = floor(4 + log2(sqrt(w h) / 224)), as an index into the strides.

    Args:
        boxes: ``[R, 4]`` xyxy in image pixels.
        strides: of the levels, finest first.

    Returns:
        ``[R]`` int64 in 0..len(strides) - 1.

    Example:
        >>> assign_levels(torch.tensor([[0., 0., 224., 224.], [0., 0., 60., 60.]]), [4, 8, 16, 32])
        tensor([2, 0])
    """
    side = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).clamp(min=1e-6).sqrt()
    wanted = torch.floor(math.log2(CANONICAL_STRIDE) + torch.log2(side / CANONICAL_SIZE) + 1e-6)
    offered = constants([math.log2(stride) for stride in strides], wanted)
    return (wanted[:, None] - offered).abs().argmin(dim=1)
