"""The largest cell in a rectangle, and its gradient, as Triton kernels.

Forward: a program owns a bin and a block of channels. Backward: a program owns a tile of cells and a block of channels, and
reads the bins whose winners lie near it (:mod:`detpipe.roi_pooling.triton_tiles`); near is found from the winners
themselves, whose smallest and largest rows and columns over the channels of a bin are computed first. Nothing is written
twice, there are no atomics, every sum is taken in the same order each time, and nothing waits for the device.

N images, R boxes, h x w bins, C channels, T cells of all maps.
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

TAPS = 4  # cells of a row that are on their way at once


def range_max(
    rows: Tensor, chosen: Tensor, images: int, sizes: Sequence[int], y: Tensor, x: Tensor, want_argmax: bool
) -> tuple[Tensor, Tensor | None]:
    """Take the largest cell in each bin.

    Args:
        rows: ``[T, C]`` cells, float16, bfloat16, float32 or float64.
        chosen: ``[R]`` int64, the map of each box.
        images: N.
        sizes: H_0, W_0, H_1, W_1, ... of the levels.
        y: ``[R, h, 2]`` int32, the first row of each bin and the one behind its last; within the map.
        x: ``[R, w, 2]`` int32, the first column of each bin and the one behind its last.
        want_argmax: say which cell it was.

    Returns:
        ``[R, h, w, C]`` in the dtype of ``rows``, 0 for an empty bin, NaN where a cell is NaN; and the winning cell
        ``y * W + x`` as ``[R, h, w, C]`` int32, or None. The first of equal cells wins, row by row;
        -1 for an empty bin.
    """
    boxes, h, w, channels = chosen.shape[0], y.shape[1], x.shape[1], rows.shape[1]
    out = rows.new_empty((boxes, h, w, channels))
    winner = torch.empty_like(out, dtype=torch.int32) if want_argmax else None
    if not out.numel():
        return out, winner
    block, warps = channel_block(channels, 256, rows)
    rows, chosen, y, x = rows.contiguous(), chosen.contiguous(), y.contiguous(), x.contiguous()
    for level in levels(images, sizes):
        launch(
            _max_kernel,
            (boxes * h * w, triton.cdiv(channels, block)),
            *(rows, chosen, y, x, out, out if winner is None else winner, *level, h, w, channels),
            ACC=accumulator(rows.dtype),
            WINNER=want_argmax,
            TAPS=TAPS,
            BLOCK=block,
            num_warps=warps,
        )
    return out, winner


def scatter_argmax(grad: Tensor, argmax: Tensor, chosen: Tensor, images: int, sizes: Sequence[int]) -> Tensor:
    """Add up gradients at the cells that won, the transpose of reading them.

    Args:
        grad: ``[R, h, w, C]``.
        argmax: ``[R, h, w, C]`` int32, the cell ``y * W + x`` of the box's map, or -1.
        chosen: ``[R]`` int64, the map of each box.
        images: N.
        sizes: H_0, W_0, H_1, W_1, ... of the levels.

    Returns:
        ``[T, C]`` in the dtype of ``grad``; accumulated in float32, or float64 for float64.
    """
    boxes, h, w, channels = grad.shape
    out = grad.new_empty((cells(images, sizes), channels))
    if not grad.numel() or not out.numel():
        return out.zero_()
    grad, argmax, chosen = grad.contiguous(), argmax.contiguous(), chosen.contiguous()
    block, warps = channel_block(channels, 128, grad, BINS)
    y_cell, x_cell = _bounds(argmax, chosen, images, sizes)
    order, starts = walk(chosen, images * len(sizes) // 2)
    y = strips(order, y_cell, None, max(sizes[::2]), ROWS)
    x = strips(order, x_cell, None, max(sizes[1::2]), COLUMNS)
    for level in levels(images, sizes):
        columns = triton.cdiv(level.width, COLUMNS)
        launch(
            _scatter_kernel,
            (triton.cdiv(level.height, ROWS) * columns, level.maps, triton.cdiv(channels, block)),
            *(grad, argmax, order, starts, y.first, y.count, x.first, x.count, out, *level, columns),
            *(boxes, h, w, channels),
            ACC=accumulator(grad.dtype),
            **TILE,
            BLOCK=block,
            num_warps=warps,
        )
    return out


def _bounds(argmax: Tensor, chosen: Tensor, images: int, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Find the outermost winners of each row and column of bins: ``[R, h, 2 w]`` rows, ``[R, w, 2 h]`` columns, or -1."""
    boxes, h, w, channels = argmax.shape
    y_cell, x_cell = argmax.new_empty((boxes, h, 2 * w)), argmax.new_empty((boxes, w, 2 * h))
    block, warps = channel_block(channels, 512, argmax)
    for level in levels(images, sizes):
        operands = (argmax, chosen, y_cell, x_cell, *level, h, w, channels)
        launch(_bounds_kernel, (boxes * h * w,), *operands, BLOCK=block, num_warps=warps)
    return y_cell, x_cell


@triton.jit(do_not_specialize=[*GEOMETRY, "h", "w"])
def _max_kernel(
    rows, chosen, y_range, x_range, out, winner_out,
    first_map, maps, first_row, height, width, h, w, channels,
    ACC: tl.constexpr, WINNER: tl.constexpr, TAPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one bin, a block of channels."""
    bin = tl.program_id(0).to(tl.int64)
    box = bin // (h * w)
    image = tl.load(chosen + box) - first_map
    if (image < 0) | (image >= maps):  # of another level
        return
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    origin = rows + (first_row + image * height * width) * channels
    y_at, x_at = y_range + (bin // w) * 2, x_range + (box * w + bin % w) * 2
    x_begin, x_end = tl.load(x_at), tl.load(x_at + 1)
    best = tl.full([BLOCK], float("-inf"), ACC)
    winner = tl.full([BLOCK], -1, tl.int32)
    for y in range(tl.load(y_at), tl.load(y_at + 1)):
        for begin in range(x_begin, x_end, TAPS):
            for tap in tl.static_range(TAPS):
                cell = y * width + begin + tap
                exists = c < tl.where(begin + tap < x_end, channels, 0)
                at = origin + cell.to(tl.int64) * channels + c
                value = tl.load(at, mask=exists, other=float("-inf")).to(ACC)
                # a NaN beats all but a NaN; the first cell wins even if it is -inf
                wins = exists & ((value > best) | ((value != value) & (best == best)) | (winner < 0))
                best = tl.where(wins, value, best)
                winner = tl.where(wins, cell, winner)
    at = bin * channels + c
    tl.store(out + at, tl.where(winner < 0, 0.0, best).to(out.dtype.element_ty), mask=c < channels)
    if WINNER:
        tl.store(winner_out + at, winner, mask=c < channels)


@triton.jit(do_not_specialize=[*GEOMETRY, "h", "w"])
def _bounds_kernel(
    argmax, chosen, y_cell, x_cell,
    first_map, maps, first_row, height, width, h, w, channels,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one bin."""
    bin = tl.program_id(0).to(tl.int64)
    box, i, j = bin // (h * w), bin // w % h, bin % w
    image = tl.load(chosen + box) - first_map
    if (image < 0) | (image >= maps):  # of another level
        return
    none = 1 << 30
    top = tl.full([BLOCK], none, tl.int32)
    left = tl.full([BLOCK], none, tl.int32)
    bottom = tl.full([BLOCK], -1, tl.int32)
    right = tl.full([BLOCK], -1, tl.int32)
    for begin in range(0, channels, BLOCK):
        c = begin + tl.arange(0, BLOCK)
        cell = tl.load(argmax + bin * channels + c, mask=c < channels, other=-1)
        y = cell // width
        x = cell - y * width
        top, bottom = tl.where(cell >= 0, tl.minimum(top, y), top), tl.where(cell >= 0, tl.maximum(bottom, y), bottom)
        left, right = tl.where(cell >= 0, tl.minimum(left, x), left), tl.where(cell >= 0, tl.maximum(right, x), right)
    y_at = y_cell + ((box * h + i) * w + j) * 2
    x_at = x_cell + ((box * w + j) * h + i) * 2
    last_y, last_x = tl.max(bottom, 0), tl.max(right, 0)
    tl.store(y_at, tl.minimum(tl.min(top, 0), last_y))  # -1 where there is none
    tl.store(y_at + 1, last_y)
    tl.store(x_at, tl.minimum(tl.min(left, 0), last_x))
    tl.store(x_at + 1, last_x)


@triton.jit(do_not_specialize=[*GEOMETRY, "columns", "boxes", "h", "w"])
def _scatter_kernel(
    grad, argmax, order, starts, y_first, y_count, x_first, x_count, out,
    first_map, maps, first_row, height, width, columns, boxes, h, w, channels,
    ACC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BOXES: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: a tile of cells of a map, a block of channels."""
    tile_y, tile_x = tl.program_id(0) // columns, tl.program_id(0) % columns
    image = tl.program_id(1)
    c = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    y_strip, x_strip = tile_y.to(tl.int64) * boxes, tile_x.to(tl.int64) * boxes
    corner = tile_y * ROWS * width + tile_x * COLUMNS
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
            at = (((box * h + i) * w + j) * channels)[:, None] + c[None, :]
            winner = tl.load(argmax + at, mask=exists, other=-1) - corner
            value = tl.load(grad + at, mask=exists, other=0.0).to(ACC)
            added = ()
            for cell in tl.static_range(ROWS * COLUMNS):
                won = winner == cell // COLUMNS * width + cell % COLUMNS
                added = added + (totals[cell] + tl.where(won, value, 0.0),)  # noqa: RUF005
            totals = added
    first_cell = first_row + image.to(tl.int64) * height * width
    for cell in tl.static_range(ROWS * COLUMNS):
        y, x = tile_y * ROWS + cell // COLUMNS, tile_x * COLUMNS + cell % COLUMNS
        at = out + (first_cell + y * width + x) * channels + c
        exists = c < tl.where((y < height) & (x < width), channels, 0)
        tl.store(at, tl.sum(totals[cell], 0).to(out.dtype.element_ty), mask=exists)
