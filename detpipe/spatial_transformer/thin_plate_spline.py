"""Grids of thin-plate splines: a smooth warp that takes control points exactly where they are told to go.

Jaderberg et al. 2015, section 3.2; Bookstein, "Principal Warps: Thin-Plate Splines and the Decomposition of Deformations", 1989.

Deviation: the parameters are the offsets of the control points from where they start, not their positions, so that zeros are the
identity, exactly.

N images, K x K control points. The package's docstring states the convention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from detpipe.spatial_transformer.base import Grid, bounded, check_limits, full_precision


class ThinPlateSplineGrid(Grid):
    """Offsets of K x K control points, and between them the surface that bends least.

    The control points lie evenly on the output, from edge to edge (-1 to 1). The 2 K^2 parameters are (dx, dy) of each, row
    by row from the upper left: where in the input, relative to its own place, the value at that point is read. The spline's
    linear system depends on the control points alone; it is solved once, in float64, at construction. Offsets that are an
    affine function of the points give that affine transform, everywhere.

    Args:
        points: K, at least 2.
        max_offset: largest offset along each axis; 1 is half of the map. Below 1 / (K - 1), neighbors cannot change places.

    Raises:
        ValueError: ``points`` below 2, or a limit that is not positive and finite.

    Example:
        >>> grid = ThinPlateSplineGrid(points=4)
        >>> grid.parameters_count, grid(torch.zeros(2, 32), (5, 7)).shape
        (32, torch.Size([2, 5, 7, 2]))
    """

    solution: Tensor

    def __init__(self, points: int = 4, max_offset: float | None = None) -> None:
        super().__init__()
        if points < 2:
            raise ValueError(f"points must be at least 2, the control points along each axis, got {points}")
        check_limits(max_offset=max_offset)
        self.points, self.max_offset = points, max_offset
        self.parameters_count = 2 * points**2
        with torch.device("cpu"):  # of a network that is built on the device "meta", too
            self._exact = _solve(_control_points(points, dtype=torch.float64))
        self.register_buffer("solution", self._exact.float(), persistent=False)  # [K^2 + 3, K^2]

    def _warp(self, theta: Tensor, points: Tensor) -> Tensor:
        offsets = bounded(theta, self.max_offset).unflatten(1, (-1, 2))  # [N, K^2, 2]
        with full_precision(theta):
            basis = _basis(points.reshape(-1, 2), _control_points(self.points, theta.device, theta.dtype))
            moved = (basis @ self.solution.to(theta)) @ offsets  # [M, K^2] @ [N, K^2, 2], of M points
        return points + moved.reshape(theta.shape[0], *points.shape)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move to another device or type; the solution follows from its exact form, and never to half precision."""
        super()._apply(fn, recurse)
        dtype = torch.promote_types(self.solution.dtype, torch.float32)
        self.solution = self._exact.to(dtype).to(self.solution.device)
        return self


def _control_points(count: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """``[K^2, 2]`` (x, y), row by row."""
    side = torch.linspace(-1, 1, count, device=device, dtype=dtype)
    return torch.stack(torch.broadcast_tensors(side, side[:, None]), dim=-1).flatten(0, 1)


def _basis(points: Tensor, control: Tensor) -> Tensor:
    """The spline's functions, r^2 log r^2 around each control point, then x, y, 1: ``[..., 2]`` -> ``[..., K^2 + 3]``."""
    square = (points[..., None, :] - control).square().sum(dim=-1)
    return torch.cat([torch.xlogy(square, square), points, torch.ones_like(points[..., :1])], dim=-1)


def _solve(control: Tensor) -> Tensor:
    """Coefficients of the functions for a unit offset at each control point: ``[K^2 + 3, K^2]``.

    The spline goes through the offsets, and its bending part has neither a sum nor a first moment.
    """
    count = len(control)
    system = control.new_zeros(count + 3, count + 3)
    system[:count] = _basis(control, control)
    system[count:, :count] = system[:count, count:].T
    return torch.linalg.solve(system, torch.eye(count + 3, count, dtype=control.dtype))
