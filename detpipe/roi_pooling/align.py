"""RoIAlign: bilinear samples averaged in each bin.

He et al., "Mask R-CNN", 2017, arXiv 1703.06870.

Deviation: coordinates are shifted by half a pixel (``aligned=True``), so that a cell's value sits at its center.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import roi_align

from detpipe.roi_pooling.pooler import RoIPooler


class RoIAlign(RoIPooler):
    """Average bilinear samples in each bin of each box. Differentiable in the features.

    Args:
        output_size: cells of the result, one number or (height, width).
        sampling_ratio: samples along each axis of a bin; 0 takes as many as the bin has cells, rounded up.

    Example:
        >>> import torch
        >>> features = {"c4": torch.ones(1, 2, 8, 8)}
        >>> RoIAlign(3)(features, [torch.tensor([[0.0, 0.0, 64.0, 64.0]])], {"c4": 16}).shape
        torch.Size([1, 2, 3, 3])
    """

    def __init__(self, output_size: int | tuple[int, int] = 7, sampling_ratio: int = 2) -> None:
        super().__init__(output_size)
        if sampling_ratio < 0:
            raise ValueError(f"sampling_ratio must be 0 (adaptive) or positive, got {sampling_ratio}")
        self.sampling_ratio = sampling_ratio

    def pool(self, features: Tensor, rois: Tensor, stride: int) -> Tensor:
        """Pool one level: ``[N, C, H, W]`` and ``[R, 5]`` in image pixels -> ``[R, C, h, w]``."""
        exact = torch.promote_types(features.dtype, torch.float32)  # half precision has no room for coordinates
        pooled = roi_align(
            features.to(exact), rois.to(exact), self.output_size, 1.0 / stride, self.sampling_ratio, aligned=True
        )
        return pooled.to(features.dtype)
