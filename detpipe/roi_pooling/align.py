"""RoIAlign: bilinear samples averaged in each bin, differentiable in the features and in the boxes.

He et al., "Mask R-CNN", 2017, arXiv 1703.06870.

Deviations:
1. Coordinates are shifted by half a cell (``aligned=True``), so that a cell's value sits at its center; ``aligned=False``
   is the paper's own, unshifted form, in which boxes are at least one cell wide and high.
2. A sample up to one cell outside the map is moved onto its border; one further out is 0 and still counts in the average.

Convention: boxes are xyxy with continuous edges, x before y, in pixels (``spatial_scale`` cells each) or relative to the
map (``normalized=True``). Differentiable in the features and in the boxes; where a sample lies on a cell's center, the slope
is the one to the right. The number of adaptive samples is a constant of the gradient.

N images, C channels, R boxes of the batch, P boxes an image, h x w bins.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary
from torchvision import ops as torchvision_ops

from detpipe.roi_pooling.axis import (
    Axis,
    AxisTaps,
    adaptive_samples,
    along_both,
    fixed_samples,
    integral,
    merge_samples,
    sample_points,
)
from detpipe.roi_pooling.grid_samples import is_exporting, is_torch_alone, read_cells
from detpipe.roi_pooling.layouts import (
    Boxes,
    as_given,
    check_features,
    looks_at_values,
    read_layout,
    read_output_size,
    read_samples,
    read_scale,
    to_rois,
)
from detpipe.roi_pooling.levels import FPNLevels
from detpipe.roi_pooling.mean_ops import has_kernels, pool
from detpipe.roi_pooling.placement import Placement, bin_edges, place, static_bound
from detpipe.roi_pooling.pooler import RoIPooler, pool_every_level
from detpipe.roi_pooling.scene import ADAPTIVE, PRECISE, Choice, Scene, make_scene
from detpipe.roi_pooling.separable import pool_separable


def roi_align(
    features: Tensor,
    boxes: Boxes,
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    aligned: bool = True,
    normalized: bool = False,
    reduce: str = "mean",
) -> Tensor:
    """Average, or take the largest of, bilinear samples in each bin of each box.

    Args:
        features: ``[N, C, H, W]``.
        boxes: ``[R, 5]`` (image, x1, y1, x2, y2), a list of N tensors ``[P_i, 4]``, or ``[N, P, 4]``.
        output_size: h x w, one number or (height, width).
        spatial_scale: cells a pixel, 1 / stride.
        sampling_ratio: samples along each axis of a bin; 0 (or less) takes as many as the bin has cells, rounded up.
        aligned: shift by half a cell, so that a cell's value sits at its center.
        normalized: boxes are in 0..1, relative to the map, and ``spatial_scale`` is not used.
        reduce: "mean" of the samples, or "max".

    Returns:
        ``[R, C, h, w]``, or ``[N, P, C, h, w]`` for boxes ``[N, P, 4]``; channels last in memory. 0 for a box outside
        the map.

    Raises:
        ValueError: an argument of another shape, type or range, or a box that is not finite or has no area.

    Example:
        >>> ramp = torch.arange(16.0).reshape(1, 1, 4, 4)
        >>> roi_align(ramp, [torch.tensor([[0.0, 0.0, 4.0, 4.0]])], 2)
        tensor([[[[ 2.5000,  4.5000],
                  [10.5000, 12.5000]]]])
    """
    if has_torch_function_unary(features):  # a tracer's proxy, or a subclass that wants to know
        settings = (output_size, spatial_scale, sampling_ratio, aligned, normalized, reduce)
        return handle_torch_function(roi_align, (features,), features, boxes, *settings)
    check_features(features)
    size, scale = read_output_size(output_size), read_scale(spatial_scale)
    if reduce not in ("mean", "max"):
        raise ValueError(f"reduce must be 'mean' or 'max', got {reduce!r}")
    samples = read_samples(sampling_ratio, least=-math.inf)
    if is_exporting() and reduce == "mean" and not normalized:
        return _exported(features, boxes, size, scale, samples, aligned)
    given, how = read_layout(boxes, features), {"aligned": aligned, "normalized": normalized}
    scene = make_scene([features], given, Choice([scale]), size, samples=samples, **how)
    return as_given(align([features], scene, reduce), given)


def align(maps: Sequence[Tensor], scene: Scene, reduce: str = "mean") -> Tensor:
    """Pool the boxes of a scene: ``[R, C, h, w]``."""
    if reduce == "mean":
        return pool(compose, maps, scene)
    samples = scene.samples
    if samples == ADAPTIVE or not has_kernels(maps, scene.boxes):
        return _largest(place(maps, scene), scene)
    each = scene._replace(h=scene.h * samples, w=scene.w * samples, samples=1)  # every sample is a bin of its own first
    return torch.nn.functional.max_pool2d(pool(compose, maps, each), samples)


def compose(maps: Sequence[Tensor], _: Tensor | None, scene: Scene) -> Tensor:
    """Average over bins by weights along y and x: ``[R, h, w, C]``."""
    placement, samples = place(maps, scene), scene.samples
    axes = _bin_edges(placement, scene)
    bound = None if samples > 0 else static_bound(placement)
    checked = looks_at_values(placement.boxes)

    def sample(start: Tensor, step: Tensor, extent: Tensor, bins: int) -> AxisTaps:
        if samples == PRECISE:
            return integral(start, step, extent, bins, bound)
        if samples == ADAPTIVE:
            return adaptive_samples(start, step, extent, bins, bound)
        return fixed_samples(start, step, extent, bins, samples, ascending=checked)

    return pool_separable(placement.table, placement.chosen, *along_both(axes, sample))


def _bin_edges(placement: Placement, scene: Scene) -> tuple[Axis, Axis]:
    at_least = None if scene.aligned or scene.samples == PRECISE else 1.0
    return bin_edges(placement, (scene.h, scene.w), scene.aligned, at_least)


def _largest(placement: Placement, scene: Scene) -> Tensor:
    """Take the largest sample of each bin; every sample is pooled as a bin of its own first."""
    axes = _bin_edges(placement, scene)
    if scene.samples > 0 or len(placement.boxes) == 0:
        samples = max(scene.samples, 1)
        counts = [torch.full_like(axis[1], samples) for axis in axes]
        return _largest_of(placement, axes, counts, (samples, samples), adaptive=False)
    counts = [axis[1].detach().ceil().clamp(min=1) for axis in axes]
    # boxes with similar numbers of samples, up to the next power of two, are pooled together
    doublings = [count.log2().ceil().long() for count in counts]
    group = doublings[0] * 64 + doublings[1]
    parts, order = [], []
    for key in group.unique().tolist():
        rows = (group == key).nonzero()[:, 0]
        part = placement._replace(chosen=placement.chosen[rows])
        part_axes = tuple((start[rows], step[rows], extent[rows], bins) for start, step, extent, bins in axes)
        part_counts = [count[rows] for count in counts]
        most = (int(part_counts[0].max()), int(part_counts[1].max()))
        parts.append(_largest_of(part, part_axes, part_counts, most, adaptive=True))
        order.append(rows)
    return torch.cat(parts)[torch.cat(order).argsort()]


def _largest_of(
    placement: Placement,
    axes: Sequence[Axis],
    counts: Sequence[Tensor],
    most: tuple[int, int],
    adaptive: bool,
) -> Tensor:
    """Pool ``most`` samples along each axis of each bin; where a box has fewer, its last sample is repeated."""
    taps: list[AxisTaps] = []
    for (start, step, extent, bins), count, samples in zip(axes, counts, most, strict=True):
        index = torch.arange(samples, device=start.device, dtype=start.dtype)
        index = index.minimum(count[:, None] - 1)[:, None]
        point = sample_points(start, step, bins, index, count[:, None, None])  # [R, B, S]
        if adaptive:
            point = point.where(step[:, None, None] > 0, -2.0)  # no area has no samples: all of them lie outside
        taps.append(merge_samples(point.flatten(1)[..., None], extent))
    single = pool_separable(placement.table, placement.chosen, *taps).permute(0, 3, 1, 2)
    return torch.nn.functional.max_pool2d(single, most)


def _exported(
    features: Tensor, boxes: Boxes, size: tuple[int, int], scale: float, sampling_ratio: int, aligned: bool
) -> Tensor:
    """Stand in for the operator in an exported graph, where only what ONNX and the runtimes know can be used."""
    rois = to_rois(boxes).to(features.dtype)
    if is_torch_alone():
        return _gridded(features, rois, size, scale, sampling_ratio, aligned)
    pooled = torchvision_ops.roi_align(features, rois, size, scale, sampling_ratio, aligned)
    return pooled.unflatten(0, boxes.shape[:2]) if isinstance(boxes, Tensor) and boxes.ndim == 3 else pooled


def _gridded(
    features: Tensor, rois: Tensor, size: tuple[int, int], scale: float, samples: int, aligned: bool
) -> Tensor:
    """Pool as many boxes of each image, one image after the other, by PyTorch's own operators: ``[R, C, h, w]``."""
    boxes = rois[:, 1:].unflatten(0, (features.shape[0], -1)) * scale - (0.5 if aligned else 0.0)
    corner, sides = boxes[..., :2], boxes[..., 2:] - boxes[..., :2]
    sides = sides if aligned else sides.clamp(min=1.0)
    x, y = (
        corner[..., axis, None]
        + (torch.arange(count * samples, device=rois.device) + 0.5) / (count * samples) * sides[..., axis, None]
        for axis, count in ((0, size[1]), (1, size[0]))
    )  # [N, P, w s] and [N, P, h s]
    cells = torch.stack(
        (x[:, :, None].expand(-1, -1, y.shape[2], -1), y[..., None].expand(-1, -1, -1, x.shape[2])), dim=-1
    )
    read = read_cells(features, cells)  # [N, P, C, h s, w s]
    return torch.nn.functional.avg_pool2d(read.flatten(0, 1), samples)


class RoIAlign(RoIPooler):
    """Average bilinear samples in each bin of each box. Differentiable in the features and in the boxes.

    Args:
        output_size: cells of the result, one number or (height, width).
        sampling_ratio: samples along each axis of a bin; 0 takes as many as the bin has cells, rounded up.
        aligned: shift by half a cell, so that a cell's value sits at its center.
        reduce: "mean" of the samples, or "max".
        levels: which pyramid level a box is pooled from; in Python any function (boxes ``[R, 4]``, strides) -> ``[R]``.

    Example:
        >>> features = {"c4": torch.ones(1, 2, 8, 8)}
        >>> RoIAlign(3)(features, [torch.tensor([[0.0, 0.0, 64.0, 64.0]])], {"c4": 16}).shape
        torch.Size([1, 2, 3, 3])
    """

    def __init__(
        self,
        output_size: int | tuple[int, int] = 7,
        sampling_ratio: int = 2,
        aligned: bool = True,
        reduce: str = "mean",
        levels: FPNLevels = FPNLevels(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__(output_size, levels)
        if reduce not in ("mean", "max"):
            raise ValueError(f"reduce must be 'mean' or 'max', got {reduce!r}")
        self.sampling_ratio, self.aligned, self.reduce = read_samples(sampling_ratio), aligned, reduce

    def pool(self, maps: list[Tensor], scene: Scene) -> Tensor:
        """Pool the boxes of a scene: ``[R, C, h, w]``."""
        return align(maps, scene._replace(samples=self.sampling_ratio, aligned=self.aligned), self.reduce)

    def forward(self, features: dict[str, Tensor], boxes: Boxes, strides: dict[str, int]) -> Tensor:
        """Pool each box from the level that suits its size; see :meth:`RoIPooler.forward`."""
        if not is_exporting() or self.reduce != "mean":
            return super().forward(features, boxes, strides)

        def pool(level: Tensor, rois: Tensor, scale: float) -> Tensor:
            return _exported(level, rois, self.output_size, scale, self.sampling_ratio, self.aligned)

        return pool_every_level(pool, features, boxes, strides, self.levels)
