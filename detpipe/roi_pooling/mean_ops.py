"""Means of bilinear samples as operators on a scene, with Triton kernels: RoIAlign, precise pooling, rotated boxes, free points.

    box_mean:          out[r, bin] = mean over a bin of the bilinear surface, at its samples or all over it
    box_mean_adjoint:  its transpose, the gradient to the maps
    box_mean_slopes:   the gradient to the boxes, or to the points

With kernels, everything is computed from the boxes as they were given: one launch forward, two for the gradient to the maps,
one for that to boxes or points, however many levels there are. Elsewhere, inside ``torch.func.vmap``, and for second
derivatives in boxes or points, each of the four is composed of PyTorch's own operations.

N images, L levels, R boxes, h x w bins, S samples a bin, C channels, T cells of all maps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from detpipe.roi_pooling.backend import kernels_for
from detpipe.roi_pooling.layouts import looks_at_values, unchecked_values
from detpipe.roi_pooling.maps import channels_last, cut_table
from detpipe.roi_pooling.operators import is_batched
from detpipe.roi_pooling.scene import Scene, scene_operator

Compose = Callable[[Sequence[Tensor], Tensor | None, Scene], Tensor]  # maps, points, scene -> [R, h, w, C]


def pool(compose: Compose, maps: Sequence[Tensor], scene: Scene, points: Tensor | None = None) -> Tensor:
    """Average over bins, with kernels where there are some.

    Args:
        compose: computes it of operations that can be differentiated any number of times.
        maps: L tensors ``[N, C, H_l, W_l]``.
        scene: the boxes and their bins.
        points: ``[N, P, h, w, S, 2]`` (x, y) in the boxes' unit, where these only choose the level.

    Returns:
        ``[R, C, h, w]``, channels last in memory. Differentiable in maps, boxes and points, any number of times.
    """
    if not has_kernels(maps, scene.boxes, points):
        return compose(maps, points, scene).permute(0, 3, 1, 2)
    if looks_at_values(scene.boxes):
        scene.read(maps[0])
    boxes, level, *rest = scene.for_kernels()
    maps = [one.contiguous(memory_format=torch.channels_last) for one in maps]
    return _Pool.apply(boxes, points, level, compose, tuple(rest), *maps).permute(0, 3, 1, 2)


def has_kernels(maps: Sequence[Tensor], boxes: Tensor, points: Tensor | None = None) -> bool:
    """Say whether boxes are pooled by kernels that read them; inside ``torch.func.vmap`` they are not."""
    if kernels_for(maps[0]) != "triton":
        return False
    operands = (*maps, boxes) if points is None else (*maps, boxes, points)
    return not any(map(is_batched, operands))


def _kernels(points: Tensor | None, scene: Scene) -> tuple[Any, tuple[Tensor | None, ...]]:
    """The module of kernels, and what they take besides maps and scene."""
    from detpipe.roi_pooling.cuda import align
    from detpipe.roi_pooling.cuda import points as sampled

    return (align, ()) if points is None and not scene.rotated else (sampled, (points,))


@scene_operator("box_mean", "Tensor[] maps, Tensor? points")
def _box_mean(maps: Sequence[Tensor], points: Tensor | None, *fields: Any) -> Tensor:
    """L x ``[N, C, H_l, W_l]`` -> ``[R, h, w, C]``."""
    kernels, more = _kernels(points, scene := Scene(*fields))
    return kernels.pool(channels_last(maps), *more, scene)


@scene_operator("box_mean_adjoint", "Tensor grad, Tensor? points")
def _box_mean_adjoint(grad: Tensor, points: Tensor | None, *fields: Any) -> Tensor:
    """``[R, h, w, C]`` -> ``[T, C]``, the cells of all maps, level by level."""
    kernels, more = _kernels(points, scene := Scene(*fields))
    return kernels.adjoint(grad.contiguous(), *more, scene)


@scene_operator("box_mean_slopes", "Tensor grad, Tensor[] maps, Tensor? points")
def _box_mean_slopes(grad: Tensor, maps: Sequence[Tensor], points: Tensor | None, *fields: Any) -> Tensor:
    """``[R, h, w, C]`` -> like the points, or the boxes."""
    kernels, more = _kernels(points, scene := Scene(*fields))
    return kernels.slopes(grad.contiguous(), channels_last(maps), *more, scene)


@_box_mean.register_fake
def _(maps, points, *fields):
    scene = Scene(*fields)
    return maps[0].new_empty((scene.count, scene.h, scene.w, maps[0].shape[1]))


@_box_mean_adjoint.register_fake
def _(grad, points, *fields):
    return grad.new_empty((Scene(*fields).cells, grad.shape[3]))


@_box_mean_slopes.register_fake
def _(grad, maps, points, *fields):
    like = Scene(*fields).boxes if points is None else points
    return torch.empty_like(like, memory_format=torch.contiguous_format)


# Functions outside of the operators: PyTorch's own way to give an operator a gradient takes several times as long a call.
# All take boxes, points, level, compose and the rest of the scene, in this order.


class _Pool(Function):
    @staticmethod
    def forward(ctx: Any, *operands: Any) -> Tensor:  # named, two maps would look to the compiler like no context
        boxes, points, *how = operands[:5]
        maps, ctx.how = operands[5:], how
        ctx.save_for_backward(boxes, points, *(maps if any(ctx.needs_input_grad[:2]) else ()))
        return torch.ops.detpipe.box_mean(maps, points, boxes, how[0], *how[2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        boxes, points, *maps = ctx.saved_tensors
        level, _, rest = ctx.how
        scene, grad = Scene(boxes, level, *rest), grad.contiguous()
        slopes, to_maps = None, [None] * len(scene.scales)
        if any(ctx.needs_input_grad[:2]):
            slopes = _Slopes.apply(grad, boxes, points, *ctx.how, *maps)
        if any(ctx.needs_input_grad[5:]):
            to_maps = cut_table(_Adjoint.apply(grad, boxes, points, *ctx.how), scene.images, scene.sizes)
        return *((slopes, None) if points is None else (None, slopes)), None, None, None, *to_maps


class _Adjoint(Function):
    @staticmethod
    def forward(ctx: Any, *operands: Any) -> Tensor:
        grad, boxes, points, *how = operands
        ctx.how = how
        ctx.save_for_backward(boxes, points, *((grad,) if any(ctx.needs_input_grad[1:3]) else ()))
        return torch.ops.detpipe.box_mean_adjoint(grad, points, boxes, how[0], *how[2])

    @staticmethod
    def backward(ctx: Any, to_rows: Tensor) -> tuple[Tensor | None, ...]:
        boxes, points, *grad = ctx.saved_tensors
        level, _, rest = ctx.how
        scene = Scene(boxes, level, *rest)
        maps = cut_table(to_rows.contiguous(), scene.images, scene.sizes)
        to_grad = _Pool.apply(boxes, points, *ctx.how, *maps) if ctx.needs_input_grad[0] else None
        slopes = _Slopes.apply(*grad, boxes, points, *ctx.how, *maps) if grad else None
        return to_grad, *((slopes, None) if points is None else (None, slopes)), None, None, None


class _Slopes(Function):
    @staticmethod
    def forward(ctx: Any, *operands: Any) -> Tensor:
        grad, boxes, points, *how = operands[:6]
        maps, ctx.how = operands[6:], how
        ctx.save_for_backward(grad, boxes, points, *maps)
        return torch.ops.detpipe.box_mean_slopes(grad, maps, points, boxes, how[0], *how[2])

    @staticmethod
    def backward(ctx: Any, to_slopes: Tensor) -> tuple[Tensor | None, ...]:
        level, compose, rest = ctx.how
        creates_graph = torch.is_grad_enabled()
        with torch.enable_grad(), unchecked_values():
            # views, so that what the operands are made of is not differentiated here
            grad, boxes, points, *maps = (one if one is None else one.view_as(one) for one in ctx.saved_tensors)
            assert boxes is not None
            place = boxes if points is None else points
            if not place.requires_grad:
                place.requires_grad_()
            pooled = compose(maps, points, Scene(boxes, level, *rest))
            [first] = torch.autograd.grad(pooled, place, grad, create_graph=True)
            inputs = [one for one in (grad, boxes, points, *maps) if one is not None and one.requires_grad]
            if first.requires_grad:
                found = torch.autograd.grad(
                    first, inputs, to_slopes, create_graph=creates_graph, allow_unused=True, materialize_grads=True
                )
            else:  # no boxes
                found = tuple(torch.zeros_like(one) for one in inputs)
        grads = dict(zip(map(id, inputs), found, strict=True))
        to_grad, to_boxes, to_points, *to_maps = (grads.get(id(one)) for one in (grad, boxes, points, *maps))
        return to_grad, to_boxes, to_points, None, None, None, *to_maps
