"""Pooling of rotated boxes as operators, and everything that their gradients need.

    rotated:          out[r, bin] = sum of weight * cell over the samples of a bin
    rotated_adjoint:  its transpose, the gradient to the cells
    rotated_frames:   the gradient to the boxes' frames

Each can be differentiated along D changes of the frames, its ``directions``. The gradients of each are the others, along one
direction more or less, so that the three are closed under differentiation to any order. Samples are listed anew in each of
them and nothing but the operands is kept; sums are taken in a fixed order.

R boxes, h x w bins, C channels, T cells of all maps, D directions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from detpipe.roi_pooling.operators import operator
from detpipe.roi_pooling.rotated_taps import Frames, Samples, moves, sample_blocks, taps_of, weights

ORDER = 2  # weights are linear in y and linear in x: a third derivative is zero


def pool_frames(rows: Tensor, frames: Frames, size: tuple[int, int], regular: int) -> Tensor:
    """Average bilinear samples in each bin of each box.

    Args:
        rows: ``[T, C]``, the cells of all maps.
        frames: the boxes.
        size: h x w bins.
        regular: samples along each axis of every bin, or 0 for what ``frames.counts`` says.

    Returns:
        ``[R, C, h, w]``, channels last in memory. Differentiable in the cells and the frames, any number of times.
    """
    directions = frames.frame.new_zeros((len(frames.frame), 0, 2, 3))
    pooled = torch.ops.detpipe.rotated(
        rows, frames.frame, directions, frames.place, frames.counts, size[0], size[1], regular
    )
    return pooled.permute(0, 3, 1, 2)


def _exact(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32)).contiguous()


@operator("rotated")
def _rotated(
    rows: Tensor, frame: Tensor, directions: Tensor, place: Tensor, counts: Tensor, h: int, w: int, regular: int
) -> Tensor:
    """``[T, C]`` -> ``[R, h, w, C]``."""
    shape = (frame.shape[0], h, w, rows.shape[1])
    exact, pooled = _exact(rows), None
    if directions.shape[1] > ORDER:
        return rows.new_zeros(shape)
    for part, some, samples in sample_blocks(Frames(frame, place, counts), (h, w), regular):
        taps = taps_of(some, samples, (h, w))
        weight = weights(taps, moves(taps, samples, directions[part]))
        result = torch.ops.detpipe.bag_sum(exact, taps.cell.flatten(), weight.flatten(), samples.bins * 4)
        result = result.to(rows.dtype).view(-1, *shape[1:])
        if len(result) == shape[0]:
            return result
        pooled = rows.new_empty(shape) if pooled is None else pooled
        pooled[part] = result
    return rows.new_zeros(shape) if pooled is None else pooled


@operator("rotated_adjoint")
def _rotated_adjoint(
    grad: Tensor, frame: Tensor, directions: Tensor, place: Tensor, counts: Tensor, cells: int, regular: int
) -> Tensor:
    """``[R, h, w, C]`` -> ``[T, C]``."""
    size, total = (grad.shape[1], grad.shape[2]), None
    exact = _exact(grad)
    if directions.shape[1] > ORDER:
        return grad.new_zeros((cells, grad.shape[3]))
    for part, some, samples in sample_blocks(Frames(frame, place, counts), size, regular):
        taps = taps_of(some, samples, size)
        weight = weights(taps, moves(taps, samples, directions[part]))
        result = torch.ops.detpipe.bag_sum_adjoint(
            exact[part].flatten(0, 2), taps.cell.flatten(), weight.flatten(), samples.bins * 4, cells
        )
        total = result if total is None else total.add_(result)
    return grad.new_zeros((cells, grad.shape[3])) if total is None else total.to(grad.dtype)


@operator("rotated_frames")
def _rotated_frames(
    grad: Tensor, rows: Tensor, frame: Tensor, directions: Tensor, place: Tensor, counts: Tensor, regular: int
) -> Tensor:
    """``[R, h, w, C]``, ``[T, C]`` -> ``[R, 2, 3]``."""
    size, result = (grad.shape[1], grad.shape[2]), torch.zeros_like(frame, memory_format=torch.contiguous_format)
    exact, exact_rows = _exact(grad), _exact(rows)
    if directions.shape[1] + 1 > ORDER:
        return result
    for part, some, samples in sample_blocks(Frames(frame, place, counts), size, regular):
        taps = taps_of(some, samples, size)
        dots = torch.ops.detpipe.bag_dot(
            exact[part].flatten(0, 2), exact_rows, taps.cell.flatten(), samples.bins * 4
        ).view(-1, 2, 2)
        along = moves(taps, samples, directions[part])
        slopes = [(weights(taps, [*along, unit]) * dots).sum((1, 2)) for unit in ((1.0, 0.0), (0.0, 1.0))]
        result[part] = _sum_samples(torch.stack(slopes, dim=1)[:, :, None] * taps.offset[:, None], samples, size)
    return result


def _sum_samples(values: Tensor, samples: Samples, size: tuple[int, int]) -> Tensor:
    """``[S, 2, 3]`` -> ``[R, 2, 3]``, in the same order on any number of threads."""
    index = torch.arange(len(values), device=values.device)
    boxes = samples.bins[:: size[0] * size[1]].contiguous()
    total = torch.ops.detpipe.bag_sum(values.flatten(1), index, values.new_ones(len(values)), boxes)
    return total.unflatten(1, (2, 3))


@_rotated.register_fake
def _(rows, frame, directions, place, counts, h, w, regular):
    return rows.new_empty((frame.shape[0], h, w, rows.shape[1]))


@_rotated_adjoint.register_fake
def _(grad, frame, directions, place, counts, cells, regular):
    return grad.new_empty((cells, grad.shape[3]))


@_rotated_frames.register_fake
def _(grad, rows, frame, directions, place, counts, regular):
    return frame.new_empty(frame.shape)


def _without(directions: Tensor, index: int) -> Tensor:
    return torch.cat((directions[:, :index], directions[:, index + 1 :]), dim=1)


def _to_frames(wanted, count, grad, rows, frame, directions, *rest) -> tuple[Tensor | None, Tensor | None]:
    """The gradients to the frames and to the first ``count`` directions; the result is linear in each direction."""
    slope = torch.ops.detpipe.rotated_frames
    to_frame, to_directions = wanted
    along = None
    if to_directions and count:
        without = [_without(directions, index) for index in range(count)]
        along = torch.stack([slope(grad, rows, frame, others, *rest) for others in without], dim=1)
    return slope(grad, rows, frame, directions, *rest) if to_frame else None, along


def _keep_rotated(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5])
    ctx.regular = inputs[7]


def _rotated_backward(ctx, grad):
    rows, frame, directions, place, counts = ctx.saved_tensors
    rest, grad, to_rows = (place, counts, ctx.regular), grad.contiguous(), None
    if ctx.needs_input_grad[0]:
        adjoint = torch.ops.detpipe.rotated_adjoint
        to_rows = adjoint(grad, frame, directions, place, counts, rows.shape[0], ctx.regular).to(rows.dtype)
    frames = _to_frames(ctx.needs_input_grad[1:3], directions.shape[1], grad, rows, frame, directions, *rest)
    return to_rows, *frames, None, None, None, None, None


def _keep_adjoint(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5])
    ctx.regular = inputs[6]


def _adjoint_backward(ctx, rows):
    grad, frame, directions, place, counts = ctx.saved_tensors
    rest, rows, to_grad = (place, counts, ctx.regular), rows.contiguous(), None
    if ctx.needs_input_grad[0]:
        size, pool = grad.shape[1:3], torch.ops.detpipe.rotated
        to_grad = pool(rows, frame, directions, place, counts, *size, ctx.regular).to(grad.dtype)
    frames = _to_frames(ctx.needs_input_grad[1:3], directions.shape[1], grad, rows, frame, directions, *rest)
    return to_grad, *frames, None, None, None, None


def _keep_frames(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:6])
    ctx.regular = inputs[6]


def _frames_backward(ctx, change):
    grad, rows, frame, directions, place, counts = ctx.saved_tensors
    ops, rest = torch.ops.detpipe, (place, counts, ctx.regular)
    more = torch.cat((directions, change[:, None].to(directions.dtype)), dim=1)
    to_grad = to_rows = None
    if ctx.needs_input_grad[0]:
        to_grad = ops.rotated(rows, frame, more, place, counts, *grad.shape[1:3], ctx.regular).to(grad.dtype)
    if ctx.needs_input_grad[1]:
        to_rows = ops.rotated_adjoint(grad, frame, more, place, counts, rows.shape[0], ctx.regular).to(rows.dtype)
    frames = _to_frames(ctx.needs_input_grad[2:4], directions.shape[1], grad, rows, frame, more, *rest)
    return to_grad, to_rows, *frames, None, None, None


_rotated.register_autograd(_rotated_backward, setup_context=_keep_rotated)
_rotated_adjoint.register_autograd(_adjoint_backward, setup_context=_keep_adjoint)
_rotated_frames.register_autograd(_frames_backward, setup_context=_keep_frames)


def _fold(info, in_dims, args: tuple, place_at: int, cells: int) -> list:
    """Write a vmapped call as one call, with its tables of cells behind one another."""
    folded = list(args)
    for index, (arg, dim) in enumerate(zip(args, in_dims, strict=True)):
        if isinstance(arg, Tensor):
            stacked = arg.movedim(dim, 0) if dim is not None else arg.expand(info.batch_size, *arg.shape)
            if index == place_at:
                first = stacked[..., :1] + cells * torch.arange(info.batch_size, device=arg.device)[:, None, None]
                stacked = torch.cat((first, stacked[..., 1:]), dim=-1)
            folded[index] = stacked.flatten(0, 1)
    return folded


def _cells(rows: Tensor, dim: int | None) -> int:
    return rows.shape[0] if dim is None else rows.movedim(dim, 0).shape[1]


def _unfold(result: Tensor, info) -> tuple[Tensor, int]:
    return result.unflatten(0, (info.batch_size, result.shape[0] // info.batch_size)), 0


@_rotated.register_vmap
def _(info, in_dims, *args):
    return _unfold(torch.ops.detpipe.rotated(*_fold(info, in_dims, args, 3, _cells(args[0], in_dims[0]))), info)


@_rotated_adjoint.register_vmap
def _(info, in_dims, *args):
    folded = _fold(info, in_dims, args, 3, args[5])
    folded[5] *= info.batch_size
    return _unfold(torch.ops.detpipe.rotated_adjoint(*folded), info)


@_rotated_frames.register_vmap
def _(info, in_dims, *args):
    return _unfold(torch.ops.detpipe.rotated_frames(*_fold(info, in_dims, args, 4, _cells(args[1], in_dims[1]))), info)
