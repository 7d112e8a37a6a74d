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
from typing import Literal

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary
from torchvision import ops as torchvision_ops

from detpipe.roi_pooling.grid_samples import is_exporting
from detpipe.roi_pooling.layouts import Boxes, as_given, check_features, read_layout, read_output_size, read_scale
from detpipe.roi_pooling.levels import FPNLevels
from detpipe.roi_pooling.max_ops import max_pool
from detpipe.roi_pooling.pooler import RoIPooler, pool_every_level
from detpipe.roi_pooling.scene import EQUAL_STEP, FAST_RCNN, Choice, Scene, make_scene

Bins = Literal["fast_rcnn", "equal_step"]
ROUNDINGS = {"fast_rcnn": FAST_RCNN, "equal_step": EQUAL_STEP}  # as a scene names them


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
    size, scale, given = read_output_size(output_size), read_scale(spatial_scale), read_layout(boxes, features)
    how = {"samples": _rounding(bins), "normalized": normalized}
    return as_given(max_pool([features], make_scene([features], given, Choice([scale]), size, **how)), given)


def _rounding(bins: Bins) -> int:
    if bins not in ROUNDINGS:
        raise ValueError(f"bins must be {' or '.join(map(repr, ROUNDINGS))}, got {bins!r}")
    return ROUNDINGS[bins]


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
        self.bins: Bins = bins
        _rounding(bins)  # refuses other names

    def forward(self, features: dict[str, Tensor], boxes: Boxes, strides: dict[str, int]) -> Tensor:
        """Pool each box from the level that suits its size; see :meth:`RoIPooler.forward`."""
        if not is_exporting() or self.bins != "fast_rcnn":
            return super().forward(features, boxes, strides)

        def pool(level: Tensor, rois: Tensor, scale: float) -> Tensor:
            return torchvision_ops.roi_pool(level, rois, self.output_size, scale)

        return pool_every_level(pool, features, boxes, strides, self.levels)

    def pool(self, maps: list[Tensor], scene: Scene) -> Tensor:
        """Pool the boxes of a scene: ``[R, C, h, w]``."""
        return max_pool(maps, scene._replace(samples=_rounding(self.bins)))
