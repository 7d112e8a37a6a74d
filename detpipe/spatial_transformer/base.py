"""What every grid can do: take points of the output to the places in the input where their values are read.

N images, P parameters of a transform, h x w cells of the output. The package's docstring states the convention.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

LARGEST = 1e6  # parameters are clamped here: products of a few of them stay finite in float32


class Grid(nn.Module, ABC):
    """A family of transforms with P parameters, and the grid of points that one of them makes of an output's cells."""

    parameters_count: int  # P, how many numbers describe one transform

    def identity(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Make the parameters ``[P]`` of the transform that leaves every point where it is: zeros, for most families."""
        return torch.zeros(self.parameters_count, device=device, dtype=dtype)

    @abstractmethod
    def _warp(self, theta: Tensor, points: Tensor) -> Tensor:
        """Take points ``[..., 2]`` by finite parameters ``[N, P]`` to ``[N, ..., 2]``, both of one type, float32 at least."""

    def warp(self, theta: Tensor, points: Tensor) -> Tensor:
        """Take points of the output to the input, such as the outline of what is looked at, for a picture.

        Args:
            theta: ``[N, P]`` parameters, of any floating-point type.
            points: ``[..., 2]`` (x, y), -1..1, the same for all images.

        Returns:
            ``[N, ..., 2]`` (x, y), -1..1 inside of the map; float32 at least. Differentiable in ``theta``; finite, with
            finite gradients, whatever the parameters.

        Raises:
            ValueError: ``theta`` that is not floating-point ``[N, P]``.
        """
        if theta.ndim != 2 or theta.shape[1] != self.parameters_count or not theta.is_floating_point():
            raise ValueError(
                f"theta must be floating-point [N, {self.parameters_count}] for {type(self).__name__}, "
                f"got {list(theta.shape)} {theta.dtype}"
            )
        theta = theta.to(torch.promote_types(theta.dtype, torch.float32))
        known = (theta.abs() < math.inf).all(dim=1, keepdim=True)
        theta = torch.where(known, theta, self.identity(theta.device, theta.dtype)).clamp(-LARGEST, LARGEST)
        return self._warp(theta, points.to(theta))

    def forward(self, theta: Tensor, size: Sequence[int]) -> Tensor:
        """Lay the grid.

        Args:
            theta: ``[N, P]`` parameters, of any floating-point type.
            size: (h, w) cells of the output.

        Returns:
            ``[N, h, w, 2]``: where in the input the center of each cell of the output is, (x, y), -1..1; float32 at least.

        Raises:
            ValueError: ``theta`` that is not floating-point ``[N, P]``, or a size below 1.
        """
        h, w = size
        if h < 1 or w < 1:
            raise ValueError(f"size (h, w) must be at least 1, got {tuple(size)}")
        return self.warp(theta, cell_centers((h, w), theta.device, torch.promote_types(theta.dtype, torch.float32)))


def cell_centers(size: Sequence[int], device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Compute the points of the identity: the centers of the cells of a size (h, w), ``[h, w, 2]`` (x, y), -1..1.

    Example:
        >>> cell_centers((1, 4))
        tensor([[[-0.7500,  0.0000],
                 [-0.2500,  0.0000],
                 [ 0.2500,  0.0000],
                 [ 0.7500,  0.0000]]])
    """
    # whole numbers up to the division: one rounding, and none where the size is a power of two
    y, x = ((2 * torch.arange(n, device=device, dtype=dtype) + (1 - n)) / n for n in size)
    return torch.stack(torch.broadcast_tensors(x, y[:, None]), dim=-1)


def columns(theta: Tensor, points: Tensor) -> tuple[Tensor, ...]:
    """Split ``[N, P]`` into P tensors ``[N, 1, ..., 1]`` that broadcast against a coordinate of ``points`` ``[..., 2]``."""
    return theta.reshape(*theta.shape, *(1,) * (points.ndim - 1)).unbind(dim=1)


def bounded(change: Tensor, limit: float | None) -> Tensor:
    """Keep a change from the identity within ``-limit..limit``, by a hyperbolic tangent: near zero it stays what it was."""
    return change if limit is None else limit * torch.tanh(change / limit)


def check_limits(**limits: float | None) -> None:
    """Refuse bounds that leave nothing to choose, by a ValueError that has the name of the argument."""
    for name, limit in limits.items():
        if limit is not None and not 0 < limit < math.inf:
            raise ValueError(f"{name} must be positive and finite, or None for no limit, got {limit}")


def full_precision(tensor: Tensor) -> AbstractContextManager:
    """Switch autocast off for the device of a tensor."""
    kind = tensor.device.type
    return nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)
