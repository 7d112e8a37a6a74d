"""Means over the bins of boxes: which way they are computed, and the operators of the way that has kernels for it.

With kernels, everything is computed from the boxes as they were given: one launch forward, two for the gradient to the maps,
one for that to the boxes, however many levels there are. Elsewhere, and inside ``torch.func.vmap``, weights along y and x are
computed by :mod:`detpipe.roi_pooling.axis` and applied by :mod:`detpipe.roi_pooling.separable`; the second derivative in the
boxes is computed so everywhere.

N images, L levels, R boxes, h x w bins, C channels, T cells of all maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from detpipe.roi_pooling.axis import AxisTaps, adaptive_samples, along_both, fixed_samples, integral
from detpipe.roi_pooling.backend import kernels_for
from detpipe.roi_pooling.layouts import MOST_LISTED, GivenBoxes, looks_at_values, read_values, with_images
from detpipe.roi_pooling.levels import choose_level
from detpipe.roi_pooling.operators import is_batched, operator
from detpipe.roi_pooling.placement import Placement, bin_edges, place, static_bound
from detpipe.roi_pooling.separable import pool_separable

ADAPTIVE, PRECISE = 0, -1  # in the place of a number of samples


class Task(NamedTuple):
    """What to pool from boxes, in the order of the operators' arguments."""

    ends: tuple[int, ...]  # for each image the number of boxes up to its last one, where boxes are of a list
    scales: tuple[float, ...]  # cells a pixel of each level
    areas: tuple[float, ...]  # w * h of the smallest box of each level but the first, in pixels
    height: int  # bins
    width: int
    samples: int  # along each axis of a bin, or ADAPTIVE, or PRECISE
    aligned: bool
    normalized: bool


def pool_boxes(
    maps: Sequence[Tensor],
    given: GivenBoxes,
    scales: Sequence[float],
    size: tuple[int, int],
    samples: int,
    aligned: bool,
    normalized: bool = False,
    level: Tensor | None = None,
    areas: Sequence[float] = (),
) -> Tensor:
    """Pool with kernels, which :func:`has_kernels` says whether there are.

    Args:
        maps: L maps ``[N, C, H_l, W_l]``.
        given: the boxes.
        scales: cells a pixel of each level.
        size: h x w bins.
        samples: along each axis of a bin, or ``ADAPTIVE`` or ``PRECISE``.
        aligned: shift by half a cell.
        normalized: the boxes are relative to the map.
        level: ``[R]`` int64, the level of each box; None where the areas tell, or there is one level.
        areas: w * h of the smallest box of each level but the first, in pixels.

    Returns:
        ``[R, C, h, w]``, channels last in memory; differentiable in maps and boxes, any number of times.
    """
    if looks_at_values(given.boxes):
        read_values(given, maps[0])
    if len(given.ends) > MOST_LISTED:
        given = with_images(given)
    task = Task(given.ends, tuple(scales), tuple(areas), *size, samples, aligned, normalized)
    maps = [values.contiguous(memory_format=torch.channels_last) for values in maps]
    return _Pool.apply(given.boxes, level, task, *maps).permute(0, 3, 1, 2)


def has_kernels(maps: Sequence[Tensor], given: GivenBoxes) -> bool:
    """Say whether boxes are pooled by kernels that read them; inside ``torch.func.vmap`` they are not."""
    if kernels_for(maps[0]) != "triton":
        return False
    return torch.compiler.is_compiling() or not any(map(is_batched, (*maps, given.boxes)))


def pool_placed(placement: Placement, size: tuple[int, int], samples: int, aligned: bool) -> Tensor:
    """Pool placed boxes by weights along y and x: ``[R, C, h, w]``; ``samples`` as in :func:`pool_boxes`."""
    axes = bin_edges(placement, size, aligned, at_least=None if aligned or samples == PRECISE else 1.0)
    bound = None if samples > 0 else static_bound(placement)
    checked = looks_at_values(placement.boxes)

    def sample(start: Tensor, step: Tensor, extent: Tensor, bins: int) -> AxisTaps:
        if samples == PRECISE:
            return integral(start, step, extent, bins, bound)
        if samples == ADAPTIVE:
            return adaptive_samples(start, step, extent, bins, bound)
        return fixed_samples(start, step, extent, bins, samples, ascending=checked)

    return pool_separable(placement.table, placement.chosen, *along_both(axes, sample))


@operator("roi_align")
def _roi_align(
    maps: Sequence[Tensor],
    boxes: Tensor,
    level: Tensor | None,
    ends: Sequence[int],
    scales: Sequence[float],
    areas: Sequence[float],
    height: int,
    width: int,
    samples: int,
    aligned: bool,
    normalized: bool,
) -> Tensor:
    """L maps ``[N, C, H_l, W_l]`` -> ``[R, h, w, C]``."""
    from detpipe.roi_pooling.cuda import align

    images, sizes = maps[0].shape[0], _sizes(maps)
    scene = align.Scene(boxes, level, ends, images, sizes, scales, areas)
    return align.pool(maps, scene, (height, width), samples, aligned, normalized)


@operator("roi_align_adjoint")
def _roi_align_adjoint(
    grad: Tensor,
    images: int,
    sizes: Sequence[int],
    boxes: Tensor,
    level: Tensor | None,
    ends: Sequence[int],
    scales: Sequence[float],
    areas: Sequence[float],
    height: int,
    width: int,
    samples: int,
    aligned: bool,
    normalized: bool,
) -> Tensor:
    """``[R, h, w, C]`` -> ``[T, C]``: the gradient to the maps, level by level."""
    from detpipe.roi_pooling.cuda import align

    scene = align.Scene(boxes, level, ends, images, sizes, scales, areas)
    return align.pool_adjoint(grad, scene, samples, aligned, normalized)


@operator("roi_align_box_grad")
def _roi_align_box_grad(
    grad: Tensor,
    maps: Sequence[Tensor],
    boxes: Tensor,
    level: Tensor | None,
    ends: Sequence[int],
    scales: Sequence[float],
    areas: Sequence[float],
    height: int,
    width: int,
    samples: int,
    aligned: bool,
    normalized: bool,
) -> Tensor:
    """``[R, h, w, C]`` -> like the boxes: the gradient to them."""
    from detpipe.roi_pooling.cuda import align

    scene = align.Scene(boxes, level, ends, maps[0].shape[0], _sizes(maps), scales, areas)
    return align.box_grad(grad, maps, scene, samples, aligned, normalized)


@_roi_align.register_fake
def _(maps, boxes, level, ends, scales, areas, height, width, samples, aligned, normalized):
    count = boxes.shape[0] * (boxes.shape[1] if boxes.ndim == 3 else 1)
    return maps[0].new_empty((count, height, width, maps[0].shape[1]))


@_roi_align_adjoint.register_fake
def _(grad, images, sizes, *others):
    cells = images * sum(height * width for height, width in zip(sizes[::2], sizes[1::2], strict=True))
    return grad.new_empty((cells, grad.shape[3]))


@_roi_align_box_grad.register_fake
def _(grad, maps, boxes, *others):
    return torch.empty_like(boxes, memory_format=torch.contiguous_format)


def _sizes(maps: Sequence[Tensor]) -> list[int]:
    return [side for values in maps for side in values.shape[2:]]


def _levels_of(rows: Tensor, images: int, sizes: Sequence[int]) -> list[Tensor]:
    """Cut ``[T, C]`` into views ``[N, C, H_l, W_l]``, channels last in memory."""
    shapes = list(zip(sizes[::2], sizes[1::2], strict=True))
    parts = rows.split([images * height * width for height, width in shapes])
    return [
        part.view(images, *shape, rows.shape[1]).permute(0, 3, 1, 2) for part, shape in zip(parts, shapes, strict=True)
    ]


# Functions outside of the operators: PyTorch's own way to give an operator a gradient takes several times as long a call


class _Pool(Function):
    @staticmethod
    def forward(ctx: Any, *operands: Any) -> Tensor:  # named, two maps would look to the compiler like no context
        boxes, level, task, *maps = operands
        ctx.task, ctx.level, ctx.images, ctx.sizes = task, level, maps[0].shape[0], _sizes(maps)
        ctx.save_for_backward(boxes, *(maps if ctx.needs_input_grad[0] else ()))
        return torch.ops.detpipe.roi_align(maps, boxes, level, *task)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        boxes, *maps = ctx.saved_tensors
        grad = grad.contiguous()
        to_boxes = _BoxGrad.apply(grad, boxes, ctx.level, ctx.task, *maps) if ctx.needs_input_grad[0] else None
        to_maps = [None] * len(ctx.task.scales)
        if any(ctx.needs_input_grad[3:]):
            rows = _Adjoint.apply(grad, boxes, ctx.level, ctx.task, ctx.images, ctx.sizes)
            to_maps = _levels_of(rows, ctx.images, ctx.sizes)
        return to_boxes, None, None, *to_maps


class _Adjoint(Function):
    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, boxes: Tensor, level: Tensor | None, task: Task, images: int, sizes: list[int]
    ) -> Tensor:
        ctx.task, ctx.level, ctx.images, ctx.sizes = task, level, images, sizes
        ctx.save_for_backward(boxes, *((grad,) if ctx.needs_input_grad[1] else ()))
        return torch.ops.detpipe.roi_align_adjoint(grad, images, sizes, boxes, level, *task)

    @staticmethod
    def backward(ctx: Any, to_rows: Tensor) -> tuple[Tensor | None, ...]:
        boxes, *grad = ctx.saved_tensors
        maps = _levels_of(to_rows.contiguous(), ctx.images, ctx.sizes)
        to_grad = _Pool.apply(boxes, ctx.level, ctx.task, *maps) if ctx.needs_input_grad[0] else None
        to_boxes = _BoxGrad.apply(*grad, boxes, ctx.level, ctx.task, *maps) if ctx.needs_input_grad[1] else None
        return to_grad, to_boxes, None, None, None, None


class _BoxGrad(Function):
    @staticmethod
    def forward(ctx: Any, *operands: Any) -> Tensor:
        grad, boxes, level, task, *maps = operands
        ctx.task, ctx.level = task, level
        ctx.save_for_backward(grad, boxes, *maps)
        return torch.ops.detpipe.roi_align_box_grad(grad, maps, boxes, level, *task)

    @staticmethod
    def backward(ctx: Any, to_grad: Tensor) -> tuple[Tensor | None, ...]:
        # by way of weights; views, so that what maps and boxes are made of is not differentiated here
        creates_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            grad, boxes, *maps = (saved.view_as(saved) for saved in ctx.saved_tensors)
            if not boxes.requires_grad:
                boxes.requires_grad_()
            pooled = _by_weights(boxes, ctx.level, ctx.task, maps)
            [first] = torch.autograd.grad(pooled, boxes, grad, create_graph=True)
            inputs = [each for each in (grad, boxes, *maps) if each.requires_grad]
            if first.requires_grad:
                found = torch.autograd.grad(first, inputs, to_grad, create_graph=creates_graph, allow_unused=True)
            else:  # no boxes
                found = tuple(torch.zeros_like(each) for each in inputs)
        grads = dict(zip(map(id, inputs), found, strict=True))
        to_first, to_boxes, *to_maps = (grads.get(id(each)) for each in (grad, boxes, *maps))
        return to_first, to_boxes, None, None, *to_maps


def _by_weights(boxes: Tensor, level: Tensor | None, task: Task, maps: Sequence[Tensor]) -> Tensor:
    """Pool boxes as they were given by weights along y and x: ``[R, h, w, C]``."""
    rois = read_values(GivenBoxes(boxes, task.ends, ()), maps[0], checks=False)
    if level is None and len(maps) > 1:
        sides = rois.boxes.detach()
        level = choose_level((sides[:, 2] - sides[:, 0]) * (sides[:, 3] - sides[:, 1]), task.areas)
    placement = place(maps, task.scales, rois, level, task.normalized)
    return pool_placed(placement, (task.height, task.width), task.samples, task.aligned).permute(0, 2, 3, 1)
