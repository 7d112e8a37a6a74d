"""Grids of matrices: affine, similarity, attention (scale and shift) and projective transforms.

Jaderberg et al. 2015, section 3.2, equations 1 and 2.

Deviations:
1. A scale is given by its logarithm, so that it can neither vanish nor mirror; equation 2's s is exp(theta).
2. ProjectiveGrid divides by a denominator that cannot vanish (its docstring says how).
3. Each change from the identity can be bounded, by a hyperbolic tangent whose slope at the identity is one.

N images. The package's docstring states the convention.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from detpipe.spatial_transformer.base import LARGEST, Grid, bounded, check_limits, columns


class AffineGrid(Grid):
    """x' = a11 x + a12 y + a13, y' = a21 x + a22 y + a23, with six parameters in that order (equation 1).

    A matrix without an inverse, such as one of zeros, is legal: many cells then read the same place.

    Args:
        max_change: how far a11, a12, a21, a22 may be from the identity's; below one half, no matrix can collapse or mirror.
        max_shift: how far a13 and a23 may be from zero; 1 is half of the map.

    Raises:
        ValueError: a limit that is not positive and finite.

    Example:
        >>> AffineGrid()(torch.tensor([[1.0, 0, 0.5, 0, 1.0, 0]]), (1, 2))  # half of the half: a quarter to the right
        tensor([[[[0., 0.],
                  [1., 0.]]]])
    """

    parameters_count = 6

    def __init__(self, max_change: float | None = None, max_shift: float | None = None) -> None:
        super().__init__()
        check_limits(max_change=max_change, max_shift=max_shift)
        self.max_change, self.max_shift = max_change, max_shift

    def identity(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Make the parameters of the identity: 1, 0, 0, 0, 1, 0."""
        return torch.eye(2, 3, device=device, dtype=dtype).flatten()

    def _warp(self, theta: Tensor, points: Tensor) -> Tensor:
        matrix = theta.unflatten(1, (2, 3))
        if self.max_change is not None or self.max_shift is not None:
            same = torch.eye(2, 3, device=theta.device, dtype=theta.dtype)
            change, shift = (matrix - same).split((2, 1), dim=-1)
            matrix = same + torch.cat((bounded(change, self.max_change), bounded(shift, self.max_shift)), dim=-1)
        # element-wise, so that autocast and reduced matrix products cannot touch it
        one = torch.ones_like(points[..., :1])
        matrix = matrix.reshape(theta.shape[0], *(1,) * (points.ndim - 1), 2, 3)
        return (matrix * torch.cat((points, one), dim=-1).unsqueeze(-2)).sum(-1)


class SimilarityGrid(Grid):
    """Rotation, scale and shift, with four parameters: angle in radians, logarithm of the scale, shift of x, shift of y.

    Args:
        max_angle: largest angle in radians.
        max_log_scale: largest absolute logarithm of the scale; without it, it is clamped at 13.8, a scale of a million.
        max_shift: largest shift along each axis; 1 is half of the map.
        aspect: width over height of the map. The rotation is one as seen in the map; 1 rotates the coordinates
            themselves, as the paper, which on maps that are not square shears what they show.

    Raises:
        ValueError: a limit or an aspect that is not positive and finite.

    Example:
        >>> grid = SimilarityGrid()
        >>> grid(torch.tensor([[torch.pi / 2, 0.0, 0.0, 0.0]]), (1, 2)).round(decimals=4)  # x turns to y
        tensor([[[[ 0.0000, -0.5000],
                  [-0.0000,  0.5000]]]])
    """

    parameters_count = 4

    def __init__(
        self,
        max_angle: float | None = None,
        max_log_scale: float | None = None,
        max_shift: float | None = None,
        aspect: float = 1.0,
    ) -> None:
        super().__init__()
        check_limits(max_angle=max_angle, max_log_scale=max_log_scale, max_shift=max_shift)
        if not 0 < aspect < math.inf:
            raise ValueError(f"aspect must be positive, the width of the map over its height, got {aspect}")
        self.max_angle, self.max_log_scale, self.max_shift = max_angle, max_log_scale, max_shift
        self.aspect = float(aspect)

    def _warp(self, theta: Tensor, points: Tensor) -> Tensor:
        angle, log_scale, x, y = columns(theta, points)
        angle, scale = bounded(angle, self.max_angle), _scale(log_scale, self.max_log_scale)
        cos, sin = scale * angle.cos(), scale * angle.sin()
        # element-wise, so that autocast and reduced matrix products cannot touch it
        right, down = points.unbind(dim=-1)
        x = cos * right - sin / self.aspect * down + bounded(x, self.max_shift)
        y = sin * self.aspect * right + cos * down + bounded(y, self.max_shift)
        return torch.stack([x, y], dim=-1)


class AttentionGrid(Grid):
    """Scale and shift, with three parameters: logarithm of the scale, shift of x, shift of y (equation 2).

    Args:
        max_log_scale: largest absolute logarithm of the scale; without it, it is clamped at 13.8, a scale of a million.
        max_shift: largest shift along each axis; 1 is half of the map.

    Raises:
        ValueError: a limit that is not positive and finite.

    Example:
        >>> AttentionGrid()(torch.tensor([[math.log(0.5), 0.0, 0.0], [0.0, 0.5, 0.0]]), (1, 2))[:, 0, :, 0]
        tensor([[-0.2500,  0.2500],
                [ 0.0000,  1.0000]])
    """

    parameters_count = 3

    def __init__(self, max_log_scale: float | None = None, max_shift: float | None = None) -> None:
        super().__init__()
        check_limits(max_log_scale=max_log_scale, max_shift=max_shift)
        self.max_log_scale, self.max_shift = max_log_scale, max_shift

    def _warp(self, theta: Tensor, points: Tensor) -> Tensor:
        log_scale, x, y = columns(theta, points)
        scale = _scale(log_scale, self.max_log_scale)
        shift = torch.stack([bounded(x, self.max_shift), bounded(y, self.max_shift)], dim=-1)
        return scale[..., None] * points + shift


class ProjectiveGrid(Grid):
    """Homographies with eight parameters, h11, h12, h13, h21, h22, h23, h31, h32; h33 is 1.

    x' = (h11 x + h12 y + h13) / d and y' = (h21 x + h22 y + h23) / d, with d = h31 x + h32 y + 1. Where d falls below
    ``margin``, 1 / d is continued by its tangent there, (2 margin - d) / margin^2: the homography is exact up to the margin,
    and beyond it a point moves on outwards, finite, the way it was going, instead of coming back from the other side
    of the horizon. Value and slope are continuous and the slope never vanishes, so that a transform can find its way back.

    Args:
        max_change: how far h11, h12, h21, h22 may be from the identity's.
        max_shift: how far h13 and h23 may be from zero; 1 is half of the map.
        max_perspective: largest absolute h31 and h32; below (1 - margin) / 2, every homography is exact in the whole output.
        margin: least denominator that is divided by, .0001 to less than 1.

    Raises:
        ValueError: a limit that is not positive and finite, or a margin outside its range.

    Example:
        >>> theta = torch.tensor([[1.0, 0, 0, 0, 1, 0, 0.5, 0]])
        >>> ProjectiveGrid()(theta, (1, 2))[0, 0, :, 0]  # -.5 / .75 and .5 / 1.25
        tensor([-0.6667,  0.4000])
    """

    parameters_count = 8

    def __init__(
        self,
        max_change: float | None = None,
        max_shift: float | None = None,
        max_perspective: float | None = None,
        margin: float = 0.1,
    ) -> None:
        super().__init__()
        check_limits(max_perspective=max_perspective)
        if not 1e-4 <= margin < 1:
            raise ValueError(f"margin must be at least 0.0001 and below 1, got {margin}")
        self.affine = AffineGrid(max_change, max_shift)
        self.max_perspective, self.margin = max_perspective, margin

    def identity(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Make the parameters of the identity: 1, 0, 0, 0, 1, 0, 0, 0."""
        return torch.eye(3, device=device, dtype=dtype).flatten()[:8]

    def _warp(self, theta: Tensor, points: Tensor) -> Tensor:
        x, y = points.unbind(dim=-1)
        h31, h32 = (bounded(column, self.max_perspective) for column in columns(theta[:, 6:], points))
        denominator, margin = h31 * x + h32 * y + 1, self.margin
        # clamped inside of the division, so that the branch not taken has a finite gradient too
        exact, tangent = 1 / denominator.clamp(min=margin), (2 * margin - denominator) / margin**2
        reciprocal = torch.where(denominator >= margin, exact, tangent)
        return self.affine.warp(theta[:, :6], points) * reciprocal[..., None]


def _scale(log_scale: Tensor, limit: float | None) -> Tensor:
    largest = math.log(LARGEST)
    return (log_scale.clamp(-largest, largest) if limit is None else bounded(log_scale, limit)).exp()
