"""Bilinear samples by ``grid_sample``, which ONNX and a graph of PyTorch's own operators have: what exported graphs read maps by.

The rule at the border is that of :mod:`detpipe.roi_pooling.points`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

_torch_alone = False  # no context variable: torch 2.11 does not compile what reads one


@contextmanager
def torch_alone() -> Iterator[None]:
    """Export graphs of PyTorch's own operators alone, so that a process runs them without torchvision and detpipe."""
    global _torch_alone
    _torch_alone = True
    try:
        yield
    finally:
        _torch_alone = False


def is_torch_alone() -> bool:
    """Whether a graph may have PyTorch's own operators alone."""
    return _torch_alone


def is_exporting() -> bool:
    """Whether a graph is exported; ``torch.compiler.is_exporting`` is true in what torch 2.11 compiles, too."""
    return torch.compiler._is_exporting_flag


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
