"""Read a map at the points of a grid: bilinear, bicubic or nearest, and averaged where the grid is coarser than the map.

Jaderberg et al. 2015, section 3.3, equations 3 to 7. Smoothing for minification: Williams, "Pyramidal Parametrics", 1983.

Deviations:
1. A point on the center of its own cell, in a grid of the map's size, reads that cell to the bit: the identity changes
   nothing. Elsewhere a coordinate in float32 is off by up to H or W times 1e-7 cells.
2. At a cell's center the bilinear kernel has a kink, where equation 7's derivative along an axis is the cell's own value; here
   it is the difference to a neighbor, as on the open interval to that side.
3. Bicubic is the cubic convolution with a = -3/4.

Equation 7 has a factor of 1 or -1, by the side on which a cell lies; texts that leave it out print what is no derivative.

N images, C channels, H x W cells of the map, G grids an image of h x w points. The package's docstring states the convention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from detpipe.spatial_transformer.base import LARGEST, cell_centers

MODES, PADDINGS = ("bilinear", "bicubic", "nearest"), ("zeros", "border")
FAR = 16.0  # no kernel reaches the map from here: points further out are moved here, which changes neither value nor gradient


class Sampler(nn.Module):
    """Read ``[N, C, H, W]`` at points ``[N, h, w, 2]``; differentiable in both, once.

    The gradient in the map exists for all modes; that in the points is zero for "nearest", and zero outside of the map. A point
    that is not a number lies outside.

    With ``antialias``, the map is halved ``levels`` times by averages of 2 x 2 cells, and a point whose cell of the output is s
    cells long in the map is read between the two halved maps next to log2(s): as fine as the plain sampler where s is at most
    one, and the exact mean of what a cell covers where it covers blocks of 2^k x 2^k. The longer side of a cell counts, so
    that one that is stretched is smoothed too much rather than too little; beyond 2^levels nothing is smoothed
    further. It costs a third of the map in memory and ``levels + 1`` samplings instead of one, wherever the points are.

    On CUDA, the gradient in the map is added up in an order that varies from run to run, and PyTorch refuses it where only
    deterministic algorithms are allowed.

    Maps in half precision are sampled in float32, by a copy, and the result has their type again; grids in float64 make the
    computation float64.

    Args:
        mode: "bilinear", "bicubic" or "nearest".
        padding: what is outside of the map: "zeros", or the nearest cell of its "border".
        antialias: smooth where the grid is coarser than the map.
        levels: how often the map is halved for that.

    Raises:
        ValueError: an unknown mode or padding, ``levels`` below 1, or antialias with "nearest".

    Example:
        >>> Sampler()(torch.tensor([[[[2.0, 6.0]]]]), torch.tensor([[[[0.0, 0.0], [0.25, 0.0], [2.0, 0.0]]]]))
        tensor([[[[4., 5., 0.]]]])
    """

    def __init__(
        self, mode: str = "bilinear", padding: str = "zeros", antialias: bool = False, levels: int = 4
    ) -> None:
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"mode must be one of {list(MODES)}, got {mode!r}")
        if padding not in PADDINGS:
            raise ValueError(f"padding must be one of {list(PADDINGS)}, got {padding!r}")
        if antialias and mode == "nearest":
            raise ValueError("antialias averages cells and nearest takes one: choose mode 'bilinear' or 'bicubic'")
        if levels < 1:
            raise ValueError(f"levels must be at least 1, got {levels}")
        self.mode, self.padding, self.antialias, self.levels = mode, padding, antialias, levels

    def forward(self, features: Tensor, grid: Tensor, steps: Tensor | None = None) -> Tensor:
        """Sample.

        Args:
            features: ``[N, C, H, W]``.
            grid: ``[N, h, w, 2]`` points (x, y), -1..1; or ``[N, G, h, w, 2]``, several grids an image, which are read in
                one call without a copy of the map.
            steps: ``[N, (G,) h, w, 2, 2]``, how far it is to the next point on the right and below, each (x, y); used with
                ``antialias``. None takes it from the neighbors in the grid.

        Returns:
            ``[N, C, h, w]``, or ``[N, G, C, h, w]``, of the type of ``features``.

        Raises:
            ValueError: features, a grid or steps of another shape or type, or a grid of one row or column with antialias
                but without steps.
        """
        self._check(features, grid, steps)
        dtype = torch.promote_types(torch.promote_types(features.dtype, grid.dtype), torch.float32)
        maps, points = features.to(dtype), grid.to(dtype).nan_to_num(LARGEST).clamp(-LARGEST, LARGEST)
        at_center = _at_own_centers(grid, maps)
        if self.antialias:
            steps = cell_steps(points) if steps is None else steps.to(dtype)
            sampled = self._smoothed(maps, points, steps, at_center)
        else:
            sampled = self._read(maps, points, at_center)
        return sampled.to(features.dtype)

    def _smoothed(self, maps: Tensor, points: Tensor, steps: Tensor, at_center: Tensor | None) -> Tensor:
        size = (maps.shape[2], maps.shape[3])
        octave = octaves(steps, size, self.levels).unsqueeze(-3)  # a channel to broadcast over
        total = self._read(maps, points, at_center) * (1 - octave).clamp(min=0)
        for level in range(1, self.levels + 1):
            maps = halve(maps, self.padding)
            moved = in_level(points, size, (maps.shape[2], maps.shape[3]), level)
            total = total + self._read(maps, moved) * (1 - (octave - level).abs()).clamp(min=0)
        return total

    def _read(self, maps: Tensor, points: Tensor, at_center: Tensor | None = None) -> Tensor:
        rows = points.flatten(1, -3).clamp(-FAR, FAR)  # [N, G h, w, 2]
        sampled = functional.grid_sample(maps, rows, mode=self.mode, padding_mode=self.padding, align_corners=False)
        if points.ndim == 5:
            return sampled.unflatten(2, points.shape[1:3]).transpose(1, 2)  # [N, G, C, h, w]
        if at_center is None:
            return sampled
        if torch.compiler._is_exporting_flag:  # for inference; is_exporting() is true in what torch 2.11 compiles, too
            return torch.where(at_center, maps, sampled)
        return _OwnCells.apply(sampled, maps.detach(), at_center)  # pyright: ignore[reportReturnType]

    @staticmethod
    def _check(features: Tensor, grid: Tensor, steps: Tensor | None) -> None:
        if features.ndim != 4 or not features.is_floating_point() or 0 in features.shape[1:]:
            raise ValueError(
                "features must be floating-point [N, C, H, W] with at least one channel and cell, "
                f"got {list(features.shape)} {features.dtype}"
            )
        if grid.ndim not in (4, 5) or grid.shape[-1] != 2 or not grid.is_floating_point():
            raise ValueError(
                f"grid must be floating-point [N, h, w, 2] or [N, G, h, w, 2], got {list(grid.shape)} {grid.dtype}"
            )
        if grid.shape[0] != features.shape[0]:
            raise ValueError(f"grid {list(grid.shape)} is for {grid.shape[0]} images, features are {features.shape[0]}")
        if steps is not None and steps.shape != (*grid.shape, 2):
            raise ValueError(
                f"steps must be {[*grid.shape, 2]}, two for each point of the grid, got {list(steps.shape)}"
            )


def _at_own_centers(grid: Tensor, maps: Tensor) -> Tensor | None:
    """Which points are the centers of their own cells, ``[N, 1, h, w]``; None where the grid has not the size of the map."""
    if grid.ndim == 5 or grid.shape[1:3] != maps.shape[2:]:
        return None
    centers = cell_centers(maps.shape[2:], grid.device, torch.promote_types(grid.dtype, torch.float32))
    return (grid == centers.to(grid.dtype)).all(dim=-1)[:, None]


class _OwnCells(torch.autograd.Function):
    """Put values that need no interpolation where they belong, and pass the gradient on as if they had been interpolated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(sampled: Tensor, maps: Tensor, at_center: Tensor) -> Tensor:
        return torch.where(at_center, maps, sampled)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient, None, None


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
