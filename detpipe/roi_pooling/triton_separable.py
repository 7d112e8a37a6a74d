"""Pooling with separable weights as Triton kernels; :mod:`detpipe.roi_pooling.separable` says what they compute.

Pooling: a program owns some bins of a row of a box and a block of channels, and reads the rows of cells that they name.
Its transpose: a program owns a tile of cells and a block of channels, and reads the rows of bins that touch it
(:mod:`detpipe.roi_pooling.triton_tiles`); a bin that touches several cells of the tile is read once.
Gradient to the weights: a program owns a bin along one axis, and multiplies rows of bins with rows of cells.

Every row is C contiguous numbers, read by neighboring threads. Nothing is written twice, there are no atomics, every sum is
taken in the same order each time, and nothing waits for the device.

N images, R boxes, h x w bins, Ty and Tx cells a bin along each axis, C channels, T cells of all maps.
"""

# Triton annotates its functions as they are on the host; compiled, its loops and tensors are something else.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from detpipe.roi_pooling.triton_tiles import (
    BINS,
    COLUMNS,
    GEOMETRY,
    ROWS,
    TILE,
    accumulator,
    bins_in_reach,
    bins_of,
    cells,
    channel_block,
    launch,
    levels,
    strips,
    walk,
)

PROGRAMS = 1 << 14  # enough to fill a GPU several times: beyond, a program takes several bins
TAPS = 8  # cells along one axis that are on their way at once, at most


def separable(
    rows: Tensor,
    chosen: Tensor,
    images: int,
    sizes: Sequence[int],
    y_cell: Tensor,
    y_weight: Tensor,
    x_cell: Tensor,
    x_weight: Tensor,
) -> Tensor:
    """Pool: ``out[r, i, j] = sum of y_weight[r, i, k] * x_weight[r, j, l] * map[r][y_cell[r, i, k], x_cell[r, j, l]]``.

    Args:
        rows: ``[T, C]`` cells, float16, bfloat16, float32 or float64.
        chosen: ``[R]`` int64, the map of each box.
        images: N.
        sizes: H_0, W_0, H_1, W_1, ... of the levels.
        y_cell: ``[R, h, Ty]`` int32, -1 behind the last cell of a bin.
        y_weight: ``[R, h, Ty]``.
        x_cell: ``[R, w, Tx]`` int32.
        x_weight: ``[R, w, Tx]``.

    Returns:
        ``[R, h, w, C]`` in the dtype of ``rows``; accumulated in float32, or float64 for float64.
    """
    (boxes, h, y_most), (w, x_most), channels = y_cell.shape, x_cell.shape[1:], rows.shape[1]
    out = rows.new_empty((boxes, h, w, channels))
    if not out.numel():
        return out
    rows, chosen, y_cell, y_weight, x_cell, x_weight = _contiguous(rows, chosen, y_cell, y_weight, x_cell, x_weight)
    block, warps = channel_block(channels, 256, rows)
    blocks = triton.cdiv(channels, block)
    step = min(w, max(1, boxes * h * w * blocks // PROGRAMS))
    for level in levels(images, sizes):
        launch(
            _pool_kernel,
            (boxes * h * triton.cdiv(w, step), blocks),
            *(rows, chosen, y_cell, y_weight, x_cell, x_weight, out, *level, h, w, y_most, x_most, step, channels),
            ACC=accumulator(rows.dtype),
            TAPS=min(TAPS, triton.next_power_of_2(x_most)),
            BLOCK=block,
            num_warps=warps,
        )
    return out


def separable_adjoint(
    grad: Tensor,
    chosen: Tensor,
    images: int,
    sizes: Sequence[int],
    y_cell: Tensor,
    y_weight: Tensor,
    x_cell: Tensor,
    x_weight: Tensor,
) -> Tensor:
    """Apply the transpose of :func:`separable`, the gradient to the cells.

    Args:
        grad: ``[R, h, w, C]``.
        chosen: as in :func:`separable`, like everything that follows.
        images: N.
        sizes: of the levels.
        y_cell: ``[R, h, Ty]`` int32; a bin names a cell once at most.
        y_weight: ``[R, h, Ty]``.
        x_cell: ``[R, w, Tx]`` int32.
        x_weight: ``[R, w, Tx]``.

    Returns:
        ``[T, C]`` in the dtype of ``grad``.
    """
    boxes, h, w, channels = grad.shape
    out = grad.new_empty((cells(images, sizes), channels))
    if not grad.numel() or not out.numel():
        return out.zero_()
    exact = torch.promote_types(grad.dtype, torch.float32)
    grad, chosen, y_cell, x_cell = _contiguous(grad, chosen, y_cell, x_cell)
    y_weight, x_weight = _contiguous(y_weight.to(exact), x_weight.to(exact))
    block, warps = channel_block(channels, 128, grad, BINS)
    order, starts = walk(chosen, images * len(sizes) // 2)
    y = strips(order, y_cell, y_weight, max(sizes[::2]), ROWS)
    x = strips(order, x_cell, x_weight, max(sizes[1::2]), COLUMNS)
    for level in levels(images, sizes):
        columns = triton.cdiv(level.width, COLUMNS)
        launch(
            _adjoint_kernel,
            (triton.cdiv(level.height, ROWS) * columns, level.maps, triton.cdiv(channels, block)),
            *(grad, order, starts, *y, *x, out, *level, columns, boxes, h, w),
            *(y.weight.shape[2], x.weight.shape[2], channels),
            ACC=accumulator(grad.dtype),
            **TILE,
            BLOCK=block,
            num_warps=warps,
        )
    return out


def separable_weight_grad(
    grad: Tensor,
    rows: Tensor,
    chosen: Tensor,
    images: int,
    sizes: Sequence[int],
    y_cell: Tensor,
    x_cell: Tensor,
    other_weight: Tensor,
    axis: int,
) -> Tensor:
    """Compute the gradient of :func:`separable` to the weights along one axis.

    Args:
        grad: ``[R, h, w, C]``.
        rows: as in :func:`separable`, like everything that follows.
        chosen: ``[R]`` int64.
        images: N.
        sizes: of the levels.
        y_cell: ``[R, h, Ty]`` int32.
        x_cell: ``[R, w, Tx]`` int32.
        other_weight: the weights along the other axis.
        axis: 0 for y, 1 for x.

    Returns:
        ``[R, h, Ty]`` or ``[R, w, Tx]`` in the dtype of ``other_weight``, 0 where there is no cell.
    """
    own, other = (y_cell, x_cell) if axis == 0 else (x_cell, y_cell)
    boxes, h, w, channels = grad.shape
    out = other_weight.new_zeros(own.shape)
    if not out.numel() or not grad.numel():
        return out
    grad, rows, chosen, own, other, other_weight = _contiguous(grad, rows, chosen, own, other, other_weight)
    block, warps = channel_block(channels, 256, rows)
    bin_steps = (w, 1) if axis == 0 else (1, w)  # from a bin to the next along the own axis and along the other
    for level in levels(images, sizes):
        cell_steps = (level.width, 1) if axis == 0 else (1, level.width)
        launch(
            _weight_grad_kernel,
            (boxes * own.shape[1],),
            *(grad, rows, chosen, own, other, other_weight, out, *level, h * w, *own.shape[1:], *other.shape[1:]),
            *(*bin_steps, *cell_steps, channels),
            ACC=accumulator(torch.promote_types(rows.dtype, other_weight.dtype)),
            BLOCK=block,
            TAPS=min(TAPS, triton.next_power_of_2(other.shape[2])),
            num_warps=warps,
        )
    return out


def _contiguous(*tensors: Tensor) -> list[Tensor]:
    return [tensor.contiguous() for tensor in tensors]


@triton.jit(do_not_specialize=[*GEOMETRY, "h", "w", "y_most", "x_most", "step"])
def _pool_kernel(
    rows, chosen, y_cell, y_weight, x_cell, x_weight, out,
    first_map, maps, first_row, height, width,
    h, w, y_most, x_most, step, channels,
    ACC: tl.constexpr, TAPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: ``step`` bins of a row of bins of a box, a block of channels."""
    groups = tl.cdiv(w, step)
    line = (tl.program_id(0) // groups).to(tl.int64)  # box * h + row of bins
    begin = (tl.program_id(0) % groups) * step
    box = line // h
    image = tl.load(chosen + box) - first_map
    if (image < 0) | (image >= maps):  # of another level
        return
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    origin = rows + (first_row + image * height * width) * channels
    for j in range(begin, tl.minimum(begin + step, w)):
        total = tl.zeros([TAPS, BLOCK], ACC)
        x_at = (box * w + j) * x_most
        across = 0
        while tl.load(x_cell + x_at + across, mask=across < x_most, other=-1) >= 0:
            taps = across + tl.arange(0, TAPS)
            x = tl.load(x_cell + x_at + taps, mask=taps < x_most, other=-1)
            x_share = tl.load(x_weight + x_at + taps, mask=x >= 0, other=0.0).to(ACC)
            exists = (x >= 0)[:, None] & (c < channels)[None, :]
            down = 0
            y = tl.load(y_cell + line * y_most)
            while y >= 0:
                share = x_share * tl.load(y_weight + line * y_most + down).to(ACC)
                cell = (y * width + x).to(tl.int64) * channels
                value = tl.load(origin + cell[:, None] + c[None, :], mask=exists, other=0.0)
                total += share[:, None] * value.to(ACC)
                down += 1
                y = tl.load(y_cell + line * y_most + down, mask=down < y_most, other=-1)
            across += TAPS
        at = out + (line * w + j) * channels + c
        tl.store(at, tl.sum(total, 0).to(out.dtype.element_ty), mask=c < channels)


@triton.jit(do_not_specialize=[*GEOMETRY, "columns", "boxes", "h", "w", "y_extent", "x_extent"])
def _adjoint_kernel(
    grad, order, starts, y_first, y_count, y_weight, x_first, x_count, x_weight, out,
    first_map, maps, first_row, height, width, columns,
    boxes, h, w, y_extent, x_extent, channels,
    ACC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BOXES: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: a tile of cells of a map, a block of channels."""
    tile_y, tile_x = tl.program_id(0) // columns, tl.program_id(0) % columns
    image = tl.program_id(1)
    c = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    y_strip, x_strip = tile_y.to(tl.int64) * boxes, tile_x.to(tl.int64) * boxes
    end = tl.load(starts + first_map + image + 1)
    totals = ()  # one a cell of the tile, by nth bin and channel
    for _ in tl.static_range(ROWS * COLUMNS):
        totals = totals + (tl.zeros([BINS, BLOCK], ACC),)  # noqa: RUF005
    for begin in range(tl.load(starts + first_map + image), end, BOXES):
        until, total = bins_in_reach(y_count + y_strip, x_count + x_strip, begin, end, BOXES)
        for some in range(0, total, BINS):
            nth = some + tl.arange(0, BINS)
            position, i, j = bins_of(
                nth, total, until, begin, y_first + y_strip, x_first + x_strip, x_count + x_strip, BOXES
            )
            box = tl.load(order + position)
            exists = (nth < total)[:, None] & (c < channels)[None, :]
            at = ((box * h + i) * w + j) * channels
            value = tl.load(grad + at[:, None] + c[None, :], mask=exists, other=0.0).to(ACC)
            y_at = y_weight + (position * h + i) * y_extent + tile_y * ROWS
            x_at = x_weight + (position * w + j) * x_extent + tile_x * COLUMNS
            added = ()
            for cell in tl.static_range(ROWS * COLUMNS):
                y_share = tl.load(y_at + cell // COLUMNS, mask=nth < total, other=0.0)
                x_share = tl.load(x_at + cell % COLUMNS, mask=nth < total, other=0.0)
                added = added + (totals[cell] + (y_share * x_share)[:, None] * value,)  # noqa: RUF005
            totals = added
    first_cell = first_row + image.to(tl.int64) * height * width
    for cell in tl.static_range(ROWS * COLUMNS):
        y, x = tile_y * ROWS + cell // COLUMNS, tile_x * COLUMNS + cell % COLUMNS
        at = out + (first_cell + y * width + x) * channels + c
        exists = c < tl.where((y < height) & (x < width), channels, 0)
        tl.store(at, tl.sum(totals[cell], 0).to(out.dtype.element_ty), mask=exists)


@triton.jit(
    do_not_specialize=[
        *(*GEOMETRY, "bins", "own_bins", "own_most", "other_bins", "other_most"),
        *("own_bin_step", "other_bin_step", "own_cell_step", "other_cell_step"),
    ]
)
def _weight_grad_kernel(
    grad, rows, chosen, own_cell, other_cell, other_weight, out,
    first_map, maps, first_row, height, width,
    bins, own_bins, own_most, other_bins, other_most,
    own_bin_step, other_bin_step, own_cell_step, other_cell_step, channels,
    ACC: tl.constexpr, BLOCK: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """One program: one bin along the own axis."""
    line = tl.program_id(0).to(tl.int64)
    box = line // own_bins
    image = tl.load(chosen + box) - first_map
    if (image < 0) | (image >= maps):  # of another level
        return
    origin = rows + (first_row + image * height * width) * channels
    first_bin = grad + (box * bins + (line % own_bins) * own_bin_step) * channels
    k = 0
    own = tl.load(own_cell + line * own_most)
    while own >= 0:
        total = tl.zeros([TAPS, BLOCK], ACC)
        for begin in range(0, channels, BLOCK):
            c = begin + tl.arange(0, BLOCK)
            for j in range(other_bins):
                at = first_bin + j * other_bin_step * channels + c
                vector = tl.load(at, mask=c < channels, other=0.0).to(ACC)
                other_at = (box * other_bins + j) * other_most
                tap = 0
                while tl.load(other_cell + other_at + tap, mask=tap < other_most, other=-1) >= 0:
                    taps = tap + tl.arange(0, TAPS)
                    other = tl.load(other_cell + other_at + taps, mask=taps < other_most, other=-1)
                    share = tl.load(other_weight + other_at + taps, mask=other >= 0, other=0.0).to(ACC)
                    exists = (other >= 0)[:, None] & (c < channels)[None, :]
                    cell = (own * own_cell_step + other * other_cell_step).to(tl.int64) * channels
                    value = tl.load(origin + cell[:, None] + c[None, :], mask=exists, other=0.0)
                    total += share[:, None] * (value.to(ACC) * vector[None, :])
                    tap += TAPS
        tl.store(out + line * own_most + k, tl.sum(tl.sum(total, 1), 0).to(out.dtype.element_ty))
        k += 1
        own = tl.load(own_cell + line * own_most + k, mask=k < own_most, other=-1)
