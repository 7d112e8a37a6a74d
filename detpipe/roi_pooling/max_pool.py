"""RoI max pooling: the largest value in each bin.

Girshick, "Fast R-CNN", 2015, arXiv 1504.08083, section 2.1.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import roi_pool

from detpipe.roi_pooling.pooler import RoIPooler


class RoIMaxPool(RoIPooler):
    """Take the largest value in each bin of each box, box and bins rounded to cells. Differentiable in the features.

    Args:
        output_size: cells of the result, one number or (height, width).

    Example:
        >>> import torch
        >>> features = {"c4": torch.ones(1, 2, 8, 8)}
        >>> RoIMaxPool(3)(features, [torch.tensor([[0.0, 0.0, 64.0, 64.0]])], {"c4": 16}).shape
        torch.Size([1, 2, 3, 3])
    """

    def __init__(self, output_size: int | tuple[int, int] = 7) -> None:
        super().__init__(output_size)

    def pool(self, features: Tensor, rois: Tensor, stride: int) -> Tensor:
        """Pool one level: ``[N, C, H, W]`` and ``[R, 5]`` in image pixels -> ``[R, C, h, w]``."""
        exact = torch.promote_types(features.dtype, torch.float32)  # half precision has no room for coordinates
        return roi_pool(features.to(exact), rois.to(exact), self.output_size, 1.0 / stride).to(features.dtype)
