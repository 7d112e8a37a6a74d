"""Samplers and warps written out from their definitions, one point at a time, and grids to try."""

import math

import torch

from detpipe.spatial_transformer import (
    AffineGrid,
    AttentionGrid,
    ProjectiveGrid,
    SimilarityGrid,
    ThinPlateSplineGrid,
)

GRIDS = {
    "affine": AffineGrid(),
    "affine, bounded": AffineGrid(max_change=0.4, max_shift=0.5),
    "similarity": SimilarityGrid(),
    "similarity, bounded": SimilarityGrid(max_angle=1.0, max_log_scale=0.7, max_shift=0.5, aspect=1.5),
    "attention": AttentionGrid(),
    "attention, bounded": AttentionGrid(max_log_scale=0.7, max_shift=0.5),
    "projective": ProjectiveGrid(),
    "projective, bounded": ProjectiveGrid(max_change=0.4, max_shift=0.5, max_perspective=0.4),
    "thin-plate spline": ThinPlateSplineGrid(points=3),
    "thin-plate spline, bounded": ThinPlateSplineGrid(points=2, max_offset=0.4),
}


def kernel(mode, distance):
    distance = abs(distance)
    if mode == "bilinear":
        return max(0.0, 1 - distance)
    a = -0.75  # the cubic convolution
    if distance <= 1:
        return (a + 2) * distance**3 - (a + 3) * distance**2 + 1
    return a * (distance**3 - 5 * distance**2 + 8 * distance - 4) if distance < 2 else 0.0


def value(channel, x, y, mode, padding):
    """Equation 3 of the paper at a point in cells, with cells outside that are zero or repeat the border."""
    height, width = channel.shape

    def cell(row, col):
        if padding == "border":
            row, col = min(max(row, 0), height - 1), min(max(col, 0), width - 1)
        return channel[row, col].item() if 0 <= row < height and 0 <= col < width else 0.0

    if mode == "nearest":
        return cell(round(y), round(x))
    rows, cols = range(math.floor(y) - 1, math.floor(y) + 3), range(math.floor(x) - 1, math.floor(x) + 3)
    return sum(cell(row, col) * kernel(mode, x - col) * kernel(mode, y - row) for row in rows for col in cols)


def sample(features, grid, mode="bilinear", padding="zeros"):
    images, channels, height, width = features.shape
    result = features.new_empty(images, channels, *grid.shape[1:3])
    for n in range(images):
        for row in range(grid.shape[1]):
            for col in range(grid.shape[2]):
                x, y = grid[n, row, col].tolist()
                x, y = width * (x + 1) / 2 - 0.5, height * (y + 1) / 2 - 0.5
                for c in range(channels):
                    result[n, c, row, col] = value(features[n, c], x, y, mode, padding)
    return result


def grid_of(warp, size):
    """The grid of a function of (x, y), ``[1, h, w, 2]``."""
    height, width = size
    grid = torch.empty(1, height, width, 2, dtype=torch.float64)
    for row in range(height):
        for col in range(width):
            grid[0, row, col] = torch.tensor(
                warp((2 * col + 1) / width - 1, (2 * row + 1) / height - 1), dtype=torch.float64
            )
    return grid


def some_theta(grid, images=2, spread=0.2, dtype=torch.float64):
    return grid.identity(dtype=dtype) + spread * torch.randn(images, grid.parameters_count, dtype=dtype)
