"""Box geometry: areas, overlaps, clipping, and the (dx, dy, dw, dh) parametrization of box regression.

Girshick et al., "Rich feature hierarchies for accurate object detection", 2014, arXiv 1311.2524, appendix C;
Girshick, "Fast R-CNN", 2015, arXiv 1504.08083.

Deviations:
1. Boxes are continuous, without the devkit's "+ 1": a box of the whole image is ``[0, 0, width, height]``.
2. Deltas are multiplied by fixed weights (10, 10, 5, 5) instead of being divided by measured standard deviations
   (.1, .1, .2, .2): the same numbers, known before the data.

Convention: ``[..., 4]`` is ``x1, y1, x2, y2`` in pixels. Everything is differentiable, batched over the leading
dimensions, and makes no copy to the host.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

DeltaWeights = tuple[float, float, float, float]  # factors of dx, dy, dw, dh
DELTA_WEIGHTS: DeltaWeights = (10.0, 10.0, 5.0, 5.0)
MAX_LOG_SCALE = math.log(1000.0 / 16.0)  # a box grows by at most this factor in one step, so that exp() stays finite


def constants(values: Sequence[float], like: Tensor) -> Tensor:
    """Put a few numbers, ``[V]``, on a tensor's device, in its dtype, without a copy that waits for the device."""
    return torch.stack([like.new_full((), value) for value in values])


def image_sides(image_sizes: Sequence[tuple[int, int]], like: Tensor) -> tuple[Tensor, Tensor]:
    """Put the heights and widths of images on a tensor's device, without waiting for it.

    Args:
        image_sizes: height and width of each of N images, or one for all.
        like: gives dtype and device.

    Returns:
        ``[N, 1]`` each, or ``[1, 1]``.
    """
    first: Any = image_sizes[0] if image_sizes else (0, 0)
    if isinstance(first[0], Tensor):  # of an exported graph, for all images
        return first
    if len({tuple(size) for size in image_sizes}) == 1:
        height, width = image_sizes[0]
        return like.new_full((len(image_sizes), 1), height), like.new_full((len(image_sizes), 1), width)
    sizes = torch.tensor([tuple(size) for size in image_sizes], dtype=like.dtype).reshape(-1, 2, 1)
    heights, widths = sizes.to(like.device, non_blocking=True).unbind(1)
    return heights, widths


def area(boxes: Tensor) -> Tensor:
    """Compute the area of each box ``[..., 4]``: ``[...]`` square pixels, 0 for a box that is turned inside out.

    Example:
        >>> area(torch.tensor([[0.0, 0.0, 4.0, 3.0]]))
        tensor([12.])
    """
    return _area(boxes[..., :2], boxes[..., 2:])


def intersection(boxes: Tensor, others: Tensor) -> Tensor:
    """Compute the area ``[..., P, G]`` that each box ``[..., P, 4]`` shares with each other box ``[..., G, 4]``."""
    top_left = torch.maximum(boxes[..., :, None, :2], others[..., None, :, :2])
    bottom_right = torch.minimum(boxes[..., :, None, 2:], others[..., None, :, 2:])
    return _area(top_left, bottom_right)


def _area(top_left: Tensor, bottom_right: Tensor) -> Tensor:
    """``[..., 2]`` each -> ``[...]``, float32 at least: 256 x 256 pixels are too many for float16."""
    size = (bottom_right - top_left).clamp(min=0)
    size = size.to(torch.promote_types(size.dtype, torch.float32))
    return size[..., 0] * size[..., 1]


def iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Compute the IoU ``[..., P, G]`` in 0..1 of each box with each other box; 0 where both areas are 0.

    Args:
        boxes: ``[..., P, 4]`` xyxy.
        others: ``[..., G, 4]`` xyxy, with the same leading dimensions.

    Example:
        >>> iou(torch.tensor([[0.0, 0.0, 2.0, 2.0]]), torch.tensor([[1.0, 0.0, 3.0, 2.0]]))
        tensor([[0.3333]])
    """
    shared = intersection(boxes, others)
    union = area(boxes)[..., :, None] + area(others)[..., None, :] - shared
    return shared / union.clamp(min=torch.finfo(shared.dtype).tiny)


def coverage(boxes: Tensor, regions: Tensor) -> Tensor:
    """Compute how much of each box ``[..., P, 4]`` lies inside each region ``[..., G, 4]``: COCO's overlap with crowd regions."""
    shared = intersection(boxes, regions)
    return shared / area(boxes)[..., :, None].clamp(min=torch.finfo(shared.dtype).tiny)


def clip(boxes: Tensor, height: Tensor | float, width: Tensor | float) -> Tensor:
    """Move the corners of boxes ``[..., 4]`` into an image; a box wholly outside becomes one of area 0 on the border.

    ``height`` and ``width`` are numbers of pixels, or tensors that broadcast against ``[...]``.
    """
    if isinstance(height, Tensor) and isinstance(width, Tensor):
        limit = torch.stack((width, height, width, height), dim=-1).to(boxes)
        return torch.minimum(boxes.clamp(min=0), limit)
    x, y = boxes[..., 0::2].clamp(0, float(width)), boxes[..., 1::2].clamp(0, float(height))
    return torch.stack((x, y), dim=-1).flatten(-2)


def fill(boxes: Tensor, present: Tensor) -> Tensor:
    """Put ``[0, 0, 1, 1]`` where no box is present, ``[...]`` bool, so that every row can be pooled and encoded.

    Example:
        >>> fill(torch.zeros(1, 4), torch.tensor([False]))
        tensor([[0., 0., 1., 1.]])
    """
    unit = torch.nn.functional.pad(boxes.new_ones(2), (2, 0))
    return torch.where(present[..., None], boxes, unit)


def valid(boxes: Tensor, min_size: float = 0.0) -> Tensor:
    """Tell which boxes ``[..., 4]`` are finite, and wider and higher than ``min_size`` pixels: ``[...]`` bool."""
    size = boxes[..., 2:] - boxes[..., :2]
    return ((size > min_size) & (size < math.inf)).all(-1)  # an edge that is not finite makes a size that is not


def take(boxes: Tensor, index: Tensor) -> Tensor:
    """Take rows of ``[N, P, 4]`` by an index ``[N, S]``: ``[N, S, 4]``."""
    return boxes.gather(1, index[..., None].expand(-1, -1, boxes.shape[-1]))


def encode(boxes: Tensor, references: Tensor, weights: DeltaWeights = DELTA_WEIGHTS) -> Tensor:
    """Write boxes as weighted deltas to reference boxes (R-CNN, equations 6 to 9).

    Args:
        boxes: ``[..., 4]`` xyxy, what to describe; must have a positive size.
        references: ``[..., 4]`` xyxy, where the description starts; must have a positive size.
        weights: factors of dx, dy, dw, dh.

    Returns:
        ``[..., 4]`` deltas, without unit.

    Example:
        >>> encode(torch.tensor([[1.0, 0.0, 3.0, 2.0]]), torch.tensor([[0.0, 0.0, 2.0, 2.0]]))
        tensor([[5., 0., 0., 0.]])
    """
    box_size, box_center = _size_and_center(boxes)
    size, center = _size_and_center(references)
    shift, scale = (box_center - center) / size, torch.log(box_size / size)
    return torch.cat((_each(operator.mul, shift, weights[:2]), _each(operator.mul, scale, weights[2:])), dim=-1)


def decode(deltas: Tensor, references: Tensor, weights: DeltaWeights = DELTA_WEIGHTS) -> Tensor:
    """Apply weighted deltas ``[..., 4]`` to reference boxes: the inverse of :func:`encode`, not clipped.

    dw and dh are capped so that a box grows at most 62.5 times.
    """
    size, center = _size_and_center(references)
    shift = _each(operator.truediv, deltas[..., :2], weights[:2])
    scale = _each(operator.truediv, deltas[..., 2:], weights[2:])
    center = center + shift * size
    half = torch.exp(scale.clamp(max=MAX_LOG_SCALE)) * size / 2
    return torch.cat((center - half, center + half), dim=-1)


def _size_and_center(boxes: Tensor) -> tuple[Tensor, Tensor]:
    size = boxes[..., 2:] - boxes[..., :2]
    return size, boxes[..., :2] + size / 2


def _each(operation: Callable[[Tensor, Any], Tensor], pairs: Tensor, weights: Sequence[float]) -> Tensor:
    """Multiply or divide ``[..., 2]`` by a number each; by one for both where they are equal, which needs no tensor."""
    first, second = weights
    if first != second:
        return operation(pairs, constants(weights, pairs))
    return pairs if first == 1 else operation(pairs, first)
