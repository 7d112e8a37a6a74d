"""Pooling of rotated boxes with as many samples as a bin has cells, as operators.

    rotated:          out[r, bin] = sum of weight * cell over the samples of a bin
    rotated_adjoint:  its transpose, the gradient to the cells
    rotated_frames:   the gradient to the boxes' frames

The gradients of the first two are among the three; that of the last one is taken through the sum over samples itself. Samples
are listed anew in each of them and nothing but the operands is kept; sums are taken in a fixed order.

R boxes, h x w bins, C channels, T cells of all maps, S samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from detpipe.roi_pooling.operators import fold, operator, stack, unfold
from detpipe.roi_pooling.points import bilinear, neighbors
from detpipe.roi_pooling.rotated_samples import Frames, Samples, offsets, sample_blocks


def pool_frames(rows: Tensor, frames: Frames, size: tuple[int, int]) -> Tensor:
    """Average bilinear samples, ``[T, C]`` -> ``[R, h, w, C]``; differentiable in cells and frames, any number of times."""
    return torch.ops.detpipe.rotated(rows, *frames, *size)


def _exact(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32)).contiguous()


def _points(frames: Frames, samples: Samples, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """``[S]`` y and x of samples, and their ``[S, 3]`` offsets in the box."""
    offset = offsets(frames, samples, size)
    y, x = (frames.frame.index_select(0, samples.box) * offset[:, None]).sum(-1).unbind(-1)
    return y, x, offset


def _taps(frames: Frames, samples: Samples, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """``[S, 4]`` cells around samples, and their weights in the average of a bin."""
    first, height, width, count = (
        values.index_select(0, samples.box) for values in (*frames.place.unbind(1), frames.counts.prod(1))
    )
    return bilinear(y, x, first, height, width, 1 / count.to(y.dtype))


def _slopes(frames: Frames, samples: Samples, y: Tensor, x: Tensor, share: Tensor, dots: Tensor) -> Tensor:
    """``[S, 2]`` how a sum of products with four cells ``[S, 2, 2]`` changes with y and x, to the right of each sample."""
    height, width = (frames.place[:, axis].index_select(0, samples.box) for axis in (1, 2))
    inside = share > 0
    along_y, along_x = (neighbors(p.where(inside, 0), limit)[2] for p, limit in ((y, height), (x, width)))
    down, right = dots[:, 1] - dots[:, 0], dots[:, :, 1] - dots[:, :, 0]
    by_y = (down[:, 0] + (down[:, 1] - down[:, 0]) * along_x) * (y >= 0)
    by_x = (right[:, 0] + (right[:, 1] - right[:, 0]) * along_y) * (x >= 0)
    return torch.stack((by_y, by_x), dim=1) * share[:, None]


def _sum_samples(slopes: Tensor, offset: Tensor, samples: Samples, size: tuple[int, int]) -> Tensor:
    """``[S, 2]`` slopes in y and x -> ``[R, 2, 3]`` slopes in frames, in the same order on any number of threads."""
    values = slopes[:, :, None] * offset[:, None]
    index, boxes = torch.arange(len(offset), device=offset.device), samples.bins[:: size[0] * size[1]].contiguous()
    return torch.ops.detpipe.bag_sum(values.reshape(-1, 6), index, torch.ones_like(offset[:, 0]), boxes).view(-1, 2, 3)


@operator("rotated")
def _rotated(rows: Tensor, frame: Tensor, place: Tensor, counts: Tensor, h: int, w: int) -> Tensor:
    """``[T, C]`` -> ``[R, h, w, C]``."""
    exact, pooled = _exact(rows), rows.new_empty((frame.shape[0], h, w, rows.shape[1]))
    for part, some, samples in sample_blocks(Frames(frame, place, counts), (h, w)):
        y, x, _ = _points(some, samples, (h, w))
        cell, weight = _taps(some, samples, y, x)
        result = torch.ops.detpipe.bag_sum(exact, cell.flatten(), weight.flatten(), samples.bins * 4)
        pooled[part] = result.view(pooled[part].shape)
    return pooled


@operator("rotated_adjoint")
def _rotated_adjoint(grad: Tensor, frame: Tensor, place: Tensor, counts: Tensor, cells: int) -> Tensor:
    """``[R, h, w, C]`` -> ``[T, C]``."""
    size, exact = (grad.shape[1], grad.shape[2]), _exact(grad)
    total = exact.new_zeros((cells, grad.shape[3]))
    for part, some, samples in sample_blocks(Frames(frame, place, counts), size):
        y, x, _ = _points(some, samples, size)
        cell, weight = _taps(some, samples, y, x)
        total += torch.ops.detpipe.bag_sum_adjoint(
            exact[part].flatten(0, 2), cell.flatten(), weight.flatten(), samples.bins * 4, cells
        )
    return total.to(grad.dtype)


@operator("rotated_frames")
def _rotated_frames(grad: Tensor, rows: Tensor, frame: Tensor, place: Tensor, counts: Tensor) -> Tensor:
    """``[R, h, w, C]``, ``[T, C]`` -> ``[R, 2, 3]``."""
    size, result = (grad.shape[1], grad.shape[2]), torch.zeros_like(frame, memory_format=torch.contiguous_format)
    exact, exact_rows = _exact(grad), _exact(rows)
    for part, some, samples in sample_blocks(Frames(frame, place, counts), size):
        y, x, offset = _points(some, samples, size)
        cell, weight = _taps(some, samples, y, x)
        dots = torch.ops.detpipe.bag_dot(exact[part].flatten(0, 2), exact_rows, cell.flatten(), samples.bins * 4)
        slopes = _slopes(some, samples, y, x, weight.sum(1), dots.view(-1, 2, 2))
        result[part] = _sum_samples(slopes, offset, samples, size)
    return result


@_rotated.register_fake
def _(rows, frame, place, counts, h, w):
    return rows.new_empty((frame.shape[0], h, w, rows.shape[1]))


@_rotated_adjoint.register_fake
def _(grad, frame, place, counts, cells):
    return grad.new_empty((cells, grad.shape[3]))


@_rotated_frames.register_fake
def _(grad, rows, frame, place, counts):
    return frame.new_empty(frame.shape)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))


def _rotated_backward(ctx, grad):
    rows, *where = ctx.saved_tensors
    to_rows, to_frame = ctx.needs_input_grad[:2]
    ops, grad = torch.ops.detpipe, grad.contiguous()
    rows_grad = ops.rotated_adjoint(grad, *where, rows.shape[0]).to(rows.dtype) if to_rows else None
    return rows_grad, ops.rotated_frames(grad, rows, *where) if to_frame else None, None, None, None, None


def _adjoint_backward(ctx, rows):
    grad, *where = ctx.saved_tensors
    to_grad, to_frame = ctx.needs_input_grad[:2]
    ops, rows = torch.ops.detpipe, rows.contiguous()
    grad_grad = ops.rotated(rows, *where, *grad.shape[1:3]).to(grad.dtype) if to_grad else None
    return grad_grad, ops.rotated_frames(grad, rows, *where) if to_frame else None, None, None, None


def _frames_backward(ctx, change):
    """Differentiate along a change of the frames: sums with the slopes of the weights, which are linear in y and in x."""
    grad, rows, frame, place, counts = ctx.saved_tensors
    size, ops = grad.shape[1:3], torch.ops.detpipe
    exact, exact_rows = _exact(grad), _exact(rows)
    to_grad, to_frame, to_rows = [exact[:0]], [frame[:0]], torch.zeros_like(exact_rows)
    for part, some, samples in sample_blocks(Frames(frame, place, counts), size):
        y, x, offset = _points(some, samples, size)
        dy, dx = (change[part].index_select(0, samples.box) * offset[:, None]).sum(-1).unbind(-1)
        cell, weight = _taps(some, samples, y, x)
        height, width = (some.place[:, axis].index_select(0, samples.box) for axis in (1, 2))
        share = weight.detach().sum(1)
        dy, dx = dy * share * (y >= 0), dx * share * (x >= 0)  # what is moved onto the map does not move
        up, left = neighbors(y.where(share > 0, 0), height)[2], neighbors(x.where(share > 0, 0), width)[2]
        slope = torch.stack(
            (dy * left + dx * up - dy - dx, dx - dx * up - dy * left, dy - dy * left - dx * up, dy * left + dx * up), 1
        )
        own, bins = exact[part].reshape(-1, exact.shape[3]), samples.bins * 4
        to_grad.append(ops.bag_sum(exact_rows, cell.flatten(), slope.reshape(-1), bins).view(-1, *exact.shape[1:]))
        to_rows = to_rows + ops.bag_sum_adjoint(own, cell.flatten(), slope.reshape(-1), bins, len(rows))
        dots = ops.bag_dot(own, exact_rows, cell.flatten(), bins).view(-1, 4)
        twist = dots[:, 0] - dots[:, 1] - dots[:, 2] + dots[:, 3]
        to_frame.append(
            _sum_samples(torch.stack((dx * twist * (y >= 0), dy * twist * (x >= 0)), 1), offset, samples, size)
        )
    return torch.cat(to_grad).to(grad.dtype), to_rows.to(rows.dtype), torch.cat(to_frame), None, None


_rotated.register_autograd(_rotated_backward, setup_context=_keep)
_rotated_adjoint.register_autograd(_adjoint_backward, setup_context=_keep)
_rotated_frames.register_autograd(_frames_backward, setup_context=_keep)


@_rotated.register_vmap
def _(info, in_dims, *args):
    cells = stack(info, args[0], in_dims[0]).shape[1]
    return unfold(torch.ops.detpipe.rotated(*fold(info, in_dims, args, {2: cells})), info), 0


@_rotated_adjoint.register_vmap
def _(info, in_dims, *args):
    *folded, cells = fold(info, in_dims, args, {2: args[4]})
    return unfold(torch.ops.detpipe.rotated_adjoint(*folded, cells * info.batch_size), info), 0


@_rotated_frames.register_vmap
def _(info, in_dims, *args):
    cells = stack(info, args[1], in_dims[1]).shape[1]
    return unfold(torch.ops.detpipe.rotated_frames(*fold(info, in_dims, args, {3: cells})), info), 0
