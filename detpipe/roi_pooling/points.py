"""Read feature maps at free points, a few for each bin: what a glimpse of any form is made of.

The rule at the border is RoIAlign's, so that points on a box's regular grid give what RoIAlign gives: He et al., "Mask
R-CNN", 2017, arXiv 1703.06870; the points of a spatial transformer: Jaderberg et al. 2015, arXiv 1506.02025, equation 5.

Convention: points are (x, y) in image pixels; a cell covers ``stride`` pixels, and its value sits at its center. A point up to
one cell outside the map is moved onto its border; one further out, or one that is not a number, is 0 and still counts in the
average. Differentiable in the features and, except where a point crosses a cell's center, in the points, any number of times.

N images, C channels, P regions an image, R regions of the batch, h x w bins, S points a bin.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from detpipe.roi_pooling.bags import bag_sum
from detpipe.roi_pooling.grid_samples import is_exporting, read_cells
from detpipe.roi_pooling.layouts import as_given, describe, read_layout, refuse_tangent
from detpipe.roi_pooling.levels import FPNLevels
from detpipe.roi_pooling.mean_ops import pool
from detpipe.roi_pooling.placement import Placement, place
from detpipe.roi_pooling.pooler import read_levels
from detpipe.roi_pooling.scene import Scene, choose_levels, make_scene


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
    shape, of_boxes = describe(points), describe(boxes)
    if len(shape) != 6 or shape[5] != 2 or shape[4] == 0 or shape[:2] != of_boxes[:2]:
        raise ValueError(f"points must be [N, P, h, w, S, 2] for boxes [N, P, 4], got {shape} and {of_boxes}")
    refuse_tangent("points", points)
    if is_exporting():
        return _exported(maps, points, boxes, list(strides.values()), levels)
    given = read_layout(boxes.detach(), maps[0])
    h, w, samples = points.shape[2:5]
    choice = choose_levels(levels, maps[0], given, list(strides.values()))
    return as_given(pool(_compose, maps, make_scene(maps, given, choice, (h, w), samples=samples), points), given)


def _compose(maps: Sequence[Tensor], points: Tensor | None, scene: Scene) -> Tensor:
    """``[R, h, w, C]``."""
    assert points is not None
    placement = place(maps, scene)
    # in float32 at least: a coordinate in half precision is wrong by whole cells
    exact = points.flatten(0, 1).to(torch.promote_types(placement.boxes.dtype, points.dtype))
    return read_points(placement, exact * placement.scale[:, None, None, None] - 0.5)


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
    """Average bilinear samples at ``[R, h, w, S, 2]`` (x, y), in cells, whose values sit at whole numbers: ``[R, h, w, C]``."""
    *shape, samples, _ = cells.shape
    first, height, width = (
        value[:, None, None, None] for value in (placement.first, placement.height, placement.width)
    )
    x, y = cells.unbind(-1)
    cell, weight = bilinear(y, x, first, height, width, torch.full_like(x, 1 / samples))
    offsets = torch.arange(math.prod(shape) + 1, device=cells.device) * (samples * 4)
    return bag_sum(placement.table.rows, cell.flatten(), weight.flatten(), offsets, shape)


def bilinear(
    y: Tensor, x: Tensor, first: Tensor, height: Tensor, width: Tensor, share: Tensor
) -> tuple[Tensor, Tensor]:
    """Find the cells that samples at y and x read, and their weights: ``[..., 4]`` rows of the table.

    Upper ones come first, and of two left ones. ``first`` is the row of the table where a sample's map begins, height and width
    are that map's, and ``share`` is the sample's in its bin; all are broadcast.
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
