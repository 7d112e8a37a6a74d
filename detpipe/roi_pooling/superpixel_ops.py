"""The operators under superpixel pooling: weighted sums over superpixels, their transpose, and where a maximum is.

The sum is linear in the features, and its gradient is its transpose, whose gradient is the sum again: both can be
differentiated any number of times. Labels have no gradient.

Which cells of a feature map each superpixel reads, and with what weight, has two resolutions. ``"labels"``: each label pixel reads
the features at its center by bilinear interpolation, with half-pixel centers. ``"features"``: each label pixel reads the cells that
it covers, by the share of the cell that it covers. In both, a pixel reads along each axis a first cell and the next one, with
weights that are fractions of whole numbers; so the weights of neighboring pixels of one superpixel that read the same two cells are
summed exactly, and read once.

N images, C channels, S superpixels an image, H x W cells, Hl x Wl label pixels. Features are rows, ``[N * H * W, C]``. A superpixel
of the batch is a bag, ``image * S + id``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from detpipe.roi_pooling.bags import bag_sum, transpose_bags
from detpipe.roi_pooling.operators import Operator, fold, operator

FREE_TO_LOOK = ("cpu",)  # devices on which the number of runs is known without waiting
IGNORED_AT_ONCE = 512  # ignored pixels in one bag, elsewhere: a single bag of all of them would keep one program busy


class AxisReads(NamedTuple):
    """What the pixels along one axis read."""

    first: Tensor  # [L] int64, the first cell that pixel l reads
    after: Tensor  # [L] int64, numerator of the weight of the cell after it, 0 to whole - 1
    whole: int  # sum of the numerators of both
    divisor: int  # denominator of the weights
    single: bool  # no pixel reads a second cell


class Runs(NamedTuple):
    """Pixels of one row and one superpixel that read the same columns, in row-major order."""

    bag: Tensor  # [Q] int64; N * S and above for ignored pixels, where these could not be left out
    start: Tensor  # [Q] int64, the first pixel, counted through the batch
    length: Tensor  # [Q] int64
    bags: int  # N * S, and those of ignored pixels


def read_axis(pixels: int, cells: int, resolution: str, device: torch.device) -> AxisReads:
    """Tell what each pixel along an axis reads of its cells; for ``"features"`` there must be at least as many pixels."""
    pixel = torch.arange(pixels, device=device)
    if resolution == "labels":
        divisor = whole = 2 * pixels
        position = ((2 * pixel + 1) * cells - pixels).clamp(min=0)  # of the pixel's center, in cells / divisor
        first = position // divisor
        after = torch.where(first < cells - 1, position - first * divisor, 0)
        first = first.clamp(max=cells - 1)
        return AxisReads(first, after, whole, divisor, pixels == cells or cells == 1)
    begin, divisor, whole = pixel * cells, pixels, cells
    first = begin // divisor
    after = (begin + whole - (first + 1) * divisor).clamp(min=0)
    return AxisReads(first, after, whole, divisor, pixels % cells == 0)


def split_pixels(labels: Tensor, height: int, width: int) -> Tensor:
    """Divide pixels that are larger than a cell into equal parts, so that none covers more than two cells along an axis.

    The result is ``[N, kHl, mWl]`` with the least k and m that make these at least H and W.
    """
    for dim, cells in ((1, height), (2, width)):
        pixels = labels.shape[dim]
        parts = -(-cells // max(pixels, 1))
        if parts > 1:
            labels = labels.index_select(dim, torch.arange(pixels * parts, device=labels.device) // parts)
    return labels


def find_runs(labels: Tensor, superpixels: int, first: Tensor | None = None) -> Runs:
    """Find the runs of pixels, in row-major order, and check their ids.

    On other devices than the CPU each pixel is a run, so that nothing waits for the device, and ids are checked only
    inside ``torch.autograd.detect_anomaly()``. ``first`` is the first column that each pixel of a row reads, ``[Wl]``; without
    it the pixels of a run may read any.

    Raises:
        ValueError: an id that is neither -1 nor in 0..S - 1.
    """
    total, bags = labels.numel(), labels.shape[0] * superpixels
    waits = labels.device.type not in FREE_TO_LOOK
    if waits:
        start = torch.arange(total, device=labels.device)
        length = torch.ones_like(start)
    else:
        begins = torch.ones_like(labels, dtype=torch.bool)
        torch.ne(labels[..., 1:], labels[..., :-1], out=begins[..., 1:])
        if first is not None:
            begins[..., 1:] |= first[1:] != first[:-1]
        start = begins.flatten().nonzero()[:, 0]
        length = torch.cat((start, start.new_full((1,), total))).diff()
    label = labels.flatten()[start].long()
    if not waits or torch.is_anomaly_enabled():
        _check_ids(label, start, labels.shape, superpixels)
    kept = (label >= 0) & (label < superpixels)
    bag = label + start // (labels.shape[1] * labels.shape[2]) * superpixels
    if waits:
        bag = torch.where(kept, bag, bags + start // IGNORED_AT_ONCE)
        return Runs(bag, start, length, bags + -(-total // IGNORED_AT_ONCE))
    if not kept.all():
        bag, start, length = bag[kept], start[kept], length[kept]
    return Runs(bag, start, length, bags)


def _check_ids(label: Tensor, start: Tensor, shape: torch.Size, superpixels: int) -> None:
    wrong = (label < -1) | (label >= superpixels)
    if wrong.any():
        run = int(wrong.nonzero()[0])
        line, column = divmod(int(start[run]), shape[2])
        place = [line // shape[1], line % shape[1], column]
        known = f"or an id in 0..{superpixels - 1}, " if superpixels else ""
        raise ValueError(
            f"labels{place} is {int(label[run])}: expected -1 (ignored) {known}since num_superpixels is {superpixels}"
        )


def sort_by_bag(runs: Runs) -> tuple[Tensor, Tensor]:
    """Group runs by bag, in the order in which they stand: the order ``[Q]``, and the offsets of the groups."""
    dtype = torch.int32 if runs.bags < torch.iinfo(torch.int32).max else torch.int64
    key, order = torch.sort(runs.bag.to(dtype), stable=True)
    return order, torch.searchsorted(key, torch.arange(runs.bags + 1, device=key.device).to(dtype))


class Taps(NamedTuple):
    """The cells that runs read: up to two rows times two columns, in the order of the cells."""

    cell: Tensor  # [Q, taps] int64, counted through the batch
    weight: Tensor  # [Q, taps]


def read_cells(
    start: Tensor, length: Tensor, y: AxisReads, x: AxisReads, size: tuple[int, int], dtype: torch.dtype
) -> Taps:
    """Look up what runs read, with weights of a type, where ``y`` is what the pixels of a column read, and ``x`` of a row.

    A cell with weight 0 is one that the run reads anyway, so that what it holds does not matter.
    """
    pixels_y, pixels_x = y.first.shape[0], x.first.shape[0]
    column, line = start % pixels_x, start // pixels_x
    row, image = line % pixels_y, line // pixels_y
    sums = torch.cat((x.after.new_zeros(1), x.after.cumsum(0)))
    after = sums[column + length] - sums[column]
    columns, share_x = _two(x, column, after, length * x.whole, dtype)
    rows, share_y = _two(y, row, y.after[row], torch.full_like(row, y.whole), dtype)
    cells = (image[:, None] * size[0] + rows)[:, :, None] * size[1] + columns[:, None, :]
    return Taps(cells.flatten(1), (share_y[:, :, None] * share_x[:, None, :]).flatten(1))


def _two(axis: AxisReads, pixel: Tensor, after: Tensor, whole: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """First cell and next one, with their weights: ``[Q, 2]`` each, or ``[Q, 1]`` if no pixel reads a second one."""
    first = axis.first[pixel]
    if axis.single:
        return first[:, None], whole[:, None].to(dtype) / axis.divisor
    cells = torch.stack((first, first + (after > 0)), dim=1)
    return cells, torch.stack((whole - after, after), dim=1).to(dtype) / axis.divisor


def distinct_cells(runs: Runs, cell: Tensor, cells: int) -> tuple[Tensor, Tensor]:
    """Sort the cells of each bag that its runs read, ``[Q, taps]``, and on the CPU keep each once; and the bags' offsets."""
    key = (runs.bag[:, None] * cells + cell).flatten()
    key = torch.unique(key) if key.device.type in FREE_TO_LOOK else key.sort().values
    first = torch.arange(runs.bags + 1, device=key.device) * cells
    return key % max(1, cells), torch.searchsorted(key, first)


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
    total = bag_sum(exact, index, weight, offsets * taps.cell.shape[1])
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
    return bag_sum(exact, *entries)


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
        values = bag_sum(part, cell.flatten(), weight.flatten(), candidates * cell.shape[1])
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
        return call(*fold(info, in_dims, args)).unflatten(0, (info.batch_size, -1)), 0

    registered.register_vmap(folded)


_register_vmap(_superpixel_sum, torch.ops.detpipe.superpixel_sum)
_register_vmap(_superpixel_sum_adjoint, torch.ops.detpipe.superpixel_sum_adjoint)
_register_vmap(_superpixel_argmax, torch.ops.detpipe.superpixel_argmax)
_register_vmap(_superpixel_count, torch.ops.detpipe.superpixel_count)
