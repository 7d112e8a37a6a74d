"""Rotated RoIAlign: bilinear samples averaged in each bin of a rotated box, differentiable in the features and in the boxes.

Ma et al., "Arbitrary-Oriented Scene Text Detection via Rotation Proposals", 2017, arXiv 1703.01086, with the bilinear samples
of He et al., "Mask R-CNN", 2017, arXiv 1703.06870; conventions as in detectron2 and mmcv.

Deviations:
1. Coordinates are always shifted by half a cell, so that a cell's value sits at its center.
2. A sample up to one cell outside the map is moved onto its border; one further out is 0 and still counts in the average.
3. The boxes have gradients; the peers' have none.

Convention: boxes are (cx, cy, w, h, angle), x before y, in pixels (``spatial_scale`` cells each) or relative to the map
(``normalized=True``); they are scaled first and then rotated about their center. The angle is in degrees, and positive is
counter-clockwise as one sees the image (x to the right, y down). The result is turned back: its rows run along the box's
height. Differentiable in the features, and in the boxes except where a sample crosses a cell's center; the number of adaptive
samples is a constant of the gradient.

N images, C channels, R boxes of the batch, P boxes an image, h x w bins.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from detpipe.roi_pooling.axis import split_evenly
from detpipe.roi_pooling.layouts import (
    ROTATED_SIDES,
    Boxes,
    as_given,
    check_features,
    read_boxes,
    read_layout,
    read_output_size,
    read_samples,
    read_scale,
)
from detpipe.roi_pooling.levels import FPNLevels
from detpipe.roi_pooling.mean_ops import pool
from detpipe.roi_pooling.placement import place
from detpipe.roi_pooling.points import read_points
from detpipe.roi_pooling.pooler import RoIPooler, read_levels
from detpipe.roi_pooling.rotated_ops import pool_frames
from detpipe.roi_pooling.rotated_samples import Frames
from detpipe.roi_pooling.scene import Choice, Scene, make_scene

MOST_SAMPLES = 1 << 30  # of a bin along one axis: what lies on the map is then a vanishing part of it


def rotated_roi_align(
    features: Tensor,
    boxes: Boxes,
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    normalized: bool = False,
) -> Tensor:
    """Average bilinear samples in each bin of each rotated box.

    Args:
        features: ``[N, C, H, W]``.
        boxes: ``[R, 6]`` (image, cx, cy, w, h, angle), a list of N tensors ``[P_i, 5]``, or ``[N, P, 5]``; the angle in
            degrees, counter-clockwise.
        output_size: h x w, one number or (height, width).
        spatial_scale: cells a pixel, 1 / stride.
        sampling_ratio: samples along each axis of a bin; 0 (or less) takes as many as the bin has cells, rounded up.
        normalized: centers and sizes are in 0..1, relative to the map, and ``spatial_scale`` is not used.

    Returns:
        ``[R, C, h, w]``, or ``[N, P, C, h, w]`` for boxes ``[N, P, 5]``; channels last in memory. 0 for a box outside
        the map.

    Raises:
        ValueError: an argument of another shape, type or range, or a box that is not finite or has no area.

    Example:
        >>> ramp = torch.arange(16.0).reshape(1, 1, 4, 4)
        >>> rotated_roi_align(ramp, [torch.tensor([[2.0, 2.0, 4.0, 4.0, 90.0]])], 2)
        tensor([[[[10.5000,  2.5000],
                  [12.5000,  4.5000]]]])
    """
    if has_torch_function_unary(features):  # a tracer's proxy, or a subclass that wants to know
        settings = (output_size, spatial_scale, sampling_ratio, normalized)
        return handle_torch_function(rotated_roi_align, (features,), features, boxes, *settings)
    check_features(features)
    size, scale = read_output_size(output_size), read_scale(spatial_scale)
    samples = read_samples(sampling_ratio, least=-math.inf)
    given = read_layout(boxes, features, ROTATED_SIDES)
    how = {"samples": samples, "normalized": normalized, "rotated": True}
    return as_given(pool(compose, [features], make_scene([features], given, Choice([scale]), size, **how)), given)


def compose(maps: Sequence[Tensor], _: Tensor | None, scene: Scene) -> Tensor:
    """Average over the bins of rotated boxes: ``[R, h, w, C]``."""
    placement, size, samples = place(maps, scene), (scene.h, scene.w), scene.samples
    boxes, scale = placement.boxes, placement.scale
    cx, cy = (boxes[:, :2] * scale - 0.5).unbind(1)
    width, height = (boxes[:, 2:4] * scale).unbind(1)
    angle = boxes[:, 4].remainder(360) * (math.pi / 180)
    cos, sin = angle.cos(), angle.sin()
    frame = torch.stack((cy, height * cos, -width * sin, cx, height * sin, width * cos), dim=1).unflatten(1, (2, 3))
    if samples > 0:
        return read_points(placement, _grid(frame, size, samples))
    bins = torch.stack((split_evenly(height, size[0]), split_evenly(width, size[1])), dim=1).detach()
    counts = bins.ceil().nan_to_num(0).clamp(0, MOST_SAMPLES).long()  # a box without area has no samples
    where = torch.stack((placement.first, placement.height, placement.width), dim=1)
    return pool_frames(placement.table.rows, Frames(frame, where, counts), size)


def _grid(frame: Tensor, size: tuple[int, int], samples: int) -> Tensor:
    """``[R, h, w, samples ** 2, 2]`` (x, y): where the samples of bins lie."""
    v, u = (  # fractions of the box from its center, of whole numbers: rounding comes last
        torch.arange(1 - bins * samples, bins * samples, 2, device=frame.device).to(frame.dtype) / (2 * bins * samples)
        for bins in size
    )
    center, by_height, by_width = frame[:, :, None, None].unbind(-1)
    points = center + v[:, None] * by_height + u * by_width  # [R, 2, h * samples, w * samples]
    points = points.unflatten(3, (size[1], samples)).unflatten(2, (size[0], samples))
    return points.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flip(-1)


class RotatedRoIAlign(RoIPooler):
    """Average bilinear samples in each bin of each rotated box. Differentiable in the features and in the boxes.

    Boxes without an angle, as a detector's proposals are, are pooled as they stand.

    Args:
        output_size: cells of the result, one number or (height, width).
        sampling_ratio: samples along each axis of a bin; 0 takes as many as the bin has cells, rounded up.
        levels: which pyramid level a box is pooled from; in Python any function (boxes ``[R, 4]``, strides) -> ``[R]``,
            which is given the boxes before their rotation.

    Raises:
        ValueError: a size or number of samples that is not positive.

    Example:
        >>> features = {"c4": torch.ones(1, 2, 8, 8)}
        >>> RotatedRoIAlign(3)(features, [torch.tensor([[64.0, 64.0, 50.0, 20.0, 30.0]])], {"c4": 16}).shape
        torch.Size([1, 2, 3, 3])
    """

    sides = ROTATED_SIDES

    def __init__(
        self,
        output_size: int | tuple[int, int] = 7,
        sampling_ratio: int = 2,
        levels: FPNLevels = FPNLevels(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__(output_size, levels)
        self.sampling_ratio = read_samples(sampling_ratio)

    def forward(self, features: dict[str, Tensor], boxes: Boxes, strides: dict[str, int]) -> Tensor:
        """Pool each box from the level that suits its size.

        Args:
            features: level name -> ``[N, C, H_l, W_l]``.
            boxes: ``[R, 6]`` (image, cx, cy, w, h, angle), a list of N tensors ``[P_i, 5]``, or ``[N, P, 5]``, in image
                pixels and degrees; or xyxy boxes ``[R, 5]``, a list of ``[P_i, 4]``, or ``[N, P, 4]``.
            strides: image pixels a cell of each level; the same names as ``features``.

        Returns:
            ``[R, C, h, w]``, or ``[N, P, C, h, w]`` for boxes ``[N, P, 5]`` or ``[N, P, 4]``.

        Raises:
            ValueError: ``features`` lacks a level of ``strides``, or the boxes have another layout, are not finite or
                have no area.
        """
        if not _has_corners(boxes):
            return super().forward(features, boxes, strides)
        rois = read_boxes(boxes, read_levels(features, strides)[0])
        rows = torch.cat((rois.image[:, None].to(rois.boxes.dtype), _from_corners(rois.boxes)), dim=1)
        pooled = super().forward(features, rows, strides)
        return pooled.unflatten(0, rois.lead) if len(rois.lead) == 2 else pooled

    def pool(self, maps: list[Tensor], scene: Scene) -> Tensor:
        """Pool the boxes of a scene: ``[R, C, h, w]``."""
        return pool(compose, maps, scene._replace(samples=self.sampling_ratio, rotated=True))


def _has_corners(boxes: Boxes) -> bool:
    """Say whether boxes are xyxy; what is neither that nor rotated is left to be refused."""
    if isinstance(boxes, Tensor):
        return boxes.shape[-1:] == ((5,) if boxes.ndim == 2 else (4,))
    return any(isinstance(box, Tensor) and box.shape[-1:] == (4,) for box in boxes)


def _from_corners(boxes: Tensor) -> Tensor:
    """``[R, 4]`` xyxy -> ``[R, 5]``."""
    low, high = boxes[:, :2], boxes[:, 2:]
    return torch.cat(((low + high) / 2, high - low, torch.zeros_like(boxes[:, :1])), dim=1)
