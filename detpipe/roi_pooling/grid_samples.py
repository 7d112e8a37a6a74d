"""Bilinear samples by ``grid_sample``, which ONNX and a graph of PyTorch's own operators have: what exported graphs read maps by.

The rule at the border is that of :mod:`detpipe.roi_pooling.points`.
"""

from __future__ import annotations

from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

# whether a graph that is exported may have PyTorch's own operators alone, so that a process runs it without torchvision and detpipe
torch_alone: ContextVar[bool] = ContextVar("torch_alone", default=False)


def read_cells(features: Tensor, cells: Tensor) -> Tensor:
    """Read a map at points.

    Args:
        features: ``[N, C, H, W]``.
        cells: ``[N, P, A, B, 2]`` (x, y); the value of cell k sits at coordinate k.

    Returns:
        ``[N, P, C, A, B]``; 0 more than a cell outside of the map.

    Example:
        >>> ramp = torch.arange(4.0).reshape(1, 1, 1, 4)
        >>> read_cells(ramp, torch.tensor([0.5, 0.0, 3.5, 0.0, 4.5, 0.0]).reshape(1, 1, 1, 3, 2)).flatten().tolist()
        [0.5, 3.0, 0.0]
    """
    sides = torch.stack([cells.new_full((), features.shape[axis]) for axis in (3, 2)])  # width, height
    inside = ((cells >= -1) & (cells <= sides)).all(-1)  # [N, P, A, B]
    grid = ((2 * cells + 1) / sides - 1).flatten(2, 3)  # [N, P, A B, 2]
    read = F.grid_sample(features, grid.to(features.dtype), "bilinear", "border", align_corners=False)
    return read.unflatten(3, cells.shape[2:4]).transpose(1, 2) * inside[:, :, None]
