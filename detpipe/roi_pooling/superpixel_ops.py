"""The operators under superpixel pooling: weighted sums over superpixels, their transpose, and where a maximum is.

The sum is linear in the features, and its gradient is its transpose, whose gradient is the sum again: both can be
differentiated any number of times. Labels have no gradient.

N images, C channels, S superpixels an image, H x W cells, Hl x Wl label pixels. Features are rows, ``[N * H * W, C]``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from detpipe.roi_pooling.bags import transpose_bags
from detpipe.roi_pooling.operators import Operator, operator
from detpipe.roi_pooling.superpixel_taps import (
    AxisReads,
    Runs,
    Taps,
    distinct_cells,
    find_runs,
    read_axis,
    read_cells,
    sort_by_bag,
    split_pixels,
)

VALUES_AT_ONCE = 1 << 22  # candidates times channels that a maximum compares in one pass


def read_axes(labels: Tensor, size: tuple[int, int], resolution: str) -> tuple[AxisReads, AxisReads]:
    """Tell what the pixels of a label map read along y and along x."""
    y, x = (read_axis(labels.shape[1 + axis], size[axis], resolution, labels.device) for axis in (0, 1))
    return y, x


def _taps(
    labels: Tensor, height: int, width: int, superpixels: int, resolution: str, dtype: torch.dtype
) -> tuple[Runs, Taps]:
    if resolution == "features":
        labels = split_pixels(labels, height, width)
    y, x = read_axes(labels, (height, width), resolution)
    runs = find_runs(labels, superpixels, x.first)
    return runs, read_cells(runs.start, runs.length, y, x, (height, width), dtype)


@operator("superpixel_sum")
def _superpixel_sum(rows: Tensor, labels: Tensor, height: int, width: int, superpixels: int, resolution: str) -> Tensor:
    """``[N * H * W, C]`` -> ``[N * S, C]``, float32 at least."""
    exact = rows.to(torch.promote_types(rows.dtype, torch.float32))
    runs, taps = _taps(labels, height, width, superpixels, resolution, exact.dtype)
    order, offsets = sort_by_bag(runs)
    index, weight = taps.cell[order].flatten(), taps.weight[order].flatten()
    total = torch.ops.detpipe.bag_sum(exact, index, weight, offsets * taps.cell.shape[1])
    return total[: labels.shape[0] * superpixels]


@operator("superpixel_sum_adjoint")
def _superpixel_sum_adjoint(
    grad: Tensor, labels: Tensor, height: int, width: int, superpixels: int, resolution: str
) -> Tensor:
    """``[N * S, C]`` -> ``[N * H * W, C]``, float32 at least."""
    exact = grad.to(torch.promote_types(grad.dtype, torch.float32))
    runs, taps = _taps(labels, height, width, superpixels, resolution, exact.dtype)
    bag = runs.bag
    if runs.bags > exact.shape[0]:  # ignored pixels read a row of zeros
        bag, exact = bag.clamp(max=exact.shape[0]), torch.nn.functional.pad(exact, (0, 0, 0, 1))
    bag = bag[:, None].expand_as(taps.cell).flatten()
    entries = transpose_bags(taps.cell.flatten(), taps.weight.flatten(), bag, labels.shape[0] * height * width)
    return torch.ops.detpipe.bag_sum(exact, *entries)


@operator("superpixel_argmax")
def _superpixel_argmax(
    rows: Tensor, labels: Tensor, height: int, width: int, superpixels: int, resolution: str
) -> Tensor:
    """``[N * H * W, C]`` -> ``[N * S, C]`` int64: a cell of its image, or for ``"labels"`` a pixel; -1 if absent."""
    exact = rows.to(torch.promote_types(rows.dtype, torch.float32))
    total = labels.shape[0] * superpixels
    if resolution == "features" or labels.shape[1:] == (height, width):
        runs, taps = _taps(labels, height, width, superpixels, resolution, exact.dtype)
        place = _argmax_of_bags(exact, *distinct_cells(runs, taps.cell, rows.shape[0]))
        each = height * width
    else:
        place = _argmax_of_pixels(exact, labels, (height, width), superpixels)
        each = labels.shape[1] * labels.shape[2]
    place = place[:total]
    return torch.where(place >= 0, place % each, -1)


def _argmax_of_pixels(rows: Tensor, labels: Tensor, size: tuple[int, int], superpixels: int) -> Tensor:
    """Which pixel of a label map of another size reads the largest value in each bag and channel."""
    y, x = read_axes(labels, size, "labels")
    runs = find_runs(labels, superpixels, x.first)
    order, offsets = sort_by_bag(runs)
    start, length = runs.start[order], runs.length[order]
    # between two columns the surface is linear along a row, so that a run is largest at one of its ends
    ends = torch.stack((start, start + length - 1), dim=1).flatten()
    cell, weight = read_cells(ends, torch.ones_like(ends), y, x, size, rows.dtype)
    candidates = torch.arange(len(ends) + 1, device=rows.device)
    place = ends.new_empty((runs.bags, rows.shape[1]))
    step = max(1, VALUES_AT_ONCE // max(1, len(ends)))
    for begin in range(0, rows.shape[1], step):
        part = rows[:, begin : begin + step].contiguous()
        values = torch.ops.detpipe.bag_sum(part, cell.flatten(), weight.flatten(), candidates * cell.shape[1])
        found = _argmax_of_bags(values, candidates[:-1], offsets * 2)
        place[:, begin : begin + step] = torch.where(found >= 0, ends[found.clamp(min=0)] if len(ends) else found, -1)
    return place


def _argmax_of_bags(rows: Tensor, index: Tensor, offsets: Tensor) -> Tensor:
    """Which of its rows is largest in each bag and channel, the first of equals: ``[B, C]`` int64, -1 in an empty bag."""
    size = offsets.diff()[:, None]
    if not index.shape[0] or not size.shape[0]:
        return size.new_full((size.shape[0], rows.shape[1]), -1)
    rows = rows.nan_to_num(torch.inf, torch.inf, -torch.inf)  # found as the largest, so that the value read is NaN
    places = torch.embedding_bag(rows, index, offsets, mode=2, include_last_offset=True)[3]  # 2 is the maximum
    return torch.where(size > 0, places, -1)


@operator("superpixel_count")
def _superpixel_count(labels: Tensor, superpixels: int) -> Tensor:
    """``[N, Hl, Wl]`` -> ``[N, S]`` int64 pixels."""
    runs, total = find_runs(labels, superpixels), labels.shape[0] * superpixels
    count = runs.length.new_zeros(runs.bags).scatter_add_(0, runs.bag, runs.length)  # exact, in whatever order
    return count[:total].view(labels.shape[0], superpixels)


@_superpixel_sum.register_fake
def _(rows, labels, height, width, superpixels, resolution):
    return rows.new_empty(
        (labels.shape[0] * superpixels, rows.shape[1]), dtype=torch.promote_types(rows.dtype, torch.float32)
    )


@_superpixel_sum_adjoint.register_fake
def _(grad, labels, height, width, superpixels, resolution):
    return grad.new_empty(
        (labels.shape[0] * height * width, grad.shape[1]), dtype=torch.promote_types(grad.dtype, torch.float32)
    )


@_superpixel_argmax.register_fake
def _(rows, labels, height, width, superpixels, resolution):
    return labels.new_empty((labels.shape[0] * superpixels, rows.shape[1]), dtype=torch.int64)


@_superpixel_count.register_fake
def _(labels, superpixels):
    return labels.new_empty((labels.shape[0], superpixels), dtype=torch.int64)


def _keep(ctx, inputs, output):
    values, labels, *ctx.settings = inputs
    ctx.dtype = values.dtype
    ctx.save_for_backward(labels)


def _sum_backward(ctx, grad):
    back = torch.ops.detpipe.superpixel_sum_adjoint(grad, *ctx.saved_tensors, *ctx.settings)
    return back.to(ctx.dtype), None, None, None, None, None


def _adjoint_backward(ctx, grad):
    back = torch.ops.detpipe.superpixel_sum(grad, *ctx.saved_tensors, *ctx.settings)
    return back.to(ctx.dtype), None, None, None, None, None


_superpixel_sum.register_autograd(_sum_backward, setup_context=_keep)
_superpixel_sum_adjoint.register_autograd(_adjoint_backward, setup_context=_keep)


def _register_vmap(registered: Operator, call: Callable[..., Tensor]) -> None:
    """Under vmap the vmapped calls are further images."""

    def folded(info, in_dims, *args):
        batch = info.batch_size
        tensors = [
            (arg.expand(batch, *arg.shape) if dim is None else arg.movedim(dim, 0)).flatten(0, 1)
            for arg, dim in zip(args, in_dims, strict=True)
            if isinstance(arg, Tensor)
        ]
        return call(*tensors, *args[len(tensors) :]).unflatten(0, (batch, -1)), 0

    registered.register_vmap(folded)


_register_vmap(_superpixel_sum, torch.ops.detpipe.superpixel_sum)
_register_vmap(_superpixel_sum_adjoint, torch.ops.detpipe.superpixel_sum_adjoint)
_register_vmap(_superpixel_argmax, torch.ops.detpipe.superpixel_argmax)
_register_vmap(_superpixel_count, torch.ops.detpipe.superpixel_count)
