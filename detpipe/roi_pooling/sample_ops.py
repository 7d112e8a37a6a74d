"""Averages of bilinear samples as operators on boxes as they were given, with Triton kernels: free points and rotated boxes.

    sampled:          out[r, bin] = mean over the samples of a bin of the bilinear surface there
    sampled_adjoint:  its transpose, the gradient to the maps
    sampled_slopes:   the gradient to the points, or to rotated boxes

A second derivative is taken through the formulation in PyTorch's own operations, which CPUs run. One launch forward, two on the
way back to the maps, and one to points or boxes.

N images, L levels, R boxes, h x w bins, S samples a bin, C channels, T cells of all maps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from detpipe.roi_pooling.layouts import (
    MOST_LISTED,
    ROTATED_SIDES,
    SIDES,
    GivenBoxes,
    looks_at_values,
    read_values,
    with_images,
)
from detpipe.roi_pooling.maps import cut_table
from detpipe.roi_pooling.operators import operator

Compose = Callable[[Sequence[Tensor], Tensor | None, Tensor], Tensor]  # maps, points, boxes -> [R, h, w, C]


def sample(
    compose: Compose,
    maps: list[Tensor],
    points: Tensor | None,
    given: GivenBoxes,
    level: Tensor | None,
    scales: list[float],
    areas: list[float],
    size: tuple[int, int],
    samples: int,
    normalized: bool = False,
) -> Tensor:
    """Average bilinear samples with kernels, which :func:`detpipe.roi_pooling.box_ops.has_kernels` says whether there are.

    Args:
        compose: computes the same of maps, points and boxes with operations that can be differentiated any number of times.
        maps: L tensors ``[N, C, H_l, W_l]``.
        points: ``[N, P, h, w, S, 2]`` (x, y) in the boxes' unit; None for rotated boxes.
        given: the boxes.
        level: ``[R]`` int64, the level of each box; None if there is one, or ``areas`` choose it.
        scales: cells a pixel of each level.
        areas: of the smallest box of each level but the first.
        size: h x w bins.
        samples: S, or of rotated boxes those along each axis of a bin, 0 for as many as it has cells.
        normalized: boxes are relative to the map.

    Returns:
        ``[R, C, h, w]``, channels last in memory. Differentiable in maps, points and rotated boxes.
    """
    if looks_at_values(given.boxes):
        read_values(given, maps[0], SIDES if points is not None else ROTATED_SIDES)
    if len(given.ends) > MOST_LISTED:
        given = with_images(given)
    sizes = [side for one in maps for side in one.shape[2:]]
    rest = (list(given.ends), scales, areas, maps[0].shape[0], sizes, *size, samples, normalized)
    return _Sampled.apply(compose, rest, given.boxes, level, points, *maps).permute(0, 3, 1, 2)


@operator("sampled")
def _sampled(
    maps: Sequence[Tensor],
    points: Tensor | None,
    boxes: Tensor,
    level: Tensor | None,
    ends: Sequence[int],
    scales: Sequence[float],
    areas: Sequence[float],
    images: int,
    sizes: Sequence[int],
    h: int,
    w: int,
    samples: int,
    normalized: bool,
) -> Tensor:
    """L x ``[N, C, H_l, W_l]`` -> ``[R, h, w, C]``."""
    from detpipe.roi_pooling.cuda import points as kernels

    scene = kernels.Scene(boxes, level, ends, images, sizes, scales, areas)
    return kernels.pool(_channels_last(maps), _contiguous(points), scene, (h, w), samples, normalized)


@operator("sampled_adjoint")
def _sampled_adjoint(
    grad: Tensor,
    points: Tensor | None,
    boxes: Tensor,
    level: Tensor | None,
    ends: Sequence[int],
    scales: Sequence[float],
    areas: Sequence[float],
    images: int,
    sizes: Sequence[int],
    h: int,
    w: int,
    samples: int,
    normalized: bool,
) -> Tensor:
    """``[R, h, w, C]`` -> ``[T, C]``, the cells of all maps, level by level."""
    from detpipe.roi_pooling.cuda import points as kernels

    scene = kernels.Scene(boxes, level, ends, images, sizes, scales, areas)
    return kernels.adjoint(grad, _contiguous(points), scene, samples, normalized)


@operator("sampled_slopes")
def _sampled_slopes(
    grad: Tensor,
    maps: Sequence[Tensor],
    points: Tensor | None,
    boxes: Tensor,
    level: Tensor | None,
    ends: Sequence[int],
    scales: Sequence[float],
    areas: Sequence[float],
    images: int,
    sizes: Sequence[int],
    h: int,
    w: int,
    samples: int,
    normalized: bool,
) -> Tensor:
    """``[R, h, w, C]`` -> ``[R, h, w, S, 2]`` of points, or ``[R, 5]``."""
    from detpipe.roi_pooling.cuda import points as kernels

    scene = kernels.Scene(boxes, level, ends, images, sizes, scales, areas)
    return kernels.slopes(grad, _channels_last(maps), _contiguous(points), scene, samples, normalized)


def _channels_last(maps: Sequence[Tensor]) -> list[Tensor]:
    return [one.permute(0, 2, 3, 1).contiguous() for one in maps]


def _contiguous(points: Tensor | None) -> Tensor | None:
    return None if points is None else points.contiguous()


@_sampled.register_fake
def _(maps, points, boxes, level, ends, scales, areas, images, sizes, h, w, samples, normalized):
    return maps[0].new_empty((boxes.shape[:-1].numel(), h, w, maps[0].shape[1]))


@_sampled_adjoint.register_fake
def _(grad, points, boxes, level, ends, scales, areas, images, sizes, h, w, samples, normalized):
    cells = images * sum(height * width for height, width in zip(sizes[::2], sizes[1::2], strict=True))
    return grad.new_empty((cells, grad.shape[3]))


@_sampled_slopes.register_fake
def _(grad, maps, points, boxes, level, ends, scales, areas, images, sizes, h, w, samples, normalized):
    shape = (grad.shape[0], 5) if points is None else points.shape
    return grad.new_empty(shape, dtype=torch.promote_types(grad.dtype, torch.float32))


class _Sampled(torch.autograd.Function):
    """``sampled``, differentiable in maps and points, or rotated boxes."""

    @staticmethod
    def forward(ctx, compose, rest, boxes, level, points, *maps):
        ctx.save_for_backward(boxes, level, points, *maps)
        ctx.compose, ctx.rest = compose, rest
        return torch.ops.detpipe.sampled(list(maps), points, boxes, level, *rest)

    @staticmethod
    def backward(ctx, grad):
        boxes, level, points, *maps = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        if torch.is_grad_enabled():  # it is to be differentiated again
            return None, None, *_composed_gradients(ctx.compose, grad, boxes, points, maps, wanted[2:])
        ops, grad = torch.ops.detpipe, grad.contiguous()
        to_boxes = to_points = None
        if wanted[4]:
            to_points = ops.sampled_slopes(grad, maps, points, boxes, level, *ctx.rest).to(points.dtype)
        elif points is None and wanted[2]:
            to_boxes = ops.sampled_slopes(grad, maps, None, boxes, level, *ctx.rest)
            if boxes.ndim == 2 and boxes.shape[1] == 6:
                to_boxes = torch.nn.functional.pad(to_boxes, (1, 0))  # of the image
            to_boxes = to_boxes.view(boxes.shape).to(boxes.dtype)
        to_maps = [None] * len(maps)
        if any(wanted[5:]):
            to_maps = cut_table(ops.sampled_adjoint(grad, points, boxes, level, *ctx.rest), *ctx.rest[3:5])
        return None, None, to_boxes, None, to_points, *to_maps


def _composed_gradients(compose, grad, boxes, points, maps, wanted) -> list[Tensor | None]:
    """Gradients to boxes, level, points and maps that can be differentiated themselves."""
    operands = [boxes, None, points, *maps]
    own = [one.view_as(one) if want else one for one, want in zip(operands, wanted, strict=True)]
    pooled = compose(own[3:], own[2], own[0])
    sought = [one for one, want in zip(own, wanted, strict=True) if want]
    grads = iter(
        torch.autograd.grad(pooled, sought, grad, create_graph=True, allow_unused=True, materialize_grads=True)
    )
    return [next(grads) if want else None for want in wanted]
