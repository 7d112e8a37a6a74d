"""Precise RoI pooling: the bilinear surface averaged over each bin in closed form, without samples.

Jiang et al., "Acquisition of Localization Confidence for Accurate Object Detection" (IoU-Net), 2018, arXiv 1807.11590,
equations 4 to 7.

Deviations: none by default. ``aligned=True`` shifts by half a cell, as RoIAlign does.

Convention: boxes are xyxy with continuous edges, x before y, in pixels (``spatial_scale`` cells each) or relative to the map
(``normalized=True``). In the paper's frame the value of cell k sits at coordinate k. Outside the map the surface falls to
zero within one cell. Differentiable in the features, and in the boxes everywhere: the gradient to an edge is continuous.

N images, C channels, R boxes of the batch, P boxes an image, h x w bins.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from detpipe.roi_pooling.align import align
from detpipe.roi_pooling.layouts import Boxes, as_given, check_features, read_layout, read_output_size, read_scale
from detpipe.roi_pooling.levels import FPNLevels
from detpipe.roi_pooling.pooler import RoIPooler
from detpipe.roi_pooling.scene import PRECISE, Choice, Scene, make_scene


def precise_roi_pool(
    features: Tensor,
    boxes: Boxes,
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    normalized: bool = False,
    aligned: bool = False,
) -> Tensor:
    """Average the bilinear surface through the cells over each bin of each box.

    Args:
        features: ``[N, C, H, W]``.
        boxes: ``[R, 5]`` (image, x1, y1, x2, y2), a list of N tensors ``[P_i, 4]``, or ``[N, P, 4]``.
        output_size: h x w, one number or (height, width).
        spatial_scale: cells a pixel, 1 / stride.
        normalized: boxes are in 0..1, relative to the map, and ``spatial_scale`` is not used.
        aligned: shift by half a cell, so that a cell's value sits at its center; the paper does not.

    Returns:
        ``[R, C, h, w]``, or ``[N, P, C, h, w]`` for boxes ``[N, P, 4]``; channels last in memory. 0 for a box outside
        the map.

    Raises:
        ValueError: an argument of another shape, type or range, or a box that is not finite or has no area.

    Example:
        >>> import torch
        >>> surface = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
        >>> precise_roi_pool(surface, [torch.tensor([[0.0, 0.0, 1.0, 1.0]])], 2)
        tensor([[[[1.7500, 2.2500],
                  [2.7500, 3.2500]]]])
    """
    if has_torch_function_unary(features):  # a tracer's proxy, or a subclass that wants to know
        settings = (output_size, spatial_scale, normalized, aligned)
        return handle_torch_function(precise_roi_pool, (features,), features, boxes, *settings)
    check_features(features)
    size, scale = read_output_size(output_size), read_scale(spatial_scale)
    given, how = read_layout(boxes, features), {"aligned": aligned, "normalized": normalized}
    return as_given(
        align([features], make_scene([features], given, Choice([scale]), size, samples=PRECISE, **how)), given
    )


class PreciseRoIPool(RoIPooler):
    """Average the bilinear surface over each bin of each box. Differentiable in the features and in the boxes.

    Args:
        output_size: cells of the result, one number or (height, width).
        aligned: shift by half a cell, so that a cell's value sits at its center; the paper does not.
        levels: which pyramid level a box is pooled from; in Python any function (boxes ``[R, 4]``, strides) -> ``[R]``.

    Example:
        >>> import torch
        >>> features = {"c4": torch.ones(1, 2, 8, 8)}
        >>> PreciseRoIPool(3)(features, [torch.tensor([[0.0, 0.0, 64.0, 64.0]])], {"c4": 16}).shape
        torch.Size([1, 2, 3, 3])
    """

    def __init__(
        self,
        output_size: int | tuple[int, int] = 7,
        aligned: bool = False,
        levels: FPNLevels = FPNLevels(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__(output_size, levels)
        self.aligned = aligned

    def pool(self, maps: list[Tensor], scene: Scene) -> Tensor:
        """Pool the boxes of a scene: ``[R, C, h, w]``."""
        return align(maps, scene._replace(samples=PRECISE, aligned=self.aligned))
