"""Where cells of the output cover many cells of the map: halved maps, and how far each point needs them.

N images, C channels, H x W cells of the map, h x w cells of the output. The package's docstring states the convention.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from detpipe.spatial_transformer.base import LARGEST

NEAR = 1e-3  # octaves: as near to a level of the pyramid as rounding may bring a point that is on it, on a map of 10 000 cells


def cell_steps(grid: Tensor) -> Tensor:
    """Compute how far it is from each point of a grid to the next ones, from its neighbors on both sides.

    Args:
        grid: ``[..., h, w, 2]`` points (x, y), both sizes at least 2, or it is a ValueError: a single row does not tell.

    Returns:
        ``[..., h, w, 2, 2]``: the step to the right, then the step down, each (x, y).
    """
    if grid.shape[-3] < 2 or grid.shape[-2] < 2:
        raise ValueError(
            "antialias: a grid of one row or one column does not tell how large its cells are: "
            f"pass steps [..., h, w, 2, 2] with the grid {list(grid.shape)}"
        )
    right, down = torch.gradient(grid, dim=[grid.ndim - 2, grid.ndim - 3])
    return torch.stack([right, down], dim=-2)


def octaves(steps: Tensor, size: tuple[int, int], levels: int) -> Tensor:
    """Compute by how many halvings of the map a cell of the output is one cell of it.

    Args:
        steps: ``[..., 2, 2]`` the step to the right and the step down, each (x, y), in coordinates of the map.
        size: (H, W) of the map.
        levels: the largest result.

    Returns:
        ``[...]`` in 0..levels: the binary logarithm of the longer step in cells of the map; 0 where that is below one cell.
    """
    height, width = size
    steps = steps.nan_to_num(0.0, LARGEST, -LARGEST).clamp(-LARGEST, LARGEST)
    square = (steps[..., 0] * (width / 2)).square() + (steps[..., 1] * (height / 2)).square()
    level = square.amax(dim=-1).clamp(1, 4**levels).log2() / 2
    whole = level.detach().round()
    return torch.where((level.detach() - whole).abs() < NEAR, level + (whole - level.detach()), level)


def halve(maps: Tensor, padding: str) -> Tensor:
    """Average blocks of 2 x 2 cells, an odd last row or column with what the padding, "zeros" or "border", says is beyond."""
    height, width = maps.shape[2:]
    if height % 2 or width % 2:
        maps = functional.pad(
            maps, (0, width % 2, 0, height % 2), mode="constant" if padding == "zeros" else "replicate"
        )
    return functional.avg_pool2d(maps, 2)


def in_level(points: Tensor, size: tuple[int, int], halved: tuple[int, int], level: int) -> Tensor:
    """Express points ``[..., 2]`` of a map of size (H, W) in coordinates of the one that ``level`` halvings made of it.

    They may reach beyond the right and lower edge.
    """
    (height, width), (rows, cols) = size, halved
    x, y = points.unbind(dim=-1)
    x = (x + 1) * (width / (cols * 2**level)) - 1
    y = (y + 1) * (height / (rows * 2**level)) - 1
    return torch.stack([x, y], dim=-1)
