"""Read feature maps at free points, a few for each bin: what a glimpse of any form is made of.

The rule at the border is RoIAlign's, so that points on a box's regular grid give what RoIAlign gives: He et al., "Mask
R-CNN", 2017, arXiv 1703.06870; the points of a spatial transformer: Jaderberg et al. 2015, arXiv 1506.02025, equation 5.

Convention: points are (x, y) in image pixels; a cell covers ``stride`` pixels, and its value sits at its center. A point up to
one cell outside the map is moved onto its border; one further out, or one that is not a number, is 0 and still counts in the
average. Differentiable in the features and, except where a point crosses a cell's center, in the points, any number of times.

N images, C channels, P regions an image, R regions of the batch, h x w bins, S points a bin.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from detpipe.roi_pooling.box_ops import has_kernels
from detpipe.roi_pooling.grid_samples import read_cells
from detpipe.roi_pooling.layouts import read_layout, read_values
from detpipe.roi_pooling.levels import FPNLevels, choose_level
from detpipe.roi_pooling.placement import Placement, place
from detpipe.roi_pooling.pooler import choose_levels, read_levels
from detpipe.roi_pooling.sample_ops import sample


def pool_points(
    features: dict[str, Tensor],
    points: Tensor,
    boxes: Tensor,
    strides: dict[str, int],
    levels: Callable[[Tensor, Sequence[int]], Tensor] = FPNLevels(),  # noqa: B008 (frozen)
) -> Tensor:
    """Average bilinear samples at the points of each bin, for all regions of all images and levels in one call.

    No map is copied for a region: the cells around each point are gathered and summed.

    Args:
        features: level name -> ``[N, C, H_l, W_l]``.
        points: ``[N, P, h, w, S, 2]`` (x, y) in image pixels.
        boxes: ``[N, P, 4]`` xyxy, what the points of a region are about: chooses its level, and nothing else.
        strides: image pixels a cell of each level; the same names as ``features``.
        levels: which pyramid level a box is read from.

    Returns:
        ``[N, P, C, h, w]``, channels last in memory.

    Raises:
        ValueError: points of another shape, ``features`` without a level of ``strides``, or boxes that are not finite or
            have no area.

    Example:
        >>> ramp = {"c0": torch.arange(16.0).reshape(1, 1, 4, 4)}
        >>> points = torch.tensor([[1.0, 1.0], [2.0, 1.0]]).reshape(1, 1, 1, 1, 2, 2)  # halfway between cells 0 and 1, 1 and 2
        >>> pool_points(ramp, points, torch.tensor([[[0.0, 0.0, 4.0, 4.0]]]), {"c0": 1}).item()
        3.0
    """
    maps = read_levels(features, strides)
    if points.ndim != 6 or points.shape[-1] != 2 or points.shape[:2] != boxes.shape[:2] or points.shape[4] < 1:
        raise ValueError(
            f"points must be [N, P, h, w, S, 2] for boxes [N, P, 4], got {list(points.shape)} and {list(boxes.shape)}"
        )
    if torch.compiler.is_exporting():
        return _exported(maps, points, boxes, list(strides.values()), levels)
    given, sides = read_layout(boxes.detach(), maps[0]), list(strides.values())
    h, w, samples = points.shape[2:5]
    scales, level, areas = choose_levels(levels, maps[0], given, sides)

    def compose(maps: Sequence[Tensor], points: Tensor | None, _: Tensor) -> Tensor:
        assert points is not None
        rois = read_values(given, maps[0])
        own = choose_level((rois.boxes[:, 2:] - rois.boxes[:, :2]).prod(1), areas) if areas else level
        placement = place(maps, scales, rois, own)
        # in float32 at least: a coordinate in half precision is wrong by whole cells
        exact = points.flatten(0, 1).flatten(1, 2).to(torch.promote_types(rois.boxes.dtype, points.dtype))
        return read_points(placement, exact * placement.scale[:, None, None] - 0.5).view(
            len(exact), h, w, maps[0].shape[1]
        )

    if has_kernels([*maps, points], given):
        pooled = sample(compose, maps, points, given, level, scales, areas, (h, w), samples)
    else:
        pooled = compose(maps, points, given.boxes).permute(0, 3, 1, 2)
    return pooled.unflatten(0, given.lead)


def _exported(
    maps: Sequence[Tensor],
    points: Tensor,
    boxes: Tensor,
    strides: list[int],
    levels: Callable[[Tensor, Sequence[int]], Tensor],
) -> Tensor:
    """Read the points of every level by what ONNX has, and take the right one: ``[N, P, C, h, w]``."""
    h, w, samples = points.shape[2:5]
    chosen, pooled = levels(boxes.flatten(0, 1), strides).view(*boxes.shape[:2], 1, 1, 1), None
    for index, (level, stride) in enumerate(zip(maps, strides, strict=True)):
        cells = (points / stride - 0.5).flatten(2, 4)[:, :, None]  # [N, P, 1, h w S, 2]
        read = read_cells(level, cells)[:, :, :, 0]  # [N, P, C, h w S]
        here = read.unflatten(3, (h, w, samples)).mean(-1)
        pooled = here if pooled is None else torch.where(chosen == index, here, pooled)
    assert pooled is not None
    return pooled


def read_points(placement: Placement, cells: Tensor) -> Tensor:
    """Average bilinear samples.

    Args:
        placement: the map of each region.
        cells: ``[R, B, S, 2]`` (x, y); the value of cell k sits at coordinate k.

    Returns:
        ``[R * B, C]``.
    """
    regions, bins, samples = cells.shape[:3]
    first, height, width = (value[:, None, None] for value in (placement.first, placement.height, placement.width))
    x, y = cells.unbind(-1)
    cell, weight = bilinear(y, x, first, height, width, torch.full_like(x, 1 / samples))
    offsets = torch.arange(regions * bins + 1, device=cells.device) * (samples * 4)
    return torch.ops.detpipe.bag_sum(placement.table.rows, cell.flatten(), weight.flatten(), offsets)


def bilinear(
    y: Tensor, x: Tensor, first: Tensor, height: Tensor, width: Tensor, share: Tensor
) -> tuple[Tensor, Tensor]:
    """Find the cells that samples read.

    Args:
        y: ``[...]`` in cells.
        x: ``[...]``.
        first: row of the table with the first cell of a sample's map, int64; this and what follows is broadcast.
        height: of that map, int64.
        width: int64.
        share: of a sample in its bin.

    Returns:
        ``[..., 4]`` rows of the table, upper left, upper right, lower left and lower right, and their weights.
    """
    inside = (x >= -1) & (x <= width) & (y >= -1) & (y <= height)
    left, right, along_x = neighbors(x.where(inside, 0), width)
    upper, lower, along_y = neighbors(y.where(inside, 0), height)
    share = share.where(inside, 0)
    above, below = share - share * along_y, share * along_y
    upper, lower = first + upper * width, first + lower * width
    cell = torch.stack((upper + left, upper + right, lower + left, lower + right), dim=-1)
    weight = (above - above * along_x, above * along_x, below - below * along_x, below * along_x)
    return cell, torch.stack(weight, dim=-1)


def neighbors(point: Tensor, extent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The two cells along an axis that a point lies between, and how far it is from the first; beyond the border nothing moves."""
    last = (extent - 1).to(point.dtype)
    # where a point lies on a cell, its gradient is that of the cells behind it, and 0 at the last one
    point = torch.where(point < last, point.where(point >= 0, 0.0), last)
    cell = point.detach().long()
    return cell, (cell + 1).minimum(extent - 1), point - cell
