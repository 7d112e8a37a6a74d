"""RoI max pooling: the largest cell in each bin, boxes and bins rounded to whole cells.

Girshick, "Fast R-CNN", 2015, arXiv 1504.08083, section 2.1.

Two roundings:
- ``"fast_rcnn"``, that of the paper's own code: a box's edges are rounded to the nearest cell, both edge cells included, and
  it is divided into equal bins, rounded outwards, so that neighbors may share a row or column of cells.
- ``"equal_step"``, that of a widespread Keras layer: edges are rounded down, and bins are as many whole cells as fit, the
  last one with what is left. A box with fewer cells than bins has empty bins.

Deviation: a bin without cells gives 0, never -inf, in both.

Convention: boxes are xyxy, x before y, in pixels (``spatial_scale`` cells each) or relative to the map
(``normalized=True``). Differentiable in the features; boxes are rounded and have no gradient.

N images, C channels, R boxes of the batch, P boxes an image, h x w bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from detpipe.roi_pooling.axis import split_evenly
from detpipe.roi_pooling.layouts import Boxes, check_features, read_boxes, read_output_size, read_scale
from detpipe.roi_pooling.levels import FPNLevels
from detpipe.roi_pooling.placement import Placement, place
from detpipe.roi_pooling.pooler import RoIPooler
from detpipe.roi_pooling.range_max import pool_range_max

Bins = Literal["fast_rcnn", "equal_step"]
FARTHEST = 1 << 30  # cells; coordinates beyond are moved there, where whole numbers are still exact


def roi_max_pool(
    features: Tensor,
    boxes: Boxes,
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    bins: Bins = "fast_rcnn",
    normalized: bool = False,
) -> Tensor:
    """Take the largest cell in each bin of each box.

    Args:
        features: ``[N, C, H, W]``.
        boxes: ``[R, 5]`` (image, x1, y1, x2, y2), a list of N tensors ``[P_i, 4]``, or ``[N, P, 4]``.
        output_size: h x w, one number or (height, width).
        spatial_scale: cells a pixel, 1 / stride.
        bins: how boxes and bins are rounded to cells, "fast_rcnn" or "equal_step".
        normalized: boxes are in 0..1, relative to the map, and ``spatial_scale`` is not used.

    Returns:
        ``[R, C, h, w]``, or ``[N, P, C, h, w]`` for boxes ``[N, P, 4]``; channels last in memory. 0 for a bin without cells.

    Raises:
        ValueError: an argument of another shape, type or range, or a box that is not finite or has no area.

    Example:
        >>> ramp = torch.arange(16.0).reshape(1, 1, 4, 4)
        >>> roi_max_pool(ramp, [torch.tensor([[0.0, 0.0, 3.0, 3.0]])], 2)
        tensor([[[[ 5.,  7.],
                  [13., 15.]]]])
    """
    if has_torch_function_unary(features):  # a tracer's proxy, or a subclass that wants to know
        settings = (output_size, spatial_scale, bins, normalized)
        return handle_torch_function(roi_max_pool, (features,), features, boxes, *settings)
    check_features(features)
    size, scale = read_output_size(output_size), read_scale(spatial_scale)
    rois = read_boxes(boxes, features)
    placement = place([features], [scale], rois, normalized=normalized)
    pooled = max_pool(placement, size, read_bins(bins))
    return pooled.unflatten(0, rois.lead) if len(rois.lead) == 2 else pooled


def max_pool(placement: Placement, size: tuple[int, int], bins: Bins) -> Tensor:
    """Pool placed boxes: ``[R, C, h, w]``."""
    cells = (placement.boxes.detach() * placement.scale.repeat(1, 2)).clamp(-FARTHEST, FARTHEST)
    corners = (_round(cells) if bins == "fast_rcnn" else cells.floor()).long()
    divide = _fast_rcnn if bins == "fast_rcnn" else _equal_step
    y = divide(corners[:, 1], corners[:, 3], size[0], placement.height, cells.dtype)
    x = divide(corners[:, 0], corners[:, 2], size[1], placement.width, cells.dtype)
    return pool_range_max(placement.table, placement.chosen, y, x)


def read_bins(bins: Bins) -> Bins:
    """Check the name of a rounding.

    Raises:
        ValueError: another name.
    """
    if bins not in get_args(Bins):
        raise ValueError(f"bins must be {' or '.join(map(repr, get_args(Bins)))}, got {bins!r}")
    return bins


def _round(edge: Tensor) -> Tensor:
    """Round halves away from zero, as C does, and PyTorch does not."""
    whole = edge.trunc()
    return whole + ((edge - whole).abs() >= 0.5) * edge.sign()


def _fast_rcnn(first: Tensor, last: Tensor, bins: int, extent: Tensor, dtype: torch.dtype) -> Tensor:
    """Divide ``[R]`` first and last cells into bins: ``[R, bins, 2]`` int32 first cell and the one behind the last."""
    step = split_evenly((last - first + 1).clamp(min=1).to(dtype), bins)[:, None]
    index = torch.arange(bins + 1, device=first.device, dtype=dtype)
    edges = torch.stack(((index[:-1] * step).floor(), (index[1:] * step).ceil()), dim=2).long()
    return _on_map(edges + first[:, None, None], extent)


def _equal_step(first: Tensor, end: Tensor, bins: int, extent: Tensor, dtype: torch.dtype) -> Tensor:
    """Divide ``[R]`` first cells and those behind the last as :func:`_fast_rcnn` does, into equal whole steps."""
    begin = first[:, None] + ((end - first) // bins)[:, None] * torch.arange(bins, device=first.device)
    return _on_map(torch.stack((begin, torch.cat((begin[:, 1:], end[:, None]), dim=1)), dim=2), extent)


def _on_map(edges: Tensor, extent: Tensor) -> Tensor:
    return edges.clamp(min=0).minimum(extent[:, None, None]).to(torch.int32)


class RoIMaxPool(RoIPooler):
    """Take the largest cell in each bin of each box, box and bins rounded to cells. Differentiable in the features.

    Args:
        output_size: cells of the result, one number or (height, width).
        bins: how boxes and bins are rounded to cells, "fast_rcnn" or "equal_step"; see :func:`roi_max_pool`.
        levels: which pyramid level a box is pooled from; in Python any function (boxes ``[R, 4]``, strides) -> ``[R]``.

    Example:
        >>> features = {"c4": torch.ones(1, 2, 8, 8)}
        >>> RoIMaxPool(3)(features, [torch.tensor([[0.0, 0.0, 64.0, 64.0]])], {"c4": 16}).shape
        torch.Size([1, 2, 3, 3])
    """

    has_box_gradient = False

    def __init__(
        self,
        output_size: int | tuple[int, int] = 7,
        bins: Bins = "fast_rcnn",
        levels: FPNLevels = FPNLevels(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__(output_size, levels)
        self.bins: Bins = read_bins(bins)

    def pool(self, placement: Placement) -> Tensor:
        """Pool placed boxes: ``[R, C, h, w]``."""
        return max_pool(placement, self.output_size, self.bins)
