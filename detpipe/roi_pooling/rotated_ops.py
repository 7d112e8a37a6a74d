"""Pooling of rotated boxes with as many samples as a bin has cells, as operators.

    rotated:         out[r, bin] = sum of weight * cell over the samples of a bin, or its transpose, the gradient to the cells
    rotated_frames:  the gradient to the boxes' frames

The first is linear in the cells, and its gradients are among the two; those of the second are taken through the sum over samples
itself. Samples are listed anew in each of them and nothing but the operands is kept; sums are taken in a fixed order.

R boxes, h x w bins, C channels, T cells of all maps, S samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from detpipe.roi_pooling.bags import bag_dot, bag_sum, bag_sum_adjoint
from detpipe.roi_pooling.operators import fold, operator, stack, unfold
from detpipe.roi_pooling.points import bilinear, neighbors
from detpipe.roi_pooling.rotated_samples import Frames, Samples, offsets, sample_blocks


def pool_frames(rows: Tensor, frames: Frames, size: tuple[int, int]) -> Tensor:
    """Average bilinear samples, ``[T, C]`` -> ``[R, h, w, C]``; differentiable in cells and frames, any number of times."""
    return _rotated(None, rows, *frames, *size, rows.shape[0])


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
    return bag_sum(values.reshape(-1, 6), index, torch.ones_like(offset[:, 0]), boxes).view(-1, 2, 3)


@operator("rotated")
def _rotated(
    grad: Tensor | None, rows: Tensor | None, frame: Tensor, place: Tensor, counts: Tensor, h: int, w: int, cells: int
) -> Tensor:
    """The one of ``[R, h, w, C]`` and ``[T, C]`` that is None, from the other."""
    given = rows if grad is None else grad
    assert given is not None
    channels = given.shape[-1]
    exact_rows = None if rows is None else _exact(rows)
    shape = (frame.shape[0], h, w, channels) if grad is None else (cells, channels)
    result = given.new_zeros(
        shape, dtype=given.dtype if grad is None else torch.promote_types(given.dtype, torch.float32)
    )
    for part, some, samples in sample_blocks(Frames(frame, place, counts), (h, w)):
        y, x, _ = _points(some, samples, (h, w))
        cell, weight = (taps.flatten() for taps in _taps(some, samples, y, x))
        if exact_rows is not None:
            result[part] = bag_sum(exact_rows, cell, weight, samples.bins * 4, result[part].shape[:-1])
        elif grad is not None:
            result += bag_sum_adjoint(_exact(grad[part]), cell, weight, samples.bins * 4, cells)
    return result.to(given.dtype)


@operator("rotated_frames")
def _rotated_frames(grad: Tensor, rows: Tensor, frame: Tensor, place: Tensor, counts: Tensor) -> Tensor:
    """``[R, h, w, C]``, ``[T, C]`` -> ``[R, 2, 3]``."""
    size, result = (grad.shape[1], grad.shape[2]), torch.zeros_like(frame, memory_format=torch.contiguous_format)
    exact_rows = _exact(rows)
    for part, some, samples in sample_blocks(Frames(frame, place, counts), size):
        y, x, offset = _points(some, samples, size)
        cell, weight = _taps(some, samples, y, x)
        dots = bag_dot(_exact(grad[part]), exact_rows, cell.flatten(), samples.bins * 4)
        slopes = _slopes(some, samples, y, x, weight.sum(1), dots.view(-1, 2, 2))
        result[part] = _sum_samples(slopes, offset, samples, size)
    return result


@_rotated.register_fake
def _(grad, rows, frame, place, counts, h, w, cells):
    return (
        rows.new_empty((frame.shape[0], h, w, rows.shape[1]))
        if grad is None
        else grad.new_empty((cells, grad.shape[3]))
    )


@_rotated_frames.register_fake
def _(grad, rows, frame, place, counts):
    return frame.new_empty(frame.shape)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5])
    ctx.rest = inputs[5:]


def _backward(ctx, change):
    grad, rows, *where = ctx.saved_tensors
    to_grad, to_rows, to_frame = ctx.needs_input_grad[:3]
    grads = [None] * 8
    if to_grad:
        grads[0] = _rotated(None, change, *where, *ctx.rest).to(grad.dtype)
    if to_rows:
        grads[1] = _rotated(change, None, *where, *ctx.rest).to(rows.dtype)
    if to_frame:
        grads[2] = _rotated_frames(*((change, rows) if grad is None else (grad, change)), *where)
    return tuple(grads)


def _frames_backward(ctx, change):
    """Differentiate along a change of the frames: sums with the slopes of the weights, which are linear in y and in x."""
    grad, rows, frame, place, counts = ctx.saved_tensors
    size = grad.shape[1:3]
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
        to_grad.append(bag_sum(exact_rows, cell.flatten(), slope.reshape(-1), bins).view(-1, *exact.shape[1:]))
        to_rows = to_rows + bag_sum_adjoint(own, cell.flatten(), slope.reshape(-1), bins, len(rows))
        dots = bag_dot(own, exact_rows, cell.flatten(), bins).view(-1, 4)
        twist = dots[:, 0] - dots[:, 1] - dots[:, 2] + dots[:, 3]
        to_frame.append(
            _sum_samples(torch.stack((dx * twist * (y >= 0), dy * twist * (x >= 0)), 1), offset, samples, size)
        )
    return torch.cat(to_grad).to(grad.dtype), to_rows.to(rows.dtype), torch.cat(to_frame), None, None


_rotated.register_autograd(_backward, setup_context=_keep)
_rotated_frames.register_autograd(_frames_backward, setup_context=_keep)


# under vmap the tables of cells are behind one another


@_rotated.register_vmap
def _(info, in_dims, *args):
    *folded, cells = fold(info, in_dims, args, {3: args[7]})
    return unfold(_rotated(*folded, cells * info.batch_size), info), 0


@_rotated_frames.register_vmap
def _(info, in_dims, *args):
    cells = stack(info, args[1], in_dims[1]).shape[1]
    return unfold(_rotated_frames(*fold(info, in_dims, args, {3: cells})), info), 0
