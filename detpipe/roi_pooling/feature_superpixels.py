"""Superpixels of a feature map: its own cells, clustered by what they hold and where they are.

Achanta et al., "SLIC Superpixels Compared to State-of-the-art Superpixel Methods", 2012.

Deviations: (1) clusters features, not colors, and measures their distance in standard deviations of the map, so that the
compactness has no unit; (2) a cell compares with the 3 x 3 seeds around the block that it lies in, whereas SLIC's search
window moves with the seed; (3) superpixels are not made connected.

N images, C channels, H x W cells, S seeds an image: one in each block of spacing x spacing cells.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

import detpipe.roi_pooling.superpixel_ops  # noqa: F401 (registers the operators that are called here)
from detpipe.roi_pooling.bags import bag_dot
from detpipe.roi_pooling.layouts import check_features


def feature_superpixels(features: Tensor, spacing: int = 4, iterations: int = 3, compactness: float = 0.5) -> Tensor:
    """Cluster the cells of each feature map around a grid of seeds. Has no gradient.

    Works compiled and inside ``torch.func.vmap``, and does not wait for a GPU.

    Args:
        features: ``[N, C, H, W]``.
        spacing: cells between seeds along each axis.
        iterations: rounds of assigning cells to seeds and moving the seeds; 0 gives the blocks of the grid.
        compactness: 0 looks at the features alone; at 1 a distance of ``spacing`` cells weighs as much as one of one
            standard deviation of the features.

    Returns:
        ``[N, H, W]`` int64 labels in 0..S - 1, S = ceil(H / spacing) * ceil(W / spacing), row by row. Some may be absent.

    Raises:
        ValueError: features are not ``[N, C, H, W]``, or a number is out of range.

    Example:
        >>> halves = torch.tensor([0.0, 0.0, 0.0, 9.0, 9.0, 9.0]).expand(1, 1, 2, 6)
        >>> feature_superpixels(halves, spacing=2, compactness=0.1)
        tensor([[[0, 0, 0, 2, 2, 2],
                 [0, 0, 0, 2, 2, 2]]])
    """
    check_features(features)
    check_clustering(spacing, iterations, compactness)
    with torch.no_grad():
        rows = _describe(features.detach(), spacing, compactness)
        return _cluster(rows, features.shape[2:], spacing, iterations)


def check_clustering(spacing: int, iterations: int, compactness: float) -> None:
    """Refuse numbers that :func:`feature_superpixels` cannot cluster with.

    Raises:
        ValueError: a number is out of range.
    """
    for name, value, least in (("spacing", spacing, 1), ("iterations", iterations, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be a whole number, {least} or larger, got {value!r}")
    if not 0 <= compactness < math.inf:
        raise ValueError(f"compactness must be 0 or larger, and finite, got {compactness}")


def _describe(features: Tensor, spacing: int, compactness: float) -> Tensor:
    """What is compared, squared distances of which add up: ``[N, H * W, C + 2]``."""
    images, _, height, width = features.shape
    values = features.flatten(2).transpose(1, 2).to(torch.promote_types(features.dtype, torch.float32))
    values = values - values.mean(dim=1, keepdim=True)
    spread = values.square().sum(dim=2).mean(dim=1).sqrt()[:, None, None]
    values = values / torch.where(spread > 0, spread, 1)
    y = torch.arange(height, device=features.device, dtype=values.dtype).repeat_interleave(width)
    x = torch.arange(width, device=features.device, dtype=values.dtype).repeat(height)
    position = torch.stack((y - y.mean(), x - x.mean()), dim=1) * (compactness / spacing)
    return torch.cat((values, position.expand(images, -1, -1)), dim=2)


def _cluster(rows: Tensor, size: torch.Size, spacing: int, iterations: int) -> Tensor:
    images, cells = rows.shape[:2]
    height, width = size
    down, across = -(-height // spacing), -(-width // spacing)
    seeds = down * across
    block_y = torch.arange(height, device=rows.device)[:, None] // spacing
    block_x = torch.arange(width, device=rows.device)[None, :] // spacing
    block = (block_y * across + block_x).expand(images, -1, -1)
    near, outside = _neighbors(block_y, block_x, down, across)  # [H * W, 9]
    image = torch.arange(images, device=rows.device)[:, None, None]
    index = (near + image * seeds).flatten()
    offsets = torch.arange(images * cells + 1, device=rows.device) * near.shape[1]
    flat, labels = rows.flatten(0, 1), block
    means = torch.zeros_like(flat[:1]).expand(images * seeds, -1)
    for _ in range(iterations):
        count = torch.ops.detpipe.superpixel_count(labels, seeds).view(-1, 1)
        total = torch.ops.detpipe.superpixel_sum(flat, labels, height, width, seeds, "features")
        means = torch.where(count > 0, total / count.clamp(min=1), means)  # an empty cluster stays where it was
        dots = bag_dot(flat, means, index, offsets)
        distance = means.square().sum(dim=1)[index] - 2 * dots  # but for the cell's own square
        distance = torch.where(outside, torch.inf, distance.view(images, cells, near.shape[1]))
        labels = near.expand(images, -1, -1).gather(2, distance.argmin(dim=2, keepdim=True)).view(block.shape)
    return labels.contiguous()


def _neighbors(block_y: Tensor, block_x: Tensor, down: int, across: int) -> tuple[Tensor, Tensor]:
    """The seeds that each cell compares with, its own block's first, since ties go to the first; and which do not exist."""
    step = torch.arange(9, device=block_y.device)
    step = (step + 4) % 9  # (0, 0) before the others
    y, x = block_y[..., None] + step // 3 - 1, block_x[..., None] + step % 3 - 1
    outside = ((y < 0) | (y >= down)) | ((x < 0) | (x >= across))
    seed = y.clamp(0, down - 1) * across + x.clamp(0, across - 1)
    return seed.flatten(0, 1), outside.flatten(0, 1)
